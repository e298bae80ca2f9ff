"""Several runs in shared forwards: each comes out as if it had been alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit.bases import load_base
from lorakit.core.spec import LoRASpec
from lorakit.data import indices_at
from lorakit.errors import TrainingError
from lorakit.infer import PackedModel
from lorakit.train import Callback, Trainer, TrainSettings, finished_run, train_together
from lorakit.train.checkpoint import latest_checkpoint
from lorakit.train.loop import Loop
from tests.train import tiny
from tests.train.conftest import open_shop

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
        {"batch_size": 7, "micro_batch": 2, "lr": 2e-2, "seed": 5},
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


def make(shop, base, name, out, *, optimizer="adamw", steps=50, callbacks=(), **more):
    spec, settings = JOBS[name]
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
    assert {"best"} <= {p.name[:4] for p in (run / "checkpoints").iterdir()}
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

    own, backward = Loop.round, Loop._backward
    monkeypatch.setattr(Loop, "round", watched)
    monkeypatch.setattr(Loop, "_backward", counted)

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


def reopened(shop, base, name, out):
    data = shop.data(base, shop.out / f"{name}.jsonl")
    return Trainer.reopened(shop.out / out / name, base=base, data=data)


def test_the_fused_layers_serve_several_adapters(shop, base, monkeypatch):
    counts = []
    own = Loop._backward

    def counted(self, shares):
        before = self._packed.fused.counts["fused"]
        result = own(self, shares)
        counts.append((len(shares), self._packed.fused.counts["fused"] - before))
        return result

    monkeypatch.setattr(Loop, "_backward", counted)
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
    poison(monkeypatch, *bad)
    results = train_together(made("nan"), max_concurrent=5)
    failure = results[2]
    assert isinstance(failure, TrainingError)
    step = latest_checkpoint(shop.out / "nan" / "c" / "checkpoints")[0].step
    assert f"Stopped in step {step + 1}" in str(failure)
    assert str(failure).count("c.jsonl") == 1
    assert f"line {bad[1]}" in str(failure)
    assert [r.steps for r in results if not isinstance(r, Exception)] == [14] * 4
    monkeypatch.undo()
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
