"""Joined and apart are the same deltas, to the last bit, in both directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.sites import LowRank
from lorakit.formats import fused

from .pictures import delta


@st.composite
def parts(draw, *, zeros: bool = False) -> tuple[list[LowRank | None], list[int]]:
    """Sites that see one input; some missing, some with one A."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n, d_in = draw(st.integers(2, 4)), draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    scaling = draw(st.sampled_from([1.0, 0.5, 2 / 3]))
    shared = torch.randn(draw(st.integers(1, 4)), d_in, generator=generator).to(dtype)
    found: list[LowRank | None] = []
    for size in sizes:
        kind = draw(st.sampled_from(["none", "shared", "own"]))
        own = torch.randn(draw(st.integers(1, 4)), d_in, generator=generator).to(dtype)
        A = shared if kind == "shared" else own
        B = torch.randn(size, A.shape[0], generator=generator).to(dtype)
        if zeros and draw(st.booleans()):
            B[:, draw(st.integers(0, A.shape[0] - 1))] = 0
        found.append(None if kind == "none" else LowRank(A, B, scaling))
    if all(part is None for part in found):
        found[0] = LowRank(shared, torch.ones(sizes[0], shared.shape[0], dtype=dtype), scaling)
    return found, sizes


@settings(max_examples=200)
@given(parts())
def test_apart_joined_apart(drawn):
    """The very factors come back where no column of B is zero."""
    sites, sizes = drawn
    joined = fused.join(sites, sizes)
    dense = torch.cat(
        [
            torch.zeros(size, joined.A.shape[1], dtype=torch.float64) if s is None else delta(s)
            for s, size in zip(sites, sizes, strict=True)
        ]
    )
    torch.testing.assert_close(delta(joined), dense, rtol=1e-12, atol=1e-12)
    for site, other in zip(sites, fused.split(joined, sizes), strict=True):
        if site is None:
            assert other is None
            continue
        assert torch.equal(site.A, other.A)
        assert torch.equal(site.B, other.B)
        assert (site.scaling, site.A.dtype) == (other.scaling, other.A.dtype)


@settings(max_examples=100)
@given(parts(zeros=True))
def test_zero_columns_change_no_delta(drawn):
    sites, sizes = drawn
    joined = fused.join(sites, sizes)
    for site, other in zip(sites, fused.split(joined, sizes), strict=True):
        if site is None or other is None:
            assert site is None or not delta(site).any()
        else:
            torch.testing.assert_close(delta(site), delta(other), rtol=1e-12, atol=1e-12)


@settings(max_examples=100)
@given(st.integers(1, 6), st.integers(0, 2**32), st.lists(st.integers(1, 4), min_size=2))
def test_joined_apart_joined(rank, seed, sizes):
    """What was trained joined, with one A for all, comes back as it was."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 5, generator=generator)
    site = LowRank(A, torch.randn(sum(sizes), rank, generator=generator), 0.3)
    again = fused.join(fused.split(site, sizes), sizes)
    assert torch.equal(site.A, again.A)
    assert torch.equal(site.B, again.B)


def test_a_fresh_adapter_keeps_its_ranks():
    """B is zero before training: nothing tells whose a column is but its place."""
    sites = [LowRank(torch.randn(2, 3), torch.zeros(4, 2), 1.0) for _ in range(3)]
    again = fused.split(fused.join(sites, [4, 4, 4]), [4, 4, 4])
    assert [torch.equal(a.A, b.A) for a, b in zip(sites, again, strict=True)] == [True] * 3


def test_bias_and_magnitude_go_with_their_rows():
    site = LowRank(
        torch.randn(2, 3), torch.randn(5, 2), 1.0, bias=torch.arange(5.0), magnitude=torch.ones(5)
    )
    first, second = fused.split(site, [2, 3])
    assert second.bias.tolist() == [2, 3, 4]
    assert first.magnitude.shape == (2,)
    assert torch.equal(fused.join([first, second], [2, 3]).bias, site.bias)


def test_scalings_that_differ_go_into_b():
    """In float32, where the stored type would round the product."""
    sites = [
        LowRank(torch.randn(2, 3).bfloat16(), torch.randn(4, 2).bfloat16(), s) for s in (1.0, 1 / 3)
    ]
    joined = fused.join(sites, [4, 4])
    assert joined.B.dtype == torch.float32
    expected = torch.cat([delta(site) for site in sites])
    torch.testing.assert_close(delta(joined), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)] * 2, "has 3 outputs; expected 2"),
        ([None, None], "need one input"),
        (
            [LowRank(torch.ones(1, n), torch.ones(2, 1), 1.0) for n in (2, 3)],
            "need one input",
        ),
        (
            [LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, magnitude=torch.ones(2)), None],
            "have none",
        ),
    ],
)
def test_what_cannot_be_joined(sites, words):
    with pytest.raises(ValueError, match=words):
        fused.join(sites, [2, 2])
