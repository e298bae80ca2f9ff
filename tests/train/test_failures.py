"""A failure that belongs to one run neither ends nor changes another."""

from __future__ import annotations

import json

import pytest
import torch

from lorakit.data import indices_at
from lorakit.errors import InputError, SpecError, TrainingError
from lorakit.infer import PackedModel
from lorakit.tasks.causal import CausalTask
from lorakit.train import Callback, train_together
from lorakit.train.loop import Loop
from tests.train.test_resume import outcome

SETTINGS = {"validation_fraction": 0.0, "eval_every": None, "batch_size": 1, "steps": 6}


class Examples:
    """A run's examples, one of which cannot be had any more."""

    def __init__(self, data):
        self.data = data
        self.lost: int | None = None

    def __len__(self):
        return len(self.data)

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __getitem__(self, index):
        if index == self.lost:
            raise OSError(f"row {index} is lost")
        return self.data[index]


class Leaves(Callback):
    """Takes its run out after a step."""

    def __init__(self, step):
        self.step, self.trainer = step, None

    def on_step(self, metrics):
        if metrics.step == self.step:
            self.trainer.leave("it was told to")


def test_an_example_that_is_lost_ends_its_own_run(shop):
    """Whoever enters looks at the longest examples of all, this one among them, and goes on as
    beside a run that left before it."""
    base = shop.base()
    lengths = shop.data(base).lengths
    order = indices_at(len(lengths), 1, 0, SETTINGS["steps"])  # a batch is one example
    step = int(lengths[order].argmax())
    assert 0 < step < SETTINGS["steps"] - 1

    def together(name, **options):
        data = Examples(shop.data(base))

        def drawn():
            yield shop.trainer(f"{name} a", base=base, data=data, **SETTINGS, seed=1, **options)
            if not options:
                data.lost = int(order[step])
            yield shop.trainer(f"{name} b", base=base, **SETTINGS, seed=2)

        return drawn()

    failure, result = train_together(together("lost"), max_concurrent=2)
    assert isinstance(failure, OSError)
    rows = [json.loads(r) for r in (shop.out / "lost a" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("step", 0) for row in rows) == step
    assert result.steps == SETTINGS["steps"]
    leaves = Leaves(step)
    trainers = together("left", callbacks=[leaves])
    leaves.trainer = next(trainers)
    train_together([leaves.trainer, *trainers], max_concurrent=2)
    assert outcome(shop.out / "lost b") == outcome(shop.out / "left b")


class Refuses(Callback):
    """Fails at a note."""

    def __init__(self, part):
        self.part = part

    def on_note(self, text):
        if self.part in text:
            raise ValueError("a callback that fails")


@pytest.mark.parametrize(
    ("note", "error"),
    [
        ("its forwards are its own", None),
        ("failed (RuntimeError", RuntimeError("of several adapters")),
        ("the memory was too small", torch.OutOfMemoryError("CUDA out of memory")),
    ],
    ids=["entering", "failing", "full"],
)
def test_a_note_that_cannot_be_told_ends_its_own_run(shop, monkeypatch, note, error):
    """Each is about forwards that both share, or would."""
    own = PackedModel.group_losses

    def group_losses(self, batch, routing, groups):
        if error is not None and len(groups) > 1:
            raise error
        return own(self, batch, routing, groups)

    monkeypatch.setattr(PackedModel, "group_losses", group_losses)
    if error is None:
        monkeypatch.setattr(CausalTask, "why_apart", lambda *_: "it was said so")
    base, settings = shop.base(), {**SETTINGS, "steps": 2}
    failure, result = train_together(
        [
            shop.trainer("a", base=base, callbacks=[Refuses(note)], **settings),
            shop.trainer("b", base=base, **settings),
        ]
    )
    assert isinstance(failure, TrainingError)
    assert "a callback that fails" in str(failure)
    assert result.steps == 2


def test_who_failed_or_has_ended_decides_nothing(shop, monkeypatch):
    """What is made again is the same for those who share forwards, and they alone are asked."""
    base, seen, ended, own = shop.base(), [], [], Loop.round

    def watched(self):
        seen.append(self._forwards.task.packed.fused.recompute)
        return own(self)

    monkeypatch.setattr(Loop, "round", watched)
    (shop.out / "taken").mkdir()
    (shop.out / "taken" / "file").touch()
    ways = {"taken": "mlp", "a": "none", "b": "layers", "c": "layers", "d": "none"}
    settings = {**SETTINGS, "steps": 2}
    trainers = [
        shop.trainer(out, base=base, recompute=way, **settings) for out, way in ways.items()
    ]

    def drawn():
        yield trainers[0]
        yield trainers[1]
        while "a" not in ended:
            yield None
        yield from trainers[2:]

    found = train_together(drawn(), on_result=lambda trainer, _: ended.append(trainer.out.name))
    assert [type(one) for one in found[:1] + found[4:]] == [InputError, SpecError]
    assert "recompute is 'none', and 'layers' in the runs" in str(found[4])
    assert [one.steps for one in found[1:4]] == [2, 2, 2]
    assert seen == ["none"] * 2 + ["layers"] * 2
