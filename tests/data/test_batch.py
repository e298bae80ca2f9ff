"""Packing loses nothing, and no example sees or predicts another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data import Example, pack


@st.composite
def examples(draw):
    found = []
    for n in range(draw(st.integers(1, 6))):
        size = draw(st.integers(1, 12))
        ids = draw(st.lists(st.integers(0, 999), min_size=size, max_size=size))
        mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        row = draw(st.integers(1, 10**6))
        found.append(Example(np.array(ids, np.int32), np.array(mask), row, "f", 10 * n))
    return found


def predicted(ids, supervised):
    """(token before, token) of all supervised tokens but the first, by a plain loop."""
    return [(int(ids[i - 1]), int(ids[i])) for i in range(1, len(ids)) if supervised[i]]


@given(examples())
def test_packing_loses_nothing(drawn):
    batch = pack(drawn)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, sum(batch.lengths))
    parts = torch.split(batch.input_ids[0], list(batch.lengths))
    assert [p.tolist() for p in parts] == [one.ids.tolist() for one in drawn]
    positions = torch.split(batch.position_ids[0], list(batch.lengths))
    assert all(p.tolist() == list(range(len(p))) for p in positions)
    assert batch.example_ids.tolist() == [one.id for one in drawn]
    assert batch.rows == tuple((one.file, one.index) for one in drawn)
    for tensor in (batch.input_ids, batch.position_ids, batch.supervised, batch.labels):
        assert tensor.dtype == torch.int64


@given(examples())
def test_labels_are_the_next_tokens_of_the_same_example(drawn):
    batch = pack(drawn)
    before = batch.input_ids[0][batch.supervised].tolist()
    expected = [pair for one in drawn for pair in predicted(one.ids, one.supervised)]
    assert list(zip(before, batch.labels.tolist(), strict=True)) == expected
    assert batch.num_supervised == len(expected)
    last = set((np.cumsum(batch.lengths) - 1).tolist())
    assert not last & set(batch.supervised.tolist())
    assert batch.supervised.tolist() == sorted(set(batch.supervised.tolist()))


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        pack([])
