"""Two small judges of pictures, trained on real ones: which set drew it, and which emoji it is.

The **style classifier** names the set that a picture is from. The **features** of a picture are
near those of the same emoji in other sets, and far from other emoji: they say what is drawn,
however it is drawn. Both learn from the emoji of ``base`` and ``style``, the classifier in the five
sets that pictures are judged by and the features in all ten, and are tested on the emoji of
``known`` and ``new``, which they have never seen.

    python -m examples.emoji judges --work runs/emoji      # a quarter of an hour on one core
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.emoji import captions, data
from lorakit.core.files import atomic_file

FEATURES = 128
VIEWS = 3
"""Sets in which a step sees each of its emoji."""
_TEMPERATURE = 0.07


def network(out: int, width: int) -> nn.Module:
    """A small convolutional network, [B, 3, 32, 32] in [-1, 1] → [B, out]."""

    def block(into: int, of: int) -> list[nn.Module]:
        return [
            *(nn.Conv2d(into, of, 3, padding=1), nn.GroupNorm(8, of), nn.SiLU()),
            *(nn.Conv2d(of, of, 3, stride=2, padding=1), nn.GroupNorm(8, of), nn.SiLU()),
        ]

    return nn.Sequential(
        *block(3, width),
        *block(width, 2 * width),
        *block(2 * width, 4 * width),
        nn.Flatten(),
        nn.Linear(4 * width * 16, out),
    )


class Residual(nn.Module):
    """Two convolutions and a way around them, [B, into, S, S] → [B, of, S / stride, S / stride]."""

    def __init__(self, into: int, of: int, stride: int = 1) -> None:
        super().__init__()
        self.change = nn.Sequential(
            *(nn.GroupNorm(8, into), nn.SiLU(), nn.Conv2d(into, of, 3, stride, padding=1)),
            *(nn.GroupNorm(8, of), nn.SiLU(), nn.Conv2d(of, of, 3, padding=1)),
        )
        self.around = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(into, of, 1))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.around(x) + self.change(x)
        return changed


def residual_network(out: int, width: int) -> nn.Module:
    """A deeper one that costs no more, as it begins at half the size; [B, 3, 32, 32] → [B, out]."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, stride=2, padding=1),
        *(Residual(width, width), Residual(width, 2 * width, stride=2)),
        *(Residual(2 * width, 2 * width), Residual(2 * width, 4 * width, stride=2)),
        *(Residual(4 * width, 4 * width), nn.GroupNorm(8, 4 * width), nn.SiLU()),
        nn.Flatten(),
        nn.Linear(4 * width * 16, out),
    )


def as_input(pictures: np.ndarray) -> Tensor:
    """[N, 32, 32, 3] uint8 → [N, 3, 32, 32] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


def disturbed(pictures: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Pictures moved by up to two pixels, a little blurred or noisy, each in its own way.

    A drawn picture is never as clean as a rendered one; a judge may not hold on to that.

    Args:
        strength: of blur and noise.
    """
    number = len(pictures)
    moved = F.pad(pictures, (2, 2, 2, 2), value=1.0)  # white
    left, top = torch.randint(0, 5, (2, number), generator=generator)
    pictures = torch.stack(
        [
            moved[i, :, int(t) : int(t) + 32, int(x) : int(x) + 32]
            for i, (x, t) in enumerate(zip(left, top, strict=True))
        ]
    )
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    much = 0.6 * strength * torch.rand(number, 1, 1, 1, generator=generator).square()
    pictures = torch.lerp(pictures, blurred, much)
    noise = torch.randn(pictures.shape, generator=generator)
    level = 0.15 * strength * torch.rand(number, 1, 1, 1, generator=generator).square()
    return (pictures + level * noise).clamp(-1, 1)


def redrawn(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, 32, 32] as other hands might draw them, and `disturbed`.

    They are turned, scaled, bent, given other colours, greyed or outlined: what is drawn stays.
    """
    number = len(pictures)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(number, 1, 1, 1, generator=generator)

    def sometimes(chance: float, changed: Tensor) -> Tensor:
        return torch.where(between(0, 1) < chance, changed, pictures)

    pictures = _bent(pictures, generator)
    light = pictures.mean(1, keepdim=True)
    edges = F.max_pool2d(light, 3, 1, padding=1) + F.max_pool2d(-light, 3, 1, padding=1)  # 0 to 2
    lines = 1 - 2 * (edges * between(0.6, 2)).clamp(max=1)  # dark where the light changes
    pictures = sometimes(0.1, torch.minimum(pictures, lines))
    pictures = sometimes(0.05, lines.expand_as(pictures))

    mix = torch.randn(number, 3, 3, generator=generator) * between(0, 0.6)[:, 0]
    mixed = pictures + torch.einsum("nij, njhw -> nihw", mix, pictures - 1)  # white stays
    pictures = sometimes(0.25, mixed).clamp(-1, 1)
    pictures = sometimes(0.15, pictures.mean(1, keepdim=True).expand_as(pictures))
    darker = 2 * (pictures / 2 + 0.501) ** between(0.5, 1.6) - 1  # or lighter
    return disturbed(sometimes(0.25, darker), generator, strength=1.5)


def _bent(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures turned by up to 6°, scaled by up to a tenth each way, and bent by about a pixel."""
    number = len(pictures)

    def around(middle: float, by: float) -> Tensor:
        return middle + by * (2 * torch.rand(number, generator=generator) - 1)

    turn, across, down = around(0, 0.11), around(1, 0.1), around(1, 0.1)
    rows = [turn.cos() * across, -turn.sin() * across, turn.sin() * down, turn.cos() * down]
    affine = F.pad(torch.stack(rows, 1).view(number, 2, 2), (0, 1))  # moved is what is `disturbed`
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    bend = 0.03 * torch.randn(number, 2, 4, 4, generator=generator)
    bend = F.interpolate(bend, 32, mode="bilinear", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    return 1 + F.grid_sample(pictures - 1, grid, align_corners=False)  # white around them


@dataclass
class Judges:
    """Both, and what they found on real pictures."""

    sets: tuple[str, ...]
    style: nn.Module
    features: nn.Module

    @torch.no_grad()
    def styles_of(self, pictures: np.ndarray) -> list[str]:
        """The set that each picture [N, 32, 32, 3] looks to be from."""
        found = self.style(as_input(pictures)).argmax(1)
        return [self.sets[int(i)] for i in found]

    @torch.no_grad()
    def features_of(self, pictures: np.ndarray) -> Tensor:
        """[N, FEATURES], of length 1."""
        return F.normalize(self.features(as_input(pictures)), dim=1)

    def share(self, pictures: np.ndarray, style: str) -> float:
        """Of the pictures that are given to a style."""
        found = self.styles_of(pictures)
        return found.count(style) / len(found)

    def save(self, path: Path) -> None:
        state = {"sets": list(self.sets), "style": self.style.state_dict()}
        state["features"] = self.features.state_dict()
        with atomic_file(path) as file:
            torch.save(state, file)

    @classmethod
    def load(cls, path: Path) -> Judges:
        state = torch.load(path, weights_only=True)
        made = cls.new(tuple(state["sets"]))
        made.style.load_state_dict(state["style"])
        made.features.load_state_dict(state["features"])
        return made

    @classmethod
    def new(cls, sets: tuple[str, ...]) -> Judges:
        """Untrained."""
        return cls(sets, network(len(sets), 16).eval(), residual_network(FEATURES, 24).eval())


#: how many candidates may be the nearest for a picture to count
AMONG = {"first": 1, "first five": 5}


class Nearest:
    """Candidates that a picture may show, each the mean of its real pictures' features.

    Args:
        without: a set that the candidates do not see, to ask after its own real pictures.
    """

    def __init__(
        self,
        judges: Judges,
        pictures: data.Pictures,
        emoji: Sequence[captions.Emoji],
        without: str | None = None,
    ) -> None:
        sets = [name for name in judges.sets if name != without]
        means = [
            judges.features_of(np.stack([pictures.of(name, one) for one in emoji])) for name in sets
        ]
        self._judges = judges
        self._candidates = F.normalize(torch.stack(means).mean(0), dim=1)  # [N, FEATURES]

    def right(self, drawn: np.ndarray, own: Sequence[int] | None = None) -> dict[str, float]:
        """Share of pictures whose own candidate is the nearest, and among the five nearest.

        Args:
            own: the candidate that each picture [N, 32, 32, 3] should be of; ``None``: the same
                order.
        """
        return shares(self.places(drawn, own))

    def places(self, drawn: np.ndarray, own: Sequence[int] | None = None) -> np.ndarray:
        """How many candidates are nearer than a picture's own, int64 [N]; as :meth:`right`."""
        near = self._judges.features_of(drawn) @ self._candidates.T  # [N, candidates]
        wanted = torch.arange(len(near)) if own is None else torch.tensor(own)
        found: np.ndarray = (near > near.gather(1, wanted[:, None])).sum(1).numpy()
        return found


def shares(places: np.ndarray) -> dict[str, float]:
    """The share of :meth:`Nearest.places` that are the first, and among the first five."""
    return {name: float((places < count).mean()) for name, count in AMONG.items()}


# --- training ------------------------------------------------------------------------------------


def train(
    pictures: data.Pictures,
    *,
    steps: tuple[int, int] = (800, 2800),
    batch_size: int = 96,
    seed: int = 0,
) -> Judges:
    """Both judges, trained on the emoji of ``base`` and ``style`` that every judged set has.

    Args:
        steps: of the classifier and of the features.
        batch_size: of the classifier, pictures of a step.
    """
    torch.manual_seed(seed)
    emoji = captions.of_part(pictures.emoji, "base", "style")
    made = Judges.new(data.JUDGED)
    real, _ = _seen(pictures, emoji, data.JUDGED, len(data.JUDGED))
    _train(made.style, steps[0], seed, lambda g: _style_loss(made.style, real, batch_size, g))
    train_features(made.features, pictures, emoji, steps=steps[1], seed=seed + 1)
    return made


def train_features(
    model: nn.Module,
    pictures: data.Pictures,
    emoji: Sequence[captions.Emoji],
    *,
    steps: int,
    seed: int,
    batch_size: int = 64,
) -> None:
    """Features that are near for the same emoji, learnt in all sets that somebody drew.

    Args:
        emoji: of which those are used that ``VIEWS`` sets have.
        batch_size: emoji of a step, each in ``VIEWS`` sets.
    """
    real, has = _seen(pictures, emoji, pictures.by_hand, VIEWS)
    _train(model, steps, seed, lambda g: _feature_loss(model, real, has, batch_size, g))


def _seen(
    pictures: data.Pictures, emoji: Sequence[captions.Emoji], sets: Sequence[str], least: int
) -> tuple[Tensor, Tensor]:
    """Pictures [sets, emoji, 3, 32, 32] of those that so many sets have, and who has them."""
    has = torch.tensor([[pictures.has(name, one) for one in emoji] for name in sets])
    kept = [i for i, number in enumerate(has.sum(0).tolist()) if number >= least]
    real = np.zeros((len(sets), len(kept), data.SIZE, data.SIZE, 3), np.uint8)
    for row, name in enumerate(sets):
        for column, i in enumerate(kept):
            if has[row, i]:
                real[row, column] = pictures.of(name, emoji[i])
    return as_input(real.reshape(-1, *real.shape[2:])).unflatten(0, real.shape[:2]), has[:, kept]


def _train(
    model: nn.Module, steps: int, seed: int, loss_of: Callable[[torch.Generator], Tensor]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        loss = loss_of(generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
    model.eval()


def _style_loss(model: nn.Module, real: Tensor, size: int, generator: torch.Generator) -> Tensor:
    sets, number = real.shape[:2]
    which = torch.randint(0, sets, (size,), generator=generator)
    of = torch.randint(0, number, (size,), generator=generator)
    return F.cross_entropy(model(disturbed(real[which, of], generator)), which)


def _feature_loss(
    model: nn.Module, real: Tensor, has: Tensor, size: int, generator: torch.Generator
) -> Tensor:
    """Each emoji in some sets, every two of them against all other emoji of the step.

    InfoNCE (van den Oord et al., arXiv 1807.03748), as supervised contrast (Khosla et al., arXiv
    2004.11362), but a pair does not compete with other pictures of its emoji.
    """
    of = torch.randperm(real.shape[1], generator=generator)[:size]
    sets = torch.multinomial(has[:, of].T.float(), VIEWS, generator=generator)  # [size, VIEWS]
    seen = redrawn(real[sets, of[:, None]].flatten(0, 1), generator)
    found = F.normalize(model(seen), dim=1)
    near = found @ found.T / _TEMPERATURE
    own = torch.arange(len(of)).repeat_interleave(VIEWS)
    same = own[:, None] == own
    others = near.masked_fill(same, float("-inf")).logsumexp(1, keepdim=True)
    return F.softplus(others - near)[same & ~torch.eye(len(near), dtype=torch.bool)].mean()


# --- what they are worth -------------------------------------------------------------------------


def worth(judges: Judges, pictures: data.Pictures) -> dict[str, Any]:
    """Both on the real pictures of emoji that they never saw."""
    emoji = captions.of_part(pictures.emoji, "known", "new")
    styles, shown = {}, {}
    for name in judges.sets:
        real = np.stack([pictures.of(name, one) for one in emoji])
        styles[name] = judges.share(real, name)
        shown[name] = Nearest(judges, pictures, emoji, without=name).right(real)
    accuracy = sum(styles.values()) / len(styles)
    return {"emoji": len(emoji), "style accuracy": accuracy, "style": styles, "caption": shown}


def run(options: Any) -> None:
    """The command."""
    if options.threads:
        torch.set_num_threads(options.threads)
    work = Path(options.work)
    pictures = data.Pictures.read(work / "data")
    judges = train(pictures)
    judges.save(work / "judges.pt")
    found = worth(judges, pictures)
    (work / "judges.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
