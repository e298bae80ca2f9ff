"""Make an adapter smaller, and say by how much it then differs.

Each layer keeps its largest singular values, the best that its rank can do. Give one of: a rank for
every layer; the share of each layer's energy (the squares of the singular values) that is kept; or
the parameters of the whole adapter, which then go where they keep the most. The error is
‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius), of the numbers as they are written.

--until-loss finds the smallest adapter whose loss on the data stays within what it says: +1%, or
+0.01 in nats a token. Half of the data's prompts choose, the other half confirm.

  lorakit compress runs/mine --rank 8 --out small
  lorakit compress runs/mine --energy 0.99 --out small
  lorakit compress runs/mine --parameters 200k --out small
  lorakit compress runs/mine --until-loss +1% --base smollm2 --data test.jsonl --out small
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import ADAPTER_HELP, adapter_path, check_not_merged, use_tokenizer
from lorakit.cli.bases import add_base_arguments, load_base_from
from lorakit.cli.flags import positive_int, probability
from lorakit.cli.output import add_json_argument, console, emit_json, say
from lorakit.cli.rows import add_data_arguments, as_learnt, data_spec
from lorakit.errors import InputError

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter
    from lorakit.workflows.until_loss import Search


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("adapter", metavar="ADAPTER", help=ADAPTER_HELP)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=positive_int, metavar="R", help="largest rank of every layer")
    size.add_argument(
        "--energy",
        type=probability,
        metavar="E",
        help="share of each layer's energy that is kept at least, such as 0.99",
    )
    size.add_argument(
        "--parameters",
        type=number_of_parameters,
        metavar="N",
        help="most parameters of the whole adapter: 200000, 200k, 1.5M",
    )
    size.add_argument(
        "--until-loss",
        type=allowance,
        metavar="+X%",
        help="the smallest whose loss on --data is at most so much above the whole adapter's",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the result (PEFT)")
    parser.add_argument("--layers", action="store_true", help="every layer, not a line a kind")
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="rows of --data to use; default: all"
    )
    add_base_arguments(parser, required=False)
    add_data_arguments(parser, required=False, learnt=True)
    add_json_argument(parser)


def number_of_parameters(text: str) -> int:
    """An argparse type: ``200000``, ``200k``, ``1.5M``, ``2B``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", text)
    factor = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
    number = float(found[1]) * factor[found[2].lower()] if found else 0.0
    if not 1 <= number < 2**63:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; expected a number of parameters, such as 200k or 1.5M"
        )
    return round(number)


def allowance(text: str) -> tuple[float, bool]:
    """An argparse type: ``+1%`` is (0.01, True), relative; ``+0.02`` is (0.02, False), in nats."""
    found = re.fullmatch(r"\+?(\d*\.?\d+)(%?)", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; expected how much the loss may rise, such as +1% or +0.02"
        )
    return (float(found[1]) / 100, True) if found[2] else (float(found[1]), False)


def run(options: argparse.Namespace) -> int:
    """Read, compress, write, show."""
    from lorakit.formats import load_adapter, save_adapter

    _check_flags(options)
    path = adapter_path(options.adapter)
    if path != options.adapter:
        say(f"{options.adapter} is a run folder; its adapter is {path}")
    adapter = load_adapter(path)
    search = None
    if options.until_loss is not None:
        search = _search(options, adapter)
        smaller = search.adapter
    else:
        from lorakit.algebra.compress import compress

        smaller = compress(
            adapter, rank=options.rank, energy=options.energy, parameters=options.parameters
        )
    folder = save_adapter(smaller, options.out)
    told = smaller.provenance["compressed"]
    if options.json:
        kept = {key: value for key, value in told.items() if key not in ("from", "sites")}
        emit_json(
            {
                "out": str(folder),
                **kept,
                "parameters_before": adapter.num_parameters,
                "bytes": smaller.num_bytes,
                "sites": told["sites"],
            }
        )
        return 0
    _print(options, adapter, smaller)
    if search is not None:
        _print_search(search)
    return 0


def _check_flags(options: argparse.Namespace) -> None:
    """Flags of the base and the data act only where a loss is measured."""
    if options.until_loss is None:
        given = [
            f"--{name.replace('_', '-')}"
            for name in (
                "base",
                "data",
                "limit",
                "revision",
                "quantize",
                "template",
                "system",
                "format",
            )
            if getattr(options, name) is not None
        ]
        if given:
            raise InputError(f"{', '.join(given)}: used only with --until-loss; leave it out")
    elif options.base is None or not options.data:
        raise InputError("--until-loss measures the loss; give --base and --data")


def _search(options: argparse.Namespace, adapter: Adapter) -> Search:
    from lorakit.bases import check_base, context_length
    from lorakit.cli.meter import meter
    from lorakit.data import load_data
    from lorakit.workflows.until_loss import compress_until_loss

    check_not_merged(options.base, {options.adapter: adapter}, allow_other=options.allow_other_base)
    base = load_base_from(options)
    use_tokenizer(base, {"adapter": adapter})
    for note in check_base(adapter, base.identity, allow_other=options.allow_other_base):
        say(f"Adapter: {note}")
    spec = as_learnt(data_spec(options), options, {options.adapter: adapter})
    data = load_data(spec, base.require_tokenizer(), context_length=context_length(base.model))
    for line in data.report.lines():
        say(line)
    increase, relative = options.until_loss
    with meter() as tell:
        return compress_until_loss(
            base.model,
            adapter,
            data,
            increase,
            relative=relative,
            limit=options.limit,
            on_progress=tell,
        )


def _print(options: argparse.Namespace, adapter: Adapter, smaller: Adapter) -> None:
    from lorakit.cli.losses import percent, print_losses, ranks_of, span_of_ranks

    told = smaller.provenance["compressed"]
    before = ranks_of(adapter)
    gone = sum(one["rank"] == 0 for one in told["sites"].values())
    print(
        f"{options.out}: rank {span_of_ranks(before, smaller)}, "
        f"{adapter.num_parameters:,} → {smaller.num_parameters:,} parameters, "
        f"{smaller.num_bytes / 1e6:.1f} MB; error {percent(told['relative_error'])}"
        + (f"; {gone} of {len(told['sites'])} sites are left out" if gone else "")
    )
    print_losses(before, smaller, told["sites"], each=options.layers)


def _print_search(search: Search) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("parameters", "error", "loss", "", "loss, confirming", ""):
        table.add_column(name, justify="right" if name else "left")
    for trial in search.trials:
        cells: list[Any] = [f"{trial.parameters:,}", f"{trial.relative_error:.1%}"]
        for loss, limit in (
            (trial.loss, search.limit),
            (trial.confirming, search.limit_confirming),
        ):
            cells += ["", ""] if loss is None else [f"{loss:.4f}", "✓" if loss <= limit else "×"]
        table.add_row(*cells, style="bold" if trial.parameters == search.chosen else None)
    out = console(stdout=True)
    out.print()
    out.print(table)
    out.print(
        f"[dim]loss in nats a token; at most {search.limit:.4f} on {search.rows} rows, "
        f"{search.limit_confirming:.4f} on the {search.rows_confirming} that confirm[/dim]"
    )
