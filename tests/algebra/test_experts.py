"""Adapters of fused experts as values: each expert is a matrix of its own."""

from __future__ import annotations

import pytest
import torch

from lorakit import Adapter, LoRASpec, combine, compress
from lorakit.algebra.compare import compare
from lorakit.core.linalg import effective_rank, singular_values
from lorakit.core.sites import LowRank
from lorakit.errors import FormatError, InputError

PATH = "model.layers.0.mlp.experts.down_proj"
#: sums and decompositions of a dozen float64 numbers of order 1
LIMIT = 1e-12


def experts(rank: int, seed: int, *, scaling: float = 2.0, number: int = 3) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(number, rank, 7, generator=draw, dtype=torch.float64)
    B = torch.randn(number, 5, rank, generator=draw, dtype=torch.float64)
    return LowRank(A, B, scaling, "experts")


def adapter(site: LowRank) -> Adapter:
    return Adapter({PATH: site}, LoRASpec(rank=site.rank, targets="experts"))


def change(site: LowRank) -> torch.Tensor:
    """[E, d_out, d_in]"""
    return site.scaling * torch.einsum("eor,eri->eoi", site.B.double(), site.A.double())


def test_the_weighted_sum_is_that_of_each_expert():
    first, second = experts(2, 1), experts(3, 2, scaling=0.5)
    found = combine([(adapter(first), 0.7), (adapter(second), -1.5)]).low_rank[PATH]
    assert (found.kind, found.rank, found.A.shape) == ("experts", 5, (3, 5, 7))
    assert (change(found) - 0.7 * change(first) + 1.5 * change(second)).abs().max() <= LIMIT


@pytest.mark.parametrize("rank", [1, 3])
def test_a_sum_cut_to_a_rank_is_the_best_of_each_expert(rank):
    first, second = experts(2, 1), experts(3, 2)
    given = [(adapter(first), 1.0), (adapter(second), 1.0)]
    found = combine(given, "svd", rank=rank)
    whole = change(first) + change(second)
    best, lost = [], 0.0
    for one in whole:
        U, S, Vh = torch.linalg.svd(one, full_matrices=False)
        best.append(U[:, :rank] * S[:rank] @ Vh[:rank])
        lost += float(S[rank:].square().sum())
    site = found.low_rank[PATH]
    assert (change(site) - torch.stack(best)).abs().max() <= 1e-10
    error = found.provenance["combined"]["sites"][PATH]["relative_error"]
    assert error == pytest.approx((lost / float(whole.square().sum())) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "magnitude"])
def test_methods_on_single_numbers_see_all_experts(method):
    first, second = experts(2, 1), experts(2, 2)
    given = [(adapter(first), 1.0), (adapter(second), 1.0)]
    found = combine(given, method, rank=5, density=1.0).low_rank[PATH]
    assert found.A.shape == (3, 5, 7)
    if method in ("dare", "magnitude"):  # with nothing left out they are the sum
        assert (change(found) - change(first) - change(second)).abs().max() <= 1e-9


def test_compress():
    site = experts(4, 3)
    by_rank = compress(adapter(site), rank=2)
    small = by_rank.low_rank[PATH]
    assert (small.A.shape, small.B.shape, small.rank) == ((3, 2, 7), (3, 5, 2), 2)
    for one, other in zip(change(small), change(site), strict=True):
        values = torch.linalg.svdvals(other)
        assert float((one - other).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-9)
    assert compress(adapter(site), rank=4).low_rank[PATH] is site
    cost = 3 * (7 + 5)
    by_size = compress(adapter(site), parameters=2 * cost + 1)
    assert (by_size.low_rank[PATH].rank, by_size.num_parameters) == (2, 2 * cost)
    kept = compress(adapter(site), energy=0.9).low_rank[PATH]
    share = float(change(kept).square().sum() / change(site).square().sum())
    assert share >= 0.9
    assert kept.rank < 4


def test_singular_values_are_those_of_all_experts():
    site = experts(2, 5)
    each = torch.cat([torch.linalg.svdvals(one)[:2] for one in change(site)])
    expected = each.sort(descending=True).values
    assert (singular_values(site) - expected).abs().max() <= LIMIT
    assert 2 < effective_rank(expected) <= 6
    assert [one.kind for one in site.by_expert()] == ["linear"] * 3


def test_comparing_compares_expert_by_expert():
    first, second = experts(2, 1), experts(2, 2)
    A, B = second.A.clone(), second.B.clone()
    A[1], B[1] = first.A[1], first.B[1]
    found = compare(adapter(first), adapter(LowRank(A, B, 2.0, "experts")))
    pairs = {pair.path: pair for pair in found.sites}
    assert set(pairs) == {f"{PATH}[{e}]" for e in range(3)}
    assert pairs[f"{PATH}[1]"].cosine == pytest.approx(1.0)
    assert abs(pairs[f"{PATH}[0]"].cosine) < 0.9
    linear = Adapter({PATH: LowRank(first.A[0], first.B[0], 2.0)})
    with pytest.raises(FormatError, match="have no module in common"):
        compare(adapter(first), linear)


def test_experts_of_other_numbers_have_no_sum():
    given = [(adapter(experts(2, 1)), 1.0), (adapter(experts(2, 1, number=4)), 1.0)]
    with pytest.raises(InputError, match="different shapes"):
        combine(given)
