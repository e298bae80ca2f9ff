"""Bases stored in fewer bits, and optimizers whose averages are: training to merging, on a CPU."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit
from lorakit.bases import load_base
from lorakit.bases.half import HalfLinear, store_half_
from lorakit.bases.stored import Packed4bit, packed_weight
from lorakit.core.spec import LoRASpec
from lorakit.data import DataSpec, Example, load_data, pack
from lorakit.errors import BaseError, InputError, Interrupted, SpecError
from lorakit.evaluate import loss as evaluate_loss
from lorakit.formats import load_adapter
from lorakit.infer import PackedModel
from lorakit.layers import attach
from lorakit.layers.dense import to_dense_
from lorakit.train import Origin, Trainer, TrainSettings
from lorakit.train.settings import Facts
from tests.train import tiny
from tests.train.test_resume import Signal, assert_same, outcome

SPEC = LoRASpec(rank=16, alpha=32)
STORED = [None, "bf16", "nf4", "int8", "int4-torchao", "int8-torchao"]
LIBRARY = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "int4-torchao": "torchao",
    "int8-torchao": "torchao",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base 64 wide: bitsandbytes' blocks of 64 fit its rows."""
    return tiny.write_base(tmp_path_factory.mktemp("wide"), width=64)


def loaded(folder, stored):
    if stored in LIBRARY:
        pytest.importorskip(LIBRARY[stored])
    return load_base(str(folder), device="cpu", dtype="float32", quantize=stored)


def trainer(folder, base, stored, out, callbacks=(), **settings):
    data_file = tiny.write_rows(out.parent / "data.jsonl", tiny.rows(60))
    spec = DataSpec(path=str(data_file))
    origin = Origin(
        {"ref": str(folder), "device": "cpu", "dtype": "float32", "quantize": stored}, spec
    )
    data = load_data(spec, base.tokenizer, context_length=64)
    defaults = {"steps": 12, "batch_size": 4, "lr": 5e-3, "eval_every": 6, "samples": 1}
    chosen = TrainSettings(**{**defaults, **settings})
    return Trainer(base, SPEC, data, chosen, out, origin=origin, callbacks=callbacks)


@pytest.mark.parametrize("stored", STORED)
def test_training_evaluation_merge_and_save(folder, stored, tmp_path):
    base = loaded(folder, stored)
    made = trainer(folder, base, stored, tmp_path / "run")
    result = made.run()
    assert result.base_loss is not None
    assert result.best_loss < result.base_loss - 0.05
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    [fused] = [r["text"] for r in rows if "ran fused" in r.get("text", "")]
    assert "others" not in fused
    # the adapter's file, on the base loaded again, evaluates to the same
    again = loaded(folder, stored)
    adapter = load_adapter(result.adapter)
    data, indices = made._validation
    handle = attach(again.model, adapter, "a")
    found = evaluate_loss(again.model, handle, "a", data, indices)
    assert found.loss == pytest.approx(result.best_loss, abs=2e-4)
    handle.detach()
    # merged into the stored weights: what storing them again costs, and no more
    lorakit.merge(again.model, adapter)
    merged = evaluate_loss(again.model, None, None, data, indices)
    assert merged.loss == pytest.approx(result.best_loss, abs=0.05)
    # saved as an ordinary model
    to_dense_(again.model, torch.float32)
    assert all(type(m) is not HalfLinear for m in again.model.modules())
    again.model.save_pretrained(tmp_path / "saved")
    again.tokenizer.save_pretrained(tmp_path / "saved")
    plain = load_base(str(tmp_path / "saved"), device="cpu", dtype="float32")
    saved = evaluate_loss(plain.model, None, None, data, indices)
    assert saved.loss == pytest.approx(merged.loss, abs=2e-3 if stored != "int8" else 0.05)


@pytest.mark.parametrize("stored", STORED[1:])
def test_fused_layers_agree_with_the_plain_path(folder, stored):
    """int8's own kernel also rounds the activations, which the fused path does not."""
    base = loaded(folder, stored)
    handle = attach(base.model, SPEC, "a", trainable=True, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in handle.parameters("a"):
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    example = tiny_batch(base)
    found = {}
    for fused in (True, False):
        packed = PackedModel(base.model, handle, fused=fused, mode="packed")
        assert (packed.fused is not None) is fused
        loss, _ = packed.supervised_loss(example, lorakit.layers.Routing.uniform("a"))
        gradients = torch.autograd.grad(loss, handle.parameters("a"))
        found[fused] = loss.detach(), torch.cat([g.flatten() for g in gradients])
    bar = 0.06 if stored == "int8" else 1e-4
    assert (found[True][0] - found[False][0]).abs() <= bar * found[False][0]
    error = (found[True][1] - found[False][1]).norm() / found[False][1].norm()
    assert error <= bar
    assert stored != "int8" or error > 1e-4


def test_int8_columns_that_depend_on_all_rows_do_not_keep_it_from_being_packed(folder):
    """LLM.int8 takes columns with large values of any row out of all rows."""
    base = loaded(folder, "int8")
    handle = attach(base.model, SPEC, "a", trainable=True)
    for layer in base.model.model.layers:
        layer.input_layernorm.weight.data[:4] *= 6
        layer.post_attention_layernorm.weight.data[:4] *= 6
    plain = PackedModel(base.model, handle, fused=False)
    assert plain.mode != "packed"
    assert "batches are not packed" in plain.notes[0]
    fused = PackedModel(base.model, handle)
    assert fused.mode == "packed"
    assert fused.fused is not None
    assert fused.notes == []


def tiny_batch(base):
    ids = base.tokenizer("w1 w2 w3 w4 w5 w6 w7")["input_ids"]
    rows = np.array(ids, dtype=np.int32)
    return pack([Example(rows, np.ones(len(rows), dtype=bool), 1, "a", 0)] * 2)


def test_half_linears_compute_in_the_dtype_of_their_input(folder):
    base, full = loaded(folder, "bf16"), loaded(folder, None)
    base.model.requires_grad_(False)
    halves = [m for m in base.model.modules() if type(m) is HalfLinear]
    assert len(halves) == 14
    others = {p.dtype for n, p in base.model.named_parameters() if "_proj" not in n}
    assert others == {torch.float32}
    assert {m.weight.dtype for m in halves} == {torch.bfloat16}
    assert base.model.lm_head.weight.dtype == torch.float32
    assert base.identity.storage == "bfloat16"
    assert base.identity.shapes == full.identity.shapes
    linear = halves[0]
    x = torch.randn(5, 64, requires_grad=True)
    y = linear(x)
    assert y.dtype == torch.float32
    wide = linear.weight.detach().float()
    torch.testing.assert_close(y, x @ wide.T)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, wide.sum(0).expand(5, -1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    assert all(t.dtype == torch.bfloat16 for t in kept), "no wide copy waits for the backward"
    with pytest.raises(BaseError, match="computes in a wider dtype"):
        load_base(str(folder), device="cpu", dtype="bfloat16", quantize="bf16")


def test_a_trained_weight_of_a_half_linear_gets_its_gradient():
    linear = nn.Linear(6, 4)
    store_half_(nn.Sequential(linear), torch.float32)
    linear.weight.requires_grad_()
    x = torch.randn(3, 6)
    linear(x).square().sum().backward()
    wide = linear.weight.detach().float().requires_grad_()
    (x @ wide.T + linear.bias.detach()).square().sum().backward()
    assert linear.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(linear.weight.grad.float(), wide.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_four_bits_are_unpacked_by_pairs(dtype):
    """Against one look-up a number, also where the last block is not whole."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    dense = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    weight = nn.Parameter(packed, requires_grad=False)
    weight.quant_state = state
    found = Packed4bit(weight, state).dense(dtype)
    byte = packed.flatten().long()
    code = state.code.to(dtype)[torch.stack([byte >> 4, byte & 15], 1).flatten()][: dense.numel()]
    scale = state.absmax.to(dtype).repeat_interleave(64)[: dense.numel()]
    assert torch.equal(found.flatten(), code * scale)
    assert packed_weight(nn.Linear(3, 3)) is None


def test_eight_bit_averages_train_and_resume_exactly(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"optimizer": "adamw8bit", "checkpoint_every": 3, "samples": 0}
    whole = trainer(folder, loaded(folder, None), None, tmp_path / "whole", **options)
    result = whole.run()
    assert result.best_loss < result.base_loss - 0.05
    expected = outcome(tmp_path / "whole")
    cut = trainer(
        folder, loaded(folder, None), None, tmp_path / "cut",
        callbacks=[Signal(7, signal.SIGINT)], **options,
    )  # fmt: skip
    with pytest.raises(Interrupted):
        cut.run()
    stored = load_file(sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1])
    bytes_ = {n: t for n, t in stored.items() if n.startswith("job.optimizer.state")}
    assert {t.dtype for t in bytes_.values()} == {torch.uint8}
    Trainer.resume(tmp_path / "cut")
    assert_same(tmp_path / "cut", expected)


def test_optimizers_that_cannot_act():
    with pytest.raises(SpecError, match=r"paged-adamw8bit.*use adamw8bit"):
        TrainSettings(optimizer="paged-adamw8bit").resolve(Facts(num_examples=50))
    pytest.importorskip("bitsandbytes")
    from lorakit.train.job import _eight_bit

    with pytest.raises(InputError, match="float64"):
        _eight_bit([], torch.float64, TrainSettings(optimizer="adamw8bit"))
