"""The picture of a comparison: overlap of subspaces, spectra, norms by layer."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.algebra.compare import Comparison, SitePair, average
from lorakit.core.files import atomic_file
from lorakit.errors import InputError
from lorakit.optional import require

#: kinds of modules that get a heat map of their own
_KINDS = 8
_COLOURS = ("#3b6fb6", "#d1603d")
_FORMATS = (".png", ".svg", ".pdf")


def plot_comparison(
    comparison: Comparison, names: tuple[str, str], path: str | Path, *, width: float = 13.0
) -> Path:
    """Write the picture; the suffix says in which format.

    Args:
        names: what the two adapters are called.
        width: inches.

    Raises:
        InputError: an unknown suffix, or no low-rank site in common.
        MissingDependencyError: matplotlib is not installed.
    """
    place = Path(path).expanduser()
    if place.suffix.lower() not in _FORMATS:
        raise InputError(f"{place}: expected a name that ends in one of {', '.join(_FORMATS)}")
    known = [site for site in comparison.sites if site.right.numel()]
    if not known:
        raise InputError("The adapters share no low-rank change that is not zero; nothing to plot")
    require("matplotlib", extra="report", purpose="the picture of a comparison")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = _by_kind(known)
    columns = min(4, max(2, len(kinds)))
    rows = math.ceil(len(kinds) / columns)
    heights = [3.6, *([2.5] * 2 * rows), 3.2]
    figure = Figure(figsize=(width, sum(heights) + 1.0), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(4, 1, height_ratios=[3.6, 2.5 * rows, 2.5 * rows, 3.2])
    figure.suptitle(_title(comparison, names), fontsize=13)
    _overall(parts[0], known, names)
    for part, side, text in (
        (parts[1], "right", "Right subspaces (what the site reads), by kind of module"),
        (parts[2], "left", "Left subspaces (what the site writes), by kind of module"),
    ):
        part.suptitle(text, fontsize=11)
        _heat_maps(part, kinds, side, rows, columns)
    _spectra_and_norms(parts[3], known, names)
    with atomic_file(place) as temporary:
        figure.savefig(temporary, format=place.suffix[1:].lower())
    return place


def _title(comparison: Comparison, names: tuple[str, str]) -> str:
    cosine = comparison.common_cosine
    only = sum(len(one) for one in comparison.only)
    text = f"{names[0]}  and  {names[1]}:  {len(comparison.sites)} common sites"
    text += f", {only} in one alone" if only else ""
    return text + ("" if cosine is None else f", cosine of the changes {cosine:.3f}")


def _by_kind(sites: list[SitePair]) -> dict[str, list[SitePair]]:
    """Sites by the last name of their path; the commonest kinds, in the order they come."""
    kinds: dict[str, list[SitePair]] = {}
    for site in sites:
        name = site.path.rpartition(".")[2].partition("[")[0]  # an expert has a number
        kinds.setdefault("numbered" if name.isdigit() else name, []).append(site)
    most = sorted(kinds, key=lambda name: -len(kinds[name]))[:_KINDS]
    return {name: members for name, members in kinds.items() if name in most}


def _overall(part: Any, sites: list[SitePair], names: tuple[str, str]) -> None:
    left, right, diagonal = part.subplots(1, 3, width_ratios=[1, 1, 1.25])
    for axes, side, title in (
        (left, "right", "φ of right subspaces, mean of all sites"),
        (right, "left", "φ of left subspaces, mean of all sites"),
    ):
        image = _heat(axes, _mean(sites, side), title)
        axes.set_xlabel(f"j, first directions of {names[1]}")
        axes.set_ylabel(f"i, first directions of {names[0]}")
        part.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    _diagonal(diagonal, sites)


def _mean(sites: list[SitePair], side: str) -> Tensor:
    """The mean of φ where at least half of the sites have the cell: the rest would mislead."""
    mean, count = average([getattr(site, side) for site in sites])
    often = 2 * count >= len(sites)
    rows, columns = int(often[:, 0].sum()), int(often[0].sum())
    return torch.where(often, mean, math.nan)[: max(1, rows), : max(1, columns)]


def _spread(lines: list[Tensor]) -> tuple[range, list[Tensor]]:
    """Place from 1 → the values of the lines that have it, as far as half of them do."""
    most = max(
        k
        for k in range(1, max(map(len, lines)) + 1)
        if 2 * sum(len(v) >= k for v in lines) >= len(lines)
    )
    places = range(1, most + 1)
    return places, [torch.stack([v[k - 1] for v in lines if len(v) >= k]) for k in places]


def _diagonal(axes: Any, sites: list[SitePair]) -> None:
    """φ(k, k) over k, with the spread over sites and what chance would give."""
    for side, colour, width in (("right", _COLOURS[0], 0), ("left", _COLOURS[1], 1)):
        lines = [torch.diagonal(getattr(s, side)) for s in sites]
        ranks, spread = _spread(lines)
        middle = [float(v.median()) for v in spread]
        low = [float(v.quantile(0.1)) for v in spread]
        high = [float(v.quantile(0.9)) for v in spread]
        axes.plot(ranks, middle, color=colour, marker="o", markersize=3, label=f"{side}, median")
        axes.fill_between(ranks, low, high, color=colour, alpha=0.15, linewidth=0)
        chance = [
            sum(k / s.widths[width] for s in sites if min(s.right.shape) >= k)
            / sum(min(s.right.shape) >= k for s in sites)
            for k in ranks
        ]
        axes.plot(ranks, chance, color=colour, linestyle=":", label=f"{side}, random subspaces")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k")
    axes.set_title("φ(k, k), and 10 – 90 % of the sites", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    _clean(axes)


def _heat(axes: Any, grid: Tensor, title: str) -> Any:
    size = grid.shape
    image = axes.imshow(
        grid.numpy(),
        vmin=0.0,
        vmax=1.0,
        origin="lower",
        cmap="magma",
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, size[1] + 0.5, 0.5, size[0] + 0.5),
    )
    for axis, num in ((axes.xaxis, size[1]), (axes.yaxis, size[0])):
        step = max(1, math.ceil(num / 8))
        axis.set_ticks(sorted({1, *range(step, num + 1, step)}) if step > 1 else range(1, num + 1))
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=10)
    return image


def _heat_maps(
    part: Any, kinds: dict[str, list[SitePair]], side: str, rows: int, columns: int
) -> None:
    grid = part.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, members) in zip(grid, kinds.items(), strict=False):
        mean = _mean(members, side)
        whole = [phi for s in members if (phi := s.whole[0 if side == "right" else 1]) is not None]
        _heat(axes, mean, f"{name} ({len(members)}): {sum(whole) / len(whole):.2f} at full rank")
    for axes in grid[len(kinds) :]:
        axes.set_axis_off()


def _spectra_and_norms(part: Any, sites: list[SitePair], names: tuple[str, str]) -> None:
    spectra, norms = part.subplots(1, 2)
    for k, name in enumerate(names):
        values = [s.spectra[k] / s.spectra[k][0] for s in sites if s.spectra[k].numel()]
        ranks, spread = _spread(values)
        middle = [float(v.median()) for v in spread]
        spectra.plot(ranks, middle, color=_COLOURS[k], marker="o", markersize=3, label=name)
        spectra.fill_between(
            ranks,
            [float(v.quantile(0.1)) for v in spread],
            [float(v.quantile(0.9)) for v in spread],
            color=_COLOURS[k],
            alpha=0.15,
            linewidth=0,
        )
        layers = _by_layer(sites, k)
        norms.plot(
            list(layers), list(layers.values()), color=_COLOURS[k], marker="o", markersize=3,
            label=name,
        )  # fmt: skip
    spectra.set_yscale("log")
    spectra.yaxis.set_major_formatter("{x:g}")
    spectra.yaxis.set_minor_formatter("{x:g}")
    spectra.set_xlabel("singular value")
    spectra.set_title("Spectra σ / σ₁: median, and 10 – 90 % of the sites", fontsize=10)
    norms.set_xlabel("block")
    norms.set_ylim(0, 1.08 * norms.dataLim.y1)
    norms.set_title("‖ΔW‖ by block, common sites", fontsize=10)
    for axes in (spectra, norms):
        axes.legend(fontsize=8, frameon=False)
        _clean(axes)


def _by_layer(sites: list[SitePair], k: int) -> dict[float, float]:
    """Number of the block → ‖ΔW‖ of its sites; what lies outside of blocks comes first."""
    squares: dict[float, float] = {}
    for site in sites:
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site.path)
        block = float(found[1]) if found else -1.0
        squares[block] = squares.get(block, 0.0) + site.norms[k] ** 2
    return {block: math.sqrt(total) for block, total in sorted(squares.items())}


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
