"""Several runs in shared forwards: each comes out as if it had been alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit.bases import load_base
from lorakit.core.spec import LoRASpec
from lorakit.data import indices_at
from lorakit.errors import InputError, Interrupted, SpecError, TrainingError
from lorakit.infer import PackedModel
from lorakit.train import Callback, Trainer, TrainSettings, finished_run, train_together
from lorakit.train.checkpoint import latest_checkpoint, list_checkpoints, read_checkpoint
from lorakit.train.loop import Loop
from lorakit.train.loop.forwards import Forwards
from lorakit.train.together import aligned
from tests.train import child, tiny
from tests.train.conftest import open_shop
from tests.train.test_resume import outcome

#: sums of float64 in another order, through up to 50 optimizer steps
TOLERANCE = 1e-9

#: what each job is made of; together they differ in everything that may differ
JOBS = {
    "a": (
        {"rank": 2, "targets": ("v_proj", "lm_head"), "dropout": 0.2},
        {"batch_size": 3, "lr": 1e-2, "seed": 1},
    ),
    "b": (
        {"rank": 64, "alpha": 16, "targets": ("gate_proj", "down_proj")},
        {"batch_size": 1, "lr": 3e-3, "clip": 0.05, "schedule": "cosine"},
    ),
    "c": (
        {"rank": 8, "targets": "attention", "dropout": 0.4},
        {"batch_size": 7, "micro_batch": 2, "lr": 8e-3, "seed": 5},
    ),
    "d": (
        {"rank": 5, "targets": ("q_proj", "up_proj"), "variant": "dora"},
        {"batch_size": 2, "lr": 5e-3, "warmup": 9, "clip": 0.0},
    ),
    "e": (
        {"rank": 16, "train_modules": ("model.norm",)},
        {"batch_size": 4, "lr": 1e-3, "lora_plus_ratio": 4.0, "micro_batch_tokens": 30},
    ),
}
DECAY = {"a": 0.1, "b": 0.0, "c": 0.3, "d": 0.01, "e": 0.2}


def make(shop, base, name, out, *, optimizer="adamw", steps=50, callbacks=(), targets=None, **more):
    spec, settings = JOBS[name]
    if targets is not None:
        spec = {**spec, "targets": targets}
    if optimizer == "adamw":
        settings = {**settings, "weight_decay": DECAY[name]}
    settings = {
        "steps": steps,
        "samples": 0,
        "eval_every": 20,
        "eval_rows": 6,
        "optimizer": optimizer,
        **settings,
        **more,
    }
    if settings.get("warmup", 0) >= steps:
        settings["warmup"] = 1
    rows = shop.out / f"{name}.jsonl"
    if not rows.exists():
        tiny.write_rows(rows, tiny.rows(60, seed=ord(name)))
    return Trainer(
        base,
        LoRASpec(**{"rank": 4, **spec}),
        shop.data(base, rows),
        TrainSettings(**settings),
        shop.out / out / name,
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    return tiny.write_base(tmp_path_factory.mktemp("wide"), width=64)


@pytest.fixture
def shop(wide_folder, tmp_path):
    return open_shop(wide_folder, tmp_path)


@pytest.fixture
def base(shop, monkeypatch):
    """In float64 throughout: transformers' norm would fall to float32."""

    def forward(self, x):
        return (
            self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    return load_base(str(shop.base_folder), device="cpu", dtype="float64")


def state(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Weights and optimizer of the last checkpoint, or of that of a step."""
    found = latest_checkpoint(run / "checkpoints", until=step)[0]
    assert found is not None
    assert step is None or found.step == step
    return {n: t for n, t in found.tensors.items() if n.startswith("job.")}


def assert_close(run: Path, alone: Path, tolerance: float = TOLERANCE) -> None:
    mine, expected = state(run), state(alone)
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.numel() > 1:
            assert tensor.dtype == torch.float64
            assert (mine[name] - tensor).norm() <= tolerance * tensor.norm(), (run.name, name)
        else:
            assert torch.equal(mine[name], tensor)
    rows = [numbers(folder) for folder in (run, alone)]
    assert len(rows[0]) == len(rows[1])
    for row, other in zip(*rows, strict=True):
        assert row == pytest.approx(other, rel=1e-7)


def numbers(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "lr", "tokens", "supervised", "best")
    return [{n: r[n] for n in names if n in r} for r in rows if r["kind"] in ("step", "eval")]


def assert_identical(run: Path, other: Path, step: int | None = None) -> None:
    mine, expected = state(run, step), state(other, step)
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(mine[name], tensor), (run.name, name)


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, metrics):
        if metrics.step == self.step:
            self.action()


def leaving(trainer: Trainer, step: int) -> Trainer:
    trainer._callbacks.append(At(step, lambda: trainer.leave("it was told to")))
    return trainer


# --- solo equivalence --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        ("adamw", 24),
        ("sgd", 24),
        pytest.param("adamw", 50, marks=pytest.mark.slow),
        pytest.param("sgd", 50, marks=pytest.mark.slow),
    ],
)
def test_each_of_five_comes_out_as_alone(shop, base, optimizer, steps, monkeypatch):
    """Ranks 2 to 64; one joins at step 10, one leaves at step 20 and is resumed alone."""
    options = {"optimizer": optimizer, "steps": steps}
    for name in JOBS:
        make(shop, base, name, "alone", **options).run()
    made = {name: make(shop, base, name, "joint", **options) for name in JOBS}
    leaving(made["c"], 20)
    rounds, forwards = [], []

    def watched(self):
        rounds.append([run.folder.path.name for run in self.runs])
        return own(self)

    def counted(self, shares):
        forwards.append([share.run.folder.path.name for share in shares])
        return backward(self, shares)

    own, backward = Loop.round, Forwards.backward
    monkeypatch.setattr(Loop, "round", watched)
    monkeypatch.setattr(Forwards, "backward", counted)

    def drawn():
        yield from [made["a"], made["b"], made["c"], made["d"]]
        while len(rounds) < 10:
            yield None
        yield made["e"]

    results = train_together(drawn(), max_concurrent=5, token_budget=90)
    assert [r.ending for r in results] == ["finished"] * 2 + ["left"] + ["finished"] * 2
    assert rounds[9] == ["a", "b", "c", "d"]
    assert rounds[10] == rounds[19] == ["a", "b", "c", "d", "e"]
    assert rounds[20] == ["a", "b", "d", "e"]
    assert len(rounds) == steps + 10
    shared = [names for names in forwards if len(names) > 1]
    assert len(shared) >= steps
    assert {name for names in shared for name in names} == set("abce"), "DoRA has forwards apart"
    assert all(len(names) == len(set(names)) for names in shared)
    assert finished_run(shop.out / "joint" / "c") is None
    assert latest_checkpoint(shop.out / "joint" / "c" / "checkpoints")[0].step == 20
    again = reopened(shop, base, "c", "joint")
    assert again.run().steps == steps
    for name in JOBS:
        assert_close(shop.out / "joint" / name, shop.out / "alone" / name)
        notes = (shop.out / "joint" / name / "metrics.jsonl").read_text()
        assert "its forwards are its own" not in notes


def reopened(shop, base, name, out):
    data = shop.data(base, shop.out / f"{name}.jsonl")
    return Trainer.reopened(shop.out / out / name, base=base, data=data)


def test_the_fused_layers_serve_several_adapters(shop, base, monkeypatch):
    counts = []
    own = Forwards.backward

    def counted(self, shares):
        before = self.task.packed.fused.counts["fused"]
        result = own(self, shares)
        counts.append((len(shares), self.task.packed.fused.counts["fused"] - before))
        return result

    monkeypatch.setattr(Forwards, "backward", counted)
    train_together([make(shop, base, n, "joint", steps=3) for n in ("a", "b", "c")])
    assert (3, 2) in counts, "three adapters, both layers"
    assert {layers for _, layers in counts} == {2}


def test_a_run_moves_from_joint_to_alone_and_back(shop, base):
    names = ("a", "b")
    for name in names:
        make(shop, base, name, "alone", steps=18).run()
    first = [leaving(make(shop, base, n, "moved", steps=18), 6) for n in names]
    assert [r.ending for r in train_together(first)] == ["left", "left"]
    alone = leaving(reopened(shop, base, "a", "moved"), 12)
    with_result = train_together([alone])
    assert with_result[0].steps == 12
    back = [reopened(shop, base, name, "moved") for name in names]
    assert [r.steps for r in train_together(back)] == [18, 18]
    for name in names:
        assert_close(shop.out / "moved" / name, shop.out / "alone" / name)


# --- what stops one stops no other ---------------------------------------------------------------


def poison(monkeypatch, file: str, row: int):
    """The activations of one row are NaN, wherever it is in a forward."""
    own = PackedModel.group_losses
    from lorakit.infer import packed

    def group_losses(self, batch, *args, **kwargs):
        bad = [i for i, where in enumerate(batch.rows) if where == (file, row)]
        if not bad:
            return own(self, batch, *args, **kwargs)
        start = sum(batch.lengths[: bad[0]])
        embedding = self.model.get_input_embeddings()

        def spoil(module, inputs, output):
            output = output.clone()
            output[:, start : start + batch.lengths[bad[0]]] = float("nan")
            return output

        hook = embedding.register_forward_hook(spoil)
        try:
            return own(self, batch, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(packed.PackedModel, "group_losses", group_losses)


def test_a_nan_of_one_reaches_no_other(shop, base, monkeypatch):
    """The others are bit for bit as beside a run that leaves at that step without a NaN, and
    within rounding as without that run."""
    names = ("a", "b", "c", "d", "e")
    options = {"steps": 14, "eval_every": 0, "validation_fraction": 0.1, "eval_rows": 4}

    def made(out, who=names):
        return [make(shop, base, n, out, **options) for n in who]

    # a row of c that comes up for the first time in some later step
    bad = next(rows_of_step(made("probe", ("c",))[0], 5))
    with monkeypatch.context() as patch:
        poison(patch, *bad)
        results = train_together(made("nan"), max_concurrent=5)
    failure = results[2]
    assert isinstance(failure, TrainingError)
    step = latest_checkpoint(shop.out / "nan" / "c" / "checkpoints")[0].step
    assert f"Stopped in step {step + 1}" in str(failure)
    assert str(failure).count("c.jsonl") == 1
    assert f"line {bad[1]}" in str(failure)
    assert [r.steps for r in results if not isinstance(r, Exception)] == [14] * 4
    trainers = made("leaves")
    leaving(trainers[2], step + 1)
    train_together(trainers, max_concurrent=5)
    train_together(made("without", ("a", "b", "d", "e")), max_concurrent=5)
    for name in ("a", "b", "d", "e"):
        assert_identical(shop.out / "nan" / name, shop.out / "leaves" / name)
        assert_close(shop.out / "nan" / name, shop.out / "without" / name)
    # and it is told from poison that the test can see: its own weights are those before the step
    assert all(bool(t.isfinite().all()) for t in state(shop.out / "nan" / "c").values())


def rows_of_step(trainer, step):
    """(file, row) of the examples of a step that no earlier step has."""
    size, seed = trainer.settings.batch_size, trainer.settings.seed
    number = len(trainer._training)
    before = set(indices_at(number, seed, 0, step * size).tolist())
    for place in indices_at(number, seed, step * size, size).tolist():
        if place not in before:
            example = trainer._data[int(trainer._training[place])]
            yield example.file, example.index


class Fails(Callback):
    def on_step(self, metrics):
        if metrics.step == 3:
            raise RuntimeError("a callback that fails")


def test_what_stops_one_is_its_own(shop, base):
    """A callback that fails, targets that are not there, a folder that is taken, another base."""
    other = load_base(str(shop.base_folder), device="cpu", dtype="float64")
    options = {"steps": 5, "eval_every": 0}
    (shop.out / "joint" / "c").mkdir(parents=True)
    (shop.out / "joint" / "c" / "file").touch()
    trainers = [
        make(shop, base, "a", "joint", callbacks=[Fails()], **options),
        make(shop, base, "b", "joint", **options),
        make(shop, base, "c", "joint", **options),
        make(shop, other, "d", "joint", **options),
        make(shop, base, "e", "joint", targets=("nothing",), **options),
    ]
    told = []
    results = train_together(trainers, on_result=lambda t, r: told.append((t.out.name, r)))
    assert [type(r).__name__ for r in results] == [
        "TrainingError", "RunResult", "InputError", "InputError", "TargetError",
    ]  # fmt: skip
    assert "a callback that fails" in str(results[0])
    assert "is not empty" in str(results[2])
    assert "another base object" in str(results[3])
    assert sorted(told, key=lambda one: one[0]) == list(zip("abcde", results, strict=True))
    assert finished_run(shop.out / "joint" / "b").steps == 5
    assert not any("forward" in module.__dict__ for module in base.model.modules())
    with pytest.raises(SpecError, match="recompute is 'mlp', and 'none'"):
        raise train_together(
            [
                make(shop, base, "b", "more", **options),
                make(shop, base, "e", "more", recompute="mlp", **options),
            ]
        )[1]
    with pytest.raises(SpecError, match="max_concurrent is 0"):
        train_together([], max_concurrent=0)
    with pytest.raises(InputError, match="no run is under way"):
        train_together([None])


def test_an_iterable_that_fails_costs_nobody_a_step(shop, base):
    def drawn():
        yield make(shop, base, "a", "joint", steps=5, eval_every=0)
        yield make(shop, base, "b", "joint", steps=5, eval_every=0)
        yield from (None, None)
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")

    told = []
    with pytest.raises(UnicodeDecodeError):
        train_together(drawn(), on_result=lambda t, r: told.append((t.out.name, str(r))))
    assert [name for name, _ in told] == ["a", "b"]
    assert all("stopped by UnicodeDecodeError in making the next run" in r for _, r in told)
    for name in ("a", "b"):
        found = latest_checkpoint(shop.out / "joint" / name / "checkpoints")[0]
        assert found.step == 2
        assert found.state["together"]["members"] == ["a", "b"]


def test_memory_that_is_full_makes_shared_forwards_smaller(shop, base, monkeypatch):
    names, options = ("a", "b", "c"), {"steps": 6, "eval_every": 0}
    train_together([make(shop, base, n, "free", **options) for n in names])
    own, seen = PackedModel.group_losses, []

    def group_losses(self, batch, routing, groups):
        seen.append((batch.num_tokens, len(groups)))
        if batch.num_tokens > 70:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, batch, routing, groups)

    monkeypatch.setattr(PackedModel, "group_losses", group_losses)
    train_together([make(shop, base, n, "full", **options) for n in names])
    assert max(n for n, groups in seen if groups > 1) > 70
    assert any(n <= 70 for n, groups in seen if groups > 1)
    assert max(n for n, _ in seen[-10:]) <= 70
    for name in names:
        assert_close(shop.out / "full" / name, shop.out / "free" / name)
        notes = (shop.out / "full" / name / "metrics.jsonl").read_text()
        assert "the memory was too small" in notes


def test_a_place_is_given_to_the_next_and_a_waiting_adapter_to_the_memory(shop, base, monkeypatch):
    from lorakit.train import together

    made = [make(shop, base, n, "two", steps=4, eval_every=0) for n in ("a", "b", "c", "e")]
    crowd = []
    own = Loop.round
    monkeypatch.setattr(Loop, "round", lambda self: crowd.append(len(self.runs)) or own(self))
    results = train_together(iter(made), max_concurrent=2)
    assert [getattr(r, "steps", r) for r in results] == [4] * 4
    assert crowd == [2] * 8
    crowd.clear()
    monkeypatch.setattr(together, "_free_bytes", lambda trainer: 1000)
    made = [make(shop, base, n, "one", steps=2, eval_every=0) for n in ("a", "b", "c")]
    assert [r.steps for r in train_together(made)] == [2, 2, 2]
    assert crowd == [1] * 6


# --- interrupted and killed ----------------------------------------------------------------------


NAMES = ("a", "b", "c")
LONG = {"steps": 16, "eval_every": 5, "eval_rows": 4}


def resume_all(shop, base, out="joint", names=NAMES, **options):
    left = [n for n in names if finished_run(shop.out / out / n) is None]
    return train_together(aligned([reopened(shop, base, n, out) for n in left]), **options)


def test_an_interrupt_saves_all_at_one_moment(shop, base):
    """And the runs go on bit for bit, each row and file as if nothing had happened."""
    train_together([make(shop, base, n, "whole", **LONG) for n in NAMES])
    trainers = [make(shop, base, n, "joint", **LONG) for n in NAMES]
    trainers[1]._callbacks.append(At(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    results = train_together(trainers)
    assert [type(r) for r in results] == [Interrupted] * 3
    assert "stopped by SIGTERM after step 7 of 16" in str(results[0])
    for name in NAMES:
        last = list_checkpoints(shop.out / "joint" / name / "checkpoints")[-1]
        assert last.name == "step-00000007.safetensors"
        assert read_checkpoint(last).state["together"]["members"] == list(NAMES)
    assert [r.steps for r in resume_all(shop, base)] == [16, 16, 16]
    for name in NAMES:
        assert_same(shop, name)


def assert_same(shop, name):
    mine, expected = outcome(shop.out / "joint" / name), outcome(shop.out / "whole" / name)
    assert mine["rows"] == expected["rows"]
    assert mine["adapter"] == expected["adapter"]
    assert mine["result"] == expected["result"]
    assert_identical(shop.out / "joint" / name, shop.out / "whole" / name)


def in_a_process(folder: Path, base_folder: Path) -> None:
    """All three runs, begun or gone on with."""
    torch.set_num_threads(1)
    shop = open_shop(base_folder, folder)
    base = load_base(str(base_folder), device="cpu", dtype="float64")
    every = {**LONG, "checkpoint_every": 2}
    if (shop.out / "joint" / "a" / "run.yaml").exists():
        resume_all(shop, base)
    else:
        train_together([make(shop, base, n, "joint", **every) for n in NAMES])


def test_killed_and_resumed_together(shop, monkeypatch):
    plain = load_base(str(shop.base_folder), device="cpu", dtype="float64")
    every = {**LONG, "checkpoint_every": 2}
    train_together([make(shop, plain, n, "whole", **every) for n in NAMES])
    killed = 0
    for rows in (4, 9, 12):
        process = child.context().Process(target=in_a_process, args=(shop.out, shop.base_folder))
        process.start()
        metrics = shop.out / "joint" / "b" / "metrics.jsonl"
        while process.is_alive():
            if metrics.exists() and metrics.read_text().count('"kind": "step"') >= rows:
                process.kill()
                break
            time.sleep(0.001)
        process.join()
        killed += process.exitcode != 0
    assert killed >= 2
    resume_all(shop, plain)
    for name in NAMES:
        assert_same(shop, name)


def test_a_checkpoint_of_a_later_moment_is_left_aside(shop, base):
    """Killed between two files of one moment: those who have it go back with the others."""
    every = {**LONG, "checkpoint_every": 3}
    train_together([make(shop, base, n, "whole", **every) for n in NAMES])
    trainers = [make(shop, base, n, "joint", **every) for n in NAMES]
    trainers[0]._callbacks.append(At(9, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train_together(trainers)
    for name in NAMES[1:]:
        list_checkpoints(shop.out / "joint" / name / "checkpoints")[-1].unlink()
    again = aligned([reopened(shop, base, name, "joint") for name in NAMES])
    assert [trainer.until for trainer in again] == [6, 6, 6]
    train_together(again)
    for name in NAMES:
        assert_same(shop, name)
    # one that has gone on alone since is not taken back
    shutil.rmtree(shop.out / "joint")
    trainers = [leaving(make(shop, base, n, "joint", **LONG), 4) for n in NAMES]
    trainers[0]._callbacks.append(At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train_together(trainers)
    train_together([leaving(reopened(shop, base, "a", "joint"), 8)])
    again = aligned([reopened(shop, base, name, "joint") for name in NAMES])
    assert [trainer.until for trainer in again] == [None, None, None]
