"""What the trials compare is what is computed, not how a process lets its products be rounded."""

from __future__ import annotations

import torch

from lorakit.infer.packed import PackedModel


def test_layers_are_fused_where_products_may_be_rounded(tiny, reduced, precisions):
    model = tiny("llama").float()
    found = precisions(model)
    packed = PackedModel(model)
    assert packed.mode == "packed"
    assert packed.fused is not None, packed.notes
    assert set(found) == {"highest"}
    assert torch.get_float32_matmul_precision() == "medium"
