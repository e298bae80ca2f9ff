"""Weights that torchao holds: what its integers mean, products and gradients, merging, identity."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit
from lorakit.bases import load_base
from lorakit.bases.affine import AffineLinear, affine_weight, store_affine_
from lorakit.bases.identity import identify
from lorakit.bases.stored import packed_modules, packed_weight
from lorakit.core.adapter import Adapter
from lorakit.core.identity import compare_identities, storage_error
from lorakit.core.sites import LowRank
from lorakit.core.spec import LoRASpec
from lorakit.errors import BaseError
from lorakit.layers import attach
from lorakit.layers.dense import to_dense_
from tests.bases import tiny

torchao = pytest.importorskip("torchao")  # of the extra `quant`, which `dev` installs

NAMES = ["int8-torchao", "int4-torchao"]
CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def blocks(*sizes: tuple[int, int], name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Quantised linears under numbers, as the blocks of a model."""
    model = nn.Sequential(*(nn.Linear(d_in, d_out) for d_in, d_out in sizes))
    for i, module in enumerate(model):
        module.weight.data = drawn(*module.weight.shape, seed=i)
        module.bias.data = drawn(len(module.bias), seed=9)
    assert store_affine_(model, name, dtype, CPU) == len(sizes)
    return model


def test_integers_are_torchaos_own() -> None:
    """Against its quantisers and its reading; theirs for int4 is the private one of tinygemm."""
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization import quant_primitives as own

    W = drawn(48, 128) * drawn(48, 1, seed=1)
    W[3] = 0
    model = nn.Sequential(nn.Linear(128, 48, bias=False))
    model[0].weight.data = W.clone()
    four = copy.deepcopy(model)
    store_affine_(model, "int8-torchao", torch.float32, CPU)
    theirs = Int8Tensor.from_hp(W, PerRow())
    weight = model[0].weight
    assert torch.equal(weight.qdata, theirs.qdata)
    assert torch.equal(weight.scale, theirs.scale)
    assert torch.equal(packed_weight(model[0]).dense(torch.float32), theirs.dequantize())

    store_affine_(four, "int4-torchao", torch.float32, CPU)
    weight = four[0].weight
    options = {"quant_min": 0, "quant_max": 15}
    scale, zero = own._choose_qparams_affine_tinygemm(
        W, own.MappingType.ASYMMETRIC, (1, 64), torch.int32, **options, eps=1e-6,
        scale_dtype=torch.float32, zero_point_dtype=torch.float32,
    )  # fmt: skip
    q = own._quantize_affine_tinygemm(W, [1, 64], scale, zero, torch.int32, **options)
    bytes_ = weight.qdata.view(torch.uint8)
    found = torch.stack([bytes_ & 15, bytes_ >> 4], dim=2).view(48, 128).int()
    signed = torch.where(found > 7, found - 16, found)
    assert torch.equal(signed + 8, q)
    theirs = own._dequantize_affine_tinygemm(q, [1, 64], scale, zero, torch.int32, **options)
    mine = packed_weight(four[0]).dense(torch.float32)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert (mine[3]).abs().max() <= 1e-5
    assert (mine - W).norm() / W.norm() < 0.12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_dense_weight(
    name: str, dtype: torch.dtype
) -> None:
    model = blocks((96, 40), (40, 8), name="int8-torchao", dtype=dtype)
    if name == "int4-torchao":
        model = blocks((96, 64), (64, 8), name=name, dtype=dtype)
    assert [type(m) for m in model] == [AffineLinear, AffineLinear]
    assert not any(p.requires_grad for n, p in model.named_parameters() if "weight" in n)
    dense = copy.deepcopy(model)
    to_dense_(dense, dtype)
    for module, (_, _, packed) in zip(dense, packed_modules(model), strict=True):
        module.weight.data = packed.dense(dtype)
    x = drawn(2, 5, 96, seed=3).to(dtype).requires_grad_()
    found, expected = model(x), dense(x)
    assert found.dtype == dtype
    (dx,) = torch.autograd.grad(found.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    bar = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert (found - expected).norm() <= bar * expected.norm()
    assert (dx - wanted).norm() <= bar * wanted.norm()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model[0](x)
    assert not kept, "no wide copy of the weight waits for the backward"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_merge_and_undo(name: str, where: str) -> None:
    model = blocks((128, 64), (64, 32), name=name)
    start = identify(model, "it")
    held = {id(t) for _, _, packed in packed_modules(model) for t in packed.tensors().values()}
    before = copy.deepcopy({p: k.tensors() for p, _, k in packed_modules(model)})
    dense = {p: k.dense(torch.float64) for p, _, k in packed_modules(model)}
    site = LowRank(0.1 * drawn(2, 128, seed=4), 0.1 * drawn(64, 2, seed=5), 1.0)
    adapter = Adapter({"0": site}, base=start)
    undo = lorakit.merge(model, adapter, undo=where)
    wanted = dense["0"] + (site.B @ site.A).double()
    found = {p: k.dense(torch.float64) for p, _, k in packed_modules(model)}
    error = float((found["0"] - wanted).norm() / wanted.norm())
    assert undo.errors["0.weight"] == pytest.approx(error, rel=1e-3)
    assert 0 < error < {"int8-torchao": 0.01, "int4-torchao": 0.11}[name]
    assert torch.equal(found["1"], dense["1"])
    x = drawn(3, 128, seed=6)
    expected = x.double() @ found["0"].T + model[0].bias.double()
    torch.testing.assert_close(model[0](x).double(), expected, rtol=0, atol=1e-4)
    second = lorakit.merge(model, adapter)  # knows the base of before the first
    second()
    lorakit.merge(model, adapter)()
    undo()
    after = {p: k.tensors() for p, _, k in packed_modules(model)}
    assert all(torch.equal(after[p][k], t) for p, kept in before.items() for k, t in kept.items())
    assert {id(t) for kept in after.values() for t in kept.values()} == held
    assert identify(model, "it") == start


def test_lengths_of_dora_see_a_merge() -> None:
    """The wrapper of the integers has no address and no version of its own."""
    model = blocks((64, 32), (32, 8), name="int4-torchao")
    handle = attach(model, LoRASpec(rank=2, targets="0", variant="dora"), "a")
    x = drawn(3, 64)
    with torch.no_grad():
        first = model(x)
        packed = packed_weight(model[0])
        packed.store_(2 * packed.dense(torch.float32))
        again = model(x)
    handle.detach()
    assert (again - first).norm() < 0.2 * first.norm()  # m stays, and with it each row's length


@pytest.mark.parametrize("name", NAMES)
def test_identity(tmp_path: Path, name: str) -> None:
    folder = tiny.write_folder(tmp_path / "tiny", tiny.llama(hidden_size=64, intermediate_size=96))
    full = load_base(folder, device="cpu")
    base = load_base(folder, device="cpu", quantize=name)
    assert type(base.model.model.layers[0].mlp.up_proj) is AffineLinear
    assert type(base.model.lm_head) is nn.Linear
    storage = name.partition("-")[0]
    assert base.identity.storage == storage
    assert set(base.identity.samples) == set(full.identity.samples)
    assert base.identity.shapes == full.identity.shapes
    linear = base.model.model.layers[1].mlp.down_proj.weight
    rows, columns = torch.arange(200) % 64, torch.arange(200) * 7 % 96
    values = affine_weight(linear).at(rows, columns)
    torch.testing.assert_close(
        values, affine_weight(linear).dense(torch.float32)[rows, columns], rtol=0, atol=1e-7
    )
    [note] = compare_identities(full.identity, base.identity)
    assert f"is used on {storage}" in note
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        found, expected = base.model(ids).logits, full.model(ids).logits
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.97
    other = tiny.llama(seed=9, hidden_size=64, intermediate_size=96)
    with pytest.raises(BaseError, match="sampled weights differ"):
        compare_identities(base.identity, identify(other, "tiny"))
    assert storage_error("int4") < storage_error("4-bit")


def test_a_bfloat16_file_is_quantised_from_its_own_numbers(tmp_path: Path) -> None:
    model = tiny.llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    folder = tiny.write_folder(tmp_path / "tiny", model)
    base = load_base(folder, device="cpu", dtype="float32", quantize="int4-torchao")
    wide = model.model.layers[0].self_attn.q_proj.weight.float()
    expected = nn.Sequential(nn.Linear(64, 64, bias=False))
    expected[0].weight.data = wide
    store_affine_(expected, "int4-torchao", torch.float32, CPU)
    found = base.model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(found.qdata, expected[0].weight.qdata)
    others = {p.dtype for n, p in base.model.named_parameters() if "_proj" not in n}
    assert others == {torch.float32}


def test_widths_without_whole_groups(tmp_path: Path) -> None:
    model = blocks((96, 40), name="int4-torchao")
    assert model[0].weight.block_size == [1, 32]
    odd = nn.Sequential(nn.Linear(40, 8), nn.Linear(64, 8), nn.Linear(72, 8))
    with pytest.raises(BaseError, match=r"whole groups of 32(?s:.)*0: 40 inputs(?s:.)*2: 72.*"):
        store_affine_(odd, "int4-torchao", torch.float32, CPU)
    assert all(type(m) is nn.Linear for m in odd), "nothing was done by halves"
    assert store_affine_(odd, "int8-torchao", torch.float32, CPU) == 3


def test_layers_that_torchao_made_itself() -> None:
    """A black box to the adapters, and known to merging: one scale for 32 inputs here."""
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    quantize_(model, Int8WeightOnlyConfig(granularity=PerGroup(32), set_inductor_config=False))
    packed = packed_weight(model[0])
    theirs = model[0].weight.dequantize()
    assert torch.equal(packed.dense(torch.float32), theirs)
    rows, columns = torch.arange(64) % 32, torch.arange(64)
    assert torch.equal(packed.at(rows, columns), theirs[rows, columns])
    packed.store_(theirs)
    assert (packed.dense(torch.float32) - theirs).norm() < 0.01 * theirs.norm()
    handle = attach(model, LoRASpec(rank=2, targets="all-linear"), "a", trainable=True)
    model(drawn(4, 64)).sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in handle.parameters("a"))
    handle.detach()
    model[0].weight.act_pre_scale = torch.ones(64)
    found = identify(model, "it")
    assert "0.weight" in found.shapes
    assert set(found.samples) == {"2.weight"}
    with pytest.raises(BaseError, match="scales for its inputs"):
        packed_weight(model[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(tmp_path: Path, name: str) -> None:
    folder = tiny.write_folder(tmp_path / "tiny", tiny.llama(hidden_size=64, intermediate_size=96))
    found = load_base(folder, device="cuda", dtype="float32", quantize=name)
    expected = load_base(folder, device="cpu", quantize=name)
    assert {p.device.type for p in found.model.parameters()} == {"cuda"}
    pairs = zip(packed_modules(found.model), packed_modules(expected.model), strict=True)
    for (_, _, here), (_, _, there) in pairs:
        difference = here.dense(torch.float32).cpu() - there.dense(torch.float32)
        # a number halfway between two integers may be rounded either way
        assert difference.norm() <= 0.01 * there.dense(torch.float32).norm()
    handle = attach(found.model, LoRASpec(rank=4), "a", trainable=True)
    ids = torch.tensor([[5, 6, 7, 8, 9]], device="cuda")
    found.model(ids, labels=ids).loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in handle.parameters("a"))
    adapter = handle.snapshot("a")
    handle.detach()
    before = found.model(ids).logits
    undo = lorakit.merge(found.model, adapter)
    undo()
    assert torch.equal(found.model(ids).logits, before)
