"""Each initialisation against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.inits import (
    InputDirections,
    directions,
    eva,
    factors,
    loftq,
    lora_ga,
    olora,
    pissa,
    redistributed,
)


def matrix(m: int, n: int, seed: int) -> torch.Tensor:
    """Random, with singular values that lie apart, so that their vectors are determined."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator, dtype=torch.float64)).Q
    return U * torch.linspace(3, 0.2, min(m, n), dtype=torch.float64) @ V.T


shapes = st.tuples(st.integers(4, 12), st.integers(4, 12), st.integers(1, 3))


@given(shapes, st.integers(0, 99), st.floats(0.25, 8))
@settings(deadline=None, max_examples=40)
def test_pissa_is_the_best_approximation_evenly_shared(shape, seed, scaling):
    m, n, rank = shape
    W = matrix(m, n, seed)
    U, S, Vt = np.linalg.svd(W.numpy())
    best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    A, B, moves = pissa(W, rank, scaling)
    assert moves
    np.testing.assert_allclose(scaling * (B @ A).numpy(), best, atol=1e-11)
    even = np.diag(S[:rank] / scaling)
    np.testing.assert_allclose((A @ A.T).numpy(), even, atol=1e-11)
    np.testing.assert_allclose((B.T @ B).numpy(), even, atol=1e-11)


@given(shapes, st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_olora_is_the_head_of_a_qr(shape, seed):
    m, n, rank = shape
    W = matrix(m, n, seed)
    Q, R = np.linalg.qr(W.numpy())
    A, B, moves = olora(W, rank)
    assert moves
    sign = np.sign((Q[:, :rank] * B.numpy()).sum(0))
    np.testing.assert_allclose(B.numpy() * sign, Q[:, :rank], atol=1e-11)
    np.testing.assert_allclose(A.numpy() * sign[:, None], R[:rank], atol=1e-11)


def test_lora_ga_takes_the_first_right_and_the_next_left_vectors():
    G = matrix(10, 14, 3)
    U, S, Vt = np.linalg.svd(G.numpy(), full_matrices=False)
    scale = 10**0.25 / np.sqrt(16)
    A, B, moves = lora_ga(G, 3)
    assert moves
    np.testing.assert_allclose(np.abs(A.numpy() @ Vt.T), scale * np.eye(3, 10), atol=1e-11)
    np.testing.assert_allclose(np.abs(B.T.numpy() @ U), scale * np.eye(10)[3:6], atol=1e-11)
    # the promise: one step of gradient descent moves B A along the gradient's best directions
    step = B @ (B.T @ G) + (G @ A.T) @ A
    best = scale**2 * (U[:, :6] * S[:6]) @ Vt[:6]
    np.testing.assert_allclose(step.numpy(), best, atol=1e-10)


def test_loftq_gives_back_what_quantising_lost():
    W = matrix(9, 7, 5)
    Q = (W * 4).round() / 4
    A, B, moves = loftq(W, Q, 3, 2.0)
    assert not moves
    lost = np.linalg.svd((W - Q).numpy(), compute_uv=False)
    left = np.linalg.norm((W - Q - 2.0 * B @ A).numpy())
    assert left == pytest.approx(np.sqrt((lost[3:] ** 2).sum()), rel=1e-10)
    assert left < np.linalg.norm((W - Q).numpy())


def test_a_wide_matrix_is_decomposed_at_random_but_well(monkeypatch):
    W = matrix(40, 30, 1)
    exact = factors.leading(W, 3)
    monkeypatch.setattr(factors, "EXACT_SIDE", 8)
    monkeypatch.setattr(factors, "_MORE", 8)
    state = torch.get_rng_state()
    U, values, Vt = factors.leading(W, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(U, factors.leading(W, 3)[0])
    # power iterations leave an error of (σ₁₂/σ₃)^17
    torch.testing.assert_close(values, exact[1], rtol=1e-3, atol=0)
    rebuilt = (exact[0] * exact[1]) @ exact[2]
    assert (U * values @ Vt - rebuilt).norm() < 0.05 * rebuilt.norm()


def test_a_matrix_of_less_rank_leaves_no_nan():
    W = torch.zeros(6, 5, dtype=torch.float64)
    W[0, 0] = 1.0
    for found in (pissa(W, 3, 1.0), lora_ga(W, 2), olora(W, 3)):
        assert all(bool(t.isfinite().all()) for t in found[:2])


@pytest.mark.parametrize("exact", [True, False])
def test_directions_of_a_stream_are_those_of_all_rows(exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(directions, "EXACT_WIDTH", 4)
    rows = matrix(60, 12, 2) * torch.linspace(1, 3, 60, dtype=torch.float64)[:, None]
    stream = InputDirections(12, keep=12)
    for part in rows.split(17):
        stream.update(part)
    found, shares = stream.leading(4)
    _, S, Vt = np.linalg.svd(rows.numpy())
    # the incremental way keeps float32 of what was seen
    tolerance = 1e-10 if exact else 1e-5
    np.testing.assert_allclose(np.abs(found.numpy() @ Vt.T), np.eye(4, 12), atol=tolerance)
    np.testing.assert_allclose(shares.numpy(), (S**2 / (S**2).sum())[:4], rtol=max(tolerance, 1e-9))


def test_fewer_rows_than_directions_are_completed(monkeypatch):
    for width in (4096, 4):
        monkeypatch.setattr(directions, "EXACT_WIDTH", width)
        stream = InputDirections(12, keep=6)
        stream.update(matrix(3, 12, 4))
        found, shares = stream.leading(5)
        torch.testing.assert_close(found @ found.T, torch.eye(5, dtype=torch.float64))
        assert shares[:3].sum() == pytest.approx(1.0, abs=1e-6)
    A, B, moves = eva(found, 7)
    assert torch.equal(A, found)
    assert B.shape == (7, 5)
    assert not B.any()
    assert not moves


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_ranks_go_where_most_is_explained(values):
    shares = {f"s{i}": torch.tensor(sorted(v, reverse=True)) for i, v in enumerate(values)}
    budget = 2 * len(values)
    ranks = redistributed(shares, budget)
    assert sum(ranks.values()) == budget
    taken = [x for p, r in ranks.items() for x in shares[p][:r].tolist()]
    left = [x for p, r in ranks.items() for x in shares[p][r:].tolist()]
    assert min(taken) >= max(left, default=0.0)
