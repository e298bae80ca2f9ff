"""Make one adapter out of several. No base is needed.

The default is the weighted sum of what the adapters change: their ranks add up. It is computed in
float64 and written in their own dtype; what that rounds is said. --rank cuts it back, and the table
says what that loses in each kind of layer. ties, dare, dare_ties and magnitude thin
every change first, as published, and need a rank too; without --rank it is the largest there is.

  lorakit combine runs/a=0.7 runs/b=0.3 --out mix
  lorakit combine runs/a runs/b=-1 --out difference --rank 16
  lorakit combine a:one.safetensors b:two.safetensors --method ties --density 0.2 --out merged
  lorakit combine runs/a=0.5 --out half
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import ADAPTER_HELP, adapter_argument, load_adapters
from lorakit.cli.flags import positive_int, probability, seed
from lorakit.cli.output import add_json_argument, emit_json, say

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter

METHODS = ("linear", "svd", "ties", "dare", "dare_ties", "magnitude")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "adapter",
        nargs="+",
        type=adapter_argument,
        metavar="A[=W]",
        help=f"{ADAPTER_HELP}; =0.7 behind it is its weight (1 without), name: before it gives it "
        "another name",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the result (PEFT)")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="linear",
        help="linear (default): the sum; svd: cut to a rank; the others as published",
    )
    parser.add_argument(
        "--rank",
        type=positive_int,
        metavar="R",
        help="of each layer; default: the sum of the ranks for linear, the largest for the others",
    )
    parser.add_argument(
        "--density",
        type=probability,
        metavar="D",
        help="share of the numbers of a change that ties, dare, dare_ties and magnitude keep; "
        "default 0.2 for ties, else 0.5",
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="of dare and dare_ties; default 0")
    parser.add_argument(
        "--scope",
        choices=("adapter", "site"),
        help="count the share of ties and magnitude over the whole adapter (default) or each layer",
    )
    parser.add_argument(
        "--dtype",
        choices=("exact", "float64", "float32", "bfloat16", "float16"),
        help="of the result; default: the adapters' own; exact: float64 where a sum needs it, "
        "which not every program reads",
    )
    parser.add_argument(
        "--allow-other-base",
        action="store_true",
        help="combine adapters of different bases (shapes must fit)",
    )
    parser.add_argument("--layers", action="store_true", help="every layer, not a line a kind")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Read, combine, write, show."""
    import torch

    from lorakit.formats import save_adapter

    loaded = load_adapters(options.adapter)
    weights = {one.name: 1.0 if one.weight is None else one.weight for one in options.adapter}
    say(" + ".join(f"{weight:g}·{name}" for name, weight in weights.items()))
    pairs = [(loaded[name], weight) for name, weight in weights.items()]
    asked = options.dtype if options.dtype != "exact" else None
    mixed = _combine(options, pairs, list(weights), asked and getattr(torch, asked))
    own = _own_dtype(mixed, list(loaded.values()))
    if options.dtype is None and own is not None:
        mixed = _combine(options, pairs, list(weights), own)
    folder = save_adapter(mixed, options.out)
    if options.dtype == "exact" and own is not None:
        say("note: float64 holds the sum exactly; not every program reads it")
    told = mixed.provenance["combined"]
    if options.json:
        emit_json({"out": str(folder), **_facts(mixed), **_settings(told), "sites": _sites(mixed)})
    else:
        _print(options, mixed, list(loaded.values()))
    return 0


def _combine(options: argparse.Namespace, pairs: Any, names: list[str], dtype: Any) -> Adapter:
    from lorakit.algebra.combine import combine

    return combine(
        pairs,
        options.method,
        rank=options.rank,
        density=options.density,
        seed=options.seed,
        scope=options.scope,
        dtype=dtype,
        names=names,
        allow_other_base=options.allow_other_base,
    )


def _own_dtype(mixed: Adapter, members: list[Adapter]) -> Any:
    """The dtype that holds the numbers of all members, where the exact sum needs more than that."""
    from lorakit.algebra.stack import promoted

    before = {dtype for member in members for dtype in member.dtypes}
    return promoted(sorted(before, key=str)) if mixed.dtypes - before else None


def _facts(adapter: Adapter) -> dict[str, Any]:
    return {
        "parameters": adapter.num_parameters,
        "bytes": adapter.num_bytes,
        "ranks": sorted({site.rank for site in adapter.low_rank.values()}),
        "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in adapter.dtypes),
    }


def _settings(told: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in told.items() if key not in ("adapters", "sites")}
    members = [{k: v for k, v in one.items() if k != "provenance"} for one in told["adapters"]]
    return {**kept, "adapters": members}


def _sites(adapter: Adapter) -> dict[str, dict[str, Any]]:
    told = adapter.provenance["combined"]["sites"]
    exact = {
        path: {"rank": site.rank, "relative_error": 0.0} for path, site in adapter.low_rank.items()
    }
    return {**exact, **told}


def _print(options: argparse.Namespace, mixed: Adapter, members: list[Adapter]) -> None:
    from lorakit.cli.losses import percent, print_losses, ranks_of, span_of_ranks

    told = mixed.provenance["combined"]
    before = ranks_of(*members)
    error = told["relative_error"]
    what = "an exact sum" if error == 0.0 else f"{percent(error)} of the change is lost to the rank"
    if error and options.rank is None and options.method == "linear":
        dtypes = "/".join(_facts(mixed)["dtypes"])
        what = f"rounded to {dtypes} by {percent(error)} of the change"
        if options.dtype is None:
            what += " (--dtype exact for float64)"
    print(
        f"{options.out}: {options.method}, rank {span_of_ranks(before, mixed)}, "
        f"{mixed.num_parameters:,} parameters, {mixed.num_bytes / 1e6:.1f} MB; {what}"
    )
    print_losses(before, mixed, told["sites"], each=options.layers)
