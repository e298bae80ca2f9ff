"""Train the base: captioned emoji → a UNet that draws them.

    python -m examples.emoji base --work runs/emoji --steps 60000

It goes on where it was: the same command again, with more ``--steps`` if wanted. Every random
number is a function of the seed and the step, so a run that was stopped gives the weights of one
that was not. ``WORK/training/`` holds ``state.pt`` (weights, their moving average, optimizer),
``log.jsonl`` (one line per report) and ``step-*.png``: the same captions and noise each time.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from examples.emoji import captions, data, pipeline, sheets
from lorakit.core.files import atomic_file

#: in the work folder: what a training goes on from
STATE = Path("training", "state.pt")
#: weights that came with the project, half precision; used where nothing was trained
SHIPPED = Path(__file__).parent / "unet.safetensors"


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on."""

    seed: int = 0
    batch_size: int = 32
    lr: float = 1e-3
    warmup: int = 300
    """Steps until the rate is reached."""
    cooldown: int = 4000
    """Steps at the end over which it falls to nothing."""
    beta2: float = 0.99
    clip: float = 1.0
    """Largest norm of the gradient."""
    caption_dropout: float = 0.1
    """Share of examples that are drawn without a caption, for guidance."""
    min_snr: float = 5.0
    """γ of arXiv 2303.09556."""
    ema: float = 0.999
    """How much of the moving average stays at a step."""
    begins_with: str = ""
    """SHA-256 of the weights that it begins with; untrained without."""
    learns: str = ""
    """SHA-256 of pictures and captions."""

    def rate(self, step: int, steps: int) -> float:
        """Of the step with this number, from 0."""
        up = min(1.0, (step + 1) / self.warmup)
        down = min(1.0, (steps - step) / self.cooldown) if self.cooldown else 1.0
        return self.lr * min(up, down)


class Examples:
    """Pictures with the hidden states of their captions, and batches of them."""

    def __init__(self, drawn: Any, embedded: Tensor, empty: Tensor, recipe: Recipe) -> None:
        self.pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()  # uint8
        self._embedded, self._empty, self._recipe = embedded, empty, recipe
        self._kept = pipeline.new_scheduler().alphas_cumprod  # ᾱ, [T]

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Noised pictures, times, captions, targets and weights of one step."""
        recipe = self._recipe
        rows = self._rows(step)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        dropped = torch.rand(len(rows), generator=generator) < recipe.caption_dropout
        told = self._embedded[rows].float()
        told[dropped] = self._empty
        # one time in each of B equal parts: every batch sees all strengths of noise
        places = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows)
        places = places[torch.randperm(len(rows), generator=generator)]
        return (*self._noised(rows, places, generator), told)

    def fixed(self) -> Iterator[tuple[Tensor, ...]]:
        """All pictures, each at a time and with noise of its own that are always the same."""
        generator = torch.Generator().manual_seed(0)
        places = (torch.arange(len(self.pixels)) * 0.618034) % 1.0
        for rows in torch.arange(len(self.pixels)).split(64):
            noised = self._noised(rows, places[rows], generator)
            yield (*noised, self._embedded[rows].float())

    def _noised(
        self, rows: Tensor, places: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        clean = self.pixels[rows].float() / 127.5 - 1
        times = (places * len(self._kept)).long()
        kept = self._kept[times]
        signal, rest = kept.sqrt().view(-1, 1, 1, 1), (1 - kept).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator)
        snr = kept / (1 - kept).clamp_min(1e-12)
        weights = snr.clamp_max(self._recipe.min_snr) / (snr + 1)
        return signal * clean + rest * noise, times, signal * noise - rest * clean, weights

    def _rows(self, step: int) -> Tensor:
        """Each epoch sees every picture once, in an order of its own."""
        size, number = self._recipe.batch_size, len(self.pixels)
        wanted = torch.arange(step * size, (step + 1) * size)
        orders = {
            int(epoch): torch.randperm(
                number, generator=torch.Generator().manual_seed(self._recipe.seed + 7919 * epoch)
            )
            for epoch in torch.unique(wanted // number).tolist()
        }
        return torch.stack([orders[int(i) // number][int(i) % number] for i in wanted])


class Training:
    """Weights, their moving average and the optimizer: what goes on from step to step."""

    def __init__(self, recipe: Recipe, device: str, unet: Any = None) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.unet = (unet or pipeline.new_unet()).to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=0.01
        )
        self.step = 0

    def update(self, batch: tuple[Tensor, ...], rate: float) -> float:
        """One step; its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(self.unet, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        keep = min(self.recipe.ema, self.step / (self.step + 9))
        ours, theirs = list(self.average.parameters()), list(self.unet.parameters())
        torch._foreach_lerp_(ours, [p.detach() for p in theirs], 1 - keep)
        return float(loss.detach())

    @torch.no_grad()
    def held_out(self, examples: Examples) -> float:
        """Loss of the moving average on pictures that are not trained on."""
        losses = [
            (float(self._loss(self.average, batch)), len(batch[0])) for batch in examples.fixed()
        ]
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def _loss(self, unet: Any, batch: tuple[Tensor, ...]) -> Tensor:
        noised, times, target, weights, told = (
            part.to(self.device, non_blocking=True) for part in batch
        )
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            found = unet(noised, times, told, return_dict=False)[0]
        errors = (found.float() - target).square().mean(dim=(1, 2, 3))
        return (weights * errors).mean()

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "recipe": asdict(self.recipe),
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            torch.save(self.state(), file)

    def load(self, path: Path) -> None:
        """Raises:
        ValueError: it was trained by another recipe, or with other pictures.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        was = {**asdict(Recipe()), **state["recipe"]}  # which knew fewer settings before
        differ = {k: v for k, v in was.items() if getattr(self.recipe, k) != v}
        if differ:
            raise ValueError(f"{path} was trained with {differ}; give the same, or another --work")
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def run(options: argparse.Namespace) -> None:
    """The command."""
    if options.threads:
        torch.set_num_threads(options.threads)
    work = Path(options.work)
    out = work / "training"
    out.mkdir(parents=True, exist_ok=True)
    pictures = data.Pictures.read(work / "data")
    recipe, unet = _recipe(options, pictures)
    encoder, tokenizer = pipeline.text_encoder()
    examples, held_out = _examples(pictures, encoder, tokenizer, recipe, work)
    training = Training(recipe, options.device, unet)
    if (work / STATE).exists():
        training.load(work / STATE)
        print(f"goes on at step {training.step}", flush=True)
    told = {**asdict(recipe), "steps": options.steps, "torch": torch.__version__}
    (out / "recipe.json").write_text(json.dumps(told, indent=1))
    _loop(training, examples, held_out, options, work, lambda: _sheet(training, encoder, tokenizer))
    export(options)


def _recipe(options: argparse.Namespace, pictures: data.Pictures) -> tuple[Recipe, Any]:
    """The recipe, and the UNet that it begins with; ``None`` for an untrained one."""
    drawn, told = pictures.for_base()
    learns = hashlib.sha256(drawn.tobytes() + "\n".join(told).encode()).hexdigest()
    unet, begins_with = None, ""
    if options.begin_with:
        weights = Path(options.begin_with).read_bytes()
        begins_with = hashlib.sha256(weights).hexdigest()
        unet = pipeline.new_unet()
        unet.load_state_dict(safetensors.torch.load(weights))
    recipe = Recipe(
        seed=options.seed,
        batch_size=options.batch_size,
        lr=options.lr,
        begins_with=begins_with,
        learns=learns,
    )
    return recipe, unet


def export(options: argparse.Namespace) -> None:
    """The pipeline of what was trained so far, or of the weights that came with the project."""
    work = Path(options.work)
    unet = pipeline.new_unet()
    unet.load_state_dict(weights_of(work))
    pipeline.assemble(unet.half(), *pipeline.text_encoder()).save_pretrained(work / "base")
    print(f"the pipeline is {work / 'base'}", flush=True)


def weights_of(work: Path) -> dict[str, Tensor]:
    """The moving average of a training; without one, the weights that came with the project.

    Raises:
        FileNotFoundError: there is neither.
    """
    if (work / STATE).exists():
        return _stored(work)["average"]
    if SHIPPED.exists():
        return safetensors.torch.load_file(SHIPPED)
    raise FileNotFoundError(
        f"{work / STATE} is not there: train with `python -m examples.emoji base`"
    )


def _stored(work: Path) -> dict[str, Any]:
    return torch.load(work / STATE, map_location="cpu", weights_only=True)


def _loop(
    training: Training,
    examples: Examples,
    held_out: Examples,
    options: argparse.Namespace,
    work: Path,
    sheet: Callable[[], Any],
) -> None:
    out = work / "training"
    started, cpu = time.monotonic(), time.process_time()
    saved, losses = started, []
    while training.step < options.steps:
        rate = training.recipe.rate(training.step, options.steps)
        losses.append(training.update(examples.batch(training.step), rate))
        last = training.step == options.steps
        if training.step % options.report == 0 or last:
            row = {
                "step": training.step,
                "loss": sum(losses) / len(losses),
                "held_out": training.held_out(held_out),
                "lr": rate,
                "seconds": round(time.monotonic() - started, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "images": len(losses) * training.recipe.batch_size,
                "time": time.strftime("%H:%M:%S"),
            }
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
            losses, started, cpu = [], time.monotonic(), time.process_time()
        if time.monotonic() - saved > 60 * options.save_minutes or last:
            training.save(work / STATE)
            saved = time.monotonic()
        if training.step % options.sheet == 0 or last:
            sheet().save(out / f"step-{training.step:06d}.png")


def _examples(
    pictures: data.Pictures, encoder: Any, tokenizer: Any, recipe: Recipe, work: Path
) -> tuple[Examples, Examples]:
    """What is trained on, and what is held out."""
    drawn, told = pictures.for_base()
    rest = captions.of_part(pictures.emoji, "new")
    embedded = _embedded([*told, *(one.caption for one in rest), ""], encoder, tokenizer, work)
    unseen = torch.stack([torch.from_numpy(pictures.of("noto", one)) for one in rest]).numpy()
    empty = embedded[-1].float()
    return (
        Examples(drawn, embedded[: len(told)], empty, recipe),
        Examples(unseen, embedded[len(told) : -1], empty, recipe),
    )


def _embedded(told: list[str], encoder: Any, tokenizer: Any, work: Path) -> Tensor:
    """Hidden states of the captions, half precision; kept for the next start."""
    path = work / "captions.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["captions"] == told:
            return kept["embedded"]
    embedded = pipeline.embed(told, encoder, tokenizer).half()
    with atomic_file(path) as file:
        torch.save({"captions": told, "embedded": embedded}, file)
    return embedded


#: of the sheet: some that are trained on in both styles, and, behind them, some that are held out
SHOWN = (
    *("red apple", "grinning face", "dog face", "airplane", "christmas tree", "red heart"),
    *("red apple, flat", "grinning face, flat", "dog face, flat", "airplane, flat"),
    *("christmas tree, flat", "red heart, flat"),
    *("house", "ambulance", "strawberry", "octopus", "soccer ball", "crown"),
    *("bear", "top hat", "cherries", "cold face", "trophy", "star"),
)


def _sheet(training: Training, encoder: Any, tokenizer: Any) -> Any:
    made = pipeline.assemble(training.average, encoder, tokenizer)
    made.to(training.device)
    return sheets.grid(sheets.draw(made, SHOWN), columns=6, titles=SHOWN)


def curve(options: argparse.Namespace) -> None:
    """``training/curve.png``: the loss over the pictures seen, of every report."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    out = Path(options.work) / "training"
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    size = json.loads((out / "recipe.json").read_text())["batch_size"]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    seen = [row["step"] * size / 1e6 for row in rows]
    axes.plot(seen, [row["loss"] for row in rows], label="pictures that are trained on")
    axes.plot(seen, [row["held_out"] for row in rows], label="held out, moving average of weights")
    axes.set(xlabel="million pictures seen", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(out / "curve.png", dpi=120)
    pyplot.close(figure)
