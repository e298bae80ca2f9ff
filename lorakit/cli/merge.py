"""Merge adapters into their base: a whole model, written tensor by tensor.

A checkpoint larger than the memory merges too. The layout of its files, their names and dtypes
stay; sums are made in float32 and cast once. Rows of every changed tensor are computed again in
float64, and where the model fits into memory, base + adapter and the merged model read a text:
the largest difference of their logits and both perplexities are printed. An interrupted merge
leaves no half model.

  lorakit merge --base smollm2 --adapter runs/mine --out merged
  lorakit merge --base B --adapter a=0.7 --adapter b=0.3 --out merged --dtype bfloat16
  lorakit merge --base B --adapter runs/mine --out merged --data test.jsonl
  lorakit merge --base B --adapter runs/mine --to gguf --out model.gguf --quantize q8_0
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import add_adapter_arguments, check_not_merged, load_adapters
from lorakit.cli.bases import add_base_arguments
from lorakit.cli.output import add_json_argument, emit_json, plural, printable_stdout, say
from lorakit.cli.rows import add_data_arguments, data_spec
from lorakit.errors import InputError

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_base_arguments(parser, weights=False)
    add_adapter_arguments(parser)
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="a folder that is new or empty; with --to gguf, a file",
    )
    parser.add_argument(
        "--to",
        choices=("safetensors", "gguf"),
        default="safetensors",
        help="what is written; default: safetensors, in the layout of the base; gguf: one file "
        "for llama.cpp and Ollama, of a .gguf base or of a Llama, Mistral, Qwen 2 or 3 folder",
    )
    parser.add_argument(
        "--quantize",
        metavar="TYPE",
        help="with --to gguf, the type of all matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or "
        "q4_0; default: as each is stored",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of every float tensor; default: as each is stored"
    )
    parser.add_argument(
        "--compute-dtype",
        choices=("float32", "float64"),
        default="float32",
        help="what the sums are made in; default float32",
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="load the base, merge, and let transformers save it: for files whose tensors are "
        "not one to a parameter, and for quantised bases, which become dense; done by itself where "
        "an adapter brings a head that the files do not have",
    )
    parser.add_argument(
        "--untie",
        action="store_true",
        help="give an embedding that is tied to the head a tensor of its own where only one of "
        "them is adapted",
    )
    parser.add_argument(
        "--allow-other-base",
        action="store_true",
        help="merge an adapter although its base has other weights (shapes must fit)",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check what was written; default: yes",
    )
    add_data_arguments(parser, required=False)
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Merge, verify, print."""
    if not options.adapter:
        raise InputError("nothing to merge; give --adapter, again for several")
    if options.data and not options.verify:
        raise InputError("--data is the text of the check, which --no-verify leaves out")
    named = load_adapters(options.adapter)
    weights = {one.name: 1.0 if one.weight is None else one.weight for one in options.adapter}
    check_not_merged(options.base, named, allow_other=options.allow_other_base, weights=weights)
    facts = _WRITERS[options.to](options, named, weights)
    if options.json:
        emit_json(facts)
    else:
        printable_stdout()
        _PRINTERS[options.to](facts)
    return 0


def _to_safetensors(
    options: argparse.Namespace, named: dict[str, Adapter], weights: dict[str, float]
) -> dict[str, Any]:
    import torch

    from lorakit.cli.meter import meter

    if options.quantize is not None:
        raise InputError(
            "--quantize cannot act here; it is the type of a GGUF file (--to gguf). For another "
            "dtype give --dtype"
        )
    from lorakit.workflows.merge.files import merge_files
    from lorakit.workflows.merge.heads import trained_for, why_in_memory
    from lorakit.workflows.merge.memory import merge_in_memory

    pairs = [(adapter, weights[name]) for name, adapter in named.items()]
    found: dict[str, Any] = {"text": None}
    kind = trained_for(named)

    def compare(folder: Path) -> None:
        if options.verify and kind is not None:
            say(f"note: not compared on text: the adapter was trained for {kind.name}")
        elif options.verify:
            found["text"] = _compare(options, pairs, folder)

    # without the weights nothing runs the base's own code; rows are those of files
    more: dict[str, Any] = {"verify": options.verify}
    why = None if kind is None else why_in_memory(options.base, kind, named)
    if why is not None and not options.in_memory:
        say(f"note: merged in memory, and saved by transformers: {why}")
    in_memory = options.in_memory or why is not None
    if in_memory:
        more = {"trust_remote_code": options.trust_remote_code}
        if kind is not None:
            more["load"] = kind.load_base
    write: Any = merge_in_memory if in_memory else merge_files
    with meter() as tell:
        merged = write(
            options.base,
            pairs,
            options.out,
            revision=options.revision,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            compute_dtype=getattr(torch, options.compute_dtype),
            allow_other_base=options.allow_other_base,
            untie=options.untie,
            **more,
            before_end=compare,
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


def _compare(options: argparse.Namespace, pairs: list[Any], folder: Path) -> Any:
    """Both models on text; ``None``, with the reason said, where that is not possible."""
    from lorakit.bases import load_tokenizer
    from lorakit.data import load_data
    from lorakit.errors import BaseError
    from lorakit.workflows.merge.check import TEXT, compare_merged, fitting_dtype

    dtype, why = fitting_dtype(folder)
    if why:
        say(f"note: {why}")
    if dtype is None:
        return None
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
        if options.data:
            data = load_data(data_spec(options), tokenizer)
            texts = [data[i].ids.tolist() for i in range(min(len(data), 64))]
        else:
            texts = [tokenizer(TEXT)["input_ids"]]
        say("Comparing base + adapters with the merged model on text …")
        return compare_merged(
            options.base,
            pairs,
            folder,
            texts,
            dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
    except BaseError as error:
        reason = str(error).replace(str(folder), "the merged model")  # it has no name yet
        say(f"note: not compared on text: {reason}")
        return None


def _print(facts: dict[str, Any]) -> None:
    print(
        f"{facts['path']}: {facts['num_bytes'] / 1e6:,.1f} MB in "
        + plural(len(facts["shards"]), "file")
    )
    print(f"  changed   {facts['num_changed']} of {facts['num_tensors']} tensors")
    if facts["rows_checked"]:
        print(
            f"  checked   {facts['rows_checked']} rows in float64; the worst differs by "
            f"{facts['worst_row']:.0%} of what rounding allows"
        )
    _print_text(facts["text"])


def _print_text(text: Any) -> None:
    if text is not None:
        print(
            f"  on text   {text.tokens} tokens, computed in {text.dtype}: largest logit difference "
            f"{text.largest_logit_difference:.2e}, same likeliest token at {text.same_choice:.1%}"
        )
        print(
            f"            perplexity {text.perplexity_adapter:.4f} base + adapters, "
            f"{text.perplexity_merged:.4f} merged"
        )


def _to_gguf(
    options: argparse.Namespace, named: dict[str, Adapter], weights: dict[str, float]
) -> dict[str, Any]:
    from lorakit.cli import merge_gguf

    return merge_gguf.write(options, named, weights, _compare)


def _print_gguf(facts: dict[str, Any]) -> None:
    from lorakit.cli import merge_gguf

    merge_gguf.show(facts)
    _print_text(facts["text"])


#: --to → what writes it and gives the facts that are printed
_WRITERS = {"safetensors": _to_safetensors, "gguf": _to_gguf}
#: --to → what prints them
_PRINTERS = {"safetensors": _print, "gguf": _print_gguf}
