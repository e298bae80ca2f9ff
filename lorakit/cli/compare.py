"""How alike two adapters are: subspaces, cosine of the changes, norms and spectra.

φ is the subspace similarity of the LoRA paper (section 7.2): 1 where the smaller of two subspaces
lies in the larger, near 0 where they have nothing in common; "chance" is what random subspaces of
these ranks have. Right subspaces are what a site reads, left ones what it writes. The cosine is
that of the two changes as vectors. No base is loaded.

  lorakit compare runs/a runs/b
  lorakit compare runs/a runs/b --layers --plot overlap.png
  lorakit compare r8 r64 --of factors --json
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import ADAPTER_HELP, adapter_name, adapter_path
from lorakit.cli.output import add_json_argument, console, emit_json, printable_stdout, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorakit.algebra.compare import Comparison, SitePair

#: sites of one adapter alone that are named
_SHOWN = 6


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    for name in ("first", "second"):
        parser.add_argument(name, metavar=name.upper(), help=ADAPTER_HELP)
    parser.add_argument(
        "--of",
        choices=("delta", "factors"),
        default="delta",
        help="singular vectors of the change B·A (default), or of A and of B alone, as the paper",
    )
    parser.add_argument("--layers", action="store_true", help="every site, not a line a block")
    parser.add_argument("--plot", metavar="FILE", help="a picture: .png, .svg or .pdf")
    parser.add_argument(
        "--allow-other-base",
        action="store_true",
        help="compare adapters of different bases (shapes must fit)",
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Read, compare, show."""
    from lorakit.algebra.compare import compare
    from lorakit.algebra.compare_plot import plot_comparison
    from lorakit.formats import load_adapter

    refs = []
    for ref in (options.first, options.second):
        path = adapter_path(ref)
        if path != ref:
            say(f"{ref} is a run folder; its adapter is {path}")
        refs.append(path)
    found = compare(
        load_adapter(refs[0]),
        load_adapter(refs[1]),
        of=options.of,
        allow_other_base=options.allow_other_base,
    )
    if options.plot is not None:
        plotted = plot_comparison(found, _names(refs), options.plot)
        say(f"The picture is {plotted}")
    if options.json:
        emit_json(as_data(found, refs, of=options.of))
        return 0
    printable_stdout()
    out = console(stdout=True)
    _print_summary(out, found, refs)
    _print_table(out, found, each=options.layers)
    return 0


def _names(refs: Sequence[str]) -> tuple[str, str]:
    first, second = map(adapter_name, refs)
    if first != second:
        return first, second
    ends = [os.path.normpath(ref) for ref in refs]
    return (ends[0], ends[1]) if ends[0] != ends[1] else (f"{first} (1)", f"{second} (2)")


def as_data(found: Comparison, refs: Sequence[str], *, of: str) -> dict[str, Any]:
    """The comparison as plain data; φ as whole grids."""
    return {
        "adapters": list(refs),
        "of": of,
        "cosine": found.cosine,
        "common_cosine": found.common_cosine,
        "norms": found.norms,
        "distance": found.distance,
        "similarity": _mean_phi(found.sites),
        "chance": _mean_chance(found.sites),
        "sites": [
            {
                "path": site.path,
                "cosine": site.cosine,
                "norms": site.norms,
                "distance": site.distance,
                "similarity": dict(zip(("right", "left"), site.whole, strict=True)),
                "chance": dict(zip(("right", "left"), site.chance, strict=True)),
                "spectra": site.spectra,
                "phi_right": site.right,
                "phi_left": site.left,
            }
            for site in found.sites
        ],
        "trained_whole": [{"path": w.path, "distance": w.distance} for w in found.whole],
        "only_first": found.only[0],
        "only_second": found.only[1],
        "notes": found.notes,
    }


def _mean_phi(sites: Sequence[SitePair]) -> dict[str, float | None]:
    """The mean over sites of φ at the full rank that both have."""
    known = [site.whole for site in sites if site.whole[0] is not None]
    return {side: _mean([phi[k] for phi in known]) for k, side in enumerate(("right", "left"))}


def _mean_chance(sites: Sequence[SitePair]) -> dict[str, float | None]:
    known = [site.chance for site in sites if site.whole[0] is not None]
    return {side: _mean([c[k] for c in known]) for k, side in enumerate(("right", "left"))}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- printing ----------------------------------------------------------------------------------


def _print_summary(out: Any, found: Comparison, refs: Sequence[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    norms = found.norms
    for name, value in {
        "first": f"{refs[0]}: ‖ΔW‖ {norms[0]:.4g}",
        "second": f"{refs[1]}: ‖ΔW‖ {norms[1]:.4g}",
        "in common": _common_line(found),
        "cosine": _cosine_line(found),
        "distance": f"{found.distance:.4g} (‖ΔW₁ - ΔW₂‖, Frobenius)",
        "φ right": _phi_line(found.sites, 0),
        "φ left": _phi_line(found.sites, 1),
    }.items():
        table.add_row(name, Text(value))
    for whole in found.whole:
        table.add_row("trained whole", Text(f"{whole.path}: differ by {whole.distance:.2%}"))
    for k, name in enumerate(("only first", "only second")):
        if found.only[k]:
            table.add_row(name, Text(_only_line(found.only[k])))
    for note in found.notes:
        table.add_row("note", Text(note))
    out.print(table)


def _common_line(found: Comparison) -> str:
    text = f"{len(found.sites)} low-rank sites"
    if found.whole:
        text += f", {len(found.whole)} trained whole"
    ranks = [{len(site.spectra[k]) for site in found.sites} for k in (0, 1)]
    shown = [_range(sorted(one)) for one in ranks if one]
    return text + (f"; ranks {shown[0]} and {shown[1]}" if shown else "")


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} – {values[-1]}"


def _cosine_line(found: Comparison) -> str:
    if found.cosine is None:
        return "none: a change is zero"
    if not any(found.only):
        return f"{found.cosine:.4f}"
    if found.common_cosine is None:
        return f"{found.cosine:.4f}"
    return (
        f"{found.cosine:.4f}, with what one has alone as zero in the other; "
        f"{found.common_cosine:.4f} over the common sites"
    )


def _phi_line(sites: Sequence[SitePair], side: int) -> str:
    known = [site for site in sites if site.whole[side] is not None]
    if not known:
        return "none: a change is zero"
    first = _mean([site.at(1, 1)[side] for site in known])
    whole = _mean([site.whole[side] for site in known])
    chance = _mean([site.chance[side] for site in known])
    kind = "reads" if side == 0 else "writes"
    return (
        f"{whole:.3f} of all directions, {first:.3f} of the first alone; chance {chance:.3f} "
        f"(what a site {kind}; mean of {len(known)} sites)"
    )


def _only_line(alone: Any) -> str:
    paths = list(alone)
    norm = sum((value or 0.0) ** 2 for value in alone.values()) ** 0.5
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{len(paths)} sites, ‖ΔW‖ {norm:.4g}: {', '.join(paths[:_SHOWN])}{more}"


def _print_table(out: Any, found: Comparison, *, each: bool) -> None:
    """One line a block, or one a site."""
    from rich.table import Table
    from rich.text import Text

    if not found.sites:
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("site" if each else "block", no_wrap=True)
    for name in ("rank" if each else "sites", "‖ΔW₁‖", "‖ΔW₂‖", "cosine", "φ right", "φ left"):
        table.add_column(name, justify="right")
    for cells in _site_rows(found.sites) if each else _block_rows(found.sites):
        table.add_row(*(Text(cell) for cell in cells))
    out.print()
    out.print(table)


def _site_rows(sites: Sequence[SitePair]) -> Iterator[tuple[str, ...]]:
    for site in sorted(sites, key=lambda site: _order(site.path)):
        ranks = [len(values) for values in site.spectra]
        rank = str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]}, {ranks[1]}"
        norms = (f"{norm:#.4g}" for norm in site.norms)
        yield site.path, rank, *norms, _shown(site.cosine), *map(_shown, site.whole)


def _block_rows(sites: Sequence[SitePair]) -> Iterator[tuple[str, ...]]:
    from lorakit.algebra.compare import Comparison
    from lorakit.cli.inspect_ import block_of

    blocks: dict[str, list[SitePair]] = {}
    for site in sorted(sites, key=lambda site: _order(site.path)):
        blocks.setdefault(block_of(site.path), []).append(site)
    for block, members in blocks.items():
        part = Comparison(tuple(members), (), ({}, {}))
        phi = _mean_phi(members)
        name = block if len(members) > 1 else members[0].path
        norms = (f"{norm:#.4g}" for norm in part.norms)
        yield name, str(len(members)), *norms, _shown(part.cosine), *map(_shown, phi.values())


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _order(path: str) -> list[Any]:
    """Numbers in a path by value, so that layer 10 follows 9."""
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in path.split(".")]
