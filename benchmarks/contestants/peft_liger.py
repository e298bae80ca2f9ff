"""The plain PEFT loop with Liger's kernels, which need a GPU and the package liger-kernel."""

from __future__ import annotations

from typing import Any

from benchmarks.contestants import peft_loop
from benchmarks.contestants.peft_loop import step

__all__ = ["prepare", "step"]


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return peft_loop.prepare(task)
