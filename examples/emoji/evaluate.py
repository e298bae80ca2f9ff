"""What a style adapter did: to the style of held-out captions, and to what they show.

For each style, the same captions and noise are drawn by the base and by its adapter. The style
classifier says which share looks like the style; that number stands beside what the classifier says
of the style's real pictures, of the real pictures that the base learnt from, and of the base's own.
*Way* is how far the adapter went from the base's share to the real one. *Shown* is the share of
pictures whose nearest real emoji is the one that the caption names. An adapter draws in two
manners: as diffusers would with it, and *late*, where the base makes the first steps, and the
adapter acts on the rest, against its opposite (`--adapter-start`, `--against`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.emoji import captions, data, sheets
from examples.emoji.judge import AMONG, Judges, Nearest, shares

#: mix of adapters, captions, further fields of their cells → pictures [N, 32, 32, 3] uint8
Draw = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Manner:
    """How an adapter draws."""

    weight: float = 1.0
    against: float = 1.0
    """What the weight is multiplied by where guidance pushes away."""
    start: float = 0.0
    """Share of the steps that the base makes before."""

    def fields(self) -> dict[str, float]:
        """Of a cell, beside its mix."""
        return {"against": self.against, "start": self.start}


#: manner → style → how; the second was chosen on the captions of ``known`` with other noise
MANNERS = {
    "usual": dict.fromkeys(data.STYLES, Manner()),
    "late": {
        "twemoji": Manner(0.7, -1.0, 0.5),
        "openmoji": Manner(0.7, -1.0, 0.5),
        "high-contrast": Manner(0.6, -4.0, 0.45),
    },
}
PARTS: tuple[captions.Part, ...] = ("known", "new")
WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def judged(
    judges: Judges,
    pictures: data.Pictures,
    draw: Draw,
    *,
    each: int = 1,
    manners: Sequence[str] = tuple(MANNERS),
) -> dict[str, Any]:
    """Style → part of the test → what is real, and what base and adapter make of it.

    Args:
        each: pictures of a caption, each from noise of its own.
        manners: in which the adapters draw.
    """
    found: dict[str, Any] = {}
    candidates = captions.of_part(pictures.emoji, *PARTS)
    nearest = Nearest(judges, pictures, candidates)
    for part in PARTS:
        emoji = captions.of_part(pictures.emoji, part)
        told = [data.told(one) for one in emoji] * each
        rows = [candidates.index(one) for one in emoji]
        by_base = draw(None, told)
        base_places = nearest.places(by_base, rows * each)
        real_base = np.stack([pictures.of(data.FROM, one) for one in emoji])
        for style in data.STYLES:

            def seen(
                drawn: np.ndarray, style: str = style, rows: list[int] = rows
            ) -> dict[str, Any]:
                times = len(drawn) // len(rows)
                return {
                    "share": judges.share(drawn, style),
                    "shown": nearest.right(drawn, rows * times),
                }

            numbers = {
                "real style": seen(np.stack([pictures.of(style, one) for one in emoji])),
                "real base art": seen(real_base),
                "base": seen(by_base),
            }
            for manner in manners:
                how = MANNERS[manner][style]
                drawn = draw({style: how.weight}, told, **how.fields())
                places = nearest.places(drawn, rows * each)
                adapter = {"share": judges.share(drawn, style), "shown": shares(places)}
                numbers[manner] = {
                    **compared(adapter, numbers["base"], numbers["real style"]),
                    "95% of captions": kept_between(
                        base_places.reshape(each, -1), places.reshape(each, -1)
                    ),
                }
            found.setdefault(style, {})[part] = numbers
    return found


def compared(adapter: dict[str, Any], base: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
    """What is seen of an adapter, and beside it its way and how much less it shows."""
    gap = real["share"] - base["share"]
    return {
        **adapter,
        "way": (adapter["share"] - base["share"]) / gap if gap else float("nan"),
        "shown, to the base": {
            among: adapter["shown"][among] / shown if shown else None
            for among, shown in base["shown"].items()
        },
    }


def kept_between(
    base: np.ndarray, adapter: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """What an adapter shows over what the base shows, at the ends of 95% of resampled captions.

    Args:
        base: how many candidates are nearer, [pictures of a caption, captions]; ``adapter`` alike.
        draws: of captions, with replacement (Efron, 1979: percentiles of the bootstrap).

    Returns:
        ``None`` where some draws are of captions that the base shows nothing of.
    """
    captions_ = np.random.default_rng(seed).integers(0, base.shape[1], (draws, base.shape[1]))
    found: dict[str, tuple[float, float] | None] = {}
    for among, count in AMONG.items():
        by_base, by_adapter = (
            (places < count).mean(0)[captions_].mean(1) for places in (base, adapter)
        )
        found[among] = None
        if by_base.all():
            low, high = np.quantile(by_adapter / by_base, (0.025, 0.975))
            found[among] = float(low), float(high)
    return found


def smoothness(steps: np.ndarray) -> dict[str, float]:
    """How evenly pictures change with a weight.

    Args:
        steps: [weights, N, 32, 32, 3] uint8.

    Returns:
        ``largest step``: the largest of the mean changes from one weight to the next, as a share of
        their sum; even steps give 1 / (weights - 1). ``way``: their sum over the distance of the
        ends; 1 is a straight line.
    """
    values = steps.astype(np.float64)
    changes = np.abs(np.diff(values, axis=0)).mean(axis=(1, 2, 3, 4))
    ends = np.abs(values[-1] - values[0]).mean()
    return {
        "largest step": float(changes.max() / changes.sum()),
        "way": float(changes.sum() / ends),
    }


def run(options: Any) -> None:
    """The command."""
    from lorakit import load_adapter
    from lorakit.images.base import load_pipeline

    if options.threads:
        torch.set_num_threads(options.threads)
    work = Path(options.work)
    out = work / "judged"
    out.mkdir(exist_ok=True)
    found = report(
        load_pipeline(options.base or work / "base", dtype="float32"),
        {style: load_adapter(work / "styles" / style / "adapter") for style in data.STYLES},
        data.Pictures.read(work / "data"),
        Judges.load(work / "judges.pt"),
        out,
        each=options.each,
        manners=options.manner,
        with_sheets=options.sheets,
    )
    (out / "numbers.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


def report(
    base: Any,
    adapters: Mapping[str, Any],
    pictures: data.Pictures,
    judges: Judges,
    out: Path,
    *,
    steps: int = sheets.STEPS,
    each: int = 1,
    manners: Sequence[str] = tuple(MANNERS),
    with_sheets: bool = True,
) -> dict[str, Any]:
    """All numbers; and all sheets, as files in ``out``.

    Args:
        base: of `lorakit.images.base.load_pipeline`.
        adapters: style → adapter.
        steps: of denoising.
        each: pictures of a caption that are judged.
        manners: in which the adapters draw what is judged.
        with_sheets: also draw the sheets, and measure how even weights and how exact merges are.
    """
    from lorakit.layers import attach

    (first, adapter), *others = adapters.items()
    handle = attach(base.model, adapter, first)
    for name, other in others:
        handle.add(other, name)

    def draw(mix: Any, told: list[str], **fields: float) -> np.ndarray:
        return sheets.draw_cells(base, handle, mix, told, steps=steps, **fields)

    found = judged(judges, pictures, draw, each=each, manners=manners)
    if not with_sheets:
        handle.detach()
        return found
    found["weights"] = weight_sheets(pictures, draw, out)
    blend_sheets(pictures, draw, out)
    beside_sheets(pictures, draw, out)
    unmerged = {name: draw(name, shown(pictures, 8)) for name in adapters}
    handle.detach()
    found["merged, largest difference of a pixel"] = {
        name: merged_difference(base, adapters[name], pictures, drawn, steps)
        for name, drawn in unmerged.items()
    }
    return found


def shown(pictures: data.Pictures, number: int) -> list[str]:
    """Captions for a sheet: half of emoji that the base knows, half of new ones."""
    chosen = []
    for part in PARTS:
        emoji = captions.of_part(pictures.emoji, part)
        chosen += [data.told(emoji[i * len(emoji) // (number // 2)]) for i in range(number // 2)]
    return chosen


def weight_sheets(pictures: data.Pictures, draw: Draw, out: Path) -> dict[str, Any]:
    """A sheet per style: captions down, weights of 0 to 1 across; and how smoothly they change."""
    told = shown(pictures, 10)
    found = {}
    for style in data.STYLES:
        steps = np.stack([draw({style: weight}, told) for weight in WEIGHTS])
        found[style] = smoothness(steps)
        page = sheets.table(steps.swapaxes(0, 1), told, [f"{weight:g}" for weight in WEIGHTS])
        page.save(out / f"weights-{style}.png")
    return found


def blend_sheets(pictures: data.Pictures, draw: Draw, out: Path) -> None:
    """Two styles at once, one across and the other down: a sheet for each of two captions."""
    one, other = data.STYLES[:2]
    weights = (0.0, 0.25, 0.5, 0.75, 1.0)
    for i, caption in enumerate(shown(pictures, 4)[:2]):
        rows = [[draw({one: x, other: y}, [caption])[0] for x in weights] for y in weights]
        page = sheets.table(
            rows,
            [f"{other} {y:g}" for y in weights],
            [f"{one} {x:g}" for x in weights],
        )
        page.save(out / f"blend-{i}.png")


def beside_sheets(pictures: data.Pictures, draw: Draw, out: Path) -> None:
    """Real base art, the base, each adapter, and each style's real picture, beside one another."""
    for part in PARTS:
        emoji = captions.of_part(pictures.emoji, part)[:24]
        told = [data.told(one) for one in emoji]
        columns: dict[str, Any] = {
            f"{data.FROM}, real": [pictures.of(data.FROM, one) for one in emoji],
            "base": draw(None, told),
        }
        for style in data.STYLES:
            how = MANNERS["late"][style]
            columns[f"{style}"] = draw({style: how.weight}, told, **how.fields())
            columns[f"{style}, real"] = [pictures.of(style, one) for one in emoji]
        rows = list(zip(*columns.values(), strict=True))
        sheets.table(rows, told, list(columns)).save(out / f"beside-{part}.png")


def merged_difference(
    base: Any, adapter: Any, pictures: data.Pictures, unmerged: np.ndarray, steps: int
) -> float:
    """Largest difference, of 1, between pictures of an attached adapter and of a merged one."""
    import lorakit

    undo = lorakit.merge(base.model, [(adapter, 1.0)])
    once = sheets.draw_cells(base, None, None, shown(pictures, 8), steps=steps)
    undo()
    return float(np.abs(once.astype(int) - unmerged.astype(int)).max() / 255)
