"""Orders are permutations, and they go on from any count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data import indices_at, order

seeds = st.integers(0, 2**63 - 1)


@given(st.integers(0, 300), seeds, st.integers(0, 10**6))
def test_an_order_is_a_permutation(num, seed, epoch):
    found = order(num, seed, epoch)
    assert sorted(found.tolist()) == list(range(num))
    assert found.tolist() == order(num, seed, epoch).tolist()


@given(st.integers(1, 40), seeds, st.integers(0, 200), st.integers(0, 100))
def test_what_comes_next_is_a_function_of_the_count(num, seed, consumed, count):
    epochs = range((consumed + count) // num + 1)
    whole = [index for epoch in epochs for index in order(num, seed, epoch).tolist()]
    found = indices_at(num, seed, consumed, count).tolist()
    assert found == whole[consumed : consumed + count]


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(order(20, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_places_are_used_evenly():
    # each of 20 places gets each of 20 indices 200 times in expectation over 4000 orders; the
    # bound is six standard deviations (√190 ≈ 13.8) of a uniform draw
    counts = np.zeros((20, 20))
    for seed in range(4000):
        counts[np.arange(20), order(20, seed, 0)] += 1
    assert abs(counts - 200).max() < 83


def test_the_order_never_changes_between_versions():
    # written down once: a run of an older version must resume in the same order
    assert order(8, 0, 0).tolist() == FIRST
    assert order(8, 7, 3).tolist() == SECOND


def test_nothing_cannot_be_ordered():
    with pytest.raises(ValueError, match="no examples"):
        indices_at(0, 0, 0, 1)


FIRST = [6, 0, 3, 1, 4, 2, 7, 5]
SECOND = [5, 0, 4, 3, 1, 6, 7, 2]
