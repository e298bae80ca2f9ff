"""``--base`` and how it is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lorakit.cli.output import say

if TYPE_CHECKING:
    from lorakit.bases import Base


def add_base_arguments(
    parser: argparse.ArgumentParser,
    *,
    required: bool = True,
    weights: bool = True,
    task: bool = False,
) -> None:
    """Add ``--base`` and how to load it.

    Args:
        required: whether the command needs it (resuming a run reads it from the run).
        weights: whether the command loads the weights; without, only the tokenizer is read
            and the flags about weights are not offered.
        task: whether it takes models other than causal language models.
    """
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--base",
        required=required,
        metavar="B",
        help="hub id, folder, .gguf file, or smollm2 (SmolLM2-135M-Instruct)",
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    if task:
        from lorakit.cli.tasks import add_task_argument

        add_task_argument(group)
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the base's repository brings",
    )
    if not weights:
        return
    group.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="auto (default), cpu, cuda, cuda:1, mps",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
        help="type of the base's weights; auto (default) chooses for the processor and says why",
    )
    group.add_argument(
        "--quantize",
        choices=("nf4", "int8", "int4-torchao", "int8-torchao", "bf16"),
        help="store the base's linears in fewer bits: nf4 or int8 (bitsandbytes; nf4 is the "
        "smallest), int4-torchao or int8-torchao (torchao; scaled integers, their products exact "
        "where int8's own kernel rounds the inputs too), or bf16. All is computed in --dtype",
    )
    group.add_argument(
        "--allow-other-base",
        action="store_true",
        help="use an adapter although its base has other weights (shapes must fit)",
    )


def load_base_from(
    options: argparse.Namespace,
    *,
    task: Any = "causal-lm",
    load: Callable[..., Base] | None = None,
    quiet: bool = False,
) -> Base:
    """Load the base of these flags; says on stderr where it was put, and why.

    Args:
        load: what loads it, such as a kind's ``load_base``; by default that of ``task``.
        quiet: say nothing.
    """
    from lorakit.bases import load_base

    tell: Callable[[str], None] = (lambda text: None) if quiet else say
    base = (load or partial(load_base, task=task))(
        ref=options.base,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        say=tell,
    )
    placement = base.placement
    dtype = str(placement.dtype).removeprefix("torch.")
    tell(f"Base {options.base}: {dtype} on {placement.device} ({placement.reason})")
    for line in base.notes:
        tell(f"  {line}")
    return base
