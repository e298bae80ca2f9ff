"""Adapters of small language models, drawn or given, and what they compute."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from lorakit.core.spec import LoRASpec

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY = 3, 16, 4, 2, 4, 24, 11

#: the config of a base that all adapters here fit
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "tie_word_embeddings": True,
}
QWEN = {**LLAMA, "model_type": "qwen2"}

#: module → (d_out, d_in)
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
PATHS = {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in SHAPES.items()}


def site(
    generator: torch.Generator,
    path: str,
    rank: int = 2,
    scaling: float = 2.0,
    dtype: torch.dtype = torch.float32,
    **parts,
) -> LowRank:
    d_out, d_in = PATHS[path]
    A = torch.randn(rank, d_in, generator=generator).to(dtype)
    B = torch.randn(d_out, rank, generator=generator).to(dtype)
    return LowRank(A, B, scaling, **parts)


def adapter(seed: int = 0, **settings) -> Adapter:
    """All seven linears of the three blocks."""
    generator = torch.Generator().manual_seed(seed)
    sites = {path: site(generator, path, **settings) for path in PATHS}
    return Adapter(sites, LoRASpec(rank=2, alpha=4, targets=tuple(sorted(SHAPES))))


@st.composite
def adapters(draw, *, dtypes=(torch.float32, torch.bfloat16, torch.float16)) -> Adapter:
    """Mixed ranks, scales and dtypes over some of the linears."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    paths = draw(st.lists(st.sampled_from(sorted(PATHS)), min_size=1, max_size=5, unique=True))
    sites = {
        path: site(
            generator,
            path,
            draw(st.integers(1, 4)),
            draw(st.sampled_from([1.0, 2.0, 0.5, 32 / 3, 0.1, -1.5, 4 / 6**0.5])),
            draw(st.sampled_from(dtypes)),
        )
        for path in paths
    }
    return Adapter(sites, LoRASpec(rank=4, scaling=draw(st.sampled_from(RULES))))


RULES = ("alpha/r", "alpha/sqrt(r)")


def deltas(given: Adapter) -> dict[str, torch.Tensor]:
    """Path → ΔW in float64, by the definition."""
    return {
        path: site.scaling * site.B.double() @ site.A.double()
        for path, site in given.low_rank.items()
    }


def assert_same_changes(first: Adapter, second: Adapter, tolerance: float = 0.0) -> None:
    """The same sites and deltas.

    Args:
        tolerance: relative to the largest value of a delta.
    """
    expected, got = deltas(first), deltas(second)
    assert set(expected) == set(got)
    for path, delta in expected.items():
        error = (got[path] - delta).abs().max() / delta.abs().max()
        assert error <= tolerance, f"{path}: {error}"
