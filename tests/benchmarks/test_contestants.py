"""Contestants of training and of joint steps fit the code: on a GPU it would be late to see."""

from __future__ import annotations

import argparse
import importlib

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.contestants.task import ALPHA, RANK, random_model
from lorakit import LoRASpec, attach, load_adapter, save_adapter

# peft asks transformers by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANKS = [2, 4]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Two steps of four examples on a tiny Llama."""
    start = tmp_path_factory.mktemp("adapter") / "start"
    handle = attach(random_model("tiny", "cpu"), LoRASpec(rank=RANK, alpha=ALPHA))
    save_adapter(handle.snapshot(), start)
    return {
        "base": "random:tiny",
        "device": "cpu",
        "length": 12,
        "steps": 2,
        "batch_size": 4,
        "ranks": RANKS,
        "token_budget": None,
        "start": str(start),
    }


def rows_of(name: str, task) -> list[dict[str, float]]:
    of, _, variant = name.partition(":")
    contestant = importlib.import_module(f"benchmarks.contestants.{of}")
    state = contestant.prepare({**task, "variant": variant})
    return [contestant.step(state, i) for i in range(3)]


def losses(name: str, task) -> list[float]:
    rows = rows_of(name, task)
    assert all(row["tokens"] >= 4 * 6 for row in rows)
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("other", ["joint_loop:one_by_one", "peft_many"])
def test_joint_steps_are_measured_on_the_same_work(other, task):
    joint, theirs = losses("joint_loop:joint", task), losses(other, task)
    # peft's adapters begin elsewhere, but at no change of the base
    compared = 1 if other == "peft_many" else 3
    assert theirs[:compared] == pytest.approx(joint[:compared], rel=1e-5)


def test_one_adapter_sees_all_of_it(task):
    joint, one = (rows_of(f"joint_loop:{which}", task) for which in ("joint", "one_adapter"))
    assert [row["tokens"] for row in one] == [row["tokens"] for row in joint]


def test_training_steps_are_measured_on_the_same_work(task):
    ours, theirs = losses("lorakit_loop", task), losses("peft_loop", task)
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_layers_made_again_take_the_same_steps_and_the_adapter_is_kept(task, tmp_path):
    ours = losses("lorakit_loop", task)
    stored = {**task, "adapters": str(tmp_path)}
    assert losses("stored_loop:float32+layers", stored) == pytest.approx(ours, rel=1e-5)
    assert load_adapter(tmp_path / "float32+layers").spec.rank == RANK


def test_all_weights_are_trained_on_the_same_work(task):
    adapters, everything = rows_of("lorakit_loop", task), rows_of("full_loop", task)
    assert [row["tokens"] for row in everything] == [row["tokens"] for row in adapters]
    assert everything[0]["loss"] == pytest.approx(adapters[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_has_its_options(name):
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser()
    module.configure(parser)
    assert "--help" in parser.format_help()
    assert callable(module.run)
