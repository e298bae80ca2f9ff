"""What the trials compare is what is computed, not how a process lets its products be rounded."""

from __future__ import annotations

import torch

from lorakit import LoRASpec, attach
from lorakit.infer.packed import PackedModel
from lorakit.layers import Routing

from .test_packed import batch_of

EXACT = ({"ieee"}, {"none"}, {"ieee", "none"})


def test_layers_are_fused_where_products_may_be_rounded(tiny, reduced, precisions):
    model = tiny("llama").float()
    before = precisions()
    found = precisions(model)
    packed = PackedModel(model)
    assert packed.mode == "packed"
    assert packed.fused is not None, packed.notes
    assert found
    assert all(set(one) in EXACT for one in found)
    assert precisions() == before


def test_under_autocast_the_trial_is_under_it_too_and_layers_run_as_they_are(tiny):
    model = tiny("llama").bfloat16()
    for name, module in model.named_modules():  # as k-bit training prepares a model
        if name.endswith("norm"):
            module.float()
    handle = attach(model, LoRASpec(rank=2), "a")
    batch = batch_of((9, 2, 13, 5))
    with torch.autocast("cpu", torch.bfloat16):
        packed = PackedModel(model, handle)
        loss, _ = packed.supervised_loss(batch, Routing.uniform("a"))
    assert packed.mode == "packed"
    loss.backward()
    assert all(p.grad is not None for p in handle.parameters("a"))
    assert packed.fused is not None, packed.notes
    assert "autocast chooses the dtype of each operation" in packed.fused.reasons
