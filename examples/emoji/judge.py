"""Two small judges of pictures, trained on real ones: which set drew it, and which emoji it is.

The **style classifier** names the set that a picture is from. The **features** of a picture are
near those of the same emoji in other sets, and far from other emoji: they say what is drawn,
however it is drawn. Both learn from the emoji of ``base`` and ``style`` in all sets and are tested
on the emoji of ``known`` and ``new``, which they have never seen.

    python -m examples.emoji judges --work runs/emoji      # a few minutes on two cores
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
_TEMPERATURE = 0.1


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


def as_input(pictures: np.ndarray) -> Tensor:
    """[N, 32, 32, 3] uint8 → [N, 3, 32, 32] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


def disturbed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures moved by up to two pixels, a little blurred or noisy, each in its own way.

    A drawn picture is never as clean as a rendered one; a judge may not hold on to that.
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
    much = 0.6 * torch.rand(number, 1, 1, 1, generator=generator).square()
    pictures = torch.lerp(pictures, blurred, much)
    noise = torch.randn(pictures.shape, generator=generator)
    level = 0.15 * torch.rand(number, 1, 1, 1, generator=generator).square()
    return (pictures + level * noise).clamp(-1, 1)


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
        return cls(sets, network(len(sets), 16).eval(), network(FEATURES, 24).eval())


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
        near = self._judges.features_of(drawn) @ self._candidates.T  # [N, candidates]
        wanted = torch.arange(len(near)) if own is None else torch.tensor(own)
        places = (near > near.gather(1, wanted[:, None])).sum(1)  # how many are nearer
        return {
            "first": float((places < 1).float().mean()),
            "first five": float((places < 5).float().mean()),
        }


# --- training ------------------------------------------------------------------------------------


def train(
    pictures: data.Pictures,
    *,
    steps: tuple[int, int] = (800, 1500),
    batch_size: int = 96,
    seed: int = 0,
) -> Judges:
    """Both judges, trained on the emoji of ``base`` and ``style`` that every judged set has.

    Args:
        steps: of the classifier and of the features.
        batch_size: pictures of a step, and pairs.
    """
    torch.manual_seed(seed)
    emoji = [
        one
        for one in captions.of_part(pictures.emoji, "base", "style")
        if all(pictures.has(name, one) for name in data.JUDGED)
    ]
    real = torch.stack(  # [sets, emoji, 3, 32, 32]
        [as_input(np.stack([pictures.of(name, one) for one in emoji])) for name in data.JUDGED]
    )
    made = Judges.new(data.JUDGED)
    _train(made.style, steps[0], seed, lambda g: _style_loss(made.style, real, batch_size, g))
    _train(
        made.features,
        steps[1],
        seed + 1,
        lambda g: _feature_loss(made.features, real, batch_size, g),
    )
    return made


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


def _feature_loss(model: nn.Module, real: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """InfoNCE (van den Oord et al., arXiv 1807.03748): each emoji in two sets, both ways."""
    sets, number = real.shape[:2]
    of = torch.randperm(number, generator=generator)[:size]
    one = torch.randint(0, sets, (len(of),), generator=generator)
    other = (one + torch.randint(1, sets, (len(of),), generator=generator)) % sets
    both = disturbed(torch.cat([real[one, of], real[other, of]]), generator)
    found = F.normalize(model(both), dim=1)
    near = found[: len(of)] @ found[len(of) :].T / _TEMPERATURE
    wanted = torch.arange(len(of))
    return (F.cross_entropy(near, wanted) + F.cross_entropy(near.T, wanted)) / 2


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
