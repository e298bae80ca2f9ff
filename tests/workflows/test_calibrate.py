"""EVA's and LoRA-GA's statistics against plain autograd, and LoftQ on real 4-bit weights."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from lorakit.bases import load_base
from lorakit.core.spec import LoRASpec
from lorakit.data import DataSpec, Example, load_data, pack
from lorakit.errors import SpecError, TargetError
from lorakit.infer import PackedModel
from lorakit.layers import Routing, attach
from lorakit.layers.handle import handle_of
from lorakit.workflows import calibrate as workflow
from lorakit.workflows.calibrate import calibrate
from tests.train import tiny

SPEC = LoRASpec(rank=3, alpha=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """64 wide, which bitsandbytes' 4-bit kernels ask for."""
    folder = tiny.write_base(tmp_path_factory.mktemp("wide"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_pretrained(
        folder, hidden_size=64, intermediate_size=128, head_dim=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.rows(20))


@pytest.fixture
def base(folder):
    found = load_base(str(folder), device="cpu", dtype="float32")
    found.model.double()
    return found


@pytest.fixture
def examples(base, data_file) -> list[Example]:
    data = load_data(DataSpec(path=(str(data_file),)), base.tokenizer, context_length=64)
    return [data[i] for i in range(12)]


def gradients_and_inputs(base, examples):
    """Of each linear's weight, by autograd on the stock model, one example at a time."""
    model = copy.deepcopy(base.model)
    linears = {p: m for p, m in model.named_modules() if p.endswith("_proj")}
    inputs = {p: [] for p in linears}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, p=p: inputs[p].append(a[0][0].detach()))
        for p, m in linears.items()
    ]
    for m in linears.values():
        m.weight.requires_grad_(True)
    for example in examples:
        batch = pack([example])
        logits = model(input_ids=batch.input_ids).logits[0, batch.supervised]
        F.cross_entropy(logits, batch.labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {p: m.weight.grad for p, m in linears.items()}, {
        p: torch.cat(rows) for p, rows in inputs.items()
    }


@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_lora_ga_begins_along_the_gradient_of_the_weights(base, examples, budget, monkeypatch):
    monkeypatch.setattr(workflow, "GRADIENT_BYTES", budget)
    monkeypatch.setattr(workflow, "_TOKENS", 40)
    gradients, _ = gradients_and_inputs(base, examples)
    before = copy.deepcopy(base.model.state_dict())
    start = calibrate(base, dataclasses.replace(SPEC, init="lora-ga"), examples)
    assert handle_of(base.model) is None
    assert all(p.grad is None for p in base.model.parameters())
    assert all(torch.equal(t, before[k]) for k, t in base.model.state_dict().items())
    assert start.subtracted
    for path, site in start.adapter.low_rank.items():
        U, _, Vt = np.linalg.svd(gradients[path].numpy(), full_matrices=False)
        scale = gradients[path].shape[0] ** 0.25 / 4
        # the stock model computes its norms and rotations in float32
        agree = np.abs(site.A.numpy() @ Vt.T)[:, :3] / scale
        np.testing.assert_allclose(agree, np.eye(3), atol=1e-4, err_msg=path)
        agree = np.abs(site.B.T.numpy() @ U)[:, 3:6] / scale
        np.testing.assert_allclose(agree, np.eye(3), atol=1e-4, err_msg=path)


def test_eva_begins_with_the_directions_of_the_inputs(base, examples, monkeypatch):
    monkeypatch.setattr(workflow, "_TOKENS", 40)
    _, inputs = gradients_and_inputs(base, examples)
    start = calibrate(base, dataclasses.replace(SPEC, init="eva"), examples)
    assert not start.subtracted
    for path, site in start.adapter.low_rank.items():
        _, _, Vt = np.linalg.svd(inputs[path].numpy(), full_matrices=False)
        agree = np.abs(site.A.numpy() @ Vt.T)[:, :3]
        np.testing.assert_allclose(agree, np.eye(3), atol=1e-5, err_msg=path)
        assert not site.B.any()


def test_eva_shares_the_ranks_out(base, examples):
    with torch.no_grad():  # so that the inputs of the first layer have directions that differ
        base.model.model.embed_tokens.weight.mul_(torch.linspace(0.02, 3, 16) ** 2)
    _, inputs = gradients_and_inputs(base, examples)
    start = calibrate(base, dataclasses.replace(SPEC, init="eva"), examples, rho=2.0)
    shares = []
    for path, rows in inputs.items():
        values = np.linalg.svd(rows.numpy(), compute_uv=False) ** 2
        shares += [(value, path) for value in (values / values.sum())[:6]]
    chosen = sorted(shares, reverse=True)[: 3 * len(inputs)]
    expected = {path: sum(p == path for _, p in chosen) for path in inputs}
    found = {path: site.rank for path, site in start.adapter.low_rank.items()}
    assert found == {path: rank for path, rank in expected.items() if rank}
    assert len(set(found.values())) > 1
    assert {site.scaling for site in start.adapter.low_rank.values()} == {2.0}
    handle = attach(base.model, start)
    ids = torch.tensor([[1, 5, 9, 12]])
    with handle.use(None):
        bare = base.model(input_ids=ids).logits
    assert torch.equal(base.model(input_ids=ids).logits, bare)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loftq_brings_a_quantised_base_nearer_to_the_dense_one(wide_folder, examples, kind):
    pytest.importorskip("bitsandbytes")
    dense = load_base(str(wide_folder), device="cpu", dtype="float32").model
    base = load_base(str(wide_folder), device="cpu", dtype="float32", quantize=kind)
    start = calibrate(base, dataclasses.replace(SPEC, init="loftq"))
    assert not start.subtracted
    assert not start.is_base
    # the tiny model's own error of quantisation, and what is left of it
    for path, site in start.adapter.low_rank.items():
        weight = dense.get_submodule(path).weight.detach()
        quantised = workflow.weight_rows(base.model.get_submodule(path)).float()
        left = (weight - quantised - site.scaling * site.B @ site.A).norm()
        lost = torch.linalg.svdvals((weight - quantised).double())
        assert left.item() == pytest.approx(lost[3:].norm().item(), rel=1e-4)
    handle = attach(base.model, start)
    packed = PackedModel(base.model, handle)
    batch = pack(examples[:2])
    dense_loss, _ = PackedModel(dense).supervised_loss(batch)
    bare, _ = packed.supervised_loss(batch, Routing.uniform(None))
    begun, _ = packed.supervised_loss(batch, Routing.uniform("default"))
    assert begun.item() != bare.item()
    if kind == "nf4":  # int8 loses too little for the loss to tell
        assert abs(begun - dense_loss) < abs(bare - dense_loss)


@pytest.mark.parametrize("init", ["pissa", "lora-ga", "eva"])
def test_a_quantised_base_begins_where_it_was(wide_folder, examples, init):
    pytest.importorskip("bitsandbytes")
    base = load_base(str(wide_folder), device="cpu", dtype="float32", quantize="nf4")
    start = calibrate(base, dataclasses.replace(SPEC, init=init), examples)
    handle = attach(base.model, start)
    packed, batch = PackedModel(base.model, handle), pack(examples[:2])
    bare, _ = packed.supervised_loss(batch, Routing.uniform(None))
    begun, _ = packed.supervised_loss(batch, Routing.uniform("default"))
    torch.testing.assert_close(begun, bare, rtol=1e-6, atol=0)


def test_what_cannot_be_calibrated_is_refused(base):
    with pytest.raises(SpecError, match="'eva' needs examples"):
        calibrate(base, dataclasses.replace(SPEC, init="eva"))
    with pytest.raises(SpecError, match="rho is 2, but init 'kaiming' shares no ranks"):
        calibrate(base, SPEC, rho=2.0)
    with pytest.raises(TargetError, match="not quantised; load the base with quantize"):
        calibrate(base, dataclasses.replace(SPEC, init="loftq"))
    assert calibrate(base, SPEC).adapter.spec.init == "kaiming"
