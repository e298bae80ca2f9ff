"""The part of `lorakit merge` that writes one GGUF file: flags to a call, facts to lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.output import say
from lorakit.errors import BaseError, InputError, collected

if TYPE_CHECKING:
    from lorakit.bases.gguf_base import GgufBase
    from lorakit.core.adapter import Adapter

#: flags of safetensors files → what they are instead here
_FOREIGN = {
    "dtype": "--quantize f32, f16 or bf16",
    "in_memory": "nothing: tensors are streamed from every base",
    "untie": "nothing: a head that was the embedding gets a tensor of its own where it must",
}


def write(
    options: argparse.Namespace,
    named: dict[str, Adapter],
    weights: dict[str, float],
    compare: Callable[[argparse.Namespace, list[Any], Path], Any],
) -> dict[str, Any]:
    """Merge into the file; the facts of it.

    Args:
        compare: runs base + adapters and the model of a folder on text.

    Raises:
        InputError: a flag that cannot act.
    """
    foreign = [
        f"--{name.replace('_', '-')}: here it is {instead}"
        for name, instead in _FOREIGN.items()
        if getattr(options, name)
    ]
    if options.compute_dtype != "float32":
        foreign.append("--compute-dtype: sums are made in float32")
    if foreign:
        raise InputError(collected("These flags cannot act with --to gguf", foreign))
    from lorakit.cli.meter import meter
    from lorakit.workflows.merge.gguf import merge_to_gguf

    pairs = [(adapter, weights[name]) for name, adapter in named.items()]
    found: dict[str, Any] = {"text": None}

    def check(path: Path, parts: GgufBase) -> None:
        if options.verify:
            found["text"] = _on_text(options, pairs, path, compare)

    with meter() as tell:
        merged = merge_to_gguf(
            options.base,
            pairs,
            options.out,
            quantize=options.quantize,
            revision=options.revision,
            allow_other_base=options.allow_other_base,
            before_end=check,
            say=say,
            progress=lambda done, total: tell("MB read and written", done // 10**6, total // 10**6),
        )
    for note in merged.notes:
        say(f"note: {note}")
    return {
        "adapters": [{"name": name, "weight": weights[name]} for name in named],
        **vars(merged),
        "text": found["text"],
    }


def _on_text(
    options: argparse.Namespace,
    pairs: list[Any],
    path: Path,
    compare: Callable[[argparse.Namespace, list[Any], Path], Any],
) -> Any:
    """What transformers makes of the file, on text; ``None``, with the reason said, if nothing."""
    import shutil
    import tempfile

    from lorakit.bases.gguf_cache import write_model
    from lorakit.bases.gguf_file import read_header
    from lorakit.workflows.merge.check import available_bytes

    try:
        header = read_header(path)
    except BaseError as error:
        say(f"note: not compared on text: {error}")
        return None
    needed = 4 * header.num_elements
    free, memory = shutil.disk_usage(path.parent).free, available_bytes()
    if needed * 1.3 > free or (memory is not None and needed * 2.6 > memory):
        say(
            f"note: not compared on text: dequantised, the model takes {needed / 1e9:.1f} GB of "
            "disk and twice that of memory; its rows were compared"
        )
        return None
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
        try:
            write_model(path, header, Path(folder))
        except BaseError as error:
            say(f"note: not compared on text: {error}")
            return None
        return compare(options, pairs, Path(folder))


def show(facts: dict[str, Any]) -> None:
    """Print the facts."""
    checked = facts["checked"]
    print(f"{facts['path']}: {facts['num_bytes'] / 1e6:,.1f} MB, {facts['architecture']}")
    print(f"  changed   {facts['num_changed']} tensors; {facts['num_copied']} copied as they were")
    for kind, cost in facts["by_type"].items():
        print(
            f"  {kind:<9} {cost.num_tensors} tensors: the type adds an error of {cost.error:.3%}, "
            f"the adapters changed {cost.change:.3%}"
        )
    print(
        f"  checked   {checked.num_rows} rows in float64; the worst differs by {checked.worst:.0%} "
        "of what its type allows"
    )
