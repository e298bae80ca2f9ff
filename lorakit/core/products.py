"""Products of float32 that are what they say, whatever the process has allowed for speed.

torch may be told to round the factors of float32 products to TF32 or bfloat16, for the process and
by autocast. That is a person's choice for training and generating; where two results are compared,
or a weight is written, it would be an error of 1e-3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def unrounded_products() -> Iterator[None]:
    """Let factors of float32 keep their bits: no TF32, no bfloat16 inside of a product."""
    kinds: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    matmuls: list[Any] = [getattr(kind, "matmul", None) for kind in kinds]
    backends = [one for one in matmuls if hasattr(one, "fp32_precision")]  # since torch 2.9
    each = [one.fp32_precision for one in backends]
    try:
        all_of_them = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for a backend, which that function cannot express
        all_of_them = None
    try:
        if all_of_them is None:
            for one in backends:
                one.fp32_precision = "ieee"
        elif all_of_them != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if all_of_them not in (None, "highest"):
            torch.set_float32_matmul_precision(all_of_them)
        for one, before in zip(backends, each, strict=True):
            if one.fp32_precision != before:
                one.fp32_precision = before


@contextlib.contextmanager
def exact_products(device_types: Iterable[str]) -> Iterator[None]:
    """As :func:`unrounded_products`, without autocast and without gradients."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device_type in device_types:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(unrounded_products())
        yield
