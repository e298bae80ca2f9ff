"""The picture of a search: loss against rate, a line for each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.core.files import atomic_file
from lorakit.optional import require
from lorakit.workflows.tuning.space import shown
from lorakit.workflows.tuning.table import Candidate

_COLOURS = ("#3b6fb6", "#d1603d", "#4c956c", "#8a5fb0", "#b88a1b", "#5a5a5a", "#c2477f")
_MARKERS = ("o", "s", "D", "P", "X", "v")
#: how faint the first rung's line is
_FAINTEST = 0.25


def plot_search(
    candidates: Sequence[Candidate], chosen: int, steps: Sequence[int], path: Path
) -> None:
    """Write the picture; the suffix says in which format.

    A rung's losses compare with one another alone, so each rung has its own lines, the fainter the
    earlier; a candidate that left is a faint mark with the step at which it did.

    Args:
        steps: of the rungs.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", extra="tune", purpose="the picture of a search")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [c for c in candidates if c.best() is not None]
    figure = Figure(figsize=(9.5, 6.0), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = _by(sorted({c.rank for c in known}), _COLOURS)
    kinds = _by(list(dict.fromkeys(_kind(c) for c in known)), _MARKERS)
    top = _top(known)
    for c in known:
        _mark(axes, c, colours[c.rank], kinds[_kind(c)], top, c.number == chosen)
    for place, step in enumerate(steps):
        share = _FAINTEST + (1 - _FAINTEST) * (place + 1) / len(steps)
        for (rank, _), line in _lines(known, step).items():
            xs, ys = [c.lr for c in line], [min(top, c.losses[step].mean) for c in line]
            axes.plot(xs, ys, ".-", color=colours[rank], alpha=0.6 * share, lw=1 + share, zorder=1)
    _legend(axes, colours, kinds)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss, nats a token")
    axes.set_title(
        f"{len(candidates)} candidates; lines join those of one rank after "
        f"{', '.join(map(str, steps))} steps",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())


def _mark(
    axes: Any, candidate: Candidate, colour: str, marker: str, top: float, chosen: bool
) -> None:
    best = candidate.best()
    assert best is not None
    gone = candidate.end != "finished"
    place = (candidate.lr, min(top, best.mean))
    axes.plot(
        *place, marker=marker, color=colour, alpha=0.35 if gone else 1.0, linestyle="",
        markersize=6 if gone else 8, zorder=2,
    )  # fmt: skip
    texts = []
    if chosen:
        axes.plot(
            *place, marker="o", markersize=17, markerfacecolor="none", markeredgecolor="black",
            linestyle="", zorder=3,
        )  # fmt: skip
        texts.append("chosen")
    if candidate.default:
        texts.append("defaults")
    if candidate.end == "left":
        texts.append(f"left at {candidate.steps}")
    elif candidate.end == "failed":
        texts.append(f"failed after {candidate.steps}")
    if best.mean > top:
        texts.append(f"{best.mean:.2f}")
    if texts:
        axes.annotate(
            ", ".join(texts), place, xytext=(7, 5), textcoords="offset points", fontsize=7,
            alpha=0.5 if gone else 1.0,
        )  # fmt: skip


def _legend(axes: Any, colours: Mapping[int, str], kinds: Mapping[str, str]) -> None:
    for rank, colour in colours.items():
        axes.plot([], [], color=colour, marker="o", label=f"rank {rank}")
    for kind, marker in kinds.items():
        if kind:
            axes.plot([], [], color="#777777", marker=marker, linestyle="", label=kind)
    axes.legend(fontsize=8, frameon=False)


def _lines(known: Sequence[Candidate], step: int) -> dict[tuple[int, str], list[Candidate]]:
    """(rank, kind) → those with a finite loss after a step, by rate."""
    found: dict[tuple[int, str], list[Candidate]] = {}
    for c in sorted(known, key=lambda c: c.lr):
        if step in c.losses and c.losses[step].finite:
            found.setdefault((c.rank, _kind(c)), []).append(c)
    return {key: line for key, line in found.items() if len(line) > 1}


def _kind(candidate: Candidate) -> str:
    """The values beside rate and rank."""
    others = {n: v for n, v in candidate.values.items() if n not in ("lr", "rank")}
    return ", ".join(shown(value) for value in others.values())


def _top(known: Sequence[Candidate]) -> float:
    """Losses above are drawn here: one that went astray would flatten all others."""
    means = sorted(best.mean for c in known if (best := c.best()) is not None)
    usual = means[(len(means) - 1) * 3 // 4]
    return means[0] + max(2.5 * (usual - means[0]), 0.02 * means[0])


def _by(keys: Sequence[Any], looks: Sequence[str]) -> dict[Any, str]:
    return {key: looks[place % len(looks)] for place, key in enumerate(keys)}
