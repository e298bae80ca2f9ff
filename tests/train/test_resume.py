"""Stopped anywhere and resumed, a run ends bit for bit as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from lorakit.data import DataSpec, load_data
from lorakit.errors import DataError, InputError, Interrupted, TrainingError
from lorakit.train import (
    Callback,
    Trainer,
    TrainSettings,
    checkpoint,
    finished_run,
    folder,
    origin,
)
from lorakit.train.checkpoint import list_checkpoints
from lorakit.train.interrupt import StopRequest
from tests.train import child, tiny
from tests.train.conftest import SPEC, open_shop

TIMES = ("seconds", "tokens_per_second", "rss_mb")
LONG = {"steps": 20, "eval_every": 5, "checkpoint_every": 3, "patience": 9}


def outcome(out: Path) -> dict:
    """All that must be the same: the adapter's files, the rows but for times, the result."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    return {
        "adapter": {path.name: path.read_bytes() for path in sorted((out / "adapter").iterdir())},
        "rows": [{k: v for k, v in row.items() if k not in TIMES} for row in rows],
        "result": {k: v for k, v in result.items() if k not in ("seconds", "out", "adapter")},
    }


def assert_same(out: Path, expected: dict) -> None:
    found = outcome(out)
    assert found["rows"] == expected["rows"]
    assert found["result"] == expected["result"]
    assert found["adapter"] == expected["adapter"]
    assert not list(out.rglob("*.tmp")), "nothing half-written is left"


@pytest.fixture(scope="session")
def expected(base_folder, tmp_path_factory) -> dict:
    """What the uninterrupted run gives; the data is the same in every test."""
    shop = open_shop(base_folder, tmp_path_factory.mktemp("whole"))
    shop.trainer("whole", **LONG).run()
    return outcome(shop.out / "whole")


class Signal(Callback):
    """Sends a signal to this process after a step."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def on_step(self, metrics):
        if metrics.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_saves_and_says_how_to_go_on(shop, expected, number):
    out = shop.out / "run"
    if signal.getsignal(number) == signal.SIG_IGN:  # under nohup, where it is left ignored
        pytest.skip(f"{signal.Signals(number).name} is ignored in this process")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as error:
        shop.trainer(**LONG, callbacks=[Signal(7, number)]).run()
    assert f"stopped by {number.name} after step 7 of 20" in str(error.value)
    assert f"lorakit train --resume {out}" in str(error.value)
    assert signal.getsignal(number) == before
    assert list_checkpoints(out / "checkpoints")[-1].name == "step-00000007.safetensors"
    assert finished_run(out) is None
    assert (out / "adapter" / "adapter_config.json").exists()
    Trainer.resume(out)
    assert_same(out, expected)


def test_interrupted_again_and_again(shop, expected):
    out = shop.out / "run"
    with pytest.raises(Interrupted):
        shop.trainer(**LONG, callbacks=[Signal(1)]).run()
    for step in (2, 5, 6, 12, 19):
        with pytest.raises(Interrupted):
            Trainer.resume(out, callbacks=[Signal(step)])
    Trainer.resume(out)
    assert_same(out, expected)
    assert len(list_checkpoints(out / "checkpoints")) == 2


@pytest.mark.parametrize("evaluation", [1, 2, 5])
def test_an_interrupt_during_an_evaluation(shop, expected, evaluation, monkeypatch):
    """It ends with the forward, and the resumed run makes the evaluation again."""
    from lorakit.train.loop import validation

    begun = []

    def interrupted_losses(*args, on_batch, **kwargs):
        begun.append(1)
        if len(begun) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, on_batch=on_batch, **kwargs)

    original = validation.example_losses
    monkeypatch.setattr(validation, "example_losses", interrupted_losses)
    step = 5 * (evaluation - 1)
    with pytest.raises(Interrupted, match=f"by SIGTERM after step {step} of 20"):
        shop.trainer(**LONG).run()
    rows = [
        json.loads(line) for line in (shop.out / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(row["kind"] == "eval" for row in rows) == evaluation - 1
    Trainer.resume(shop.out / "run")
    assert_same(shop.out / "run", expected)


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_is_at_once(shop):
    class Twice(Callback):
        def on_step(self, metrics):
            if metrics.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        shop.trainer(**LONG, callbacks=[Twice()]).run()
    assert list_checkpoints(shop.out / "run" / "checkpoints")[-1].name == (
        "step-00000003.safetensors"
    )


class Crash(Callback):
    """Raises at the n-th event of one kind."""

    def __init__(self, event, number):
        self.left = number
        setattr(self, event, self._count)

    def _count(self, *_):
        self.left -= 1
        if not self.left:
            raise RuntimeError("crash")


@pytest.mark.parametrize(
    ("event", "number"),
    [("on_eval", 1), ("on_step", 1), ("on_step", 4), ("on_eval", 3), ("on_checkpoint", 2)],
)
def test_a_crash_at_any_event(shop, expected, event, number):
    with pytest.raises(TrainingError, match="can be resumed"):
        shop.trainer(**LONG, callbacks=[Crash(event, number)]).run()
    Trainer.resume(shop.out / "run")
    assert_same(shop.out / "run", expected)


@pytest.mark.parametrize("where", ["restore_best", "snapshot"])
def test_a_crash_while_it_ends(shop, expected, where, monkeypatch):
    from lorakit.train.job import Job
    from lorakit.train.run import Run

    def crash(self):
        if (self.job if where == "restore_best" else self).done:
            raise RuntimeError("crash")
        return original(self)

    kind = Run if where == "restore_best" else Job
    original = getattr(kind, where)
    monkeypatch.setattr(kind, where, crash)
    with pytest.raises(RuntimeError, match="crash"):
        shop.trainer(**LONG).run()
    monkeypatch.undo()
    Trainer.resume(shop.out / "run")
    assert_same(shop.out / "run", expected)


def test_without_validation(shop):
    options = {**LONG, "validation_fraction": 0.0, "eval_every": None, "patience": 0}
    shop.trainer("whole", **options).run()
    with pytest.raises(Interrupted):
        shop.trainer(**options, callbacks=[Signal(10)]).run()
    Trainer.resume(shop.out / "run")
    assert_same(shop.out / "run", outcome(shop.out / "whole"))


def test_going_on_with_an_adapter_survives_the_loss_of_it(shop, tmp_path):
    from lorakit.formats import load_adapter

    first = shop.trainer("first").run()
    shop.trainer("whole", what=load_adapter(first.adapter), **LONG).run()
    with pytest.raises(Interrupted):
        shop.trainer(what=load_adapter(first.adapter), **LONG, callbacks=[Signal(4)]).run()
    first.adapter.rename(tmp_path / "gone")
    Trainer.resume(shop.out / "run")
    assert_same(shop.out / "run", outcome(shop.out / "whole"))


# --- what must not go on --------------------------------------------------------------------------


def interrupted(shop, **options):
    with pytest.raises(Interrupted):
        shop.trainer(**{**LONG, **options}, callbacks=[Signal(4)]).run()
    return shop.out / "run"


def test_changed_data_is_refused(shop):
    out = interrupted(shop)
    content = shop.data_file.read_bytes()
    tiny.write_rows(shop.data_file, tiny.rows(60, seed=9))
    with pytest.raises(DataError, match="the training data changed since this run began"):
        Trainer.resume(out)
    shop.data_file.write_bytes(content)
    Trainer.resume(out)


@pytest.mark.parametrize("given", [(), ("data",), ("validation",), ("data", "validation")])
def test_data_is_loaded_where_it_is_not_given(shop, given, monkeypatch):
    base = shop.base()
    valid = tiny.write_rows(shop.out / "valid.jsonl", tiny.rows(20, seed=4))
    loaded = {"data": shop.data(base), "validation": shop.data(base, valid)}
    with pytest.raises(Interrupted):
        Trainer(
            base,
            SPEC,
            loaded["data"],
            TrainSettings(steps=6, lr=1e-2, samples=0),
            shop.out / "run",
            validation=loaded["validation"],
            callbacks=[Signal(2)],
            origin=origin.Origin(
                base={"ref": str(shop.base_folder), "device": "cpu", "dtype": "float32"},
                data=DataSpec(path=str(shop.data_file)),
                validation=DataSpec(path=str(valid)),
            ),
        ).run()
    opened = []

    def load(spec, *args, **kwargs):
        opened.append(Path(spec.path[0]).name)
        return load_data(spec, *args, **kwargs)

    monkeypatch.setattr("lorakit.tasks.causal.load_data", load)
    result = Trainer.resume(shop.out / "run", **{name: loaded[name] for name in given})
    assert result.steps == 6
    files = {"data": "data.jsonl", "validation": "valid.jsonl"}
    assert opened == [file for name, file in files.items() if name not in given]


def test_validation_made_by_a_program_must_be_given_again(shop):
    base = shop.base()
    valid = shop.data(base, tiny.write_rows(shop.out / "valid.jsonl", tiny.rows(20, seed=4)))
    out = interrupted(shop, validation=valid)
    sections = folder.RunFolder(out).read_settings()
    assert sections["validation"] is None
    with pytest.raises(InputError, match=r"where its validation data came from.*validation=…"):
        Trainer.resume(out)
    Trainer.resume(out, validation=valid)


def test_a_stopped_run_whose_data_nobody_recorded_says_how_to_go_on(shop):
    base = shop.base()
    data, valid = (
        shop.data(base, tiny.write_rows(shop.out / f"{n}.jsonl", tiny.rows(20, seed=n)))
        for n in (4, 5)
    )
    trainer = Trainer(
        base, SPEC, data, TrainSettings(steps=4, samples=0), shop.out / "run",
        validation=valid, callbacks=[Signal(2)],
    )  # fmt: skip
    with pytest.raises(Interrupted) as stopped:
        trainer.run()
    call = f"Trainer.resume({str(shop.out / 'run')!r}, data=…, validation=…)"
    assert f"Go on with: {call}" in str(stopped.value)
    with pytest.raises(InputError, match="holds a run already") as taken:
        trainer.run()
    assert f"Go on with it: {call}; or give" in str(taken.value)
    with pytest.raises(InputError, match="did not record where its data came from"):
        Trainer.resume(shop.out / "run")
    assert Trainer.resume(shop.out / "run", data=data, validation=valid).steps == 4


def test_a_changed_base_is_refused(shop):
    out = interrupted(shop)
    base = shop.base()
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(1.01)
    from lorakit.bases import identify

    base.identity = identify(base.model, "changed")
    with pytest.raises(InputError, match="the base changed since this run began"):
        Trainer.resume(out, base=base)


def test_edited_settings_are_refused(shop, expected):
    out = interrupted(shop)
    path = out / "run.yaml"
    content = path.read_text()
    edited = content.replace("lr: 0.01", "lr: 0.02").replace("rank: 3", "rank: 4")
    path.write_text(edited)
    with pytest.raises(InputError) as error:
        Trainer.resume(out)
    assert "train.lr: 0.01 then, 0.02 now" in str(error.value)
    assert "lora.rank: 3 then, 4 now" in str(error.value)
    path.write_text(content.replace("keep_checkpoints: 2", "keep_checkpoints: 1"))
    Trainer.resume(out)
    assert_same(out, expected)


def test_a_damaged_end_is_said(shop):
    shop.trainer(steps=2).run()
    out = shop.out / "run"
    result = finished_run(out)
    whole = (out / "result.json").read_text()
    for text, message in [("{}", "steps is missing"), ("[]", "no mapping"), (whole[:-9], "no map")]:
        (out / "result.json").write_text(text)
        with pytest.raises(InputError, match=rf"result.json is damaged.*\s.*{message}"):
            finished_run(out)
    (out / "result.json").write_text(whole)
    shutil.rmtree(out / "adapter")
    with pytest.raises(InputError, match=r"adapter is missing. Delete .*result.json"):
        Trainer.resume(out)
    (out / "result.json").unlink()
    (out / "metrics.jsonl").unlink()
    assert Trainer.resume(out).best_loss == result.best_loss
    assert (out / "adapter" / "adapter_config.json").exists()


def test_damage_is_said(shop, expected):
    out = interrupted(shop)
    newest = list_checkpoints(out / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-9])
    notes = []

    class Notes(Callback):
        def on_note(self, text):
            notes.append(text)

    Trainer.resume(out, callbacks=[Notes()])
    assert_same(out, expected)
    assert any("is damaged" in note for note in notes)


def test_a_run_that_another_process_runs(shop):
    out = interrupted(shop)
    with (
        folder.RunFolder(out).locked(),
        pytest.raises(InputError, match="another process is running"),
    ):
        Trainer.resume(out)


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_step(shop, what, monkeypatch):
    """One example is poisoned; the error names its row, and the weights are those before."""
    from lorakit.infer import PackedModel

    base = shop.base()
    data = shop.data(base)
    trainer = shop.trainer(
        base=base, data=data, validation_fraction=0.0, eval_every=None, steps=30, batch_size=6
    )
    poisoned = 17
    original = PackedModel.group_losses

    def poison(self, batch, *args, **kwargs):
        loss = original(self, batch, *args, **kwargs)
        if poisoned in batch.example_ids.tolist() and torch.is_grad_enabled():
            if what == "loss":
                loss = loss * float("nan")
            else:
                loss = loss + (loss - loss.detach()).abs().sqrt()  # d√0 is infinite
        return loss

    monkeypatch.setattr(PackedModel, "group_losses", poison)
    with pytest.raises(TrainingError) as error:
        trainer.run()
    text = str(error.value)
    out = shop.out / "run"
    state = checkpoint.latest_checkpoint(out / "checkpoints")[0]
    assert f"Stopped in step {state.step + 1}, before the weights moved" in text
    assert text.count("data.jsonl") == 1
    assert f"line {poisoned + 1}" in text
    assert "--lr" in text
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.tensors.values())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("step", 0) for row in steps) == state.step
    # healed, it goes on
    monkeypatch.undo()
    Trainer.resume(out)
    shop.trainer("whole", validation_fraction=0.0, eval_every=None, steps=30, batch_size=6).run()
    assert outcome(out)["adapter"] == outcome(shop.out / "whole")["adapter"]


# --- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["checkpoint", "metrics", "adapter"])
def test_a_full_disk_loses_nothing(shop, expected, where, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_, **__):
        raise full

    class Fill(Callback):
        def on_step(self, metrics):
            if metrics.step == 8:
                if where == "checkpoint":
                    monkeypatch.setattr(checkpoint, "save_file", refuse)
                elif where == "metrics":
                    monkeypatch.setattr(folder, "_as_line", refuse)
                else:
                    monkeypatch.setattr(os, "replace", refuse)

    with pytest.raises(TrainingError, match="is full; nothing that was complete is lost"):
        shop.trainer(**LONG, callbacks=[Fill()]).run()
    monkeypatch.undo()
    Trainer.resume(shop.out / "run")
    assert_same(shop.out / "run", expected)


@pytest.mark.parametrize("good", [0, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weights_that_would_not_be_finite_are_not_kept(shop, good, optimizer, monkeypatch):
    """The step is undone, with what it did to the optimizer."""
    from lorakit.train import job

    every = {"checkpoint_every": 1, "keep_checkpoints": 9}
    shop.trainer("good", steps=9, warmup=0, optimizer=optimizer, **every).run()
    original = job.rate_at
    monkeypatch.setattr(
        job, "rate_at", lambda step, *rest: 1e300 if step == good else original(step, *rest)
    )
    with pytest.raises(
        TrainingError, match=rf"in step {good + 1}: .* learning rate 1e\+300.*lower"
    ):
        shop.trainer(steps=9, warmup=0, optimizer=optimizer).run()
    state = checkpoint.latest_checkpoint(shop.out / "run" / "checkpoints")[0]
    assert state.step == good
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.tensors.values())
    if good:
        folder = shop.out / "good" / "checkpoints"
        before = checkpoint.read_checkpoint(checkpoint.checkpoint_path(folder, good)).tensors
        assert set(before) == set(state.tensors)
        assert all(torch.equal(before[name], state.tensors[name]) for name in before)


# --- SIGKILL --------------------------------------------------------------------------------------


def run_until_killed(shop, ready) -> bool:
    """Start or resume the run in a process of its own; kill it once ``ready()``.

    Returns:
        Whether it was killed; it may have ended before.
    """
    slow = ready if isinstance(ready, Path) else None
    make = partial(shop.trainer, **LONG)
    process = child.context().Process(target=child.work, args=(make, shop.out / "run", slow))
    process.start()
    while process.is_alive() and not (ready.exists() if slow else ready()):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def at_random(shop, draw: random.Random):
    """True a little after a few more rows were written than there are now."""
    metrics = shop.out / "run" / "metrics.jsonl"

    def rows() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    target = rows() + draw.randint(0, 7)

    def ready() -> bool:
        if rows() < target:
            return False
        time.sleep(draw.uniform(0, 0.05))  # anywhere inside a step, an evaluation or a write
        return True

    return ready


def kill_and_resume(shop, expected, kinds: list[str], seed: int) -> None:
    """Kill one run over and over, then let it end; each time it ends it is begun anew."""
    draw = random.Random(seed)
    out = shop.out / "run"
    killed = inside = 0
    for number, kind in enumerate(kinds):
        if ended(out) is not None:
            assert_same(out, expected)
            shutil.rmtree(out)
        slow = shop.out / f"slow{number}"
        was_killed = run_until_killed(shop, slow if kind == "write" else at_random(shop, draw))
        killed += was_killed
        if was_killed and kind == "write":
            inside += 1
            assert list((out / "checkpoints").glob(".*.tmp"))
    assert inside >= kinds.count("write") - 1  # one may have resumed behind its last checkpoint
    assert killed >= len(kinds) - 2
    if ended(out) is None:
        child.work(partial(shop.trainer, **LONG), out, None)
    assert_same(out, expected)


def ended(out: Path):
    return finished_run(out) if (out / "run.yaml").exists() else None


def test_killed_and_resumed(shop, expected):
    kill_and_resume(shop, expected, ["time", "write", "time", "write"], seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_twenty_times(shop, expected, seed):
    kill_and_resume(shop, expected, (["time"] * 2 + ["write"]) * 7, seed=seed)
