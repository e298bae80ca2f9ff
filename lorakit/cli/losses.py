"""What a combination or a compression lost at each site, as lines of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.cli.output import console, printable_stdout

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter


def print_losses(
    before: Mapping[str, int], after: Adapter, sites: Mapping[str, Mapping[str, Any]], *, each: bool
) -> None:
    """One line a kind of layer, or one a site: ranks before and after, parameters, relative error.

    Args:
        before: path → rank.
        sites: path → ``rank`` and ``relative_error``; paths that are not in it lost nothing.
        each: a line a site.
    """
    from rich.table import Table
    from rich.text import Text

    groups: dict[str, list[str]] = {}
    for path in before:
        groups.setdefault(path if each else kind_of(path), []).append(path)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("site" if each else "kind", no_wrap=True)
    names = ("rank", "parameters", "error") if each else ("sites", "rank", "parameters", "error")
    for name in names:
        table.add_column(name, justify="right")
    for name, paths in groups.items():
        low_rank = after.low_rank
        ranks = [low_rank[path].rank if path in low_rank else 0 for path in paths]
        size = sum(low_rank[path].num_parameters for path in paths if path in low_rank)
        errors = [float(sites.get(path, {}).get("relative_error", 0.0)) for path in paths]
        was = _span([before[path] for path in paths])
        cells = [f"{was} → {_span(ranks)}", f"{size:,}", _percent(errors)]
        table.add_row(Text(name), *([] if each else [str(len(paths))]), *cells)
    printable_stdout()
    console(stdout=True).print(table)


def kind_of(path: str) -> str:
    """What layers of all blocks have in common: ``"q_proj"``, or ``"to_out.0"``."""
    parts = path.split(".")
    last = next((i for i in range(len(parts) - 1, 0, -1) if not parts[i].isdigit()), 0)
    return ".".join(parts[last:])


def span_of_ranks(before: Mapping[str, int], after: Adapter) -> str:
    """``"16 → 8"``, of all sites; ``"16"`` where it stayed."""
    left = [after.low_rank[path].rank if path in after.low_rank else 0 for path in before]
    was, now = _span(list(before.values()) or [0]), _span(left or [0])
    return now if was == now else f"{was} → {now}"


def ranks_of(*adapters: Adapter) -> dict[str, int]:
    """Path → the sum of the ranks of its low-rank sites, numbers in paths by value."""
    from lorakit.cli.inspect_ import _order

    found: dict[str, int] = {}
    for adapter in adapters:
        for path, site in adapter.low_rank.items():
            found[path] = found.get(path, 0) + site.rank
    return dict(sorted(found.items(), key=_order))


def percent(error: float) -> str:
    """A relative error for the eye; what is exact says so."""
    if error == 0.0:
        return "0"
    return f"{error:.2%}" if error >= 1e-4 else f"{error:.1e}"


def _percent(errors: list[float]) -> str:
    low, high = percent(min(errors)), percent(max(errors))
    return low if low == high else f"{low} – {high}"


def _span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"
