"""Adapters drawn for the algebra, and what they do to each weight, densely and in float64.

The oracle below is written from the table in ``core.sites`` alone; it shares no code with what it
judges.
"""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from lorakit.core.spec import LoRASpec

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
seeds = st.integers(0, 2**32)
weights = st.sampled_from([1.0, 0.7, 0.3, -1.0, 0.5, 2.0, 1 / 3, -0.01]) | st.floats(0.01, 5)

#: path → kind, inputs (with the kernel), outputs, groups
PLACES = {
    "model.layers.0.q_proj": ("linear", (7,), 5, 1),
    "model.layers.0.up_proj": ("linear", (4,), 9, 1),
    "model.layers.1.q_proj": ("linear", (7,), 5, 1),
    "embed": ("embedding", (11,), 6, 1),
    "conv": ("conv", (3, 3, 2), 6, 1),
    "grouped": ("conv", (4, 3), 6, 2),
}


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def site_at(
    path: str,
    rank: int,
    seed: int,
    *,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
) -> LowRank:
    """A site of ``rank`` directions in each group."""
    kind, inputs, outputs, groups = PLACES[path]
    kernel = [1] * (len(inputs) - 1)
    A = numbers(seed, rank * groups, *inputs, dtype=dtype)
    B = numbers(seed + 1, outputs, rank, *kernel, dtype=dtype)
    own = numbers(seed + 2, outputs, dtype=dtype) if bias else None
    return LowRank(A, B, scaling, kind, own)


@st.composite
def adapters(
    draw, *, paths: tuple[str, ...] | None = None, most: int = 4, biases: bool = False
) -> Adapter:
    """Any ranks, dtypes and scalings, at some of the places."""
    chosen = paths or draw(st.lists(st.sampled_from(sorted(PLACES)), min_size=1, unique=True))
    rule = draw(st.sampled_from(["alpha/r", "alpha/sqrt(r)"]))
    sites = {}
    for path in chosen:
        rank = draw(st.integers(1, most))
        alpha = draw(st.sampled_from([1.0, 8.0, 16.0, 32.0, -3.0, 100 / 3]))
        total = rank * PLACES[path][3]
        scaling = alpha / (total if rule == "alpha/r" else math.sqrt(total))
        dtype = draw(st.sampled_from(DTYPES))
        bias = biases and draw(st.booleans())
        sites[path] = site_at(path, rank, draw(seeds), scaling=scaling, dtype=dtype, bias=bias)
    return Adapter(sites, LoRASpec(targets=tuple(chosen), scaling=rule))


def change(adapter: Adapter, path: str) -> torch.Tensor:
    """ΔW [outputs, inputs·kernel], entry by entry from the definition; zero where it has none."""
    _, inputs, outputs, groups = PLACES[path]
    width = math.prod(inputs)
    found = torch.zeros(outputs, width, dtype=torch.float64)
    site = adapter.sites.get(path)
    if site is None:
        return found
    A = site.A.double().reshape(site.A.shape[0], width)
    B = site.B.double().reshape(outputs, -1)
    per_group, directions = outputs // groups, B.shape[1]
    for out in range(outputs):
        first = (out // per_group) * directions
        for k in range(directions):
            found[out] += B[out, k] * A[first + k]
    return found * site.scaling


def bias_of(adapter: Adapter, path: str) -> torch.Tensor:
    """What the site adds to the module's bias [outputs]."""
    site = adapter.sites.get(path)
    if site is None or site.bias is None:
        return torch.zeros(PLACES[path][2], dtype=torch.float64)
    return site.bias.double() * site.scaling


def close(found: torch.Tensor, expected: torch.Tensor, limit: float, size: float | None = None):
    """Largest difference of two tensors, relative to the largest number."""
    size = float(expected.abs().max()) if size is None else size
    assert float((found - expected).abs().max()) <= limit * max(size, 1e-300)
