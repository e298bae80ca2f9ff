"""PEFT's PiSSA and OLoRA begin where ours do."""

from __future__ import annotations

import copy

import pytest
import torch

from lorakit.core.spec import LoRASpec
from lorakit.formats import save_adapter
from lorakit.layers import attach
from tests import models

peft = pytest.importorskip("peft")

# transformers' own deprecation, which PEFT runs into
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_factors_and_what_is_left_of_the_base_are_pefts(init):
    torch.manual_seed(0)
    model = models.llama()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=init, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    handle = attach(model, LoRASpec(rank=3, alpha=6, targets=tuple(TARGETS), init=init))
    parameters = handle.parameters()
    paths = list(handle.snapshot().low_rank)
    assert len(paths) == 4
    for number, path in enumerate(paths):
        A, B = (p.detach() for p in parameters[2 * number : 2 * number + 2])
        layer = theirs.base_model.model.get_submodule(path)
        A_theirs = layer.lora_A["default"].weight.detach()
        B_theirs = layer.lora_B["default"].weight.detach()
        sign = (A * A_theirs).sum(1).sign()
        # theirs is a decomposition in float32, ours in float64
        torch.testing.assert_close(A * sign[:, None], A_theirs, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(B * sign, B_theirs, rtol=1e-3, atol=1e-5)
        left = model.get_submodule(path).weight - 2.0 * B @ A
        torch.testing.assert_close(left, layer.base_layer.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_reads_the_file_on_the_untouched_base(init, tmp_path):
    torch.manual_seed(0)
    model = models.llama()
    bare = copy.deepcopy(model)
    handle = attach(model, LoRASpec(rank=3, alpha=6, targets=tuple(TARGETS), init=init))
    models.randomize(handle, 0.1)
    ids = torch.randint(0, 100, (2, 8))
    save_adapter(handle.snapshot(), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(bare, str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = theirs(input_ids=ids).logits
        with handle.use(None):
            assert (expected - model(input_ids=ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
