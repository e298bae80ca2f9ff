"""Compression against the dense singular value decomposition, and against every allocation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.algebra.budget import allocate
from lorakit.algebra.compress import compress
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Replace
from lorakit.core.spec import LoRASpec
from lorakit.errors import InputError, SpecError
from lorakit.formats import load_adapter, save_adapter
from tests.algebra.drawn import PLACES, adapters, change, close, numbers, site_at

Q, UP = "model.layers.0.q_proj", "model.layers.0.up_proj"


def best_error(adapter: Adapter, path: str, directions: int) -> float:
    """‖ΔW − the best of this many directions a group‖, from dense singular values."""
    groups = PLACES[path][3]
    blocks = change(adapter, path).chunk(groups)
    tails = [torch.linalg.svdvals(block)[directions:] for block in blocks]
    return math.sqrt(sum(float(tail.square().sum()) for tail in tails))


def error(adapter: Adapter, smaller: Adapter, path: str) -> float:
    return float((change(adapter, path) - change(smaller, path)).norm())


def in_float64(adapter: Adapter) -> Adapter:
    return adapter.with_(
        sites={
            p: LowRank(s.A.double(), s.B.double(), s.scaling, s.kind, s.bias)
            for p, s in adapter.sites.items()
        }
    )


@settings(max_examples=100)
@given(adapters(most=5).map(in_float64), st.integers(1, 8))
def test_no_approximation_of_the_rank_is_better(adapter, rank):
    smaller = compress(adapter, rank=rank)
    for path, site in smaller.low_rank.items():
        groups = PLACES[path][3]
        directions = max(1, rank // groups)
        size = float(change(adapter, path).norm())
        assert site.rank <= max(rank, groups)
        assert abs(error(adapter, smaller, path) - best_error(adapter, path, directions)) <= (
            1e-8 * size
        )
        told = smaller.provenance["compressed"]["sites"][path]
        assert told["rank"] == site.rank
        assert told["relative_error"] == pytest.approx(
            error(adapter, smaller, path) / size, abs=1e-8
        )


@settings(max_examples=60)
@given(adapters(most=5), st.integers(1, 4))
def test_the_error_that_is_told_is_that_of_the_stored_numbers(adapter, rank):
    smaller = compress(adapter, rank=rank)
    squares = [0.0, 0.0]
    for path, site in smaller.low_rank.items():
        own, size = adapter.low_rank[path], float(change(adapter, path).norm())
        assert (site.A.dtype, site.B.dtype) == (own.A.dtype, own.B.dtype)
        assert (site.scaling, site.kind) == (own.scaling, own.kind)
        left = error(adapter, smaller, path)
        told = smaller.provenance["compressed"]["sites"][path]["relative_error"]
        assert told == pytest.approx(left / size, rel=1e-6, abs=1e-9)
        squares = [squares[0] + left**2, squares[1] + size**2]
        if max(1, rank // PLACES[path][3]) * PLACES[path][3] >= own.rank:
            assert site is own
    total = math.sqrt(squares[0] / squares[1])
    assert smaller.provenance["compressed"]["relative_error"] == pytest.approx(
        total, rel=1e-6, abs=1e-9
    )


@settings(max_examples=60)
@given(adapters(most=5).map(in_float64), st.floats(0.05, 0.999999))
def test_the_least_rank_that_keeps_the_energy(adapter, energy):
    smaller = compress(adapter, energy=energy)
    for path, site in smaller.low_rank.items():
        directions = site.rank // PLACES[path][3]
        size = float(change(adapter, path).norm())

        def kept(n, path=path, size=size):
            return 1 - (best_error(adapter, path, n) / size) ** 2

        assert kept(directions) >= energy - 1e-12
        assert directions == 1 or kept(directions - 1) < energy + 1e-12


def test_all_the_energy_is_what_is_not_rounding():
    first = site_at(Q, 2, 0)
    double = LowRank(torch.cat([first.A, first.A]), torch.cat([first.B, first.B], 1), 1.0)
    adapter = Adapter({Q: double})
    smaller = compress(adapter, energy=1.0)
    assert smaller.sites[Q].rank == 2
    close(change(smaller, Q), change(adapter, Q), 1e-13)


# --- a number of parameters ------------------------------------------------------------------

spectra = st.lists(st.floats(0, 10), min_size=1, max_size=4).map(lambda v: sorted(v)[::-1])


@settings(max_examples=200)
@given(
    st.lists(st.tuples(spectra, st.sampled_from([2, 3, 4, 6])), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_no_allocation_keeps_more(sites, budget):
    gains = {str(i): own for i, (own, _) in enumerate(sites)}
    costs = {str(i): cost for i, (_, cost) in enumerate(sites)}

    def kept(counts):
        return sum(sum(gains[path][:n]) for path, n in zip(gains, counts, strict=True))

    best = max(
        kept(counts)
        for counts in itertools.product(*(range(len(own) + 1) for own in gains.values()))
        if sum(costs[path] * n for path, n in zip(gains, counts, strict=True)) <= budget
    )
    for exact in (None, False):
        found, is_best = allocate(gains, costs, budget, exact=exact)
        assert sum(costs[path] * n for path, n in found.items()) <= budget
        have = kept(found.values())
        if is_best:
            assert have == pytest.approx(best, rel=1e-12)
        # by gain for cost: at most the gain of one direction from the best
        assert best - have <= max(max(own) for own in gains.values()) + 1e-12


def test_by_gain_for_cost_is_not_always_best():
    """The case that the exact way is for: a cheap good one blocks two that fit together."""
    gains, costs = {"a": [5.0], "b": [4.0, 4.0]}, {"a": 5, "b": 4}
    assert allocate({"a": [5.1], "b": [4.0, 4.0]}, costs, 8)[0] == {"a": 0, "b": 2}
    found, best = allocate({"a": [5.1], "b": [4.0, 4.0]}, costs, 8, exact=False)
    assert (found, best) == ({"a": 1, "b": 0}, False)
    assert allocate(gains, costs, 13) == ({"a": 1, "b": 2}, True)


@settings(max_examples=25)
@given(adapters(most=2).map(in_float64), st.floats(0.05, 0.99))
def test_a_budget_is_kept_and_spent_best(adapter, share):
    budget = int(share * adapter.num_parameters)
    costs = {p: s.num_parameters // s.B.shape[1] for p, s in adapter.low_rank.items()}
    choices = [range(s.B.shape[1] + 1) for s in adapter.low_rank.values()]
    fits = [
        dict(zip(costs, counts, strict=True))
        for counts in itertools.product(*choices)
        if any(counts) and sum(c * n for c, n in zip(costs.values(), counts, strict=True)) <= budget
    ]
    if not fits:
        with pytest.raises(SpecError, match="smallest direction"):
            compress(adapter, parameters=max(1, budget))
        return
    smaller = compress(adapter, parameters=budget)
    assert smaller.num_parameters <= budget
    lost = {p: [best_error(adapter, p, n) ** 2 for n in range(5)] for p in adapter.sites}
    best = min(sum(lost[p][n] for p, n in one.items()) for one in fits)
    found = sum(error(adapter, smaller, path) ** 2 for path in adapter.sites)
    size = sum(float(change(adapter, path).norm()) ** 2 for path in adapter.sites)
    assert found <= best + 1e-10 * size
    told = smaller.provenance["compressed"]
    assert told["parameters_left"] == smaller.num_parameters
    assert {p for p, s in told["sites"].items() if s["rank"] == 0} == set(adapter.sites) - set(
        smaller.sites
    )


def test_enough_parameters_change_nothing():
    adapter = Adapter({Q: site_at(Q, 3, 0)})
    assert compress(adapter, parameters=10**9).sites[Q] is adapter.sites[Q]


def test_what_cannot_be_cut_counts():
    sites = {Q: site_at(Q, 3, 0, bias=True), UP: site_at(UP, 3, 4)}
    adapter = Adapter({**sites, "head": Replace({"weight": numbers(0, 10, 10)})})
    smaller = compress(adapter, parameters=100 + 5 + 12)
    assert smaller.sites["head"] is adapter.sites["head"]
    assert smaller.sites[Q].rank == 1  # its bias of B stays
    assert smaller.sites[Q].bias is sites[Q].bias
    assert UP not in smaller.sites
    with pytest.raises(SpecError, match="what cannot be cut the adapter has 117"):
        compress(adapter, parameters=110)


def test_sites_that_go_are_no_targets_any_more(tmp_path, caplog):
    sites = {f"layers.{i}.q_proj": LowRank(numbers(i, 1, 7), numbers(9, 5, 1), 1.0) for i in (0, 1)}
    sites["layers.1.q_proj"] = LowRank(numbers(1, 1, 7), numbers(9, 5, 1), 100.0)
    adapter = Adapter(sites, LoRASpec(rank=1, alpha=1, targets=("q_proj",)))
    smaller = compress(adapter, parameters=12)
    assert smaller.spec.targets == ("layers.1.q_proj",)
    assert "layers.0.q_proj" in caplog.text
    assert set(load_adapter(save_adapter(smaller, tmp_path / "a")).sites) == {"layers.1.q_proj"}


@settings(max_examples=30)
@given(adapter=adapters(most=4), share=st.floats(0.4, 0.9))
def test_the_file_gives_it_back(tmp_path_factory, adapter, share):
    smaller = compress(adapter, energy=share)
    again = load_adapter(save_adapter(smaller, tmp_path_factory.mktemp("x") / "adapter"))
    assert again.provenance == smaller.provenance
    for path, site in smaller.sites.items():
        assert torch.equal(site.A, again.sites[path].A)
        assert torch.equal(site.B, again.sites[path].B)
        assert site.scaling == again.sites[path].scaling


# --- refused, and odd ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is given"),
        ({"rank": 2, "energy": 0.5}, "rank and energy is given"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"parameters": -1}, "parameters is -1"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"parameters": 3}, "parameters is 3"),
    ],
)
def test_settings_that_are_impossible(options, message):
    with pytest.raises(SpecError, match=message):
        compress(Adapter({Q: site_at(Q, 3, 0)}), **options)


def test_dora_is_refused_with_the_way_out():
    site = site_at(Q, 2, 0)
    dora = Adapter({Q: LowRank(site.A, site.B, 1.0, magnitude=numbers(4, 5).abs())})
    with pytest.raises(InputError, match=r"cannot be known without W(.|\n)*lorakit extract"):
        compress(dora, rank=1)


def test_a_change_of_zero_stays_one():
    site = LowRank(numbers(0, 3, 7), torch.zeros(5, 3), 2.0)
    smaller = compress(Adapter({Q: site}), rank=1)
    assert not smaller.sites[Q].B.any()
    assert smaller.provenance["compressed"]["relative_error"] == 0.0


def test_the_history_moves_what_was_measured():
    adapter = Adapter(
        {Q: site_at(Q, 3, 0)}, provenance={"metrics": {"loss": 1.0}, "data": {"a": 1}}
    )
    told = compress(compress(adapter, rank=2), rank=1).provenance
    assert set(told) == {"data", "compressed"}
    assert told["compressed"]["from"]["compressed"]["from"]["metrics"] == {"loss": 1.0}
    assert told["compressed"]["rank"] == 1
