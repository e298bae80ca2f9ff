"""llama.cpp's names against its own table, and the order of rows against what it computes."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.gguf_names import (
    _BLOCK,
    _WHOLE,
    ARCHITECTURES,
    from_gguf_rows,
    gguf_name,
    interleaved_heads,
    module_path,
    norm_offset,
    row_order,
    to_gguf_rows,
)

_BY_NAME = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES.values())))
def test_names_are_those_of_the_gguf_package(architecture: str) -> None:
    table = gguf.get_tensor_name_map(_BY_NAME[architecture], 4)
    known = 0
    for path in (*_WHOLE, *(f"model.layers.3.{module}" for module in _BLOCK)):
        ours = gguf_name(path)
        assert ours is not None
        assert module_path(ours) == path
        theirs = table.get_name(path)  # None where this architecture has no such module
        assert theirs in (None, ours)
        known += theirs is not None
    assert known >= 11


def test_no_name() -> None:
    assert gguf_name("model.layers.0.mlp.experts") is None
    assert gguf_name("transformer.h.0.attn.c_attn") is None
    assert module_path("blk.0.ffn_gate_exps") is None
    assert module_path("rope_freqs") is None


@given(heads=st.integers(1, 5), half=st.integers(1, 4), width=st.integers(1, 3))
def test_rows_go_there_and_back(heads: int, half: int, width: int) -> None:
    value = torch.randn(heads * 2 * half, width)
    there = to_gguf_rows(value, heads)
    # feature i and i + half of a head, which transformers rotates together, lie beside each other
    for head in range(heads):
        for i in range(half):
            first = head * 2 * half + 2 * i
            assert torch.equal(there[first], value[head * 2 * half + i])
            assert torch.equal(there[first + 1], value[head * 2 * half + i + half])
    assert torch.equal(from_gguf_rows(there, heads), value)
    assert to_gguf_rows(value, 0) is value


def test_which_rows_are_interleaved() -> None:
    assert interleaved_heads("llama", "blk.3.attn_q.weight", 8, 2) == 8
    assert interleaved_heads("llama", "blk.3.attn_k", 8, 2) == 2
    assert interleaved_heads("llama", "blk.3.attn_k.bias", 8, 2) == 2
    assert interleaved_heads("llama", "blk.3.attn_q_norm.weight", 8, 2) == 0
    assert interleaved_heads("llama", "blk.3.attn_v.weight", 8, 2) == 0
    assert interleaved_heads("qwen2", "blk.3.attn_q.weight", 8, 2) == 0
    with pytest.raises(ValueError, match="10 rows do not split into 4 heads"):
        row_order(10, 4)


def test_norms_of_gemma() -> None:
    assert norm_offset("gemma", "blk.0.attn_norm.weight") == 1.0
    assert norm_offset("gemma", "blk.0.attn_q.weight") == 0.0
    assert norm_offset("llama", "output_norm.weight") == 0.0
