"""An adapter from a fully fine-tuned checkpoint and its base.

Each linear, convolution and embedding that differs becomes the best approximation of its change
that a rank allows (in Frobenius norm). One pair of tensors is read at a time, so checkpoints may be
larger than memory. What an adapter of low rank cannot hold, norms and biases above all, is listed
with its size; with --remainder keep it travels along whole.

  lorakit extract --base smollm2 --tuned runs/full --rank 64 --out adapters/full-r64
  lorakit extract --base org/base --tuned ./tuned --energy 0.9 --targets all-linear --out a
  lorakit extract --base ./base --tuned ./tuned --rank full --remainder keep --out exact
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, Literal

from lorakit.cli.flags import count, positive_int, probability
from lorakit.cli.output import add_json_argument, console, emit_json, printable_stdout, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorakit.core.adapter import Adapter

#: tensors of the remainder that are named
_SHOWN = 8


def rank_or_full(text: str) -> int | Literal["full"]:
    """An argparse type: a whole number of at least 1, or ``full``."""
    if text == "full":
        return "full"
    found: int = positive_int(text)
    return found


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "--base",
        required=True,
        metavar="B",
        help="hub id, folder, .gguf or .safetensors file, or smollm2",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub base")
    parser.add_argument(
        "--tuned", required=True, metavar="T", help="the checkpoint that was fine-tuned from it"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the adapter")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--rank",
        type=rank_or_full,
        metavar="R",
        help="rank of every site, or full; a smaller weight gets its own full rank",
    )
    size.add_argument(
        "--energy",
        type=probability,
        metavar="E",
        help="share of each weight's squared change to keep, such as 0.9",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="T",
        help="all-linear, attention, mlp, module paths, ends of paths or regular expressions; "
        "default: every linear, convolution and embedding, with the head",
    )
    parser.add_argument("--exclude", nargs="+", default=(), metavar="T", help="left out again")
    parser.add_argument(
        "--remainder",
        choices=("report", "keep", "refuse"),
        default="report",
        help="changed tensors without a site: list them (default), keep them whole, or stop",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        default="float32",
        help="of the factors; default float32",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="of the decompositions; default cpu"
    )
    parser.add_argument(
        "--worst", type=count, default=5, metavar="N", help="sites to name; default 5"
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Extract, save, show."""
    import torch

    from lorakit import extract, save_adapter
    from lorakit.cli.meter import meter
    from lorakit.errors import InputError

    if os.path.exists(options.out) and not os.path.isdir(options.out):
        raise InputError(f"--out {options.out} is a file; give a folder")
    with meter() as tell:
        adapter = extract(
            options.base,
            options.tuned,
            rank=options.rank,
            energy=options.energy,
            targets=options.targets,
            exclude=options.exclude,
            remainder=options.remainder,
            dtype=getattr(torch, options.dtype),
            device=options.device,
            revision=options.revision,
            progress=lambda done, total, _: tell("tensors", done, total),
            say=say,
        )
    folder = save_adapter(adapter, options.out)
    if options.json:
        emit_json({"out": folder, **_totals(adapter), **adapter.provenance["extract"]})
        return 0
    printable_stdout()
    out = console(stdout=True)
    _print_totals(out, str(folder), adapter)
    sites = adapter.provenance["extract"]["sites"]
    if sites:
        _print_kinds(out, sites)
        _print_worst(out, sites, options.worst)
    _print_remainder(out, adapter.provenance["extract"]["remainder"])
    return 0


def _totals(adapter: Adapter) -> dict[str, Any]:
    return {
        "parameters": adapter.num_parameters,
        "bytes": adapter.num_bytes,
        "low_rank_sites": len(adapter.low_rank),
        "replaced_sites": len(adapter.replaced),
    }


def _print_totals(out: Any, folder: str, adapter: Adapter) -> None:
    from rich.table import Table
    from rich.text import Text

    facts, totals = adapter.provenance["extract"], _totals(adapter)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    size = (
        f"{facts['energy']:g} of each change's energy" if "energy" in facts else str(facts["rank"])
    )
    for name, value in {
        "adapter": folder,
        "of": f"{facts['tuned']} against {facts['base']}",
        "rank": size,
        "sites": f"{totals['low_rank_sites']} low-rank, {totals['replaced_sites']} kept whole",
        "parameters": f"{totals['parameters']:,} ({totals['bytes'] / 1e6:,.1f} MB)",
        "error": f"{facts['error']:.2%} of the whole change is not in the adapter "
        f"(‖·‖ Frobenius; best possible at these ranks {facts['best_error']:.2%})",
    }.items():
        table.add_row(name, Text(value))
    if facts["unchanged_tensors"]:
        table.add_row("unchanged", f"{facts['unchanged_tensors']} tensors, which get no site")
    out.print(table)


def _print_kinds(out: Any, sites: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each kind of module: the last name of its path."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for path, site in sites.items():
        kinds.setdefault(path.rpartition(".")[2], []).append(site)
    rows = []
    for name, members in kinds.items():
        ranks = sorted({m["rank"] for m in members})
        total = sum(m["norm"] ** 2 for m in members) ** 0.5
        shares = [
            sum((m[key] * m["norm"]) ** 2 for m in members) ** 0.5 / total
            for key in ("error", "best_error")
        ]
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} – {ranks[-1]}"
        rows.append((name, str(len(members)), rank, f"{total:#.4g}", *map(_percent, shares)))
    _print_rows(out, ("module", "sites", "rank", "‖ΔW‖", "error", "best possible"), rows)


def _print_worst(out: Any, sites: Mapping[str, Mapping[str, Any]], num: int) -> None:
    worst = sorted(sites.items(), key=lambda item: -item[1]["error"])[:num]
    rows = [
        (p, str(s["rank"]), f"{s['norm']:#.4g}", _percent(s["error"]), _percent(s["best_error"]))
        for p, s in worst
    ]
    if rows:
        _print_rows(out, ("largest errors", "rank", "‖ΔW‖", "error", "best possible"), rows)


def _print_remainder(out: Any, remainder: Mapping[str, Any]) -> None:
    tensors = remainder["tensors"]
    if not tensors:
        out.print("\nNothing else changed: the sites are all there is.")
        return
    kept = remainder["mode"] == "keep"
    verb = "kept whole" if kept else "not in the adapter"
    own = [t for t in tensors.values() if "tied_to" not in t]
    total = sum((t["norm"] or 0.0) ** 2 for t in own) ** 0.5
    out.print(
        f"\n{len(own)} other tensors changed ({verb}), by {total:.4g} together"
        + ("" if kept else "; --remainder keep stores their new values"),
        highlight=False,
    )
    largest = sorted(tensors.items(), key=lambda item: -(item[1]["norm"] or 0.0))
    rows = [
        (
            path + (" (tied)" if "tied_to" in t else ""),
            " × ".join(map(str, t["shape"])),
            "" if t["norm"] is None else f"{t['norm']:#.4g}",
        )
        for path, t in largest[:_SHOWN]
    ]
    _print_rows(out, ("remainder", "shape", "change"), rows)
    if len(largest) > _SHOWN:
        out.print(f"… and {len(largest) - _SHOWN} more", style="dim")


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 or share == 0 else f"{share:.1e}"


def _print_rows(out: Any, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(head[0], no_wrap=True)
    for name in head[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print()
    out.print(table)
