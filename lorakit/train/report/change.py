"""Where the adapter changed the base: sizes and effective ranks as maps over layers and modules."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from lorakit.core.adapter import Adapter
from lorakit.core.linalg import effective_rank, singular_values
from lorakit.train.record import Record
from lorakit.train.report.blocks import section, wide
from lorakit.train.report.charts import Grid, heat_map, label
from lorakit.train.report.markup import Html, fill
from lorakit.train.report.words import count_text, some_of

#: rows of a heat map; above, places that differ only in a number are put together
_MOST_ROWS = 40


def change(record: Record) -> Html:
    if record.adapter is None:
        return Html("")
    parts = []
    places = _places(record.adapter)
    if places:
        norms, ranks, hint = _grids(record.adapter, places)
        parts += [
            _map_of("Size of the change, ‖ΔW‖ (Frobenius norm)", norms),
            _map_of("Effective rank of the change", ranks),
            fill('<p class="hint">{hint}</p>', hint=hint),
        ]
    whole = [
        f"{path} ({count_text(site.num_parameters)})"
        for path, site in record.adapter.replaced.items()
    ]
    if whole:
        text = f"Trained whole, parameters in brackets: {some_of(whole, 12)}."
        parts.append(fill("<p>{text}</p>", text=text))
    if record.adapter.prefixes:
        text = (
            f"In front of every text stand {record.adapter.num_virtual_tokens} virtual tokens, "
            f"whose keys and values were trained in {len(record.adapter.prefixes)} layers."
        )
        parts.append(fill("<p>{text}</p>", text=text))
    return section(
        "What changed in the model",
        "Each cell is one adapted weight: a layer across, a kind of module down, the row's mean "
        "at the right. Point at a cell for its number.",
        *parts,
    )


def _map_of(title: str, grid: Grid) -> Html:
    low, high = min(grid.values.values()), max(grid.values.values())
    return fill(
        '<h3>{title}</h3>{map}<div class="legend"><span>{low}<i class="scale"></i>{high}</span>'
        "</div>",
        title=title,
        map=wide(heat_map(title, grid)),
        low=label(low),
        high=label(high),
    )


def _places(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Path → (row, column): what kind of module it is, and in which layer.

    The layer is the first number in the path. What stands before it is named only if there are
    several such places (an encoder and a decoder).
    """
    split = {}
    for path in adapter.low_rank:
        names = path.split(".")
        at = next((i for i, name in enumerate(names) if name.isdigit()), None)
        if at is None:
            split[path] = ("", path, "–")
        else:
            split[path] = (".".join(names[:at]), ".".join(names[at + 1 :]), names[at])
    numbered = {stack for stack, _, layer in split.values() if layer != "–"}
    places = {}
    for path, (stack, kind, layer) in split.items():
        names = [stack if len(numbered) > 1 or not kind else "", kind]
        places[path] = (" · ".join(name for name in names if name) or path, layer)
    if len({row for row, _ in places.values()}) > _MOST_ROWS:
        places = {p: (re.sub(r"\d+", "*", row), layer) for p, (row, layer) in places.items()}
    return places


def _grids(adapter: Adapter, places: Mapping[str, tuple[str, str]]) -> tuple[Grid, Grid, str]:
    """Norms and effective ranks by place, and a sentence about both."""
    rows = list(dict.fromkeys(row for row, _ in places.values()))
    hidden = rows[_MOST_ROWS:]
    rows = rows[:_MOST_ROWS]
    layers = {layer for row, layer in places.values() if row in set(rows)}
    columns = sorted(
        layers, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
    )
    norms: dict[tuple[str, str], list[float]] = {}
    ranks: dict[tuple[str, str], list[float]] = {}
    with _one_thread():
        for path, place in places.items():
            if place[0] not in hidden:
                values = singular_values(adapter.low_rank[path])
                norms.setdefault(place, []).append(float(values.square().sum().sqrt()))
                ranks.setdefault(place, []).append(effective_rank(values))
    spec_ranks = Counter(site.rank for site in adapter.low_rank.values())
    settings = ", ".join(f"{rank}" for rank in sorted(spec_ranks))
    hint = (
        f"{count_text(len(places))} adapted weights of rank {settings}. The effective rank is the "
        "exponential of the entropy of the singular values: how many directions really carry the "
        "change. Near the full rank, a higher one may help; far below, a lower one would do."
    )
    shared = max(map(len, norms.values()))
    if shared > 1:
        hint += f" A cell holds the mean of up to {shared} weights whose paths differ in a number."
    if hidden:
        hint += f" {len(hidden)} more kinds of modules are not drawn."

    def grid(found: dict[tuple[str, str], list[float]], what: str) -> Grid:
        means = {place: sum(v) / len(v) for place, v in found.items()}
        titles = {
            (row, column): f"layer {column}, {row}: {what} {label(mean)}"
            for (row, column), mean in means.items()
        }
        return Grid(tuple(rows), tuple(columns), means, titles)

    return grid(norms, "‖ΔW‖"), grid(ranks, "effective rank"), hint


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Rank-sized matrices: on a busy machine, threads that wait for each other cost fifty times
    the work (210 sites with rank 16 and two threads: 5 s against 0.1 s)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
