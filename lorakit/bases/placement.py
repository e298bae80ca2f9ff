"""Device and dtype, chosen for the processor at hand, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.errors import BaseError

#: accepted spelling → dtype
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Placement:
    """Where a base runs, and in which dtype its weights are."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    """One sentence without a full stop, ready to be printed."""


@dataclass(frozen=True)
class ProcessorFacts:
    """What this machine computes with."""

    cuda: tuple[tuple[str, bool], ...] = ()
    """One (name, has bfloat16 units) for each visible CUDA or ROCm device."""
    mps: bool = False
    cpu_flags: frozenset[str] = frozenset()
    """The processor's features as ``/proc/cpuinfo`` lists them; empty where there is none."""


def processor_facts() -> ProcessorFacts:
    """Look at the machine."""
    cuda = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            # on ROCm the numbers mean something else; all cards that torch supports there have it
            native = torch.version.hip is not None or properties.major >= 8
            cuda.append((properties.name, native))
    return ProcessorFacts(tuple(cuda), torch.backends.mps.is_available(), _cpu_flags())


def choose_placement(
    device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> Placement:
    """Choose device and dtype, or check the ones that were asked for.

    Args:
        device: ``"auto"``, or torch's name of a device such as ``"cuda:1"``.
        dtype: ``"auto"``, a torch dtype or its name; ``"bf16"``, ``"fp16"`` and ``"fp32"`` are
            understood too.

    Raises:
        BaseError: there is no such device or dtype here.
    """
    facts = processor_facts()
    where, why_there = _device(device, facts)
    if isinstance(dtype, str) and dtype == "auto":
        kind, why_so = _best_dtype(where, facts)
    else:
        kind, why_so = _named_dtype(dtype, where), "the dtype was asked for"
    reason = "; ".join(part for part in (why_there, why_so) if part)
    return Placement(where, kind, reason)


def _device(device: str | torch.device, facts: ProcessorFacts) -> tuple[torch.device, str]:
    if isinstance(device, str) and device == "auto":
        if facts.cuda:
            return torch.device("cuda", 0), f"the fastest device here is {facts.cuda[0][0]}"
        if facts.mps:
            return torch.device("mps"), "the fastest device here is Apple's GPU"
        return torch.device("cpu"), "no GPU here"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BaseError(
            f"device is {device!r}; it must be auto, cpu, cuda, cuda:N or mps. Here: "
            + _available(facts)
        ) from error
    there = {"cpu": True, "cuda": len(facts.cuda) > (chosen.index or 0), "mps": facts.mps}
    if not there.get(chosen.type, _other_accelerator(chosen)):
        raise BaseError(f"There is no device {device} on this machine. Here: {_available(facts)}")
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", 0)
    return chosen, ""


def _other_accelerator(device: torch.device) -> bool:
    """Whether torch can use a device of a kind that is not known here, such as ``"xpu"``."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError):
        return False
    return device.type != "meta"


def _available(facts: ProcessorFacts) -> str:
    cards = [f"cuda:{i} ({name})" for i, (name, _) in enumerate(facts.cuda)]
    return ", ".join(["cpu", *cards, *(["mps"] if facts.mps else [])])


def _best_dtype(device: torch.device, facts: ProcessorFacts) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        name, has_bfloat16 = facts.cuda[device.index or 0]
        if has_bfloat16:
            return torch.bfloat16, f"{name} computes bfloat16 natively"
        return (
            torch.float32,
            f"{name} has no bfloat16; --dtype float16 halves the memory, but only to generate",
        )
    if device.type == "mps":
        return (
            torch.float32,
            "float32 is exact on every Apple GPU (--dtype bfloat16 halves the memory on an M2 or "
            "newer)",
        )
    if device.type == "cpu":
        return torch.float32, _why_float32(facts.cpu_flags)
    return torch.bfloat16, f"bfloat16 is the usual dtype on {device.type}"


def _why_float32(flags: frozenset[str]) -> str:
    """Why a CPU computes in float32; the numbers are in docs/bases.md."""
    if "amx_bf16" in flags:
        return "exact; --dtype bfloat16 halves the weights, and was a quarter faster where tried"
    if flags:  # without a matrix unit, also where there are instructions for bfloat16
        return "faster on this processor than bfloat16"
    return "fast on every processor"


def _named_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, str):
        found = _DTYPES.get(dtype.removeprefix("torch."))
    else:
        found = dtype if dtype in _DTYPES.values() else None
    if found is None:
        raise BaseError(f"dtype is {dtype!r}; it must be auto or one of {', '.join(_DTYPES)}")
    if device.type == "mps" and found is torch.float64:
        raise BaseError("Apple's GPU has no float64. Use float32, or --device cpu.")
    return found


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
