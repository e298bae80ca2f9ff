"""The table of impossible settings, the choices with their reasons, and the rate of each step."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import SpecError
from lorakit.train.settings import Facts, TrainSettings, rate_at

IMPOSSIBLE = [
    ({"steps": 0}, "steps is 0; it must be a whole number of at least 1"),
    ({"steps": 2.5}, "steps is 2.5"),
    ({"steps": True}, "steps is True"),
    ({"epochs": 0}, "epochs is 0; it must be a number above 0"),
    ({"epochs": math.nan}, "epochs is nan"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": None}, "batch_size is None"),
    ({"micro_batch": 0}, "micro_batch is 0"),
    ({"micro_batch_tokens": 0}, "micro_batch_tokens is 0"),
    ({"lr": 0.0}, "lr is 0.0; it must be a number above 0"),
    ({"lr": -1e-3}, "lr is -0.001"),
    ({"lr": math.inf}, "lr is inf"),
    ({"lr": "1e-3"}, "lr is '1e-3'"),
    ({"schedule": "cosin"}, "schedule is 'cosin'; it must be one of constant, linear, cosine"),
    ({"optimizer": "adam"}, "optimizer is 'adam'; it must be one of adamw, adamw8bit, paged"),
    ({"recompute": "all"}, "recompute is 'all'; it must be one of none, mlp, layers, offload"),
    ({"lora_plus_ratio": 0.0}, "lora_plus_ratio is 0.0; it must be a number above 0"),
    ({"prefix_lr_ratio": 0.0}, "prefix_lr_ratio is 0.0; it must be a number above 0"),
    ({"lr_pattern": {"q_proj": 0}}, "lr_pattern 'q_proj' has the factor 0"),
    ({"lr_pattern": {"q_(": 1.0}}, "lr_pattern 'q_(' is no regular expression"),
    ({"lr_pattern": 2.0}, "lr_pattern is 2.0; it must map patterns to factors"),
    ({"init_examples": 0}, "init_examples is 0; it must be a whole number of at least 1"),
    ({"eva_rho": 0.5}, "eva_rho is 0.5; it must be a number of at least 1"),
    ({"warmup": -1}, "warmup is -1; it must be a whole number of at least 0"),
    ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0); it must be two numbers in [0, 1)"),
    ({"betas": (0.9,)}, "betas is (0.9,)"),
    ({"eps": 0.0}, "eps is 0.0"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"clip": -1.0}, "clip is -1.0"),
    ({"seed": -1}, "seed is -1"),
    ({"validation_fraction": 1.0}, "validation_fraction is 1.0; it must be a number in [0, 1)"),
    ({"eval_every": -1}, "eval_every is -1"),
    ({"eval_rows": -1}, "eval_rows is -1"),
    ({"patience": -1}, "patience is -1"),
    ({"checkpoint_every": 0}, "checkpoint_every is 0"),
    ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
    ({"samples": -1}, "samples is -1"),
    ({"sample_tokens": 0}, "sample_tokens is 0"),
    # settings that would be accepted and not act
    ({"steps": 3, "epochs": 1}, "give one of them"),
    ({"batch_size": 4, "micro_batch": 5}, "micro_batch is 5, larger than batch_size 4"),
    ({"steps": 10, "warmup": 10}, "warmup is 10 of 10 steps"),
    ({"patience": 2, "eval_every": 0}, "there is nothing to wait for"),
    ({"optimizer": "sgd", "weight_decay": 0.1}, "sgd has no decoupled decay"),
    ({"optimizer": "sgd", "betas": (0.5, 0.9)}, "sgd keeps no averages"),
    ({"optimizer": "sgd", "eps": 1e-3}, "eps is 0.001, but sgd has no denominator"),
]


@pytest.mark.parametrize(("given_settings", "message"), IMPOSSIBLE, ids=lambda x: str(x)[:40])
def test_impossible_settings(given_settings, message):
    with pytest.raises(SpecError) as error:
        TrainSettings(**given_settings)
    assert message in str(error.value)


def test_every_field_that_can_be_wrong_is_in_the_table():
    tried = {name for settings, _ in IMPOSSIBLE for name in settings}
    assert tried == {field.name for field in dataclasses.fields(TrainSettings)}


def test_all_problems_come_at_once():
    with pytest.raises(SpecError) as error:
        TrainSettings(lr=-1.0, batch_size=0, schedule="up")
    assert all(name in str(error.value) for name in ("lr", "batch_size", "schedule"))


def test_every_field_has_a_docstring():
    import ast
    import inspect

    from lorakit.train import settings

    tree = ast.parse(inspect.getsource(settings))
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "TrainSettings"
    )
    documented = {
        field.target.id
        for field, after in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert documented == {field.name for field in dataclasses.fields(TrainSettings)}


def test_dictionary_and_back():
    settings = TrainSettings(steps=7, betas=(0.8, 0.95), lr=3e-4)
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(SpecError, match="there is no training setting learning_rate"):
        TrainSettings.from_dict({"learning_rate": 1.0})


@given(
    rows=st.integers(1, 100_000),
    validation=st.integers(0, 5_000),
    width=st.sampled_from([None, 64, 576, 2048, 4096, 16384]),
    device=st.sampled_from(["cpu", "cuda", "mps"]),
)
def test_resolving_twice_changes_nothing(rows, validation, width, device):
    facts = Facts(rows, validation, width, device)
    resolved, notes = TrainSettings(validation_fraction=0.1).resolve(facts)
    again, silence = resolved.resolve(facts)
    assert again == resolved
    assert not [note for note in silence if "batch holds" not in note]
    assert len(notes) >= 3
    assert all(": " in note or "so " in note for note in notes)
    assert 1e-4 <= resolved.lr <= 2e-3
    assert (resolved.eval_rows or 0) <= validation


def test_what_is_chosen():
    resolved, notes = TrainSettings().resolve(Facts(600, 30, 576))
    assert (resolved.steps, resolved.epochs, resolved.warmup) == (225, None, 11)
    assert resolved.eval_every == 29
    assert resolved.eval_rows == 0  # all 30
    assert any(n.startswith("steps is 225: 3 epochs of 600 examples, 8 a step") for n in notes)
    assert resolved.lr == 1.3e-3


def test_what_is_given_stays():
    settings = TrainSettings(
        steps=10,
        lr=1e-2,
        warmup=3,
        eval_every=4,
        eval_rows=5,
        micro_batch_tokens=99,
        keep_checkpoints=2,
    )
    resolved, notes = settings.resolve(Facts(600, 30, 576))
    assert resolved == settings
    assert notes == []


@pytest.mark.parametrize("setting", ["eval_every", "eval_rows", "patience"])
def test_without_validation_its_settings_cannot_act(setting):
    with pytest.raises(SpecError, match=f"{setting} is 3, but there is no validation data"):
        TrainSettings(**{setting: 3}).resolve(Facts(50))
    resolved, _ = TrainSettings().resolve(Facts(50))
    assert resolved.eval_every == 0


def test_a_warmup_longer_than_the_epochs():
    with pytest.raises(SpecError, match="warmup is 40 of 15 steps"):
        TrainSettings(warmup=40).resolve(Facts(40))


def test_a_batch_larger_than_the_data_is_said():
    _, notes = TrainSettings(batch_size=16).resolve(Facts(5))
    assert any("a batch holds some of them several times" in note for note in notes)


@pytest.mark.parametrize(("rows", "held"), [(10, 0), (39, 0), (40, 16), (1000, 50), (10**6, 256)])
def test_rows_held_out(rows, held):
    assert round(TrainSettings().held_out(rows) * rows) == held
    assert TrainSettings(validation_fraction=0.3).held_out(rows) == 0.3


def rates(**changes):
    settings = TrainSettings(lr=1.0, steps=10, warmup=4, **changes)
    return [rate_at(step, settings) for step in range(10)]


def test_rates():
    rising = [0.2, 0.4, 0.6, 0.8]
    assert rates(schedule="constant") == pytest.approx(rising + [1.0] * 6)
    assert rates(schedule="linear") == pytest.approx(rising + [1 - i / 6 for i in range(6)])
    cosine = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates(schedule="cosine") == pytest.approx(rising + cosine)


@given(
    steps=st.integers(1, 50),
    warmup=st.integers(0, 49),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_rates_are_positive_and_peak_at_lr(steps, warmup, schedule):
    if warmup >= steps:
        return
    settings = TrainSettings(lr=0.3, steps=steps, warmup=warmup, schedule=schedule)
    found = [rate_at(step, settings) for step in range(steps)]
    assert min(found) > 0
    assert max(found) == found[warmup] == pytest.approx(0.3)
