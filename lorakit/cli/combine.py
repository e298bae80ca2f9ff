"""Make one adapter out of several. No base is needed.

The default is the exact weighted sum of what the adapters change: their ranks add up. --rank cuts
it back, and the table says what that loses at each layer. ties, dare, dare_ties and magnitude thin
every change first, as published, and need a rank too; without --rank it is the largest there is.

  lorakit combine runs/a/adapter=0.7 runs/b/adapter=0.3 --out mix
  lorakit combine runs/a/adapter runs/b/adapter=-1 --out difference --rank 16
  lorakit combine a:one.safetensors b:two.safetensors --method ties --density 0.2 --out merged
  lorakit combine runs/a/adapter=0.5 --out half
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lorakit.cli.common import (
    adapter_argument,
    add_json_argument,
    emit_json,
    load_adapters,
    positive_int,
    probability,
    say,
    seed,
)

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
        help="adapter folder, file or hub id; =0.7 behind it is its weight (1 without), name: "
        "before it gives it another name",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the result (PEFT)")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="linear",
        help="linear (default): the exact sum; svd: cut to a rank; the others as published",
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
        choices=("float64", "float32", "bfloat16", "float16"),
        help="of the result; default: the adapters' own, and float64 where an exact sum needs it",
    )
    parser.add_argument(
        "--allow-other-base",
        action="store_true",
        help="combine adapters of different bases (shapes must fit)",
    )
    parser.add_argument("--layers", action="store_true", help="every layer, not a line a block")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Read, combine, write, show."""
    import torch

    from lorakit.algebra.combine import combine
    from lorakit.formats import save_adapter

    loaded = load_adapters(options.adapter)
    weights = {one.name: 1.0 if one.weight is None else one.weight for one in options.adapter}
    say(" + ".join(f"{weight:g}·{name}" for name, weight in weights.items()))
    mixed = combine(
        [(loaded[name], weight) for name, weight in weights.items()],
        options.method,
        rank=options.rank,
        density=options.density,
        seed=options.seed,
        scope=options.scope,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        names=list(weights),
        allow_other_base=options.allow_other_base,
    )
    folder = save_adapter(mixed, options.out)
    _say_dtype(mixed, list(loaded.values()))
    told = mixed.provenance["combined"]
    if options.json:
        emit_json({"out": str(folder), **_facts(mixed), **_settings(told), "sites": _sites(mixed)})
    else:
        _print(options, mixed, list(loaded.values()))
    return 0


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


def _say_dtype(mixed: Adapter, members: list[Adapter]) -> None:
    """Say where the sum is stored in more bits than its parts, and how to have it otherwise."""
    before = {dtype for member in members for dtype in member.dtypes}
    wider = sorted(str(dtype).removeprefix("torch.") for dtype in mixed.dtypes - before)
    if wider:
        say(
            f"Some tensors are stored as {', '.join(wider)}, so that the sum is exact; "
            "--dtype float32 rounds it and halves them"
        )


def _print(options: argparse.Namespace, mixed: Adapter, members: list[Adapter]) -> None:
    from lorakit.cli.losses import percent, print_losses, ranks_of

    told = mixed.provenance["combined"]
    print_losses(ranks_of(*members), mixed, told["sites"], each=options.layers)
    error = told["relative_error"]
    what = "an exact sum" if error == 0.0 else f"{percent(error)} of the change is lost to the rank"
    if error and options.rank is None and options.method == "linear":
        what = f"rounded by {percent(error)}"
    print(
        f"{options.out}: {options.method}, {mixed.num_parameters:,} parameters, "
        f"{mixed.num_bytes / 1e6:.1f} MB; {what}"
    )
