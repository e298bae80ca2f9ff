"""Merging into routers and fused experts, beside W + s·B·A in float64, expert by expert."""

from __future__ import annotations

import pytest
import torch

from lorakit import Adapter, LoRASpec, attach, merge
from lorakit.core.merging import BLOCK_BYTES, Recipe, Term, check_rows, merge_
from lorakit.core.sites import LowRank
from lorakit.errors import InputError, LorakitError

from ..models import randomize
from ..moe_models import FAMILIES, mixtral

EVERYTHING = ("experts", "router", "q_proj")


def adapter_for(family: str, seed: int = 1, **settings) -> Adapter:
    spec = LoRASpec(**{"rank": 3, "alpha": 6.0, "targets": EVERYTHING, **settings})
    handle = attach(FAMILIES[family](), spec)
    randomize(handle, seed=seed)
    return handle.snapshot()


def ids() -> torch.Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(2))


def expected(adapter: Adapter, path: str, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    site = adapter.low_rank[path]
    change = site.scaling * site.B.double() @ site.A.double()
    return weight.double() + (change.mT if transposed else change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_and_undo(family, dtype):
    adapter, model = adapter_for(family), FAMILIES[family]().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    undo = merge(model, adapter)
    assert {name.removesuffix(".weight") for name in undo.names} == set(adapter.sites)
    eps = torch.finfo(dtype).eps
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        if path not in adapter.sites:
            assert torch.equal(parameter, before[name])
            continue
        transposed = family == "gpt_oss" and adapter.low_rank[path].kind == "experts"
        exact = expected(adapter, path, before[name], transposed)
        assert ((parameter.double() - exact).abs() <= eps * exact.abs() + 1e-6).all()
        assert (exact - before[name].double()).abs().amax((-1, -2)).min() > 1e-3, "every expert"
    undo()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_attached(family):
    model, first, second = FAMILIES[family](), adapter_for(family), adapter_for(family, 7)
    with torch.no_grad():
        base = model(ids()).logits
        handle = attach(model, first, "a")
        handle.add(second, "b")
        with handle.use({"a": 0.6, "b": -0.5}):
            attached = model(ids()).logits
        handle.detach()
        undo = merge(model, [(first, 0.6), (second, -0.5)], undo="disk")
        merged = model(ids()).logits
        # float32 logits of order 1 after two layers
        assert (merged - attached).abs().max() <= 2e-5
        assert (merged - base).abs().max() > 0.1
        handle = attach(model, LoRASpec(rank=1, targets="router"))
        with pytest.raises(LorakitError, match="adapters are attached"):
            undo()
        handle.detach()
        undo()
        assert torch.equal(model(ids()).logits, base)


def test_an_overflow_of_one_expert_leaves_the_model_as_it_was():
    model = mixtral().half()
    adapter = adapter_for("mixtral")
    path = "model.layers.1.mlp.experts.down_proj"
    site = adapter.low_rank[path]
    B = site.B.clone()
    B[3] *= 1e6
    bad = adapter.with_(sites={**adapter.sites, path: LowRank(site.A, B, 2.0, "experts")})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for undo in ("memory", None):
        with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts\.down_proj"):
            merge(model, bad, undo=undo)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("contiguous", [True, False])
def test_blocks_that_cut_experts(contiguous):
    """Experts of 700 rows do not end where the blocks of the accumulator do."""
    experts, rows, columns = 5, 700, 1200
    assert rows * columns * 4 * experts > 2 * BLOCK_BYTES
    left, right = torch.randn(experts, rows, 2), torch.randn(experts, 2, columns)
    weight = torch.randn(experts, columns, rows).to(torch.bfloat16).mT
    weight = weight.contiguous() if contiguous else weight
    exact = weight.double() + 0.5 * left.double() @ right.double()
    before = weight.reshape(experts, -1).clone()
    recipe = Recipe((Term(left, right, 0.5),))
    assert recipe.cannot_overflow(torch.bfloat16)
    assert bool(merge_(weight, recipe, torch.float32))
    assert ((weight.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    chosen = [0, 2, 4]
    after = weight.reshape(experts, -1)
    assert check_rows(before[chosen], after[chosen], chosen, recipe, torch.float32) <= 1
    assert check_rows(before[chosen], after[[0, 1, 4]], chosen, recipe, torch.float32) > 1
    large = Recipe((Term(left * 1e20, right * 1e20, 1.0),))
    assert not large.cannot_overflow(torch.bfloat16)
    assert not bool(merge_(weight, large, torch.float32, write=False))
