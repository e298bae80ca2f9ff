"""What each program needs: ``--for`` picks the format and the shape, and refuses the rest.

A program that meets something it does not know drops it, mostly without a word, or stops. What is
refused here was seen to be dropped or to crash (``docs/formats.md``); merging the adapter into its
base is the way out each time.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.core.adapter import Adapter
from lorakit.errors import FormatError, collected
from lorakit.formats.format import Hints
from lorakit.formats.portable import MERGE, fold, not_plain, one_rank


@dataclass(frozen=True)
class Runtime:
    """One program."""

    title: str
    format: str
    """Name of the format that it reads."""
    kinds: tuple[str, ...]
    """Kinds of sites that it applies."""
    ranks: tuple[int, ...] = ()
    """Ranks that it takes; empty where any will do. In PEFT's format all sites get one rank."""
    dora: bool = False
    folds: bool = True
    """Whether the scale is folded here; some formats do it themselves."""


#: vLLM's choices of ``max_lora_rank``
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

RUNTIMES = {
    "vllm": Runtime("vLLM", "peft", ("linear", "embedding"), ranks=_VLLM_RANKS),
    "openvino": Runtime("OpenVINO GenAI", "peft", ("linear",)),
    "mistralrs": Runtime("mistral.rs", "peft", ("linear",)),
    "llama.cpp": Runtime("llama.cpp", "gguf", ("linear",), folds=False),
    "ollama": Runtime("Ollama", "gguf", ("linear",), folds=False),
    "mlx": Runtime("MLX", "mlx", ("linear", "embedding"), dora=True, folds=False),
    "onnxruntime": Runtime("ONNX Runtime GenAI", "onnx", ("linear",), folds=False),
    "diffusers": Runtime("diffusers", "diffusers", ("linear", "conv")),
}


def get(name: str) -> Runtime:
    """A program by its name.

    Raises:
        FormatError: there is none of this name.
    """
    if name not in RUNTIMES:
        raise FormatError(f"{name!r} is no program known here; they are {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def shape_for(
    name: str, adapter: Adapter, to: str | None, hints: Hints
) -> tuple[Adapter, str, list[str]]:
    """The adapter as a program needs it, the format to write, and what was done.

    Raises:
        FormatError: there is no such program here, it does not read the format ``to``, or it
            would drop or crash on something. All is listed.
    """
    runtime = get(name)
    if to not in (None, runtime.format):
        raise FormatError(f"{runtime.title} takes the format {runtime.format}, not {to}")
    problems = _refused(runtime, adapter)
    rank, too_large = _rank(runtime, adapter)
    if problems or too_large:
        raise FormatError(
            collected(f"{runtime.title} would not use all of this adapter", problems + too_large)
            + f"\nFor what it does not use: {MERGE}."
        )
    if not runtime.folds:
        return adapter, runtime.format, []
    folded, notes = fold(adapter, rank=rank)
    return folded, runtime.format, notes


def _refused(runtime: Runtime, adapter: Adapter) -> list[str]:
    """A line for each site that the program would drop or crash on."""
    # where all sites are DoRA, MLX builds DoRA layers
    dora = runtime.dora and all(s.magnitude is not None for s in adapter.low_rank.values())
    problems = not_plain(adapter, dora=dora)
    return problems + [
        f"{path}: is a site of the kind {site.kind}, which it does not apply"
        for path, site in adapter.low_rank.items()
        if site.kind not in runtime.kinds
    ]


def _rank(runtime: Runtime, adapter: Adapter) -> tuple[int | None, list[str]]:
    """The rank to pad to, or what is wrong with the adapter's."""
    largest = one_rank(adapter)
    if runtime.format != "peft" or largest is None:
        return None, []
    if not runtime.ranks:
        return largest, []
    fitting = [rank for rank in runtime.ranks if rank >= largest]
    if fitting:
        return min(fitting), []
    return None, [
        f"its largest rank is {largest}; {runtime.title} takes up to {max(runtime.ranks)}. "
        f"`lorakit compress --rank {max(runtime.ranks)}` makes it smaller"
    ]
