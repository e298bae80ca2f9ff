"""Comparison against dense float64 changes and the formula of the paper, cell by cell."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.algebra.compare import average, compare, similarity
from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank, Replace
from lorakit.errors import BaseError, FormatError, InputError

SHAPES = {
    "linear": ("linear", (7,), 9, 1),
    "embedding": ("embedding", (11,), 6, 1),
    "conv": ("conv", (3, 2, 2), 8, 1),
    "grouped": ("conv", (4, 3), 6, 2),
}


def site(kind, rank, seed, scaling=1.0, dtype=torch.float64):
    name, inputs, outputs, groups = SHAPES[kind]
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank * groups, *inputs, generator=generator, dtype=torch.float64)
    ones = [1] * (len(inputs) - 1)
    B = torch.randn(outputs, rank, *ones, generator=generator, dtype=torch.float64)
    return LowRank(A.to(dtype), B.to(dtype), scaling, name)


def dense(one):
    """scaling·B·A [m, n] in float64; a group of outputs has its own directions."""
    A, B = one.A.double().flatten(1), one.B.double().flatten(1)
    groups = A.shape[0] // B.shape[1]
    parts = zip(B.chunk(groups), A.chunk(groups), strict=True)
    return one.scaling * torch.cat([b @ a for b, a in parts])


def phi(first, second):
    """‖Uᵢᵀ Uⱼ‖²_F / min(i, j), one cell at a time."""
    return torch.tensor(
        [
            [
                float((first[:, :i].T @ second[:, :j]).norm() ** 2) / min(i, j)
                for j in range(1, second.shape[1] + 1)
            ]
            for i in range(1, first.shape[1] + 1)
        ],
        dtype=torch.float64,
    )


def directions(matrix, rank):
    U, values, Vh = torch.linalg.svd(matrix)
    return U[:, :rank], values[:rank], Vh[:rank].T


@given(
    st.sampled_from(sorted(SHAPES)), st.integers(1, 4), st.integers(1, 4),
    st.sampled_from([1.0, -0.5, 3.0]), st.sampled_from([torch.float64, torch.bfloat16]),
    st.integers(0, 9999),
)  # fmt: skip
def test_a_site_against_its_dense_changes(kind, r1, r2, scaling, dtype, seed):
    one, other = site(kind, r1, seed, scaling, dtype), site(kind, r2, seed + 1, 2.0)
    found = compare(Adapter({"m": one}), Adapter({"m": other})).sites[0]
    D1, D2 = dense(one), dense(other)
    rank1, rank2 = (min(s.A.shape[0], *D1.shape) for s in (one, other))
    (U1, s1, V1), (U2, s2, V2) = directions(D1, rank1), directions(D2, rank2)
    assert torch.allclose(found.spectra[0], s1, rtol=1e-9)
    assert torch.allclose(found.spectra[1], s2, rtol=1e-9)
    assert torch.allclose(found.right, phi(V1, V2), atol=1e-9)
    assert torch.allclose(found.left, phi(U1, U2), atol=1e-9)
    assert found.norms == pytest.approx((float(D1.norm()), float(D2.norm())), rel=1e-10)
    cosine = float((D1 * D2).sum() / (D1.norm() * D2.norm()))
    assert found.cosine == pytest.approx(cosine, rel=1e-10, abs=1e-12)
    assert found.distance == pytest.approx(float((D1 - D2).norm()), rel=1e-10)
    assert found.widths == (D1.shape[1], D1.shape[0])
    # the check can fail: other directions have another similarity
    assert not torch.allclose(found.right[:1, :1], phi(V1, V2.roll(1, 0))[:1, :1], atol=1e-6)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9999))
def test_factors_as_in_the_paper(r1, r2, seed):
    one, other = site("linear", r1, seed), site("linear", r2, seed + 1)
    found = compare(Adapter({"m": one}), Adapter({"m": other}), of="factors").sites[0]
    A = [torch.linalg.svd(s.A, full_matrices=False)[2].T for s in (one, other)]
    B = [torch.linalg.svd(s.B, full_matrices=False)[0] for s in (one, other)]
    assert torch.allclose(found.right, phi(*A), atol=1e-9)
    assert torch.allclose(found.left, phi(*B), atol=1e-9)
    delta = compare(Adapter({"m": one}), Adapter({"m": other})).sites[0]
    assert delta.right[-1, -1] == pytest.approx(float(found.right[-1, -1]))  # the same span


def test_the_split_into_factors_does_not_matter():
    one, other = site("linear", 3, 0), site("linear", 2, 1)
    mixing = torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
    again = LowRank(mixing @ one.A, one.B @ torch.linalg.inv(mixing), 1.0)
    first, second = (
        compare(Adapter({"m": s}), Adapter({"m": other})).sites[0] for s in (one, again)
    )
    assert torch.allclose(first.right, second.right, atol=1e-10)
    assert first.cosine == pytest.approx(second.cosine)


def test_an_adapter_and_itself():
    adapter = Adapter({"a": site("linear", 3, 0), "b": site("conv", 2, 1)})
    found = compare(adapter, adapter)
    assert found.cosine == pytest.approx(1.0)
    assert found.distance < 1e-13 * found.norms[0]
    for pair in found.sites:
        assert pair.whole == pytest.approx((1.0, 1.0))
        assert torch.allclose(pair.right, torch.ones_like(pair.right))


def test_nothing_in_common_is_zero():
    eye = torch.eye(6, dtype=torch.float64)
    one, other = (LowRank(eye[k], eye[:, k], 1.0) for k in (slice(0, 2), slice(3, 6)))
    found = compare(Adapter({"m": one}), Adapter({"m": other}))
    assert found.sites[0].whole == (0.0, 0.0)
    assert found.cosine == 0.0
    assert found.sites[0].chance == pytest.approx((2 / 6, 2 / 6))


def test_chance_is_what_random_subspaces_have():
    """The mean of ‖UᵀV‖²/min over random subspaces, by drawing them."""
    draws = []
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        first, second = (
            torch.linalg.qr(torch.randn(20, r, generator=generator, dtype=torch.float64)).Q
            for r in (3, 5)
        )
        draws.append(float(similarity(first, second)[-1, -1]))
    # 400 draws of a spread of 0.1: three deviations of the mean are 0.015
    assert sum(draws) / len(draws) == pytest.approx(5 / 20, abs=0.015)


def test_partly_different_targets_count_as_zero():
    common = [site("linear", 2, k) for k in (0, 1)]
    first = Adapter({"m": common[0], "x": site("conv", 2, 5)})
    second = Adapter({"m": common[1], "y": site("embedding", 2, 6)})
    found = compare(first, second)
    assert [set(one) for one in found.only] == [{"x"}, {"y"}]
    D = [dense(s) for s in common]
    alone = [float(dense(first.sites["x"]).norm()), float(dense(second.sites["y"]).norm())]
    norms = [math.hypot(float(d.norm()), a) for d, a in zip(D, alone, strict=True)]
    assert found.norms == pytest.approx(norms)
    assert found.cosine == pytest.approx(float((D[0] * D[1]).sum()) / (norms[0] * norms[1]))
    assert found.common_cosine == pytest.approx(
        float((D[0] * D[1]).sum() / (D[0].norm() * D[1].norm()))
    )
    assert found.distance == pytest.approx(math.hypot(float((D[0] - D[1]).norm()), *alone))


def test_a_change_of_zero_has_no_direction():
    empty = LowRank(torch.ones(2, 7), torch.zeros(9, 2), 1.0)
    found = compare(Adapter({"m": empty}), Adapter({"m": site("linear", 2, 0)}))
    assert found.sites[0].cosine is None
    assert found.sites[0].whole == (None, None)
    assert found.cosine is None


def test_trained_whole():
    one, other = torch.ones(3, 4), torch.full((3, 4), 1.5)
    sites = {"m": site("linear", 2, 0)}
    first = Adapter(sites | {"head": Replace({"weight": one}), "z": Replace({"": one})})
    second = Adapter(sites | {"head": Replace({"weight": other}), "z": site("linear", 2, 1)})
    found = compare(first, second)
    assert found.whole[0].distance == pytest.approx(0.5)
    assert any("low-rank in one and trained whole in the other" in note for note in found.notes)


def test_dora_is_said():
    one = site("linear", 2, 0)
    dora = LowRank(one.A, one.B, 1.0, magnitude=torch.ones(9, dtype=torch.float64))
    notes = compare(Adapter({"m": dora}), Adapter({"m": one})).notes
    assert any("1 DoRA sites" in note for note in notes)


def test_what_cannot_be_compared():
    linear = site("linear", 2, 0)
    wide = LowRank(torch.ones(2, 8), torch.ones(9, 2), 1.0)
    with pytest.raises(FormatError, match=r"m: linear \(7,\).*linear \(8,\)"):
        compare(Adapter({"m": linear}), Adapter({"m": wide}))
    with pytest.raises(FormatError, match="no module in common"):
        compare(Adapter({"m": linear}), Adapter({"n": linear}))
    with pytest.raises(InputError, match="delta"):
        compare(Adapter({"m": linear}), Adapter({"m": linear}), of="B")


def test_other_bases():
    def base(value):
        return BaseIdentity("b", "Net", {"w": (2,)}, {"w": (value, 1.0)})

    linear = {"m": site("linear", 2, 0)}
    first, second = Adapter(linear, base=base(1.0)), Adapter(linear, base=base(2.0))
    with pytest.raises(BaseError, match=r"different bases(.|\n)*--allow-other-base"):
        compare(first, second)
    assert "as allowed" in compare(first, second, allow_other_base=True).notes[0]
    assert not compare(first, first).notes


def test_average_of_grids_of_different_sizes():
    mean, count = average([torch.ones(1, 2), torch.zeros(2, 1), torch.zeros(0, 0)])
    assert mean[0, 0] == 0.5
    assert mean[0, 1] == 1.0
    assert mean[1, 0] == 0.0
    assert torch.isnan(mean[1, 1])
    assert count.tolist() == [[2, 1], [1, 0]]
