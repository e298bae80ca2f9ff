"""What is set aside from the garbage collector while the same runs take part."""

from __future__ import annotations

import gc
import weakref

import pytest

from lorakit.train import Callback, heap, train_together
from lorakit.train.heap import StillHeap
from tests.train.test_together import base, make, shop, wide_folder

__all__ = ["base", "shop", "wide_folder"]  # fixtures


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(heap, "_SETTLED", 3)
    assert not is_still()
    yield
    assert not is_still()


def is_still():
    return gc.get_freeze_count() >= heap._IMMORTAL


class Counts(Callback):
    def __init__(self):
        self.frozen = []

    def on_step(self, metrics):
        self.frozen.append(is_still())


def test_it_is_still_while_the_same_runs_take_part(shop, base):
    """One of two ends after five steps; the other goes on alone for four."""
    counts = Counts()
    longer = make(shop, base, "a", "a", steps=9, callbacks=[counts])
    train_together([longer, make(shop, base, "b", "b", steps=5)])
    assert counts.frozen == [False] * 2 + [True] * 3 + [False] * 2 + [True] * 2


def test_an_interrupt_at_once_leaves_nothing_set_aside(shop, base):
    class Interrupts(Callback):
        def on_step(self, metrics):
            if metrics.step == 4:
                assert is_still()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together([make(shop, base, "a", "a", steps=9, callbacks=[Interrupts()])])


def test_garbage_from_before_is_taken_away_and_later_garbage_is_found_in_the_end():
    class Ring:
        def __init__(self):
            self.me = self

    early, late = Ring(), Ring()
    seen = [weakref.ref(early), weakref.ref(late)]
    del early
    with StillHeap() as still:
        for _ in range(3):
            still.between_rounds()
        assert [one() is None for one in seen] == [True, False]
        del late
        gc.collect()
        assert seen[1]() is not None
    gc.collect()
    assert seen[1]() is None


def test_what_somebody_else_has_frozen_stays_so():
    gc.freeze()
    try:
        with StillHeap() as still:
            for _ in range(9):
                still.between_rounds()
            still.changed()
            assert is_still()
        assert is_still()
    finally:
        gc.unfreeze()
