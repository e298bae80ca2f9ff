"""Products of float32 that are what they say, whatever the process has allowed for speed.

``torch.set_float32_matmul_precision`` and autocast let products round their factors to TF32 or
bfloat16. That is a person's choice for training and generating; where two results are compared, or
a weight is written, it would be an error of 1e-3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


@contextlib.contextmanager
def exact_products(device_types: Iterable[str]) -> Iterator[None]:
    """Let float32 products be float32: no TF32, no bfloat16, no autocast; and no gradients."""
    before = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device_type in device_types:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
