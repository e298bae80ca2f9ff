"""The search for a size, judged by losses that are measured one candidate at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorakit.algebra.compress import compress
from lorakit.core.adapter import Adapter
from lorakit.core.spec import LoRASpec
from lorakit.data import pack, split
from lorakit.errors import DataError, InputError
from lorakit.evaluate import loss
from lorakit.infer import PackedModel
from lorakit.layers import attach
from lorakit.layers.handle import handle_of
from lorakit.workflows import until_loss
from lorakit.workflows.until_loss import compress_until_loss, sizes
from tests.evaluate.conftest import base, load  # noqa: F401 - fixtures

ROWS = [
    {"prompt": f"{word} {n}", "completion": f"{word[::-1]} {n * n}"}
    for n in range(3)
    for word in ("abc", "one", "two", "lamp")
]


#: trained once: the base is the same in every test
_TRAINED: list[Adapter] = []


@pytest.fixture
def learnt(base, load):  # noqa: F811
    """A base, data, and an adapter that was trained on it for a moment."""
    data = load(ROWS)
    if not _TRAINED:
        handle = attach(base.model, LoRASpec(rank=6, alpha=12), "a", trainable=True)
        packed = PackedModel(base.model, handle)
        optimizer = torch.optim.AdamW(handle.parameters("a"), lr=2e-2)
        for _ in range(25):
            total, _ = packed.supervised_loss(pack(list(data)), reduction="mean")
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
        _TRAINED.append(handle.snapshot("a"))
        handle.detach()
    return base, data, _TRAINED[0]


def alone(base, adapter, data, rows):  # noqa: F811
    """The loss of one adapter by itself; ``None`` is the bare base."""
    if adapter is None:
        return loss(base.model, None, None, data, rows.tolist()).loss
    handle = attach(base.model, adapter, "x", allow_other_base=True)
    try:
        return loss(base.model, handle, "x", data, rows.tolist()).loss
    finally:
        handle.detach()


@pytest.mark.parametrize(("increase", "relative"), [(0.3, True), (0.2, False)])
def test_the_smallest_size_that_passes_on_both_halves(learnt, increase, relative):
    base, data, adapter = learnt  # noqa: F811
    confirming, choosing = split(data, 0.5, 0)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    heard = []
    found = compress_until_loss(
        base.model,
        adapter,
        data,
        increase,
        relative=relative,
        on_progress=lambda *a: heard.append(a),
    )
    assert handle_of(base.model) is None
    assert all(torch.equal(value, before[n]) for n, value in base.model.state_dict().items())
    whole = [alone(base, adapter, data, rows) for rows in (choosing, confirming)]
    limits = [one * (1 + increase) if relative else one + increase for one in whole]
    assert [found.limit, found.limit_confirming] == pytest.approx(limits, rel=1e-5)
    passes = {}
    for trial in found.trials:
        size = trial.parameters
        one = (
            adapter
            if size == adapter.num_parameters
            else compress(adapter, parameters=size) if size else None
        )  # fmt: skip
        losses = [alone(base, one, data, rows) for rows in (choosing, confirming)]
        assert trial.loss == pytest.approx(losses[0], rel=1e-5)
        if trial.confirming is not None:
            assert trial.confirming == pytest.approx(losses[1], rel=1e-5)
        passes[size] = all(x <= limit for x, limit in zip(losses, limits, strict=True))
    assert found.chosen == min(size for size, good in passes.items() if good)
    smaller = max(size for size in passes if size < found.chosen)
    assert not passes[smaller]
    assert 0 < found.chosen < adapter.num_parameters
    assert len(found.trials) == len(sizes(adapter)) + 2  # the bare base, the whole adapter
    assert found.trials[-1].parameters == adapter.num_parameters
    assert (found.rows, found.rows_confirming) == (len(choosing), len(confirming))
    told = found.adapter.provenance["compressed"]["until_loss"]
    assert told["limit"] == found.limit
    assert len(told["trials"]) == len(found.trials)
    assert heard[0][0].startswith("choosing")
    assert heard[-1][1] == len(confirming)


def test_more_sizes_than_one_forward_holds_are_narrowed_down(learnt, monkeypatch):
    base, data, adapter = learnt  # noqa: F811
    every = compress_until_loss(base.model, adapter, data, 0.3)
    monkeypatch.setattr(until_loss, "AT_ONCE", 2)
    few = compress_until_loss(base.model, adapter, data, 0.3)
    assert few.chosen == every.chosen
    assert len(few.trials) < len(every.trials)
    below = [
        max(t.parameters for t in one.trials if t.parameters < few.chosen) for one in (few, every)
    ]
    assert below[0] == below[1]


def test_an_allowance_that_no_size_meets(learnt):
    base, data, adapter = learnt  # noqa: F811
    with pytest.raises(InputError, match="no smaller size keeps the loss"):
        compress_until_loss(base.model, adapter, data, -10.0, relative=False)
    assert handle_of(base.model) is None


def test_an_allowance_that_the_bare_base_meets_is_said(learnt, caplog):
    base, data, adapter = learnt  # noqa: F811
    found = compress_until_loss(base.model, adapter, data, 100.0, relative=False)
    assert found.chosen <= sizes(adapter)[0]
    assert found.chosen == found.trials[1].parameters
    assert "no adapter is needed" in caplog.text


def test_one_prompt_is_too_few(learnt):
    base, data, adapter = learnt  # noqa: F811
    with pytest.raises(DataError, match="too few"):
        compress_until_loss(base.model, adapter, data, 0.1, limit=1)


def test_the_sizes(learnt):
    _, _, adapter = learnt
    by_rank = [compress(adapter, rank=rank).num_parameters for rank in range(1, 6)]
    assert sizes(adapter) == [*(by_rank[0] // part for part in (8, 4, 2)), *by_rank]
    assert np.all(np.diff(sizes(adapter)) > 0)
