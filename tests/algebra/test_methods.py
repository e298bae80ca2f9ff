"""TIES, DARE and magnitude pruning against dense code written from the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorakit.algebra.combine import combine
from lorakit.algebra.dare import drop_and_rescale
from lorakit.algebra.prune import keep_largest, threshold
from lorakit.core.adapter import Adapter
from tests.algebra.drawn import adapters, bias_of, change, close, numbers, site_at, weights

Q, UP = "model.layers.0.q_proj", "model.layers.0.up_proj"
FULL = 99


def vectors(given, *, biases: bool = True):
    """Each adapter's change as one flat vector, as the papers have it, and how it is cut again."""
    paths = sorted({path for adapter, _ in given for path in adapter.sites})
    parts = [
        {p: torch.cat([change(a, p).flatten(), bias_of(a, p)]) for p in paths} for a, _ in given
    ]
    sizes = [len(parts[0][p]) for p in paths]
    return paths, [torch.cat([one[p] for p in paths]) for one in parts], sizes


def trimmed(vector: torch.Tensor, count: int, density: float) -> torch.Tensor:
    """Top-k in size; ``count`` is how many numbers the adapter has, without the zeros elsewhere."""
    k = max(1, int(density * count))
    kept = vector.float().abs().argsort(descending=True)[:k]
    out = torch.zeros_like(vector)
    out[kept] = vector[kept]
    return out


def is_decided(vector: torch.Tensor, count: int, density: float) -> bool:
    """Whether the top-k is one set: no two sizes at its edge are equal."""
    k = max(1, int(density * count))
    sizes = vector.abs().sort(descending=True).values
    return k >= len(sizes) or bool(sizes[k] == 0 or sizes[k - 1] - sizes[k] > 1e-5 * sizes[0])


def numel(adapter: Adapter) -> int:
    """Numbers of the change of the sites it has."""
    return sum(
        change(adapter, p).numel() + (0 if s.bias is None else s.bias.numel())
        for p, s in adapter.sites.items()
    )


def ties_as_published(vectors: list[torch.Tensor]) -> torch.Tensor:
    """Algorithm 1 of arXiv 2306.01708 after trimming, number by number."""
    merged = torch.zeros_like(vectors[0])
    for i in range(len(merged)):
        values = [float(v[i]) for v in vectors]
        elected = 1 if sum(values) > 0 else -1 if sum(values) < 0 else 0
        same = [v for v in values if v * elected > 0]
        merged[i] = sum(same) / len(same) if same else 0.0
    return merged


def found_vector(found: Adapter, paths) -> torch.Tensor:
    return torch.cat([torch.cat([change(found, p).flatten(), bias_of(found, p)]) for p in paths])


@settings(max_examples=40)
@given(
    st.lists(st.tuples(adapters(biases=True), weights), min_size=1, max_size=3),
    st.floats(0.05, 1.0),
    st.sampled_from(["ties", "magnitude"]),
)
def test_trimming_counts_over_the_whole_change(given, density, method):
    """At full rank nothing is lost, so the result is the papers' to rounding."""
    found = combine(given, method, density=density, rank=FULL, dtype=torch.float64)
    paths, whole, _ = vectors(given)
    assume(all(is_decided(v, numel(a), density) for v, (a, _) in zip(whole, given, strict=True)))
    thinned = [trimmed(v, numel(a), density) * w for v, (a, w) in zip(whole, given, strict=True)]
    total, size = sum(thinned), max(float(v.abs().max()) for v in thinned)
    # a sum of zero elects no sign, and rounding would
    assume(not any(((v != 0) & (total.abs() < 1e-9 * size)).any() for v in thinned))
    expected = ties_as_published(thinned) if method == "ties" else total
    close(found_vector(found, paths), expected, 1e-7, size)
    assert found.provenance["combined"]["relative_error"] <= 1e-7


def test_equal_weights_are_the_lambda_of_the_paper():
    first, second = (Adapter({Q: site_at(Q, 3, s)}) for s in (0, 7))
    plain = combine([(first, 1.0), (second, 1.0)], "ties", rank=5, dtype=torch.float64)
    scaled = combine([(first, 0.4), (second, 0.4)], "ties", rank=5, dtype=torch.float64)
    close(change(scaled, Q), 0.4 * change(plain, Q), 1e-9)
    assert plain.provenance["combined"]["density"] == 0.2
    kept = int(0.2 * 35)
    assert int((change(plain, Q).abs() > 1e-9).sum()) <= 2 * kept


def test_the_oracle_sees_factors_merged_apart():
    """What PEFT's ``ties`` computes on A and B is another thing."""
    first, second = (Adapter({Q: site_at(Q, 2, s)}) for s in (0, 7))
    right = combine([(first, 1.0), (second, 1.0)], "ties", density=1.0, rank=5)
    A = ties_as_published([a.sites[Q].A.flatten() for a in (first, second)]).view(2, 7)
    B = ties_as_published([a.sites[Q].B.flatten() for a in (first, second)]).view(5, 2)
    with pytest.raises(AssertionError):
        close(B @ A, change(right, Q), 0.1)


def test_the_scope_of_trimming():
    large = Adapter({Q: site_at(Q, 2, 0, scaling=100.0), UP: site_at(UP, 2, 3)})
    over_all = combine([(large, 1.0)], "magnitude", density=0.4, rank=9, dtype=torch.float64)
    by_site = combine(
        [(large, 1.0)], "magnitude", density=0.4, rank=9, scope="site", dtype=torch.float64
    )
    assert float(change(over_all, UP).abs().max()) < 1e-6  # all that is kept lies in Q
    assert int((change(by_site, UP).abs() > 1e-6).sum()) == int(0.4 * 36)


# --- random --------------------------------------------------------------------------------------


def test_dare_keeps_the_expectation_and_the_share():
    matrix = numbers(0, 300, 400)
    thinned = drop_and_rescale(matrix, 0.3, 0, 0, "x")
    kept = thinned != 0
    assert float(kept.double().mean()) == pytest.approx(0.3, abs=0.005)  # 4 deviations: 0.0053
    assert torch.equal(thinned[kept], (matrix / 0.3)[kept])
    mean = sum(drop_and_rescale(matrix, 0.3, s, 0, "x") for s in range(200)) / 200
    # a number's deviation is |x|·√(0.7/0.3/200); over all of them the root mean square is known
    expected = float(matrix.norm()) * (0.7 / 0.3 / 200) ** 0.5
    assert float((mean - matrix).norm()) == pytest.approx(expected, rel=0.05)


def test_dare_depends_on_seed_place_and_site_alone():
    first, second = (Adapter({Q: site_at(Q, 2, s), UP: site_at(UP, 2, s + 3)}) for s in (0, 7))
    given = [(first, 0.5), (second, 0.5)]

    def dare(seed, pairs):
        return combine(pairs, "dare", seed=seed, rank=FULL, dtype=torch.float64)

    turned = [(a.with_(sites=dict(reversed(a.sites.items()))), w) for a, w in given]
    only = [(a.with_(sites={Q: a.sites[Q]}), w) for a, w in given]
    for other in (turned, only, given):
        close(change(dare(3, other), Q), change(dare(3, given), Q), 1e-12)
    with pytest.raises(AssertionError):
        close(change(dare(4, given), Q), change(dare(3, given), Q), 0.1)


def test_dare_thins_each_adapter_by_itself():
    first, second = (Adapter({Q: site_at(Q, 3, s)}) for s in (0, 7))
    found = combine(
        [(first, 0.7), (second, 0.3)], "dare", density=0.4, seed=5, rank=5, dtype=torch.float64
    )
    parts = [
        drop_and_rescale(change(a, Q), 0.4, 5, place, Q, "weight") * w
        for place, (a, w) in enumerate([(first, 0.7), (second, 0.3)])
    ]
    close(change(found, Q), sum(parts), 1e-9)
    elected = combine(
        [(first, 0.7), (second, 0.3)], "dare_ties", density=0.4, seed=5, rank=5, dtype=torch.float64
    )
    expected = ties_as_published([p.flatten() for p in parts]).view(5, 7)
    close(change(elected, Q), expected, 1e-9)


# --- the rank, and its cost ----------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(adapters(paths=("model.layers.0.q_proj", "grouped", "embed")), weights),
        min_size=2,
        max_size=3,
    ),
    st.sampled_from(["svd", "ties", "magnitude", "dare"]),
    st.integers(2, 6),
)
def test_the_cost_of_the_rank_is_told(given, method, rank):
    found = combine(given, method, rank=rank)
    whole = combine(given, method, rank=FULL, dtype=torch.float64)
    for path, site in found.sites.items():
        expected = change(whole, path)
        left = float((change(found, path) - expected).norm())
        told = found.provenance["combined"]["sites"].get(path)
        if told is None:  # svd of a sum whose rank is no larger
            assert left == 0.0
            continue
        assert site.rank == told["rank"] <= rank
        size = float(expected.norm())
        if size < 1e-9:  # the adapters cancel each other
            continue
        assert told["relative_error"] == pytest.approx(left / size, rel=1e-4, abs=1e-6)
        directions = site.B.shape[1]
        blocks = expected.chunk(2 if path == "grouped" else 1)
        tails = [torch.linalg.svdvals(b)[directions:].square().sum() for b in blocks]
        best = float(sum(tails)) ** 0.5
        if all(t.dtype == torch.float64 for t in site.tensors().values()):
            assert left <= best + 1e-7 * size
        assert left >= best - 1e-7 * size


def test_the_default_rank_is_the_largest():
    first, second = Adapter({Q: site_at(Q, 1, 0)}), Adapter({Q: site_at(Q, 3, 5)})
    given = [(first, 0.5), (second, 0.5)]
    assert combine(given).sites[Q].rank == 4
    assert combine(given, rank=2).sites[Q].rank == 2
    for method in ("svd", "ties", "dare", "dare_ties", "magnitude"):
        found = combine(given, method)
        assert found.sites[Q].rank == 3
        assert found.provenance["combined"]["relative_error"] > 0.01


# --- the k-th largest ----------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    st.lists(st.floats(-1048576, 1048576, width=32), min_size=1, max_size=60),
    st.integers(1, 5),
    st.floats(0.01, 1.0),
)
def test_the_kth_largest_is_found_in_pieces(values, pieces, density):
    vector = torch.tensor(values, dtype=torch.float64)
    k = max(1, int(density * len(values)))
    limit = threshold(lambda: vector.chunk(pieces), density)
    assert limit == sorted(map(abs, values), reverse=True)[k - 1]
    kept = keep_largest(vector, limit)
    assert int((kept != 0).sum()) >= min(k, sum(v != 0 for v in values))
