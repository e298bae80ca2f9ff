"""A DoRA adapter is trained, stopped, resumed and continued like any other."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest
import torch

from lorakit.errors import Interrupted
from lorakit.formats import load_adapter
from lorakit.layers import attach
from lorakit.train import Trainer
from tests.train.conftest import SPEC
from tests.train.test_resume import Signal, assert_same, outcome

DORA = dataclasses.replace(SPEC, variant="dora")
RUN = {"what": DORA, "steps": 20, "eval_every": 5, "checkpoint_every": 3}


def test_twenty_steps_leave_the_base_and_move_the_magnitudes(shop):
    base = shop.base()
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    result = shop.trainer(base=base, **RUN).run()
    assert result.best_loss < result.base_loss
    for name, p in base.model.named_parameters():
        assert torch.equal(p, before[name]), name
    adapter = load_adapter(result.adapter)
    assert adapter.spec.variant == "dora"
    for path, site in adapter.low_rank.items():
        lengths = before[f"{path}.weight"].norm(dim=1)
        assert site.magnitude is not None
        assert 1e-4 < (site.magnitude - lengths).abs().max() < 1.0, path
    config = json.loads((shop.out / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    assert "| variant | DoRA |" in (shop.out / "run" / "adapter" / "README.md").read_text()


def test_stopped_and_resumed_it_ends_as_if_nothing_had_happened(shop):
    short = {**RUN, "steps": 9}
    shop.trainer("whole", **short).run()
    expected = outcome(shop.out / "whole")
    with pytest.raises(Interrupted):
        shop.trainer(**short, callbacks=[Signal(4, signal.SIGTERM)]).run()
    Trainer.resume(shop.out / "run")
    assert_same(shop.out / "run", expected)


def test_it_goes_on_where_it_was(shop):
    shop.trainer("first", **{**RUN, "steps": 8}).run()
    adapter = load_adapter(shop.out / "first" / "adapter")
    result = shop.trainer("second", **{**RUN, "what": adapter, "steps": 2}).run()
    lines = (shop.out / "second" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first = next(row for row in rows if row["kind"] == "eval")
    best = json.loads((shop.out / "first" / "result.json").read_text())["best_loss"]
    assert first["loss"] == pytest.approx(best, rel=1e-5)
    assert result.best_loss <= best * (1 + 1e-6)
    base = shop.base()
    attach(base.model, load_adapter(result.adapter))
