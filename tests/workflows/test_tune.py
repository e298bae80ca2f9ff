"""``lorakit.tune``: what is searched, who goes on, what is chosen and why, what a kill costs.

The choice is a pure function, tested on made-up tables; the search itself on a tiny random model
and a task where the rate matters, against runs that were trained alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lorakit
from lorakit.core.files import clear_disk_errors
from lorakit.core.spec import LoRASpec
from lorakit.data import DataSpec
from lorakit.errors import (
    DataError,
    InputError,
    Interrupted,
    MissingDependencyError,
    SpecError,
    TargetError,
    TrainingError,
)
from lorakit.formats import load_adapter
from lorakit.train import Callback, Origin, Trainer, TrainSettings
from lorakit.train.callbacks import CallbackList
from lorakit.workflows.tune import Plan, _prepared, resume_tune, tune
from lorakit.workflows.tuning import halving
from lorakit.workflows.tuning.choice import Choice, choose
from lorakit.workflows.tuning.field import Field, Means, Watcher
from lorakit.workflows.tuning.folder import TuneFolder, from_row, to_row
from lorakit.workflows.tuning.halving import places, rungs, survivors
from lorakit.workflows.tuning.space import (
    Choices,
    Range,
    assign,
    check_space,
    default_space,
    parse_search,
    space_from_dict,
    space_to_dict,
    spread,
    values_of,
)
from lorakit.workflows.tuning.study import Study, propose
from lorakit.workflows.tuning.table import Candidate, Losses, difference
from tests.train import tiny
from tests.train.child import context

SPACE = {"lr": Range(1e-4, 1e-2), "rank": Choices((4, 16, 64))}


# --- what is searched --------------------------------------------------------------------------


def test_a_search_as_people_write_it():
    found = parse_search(
        ["rank=4,8  lr=1e-4..1e-2", "targets=attention,q_proj+v_proj dropout=0..0.2"]
    )
    assert found == {
        "rank": Choices((4, 8)),
        "lr": Range(1e-4, 1e-2),
        "targets": Choices(("attention", "q_proj+v_proj")),
        "dropout": Range(0.0, 0.2, log=False),
    }
    assert list(found) == ["rank", "lr", "targets", "dropout"]
    assert parse_search(["rank=4..50"]) == {"rank": Choices((4, 8, 16, 32, 50))}
    assert space_from_dict(json.loads(json.dumps(space_to_dict(found)))) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rank", "is not NAME=VALUES"),
        ("ranks=4", "'ranks' cannot be searched; what can is lr, rank"),
        ("steps=10,20", "cannot be searched"),
        ("rank=4 rank=8", "given twice"),
        ("rank=four", "'four' given; expected a whole number"),
        ("lr=1e-2..1e-4", "first end of a range must be below"),
        ("lr=0..1", "must begin above 0"),
        ("lr=nan,1", "'nan' given"),
        ("targets=a..b", "has no range"),
        ("rank=,", "no value"),
        ("alpha=1,2 alpha/r=1", "say the same thing twice"),
    ],
)
def test_a_search_that_cannot_be_read(text, says):
    with pytest.raises(SpecError, match="This search cannot be made") as caught:
        parse_search([text])
    assert says in str(caught.value)


def test_all_problems_of_a_search_are_told_at_once():
    with pytest.raises(SpecError) as caught:
        parse_search(["rank=x depth=3", "lr=2..1"])
    assert str(caught.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rank=0,4", "rank=0: rank is 0"),
        ("dropout=0.5,1.5", "dropout=1.5"),
        ("rank=8", "nothing to choose from"),
        ("optimizer=adam,sgd", "optimizer is 'adam'"),
        ("optimizer=sgd,adamw weight_decay=0.1", "nothing"),
    ],
)
def test_values_that_are_impossible(text, says):
    space = parse_search([text])
    if says == "nothing":
        check_space(space, LoRASpec(), TrainSettings())  # together they fail as candidates do
        return
    with pytest.raises(SpecError) as caught:
        check_space(space, LoRASpec(), TrainSettings())
    assert says in str(caught.value)


def test_values_become_settings_and_back():
    space = parse_search(
        ["lr=1e-3,1e-2 rank=4,8 alpha/r=1,2 targets=q_proj+v_proj,mlp schedule=cosine"]
    )
    values = {
        "lr": 0.01,
        "rank": 4,
        "alpha/r": 2.0,
        "targets": "q_proj+v_proj",
        "schedule": "cosine",
    }
    spec, settings = assign(values, LoRASpec(dropout=0.1), TrainSettings(steps=7))
    assert spec == LoRASpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj"), dropout=0.1)
    assert settings == TrainSettings(steps=7, lr=0.01, schedule="cosine")
    assert values_of(space, spec, settings) == values


@settings(max_examples=25)  # each draws some hundred designs
@given(st.integers(1, 20), st.integers(0, 3))
def test_an_even_spread(number, seed):
    space = {"lr": Range(1e-4, 1e-2), "rank": Choices((4, 16)), "dropout": Range(0, 0.3, log=False)}
    made = spread(space, number, seed)
    assert made == spread(space, number, seed)
    assert all(values[name] in one for values in made for name, one in space.items())
    # each stretch of the rate has one, to the two digits to which it is rounded
    assert len(made) == number
    wanted = [1e-4 * 100 ** ((i + 0.5) / number) for i in range(number)]
    assert [v["lr"] for v in made] == pytest.approx(wanted, rel=0.05)
    ranks = [v["rank"] for v in made]
    assert abs(ranks.count(4) - ranks.count(16)) <= 1


def test_the_default_space_lies_around_the_usual_rate():
    space = default_space(0.0013, quick=False)
    assert 0.0013 in space["lr"]
    assert 0.01 in space["lr"]
    assert 16 in space["rank"]
    assert list(default_space(0.0013, quick=True)) == ["lr"]


# --- who goes on -------------------------------------------------------------------------------


@given(st.integers(1, 5000))
def test_rungs(steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "LEAST_STEPS", 20)  # as it is outside of these tests
        check_rungs(steps)


def check_rungs(steps: int) -> None:
    found = rungs(steps)
    assert found[-1] == steps
    assert list(found) == sorted(set(found))
    assert all(rung % found[0] == 0 for rung in found[:-1])  # where evaluations are
    assert len(found) == 1 or found[0] >= max(20, steps / 8)
    assert rungs(80) == (20, 40, 80)
    assert rungs(1000) == (125, 250, 500, 1000)
    assert rungs(39) == (39,)


def test_places():
    assert [places(12, rung, 3) for rung in range(3)] == [6, 3, 0]
    assert [places(3, rung, 3) for rung in range(2)] == [2, 2]


@given(
    st.lists(st.one_of(st.floats(0.1, 9), st.just(math.nan)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.data(),
)
def test_survivors(losses, keep, data):
    table = dict(enumerate(losses))
    rates = {n: data.draw(st.sampled_from([1.0, 1.5, 2.0, 4.0])) for n in table}
    gone_on = survivors(table, rates, keep, always={0})
    finite = sorted(n for n in table if math.isfinite(table[n]))
    assert set(gone_on) <= set(finite)
    assert len(set(gone_on)) == len(gone_on)
    assume(finite)
    best = min(finite, key=lambda n: (table[n], n))
    assert gone_on[0] == best
    assert (0 in gone_on) == (0 in finite)
    assert len(gone_on) <= keep + 2
    higher = [n for n in finite if rates[n] >= 2 * rates[best]]
    assert not higher or set(higher) & set(gone_on)  # what a short horizon speaks against
    worst_kept = max(table[n] for n in gone_on[:keep])
    assert all(table[n] >= worst_kept for n in finite if n not in gone_on)


# --- losses in pairs ---------------------------------------------------------------------------


def drawn(mean: float, *, number: int = 40, seed: int = 0, noise: float = 0.0) -> Losses:
    """Losses around a mean; those of one seed share each prompt's difficulty."""
    counts = np.random.default_rng(99).integers(5, 40, number)
    hard = np.random.default_rng(98).normal(0, 0.3, number)
    own = np.random.default_rng(seed).normal(0, 1, number) * noise
    own -= (own * counts).sum() / counts.sum()
    hard -= (hard * counts).sum() / counts.sum()
    return Losses((mean + hard + own) * counts, counts)


def test_a_difference_and_its_error():
    one, other = drawn(1.5, noise=0.1, seed=1), drawn(1.4, noise=0.1, seed=2)
    found = difference(one, other)
    assert found.mean == pytest.approx(0.1)
    draw = np.random.default_rng(0)
    again = []
    for _ in range(4000):
        rows = draw.integers(0, 40, 40)
        again.append((one.sums - other.sums)[rows].sum() / one.counts[rows].sum())
    # a bootstrap over prompts has the same spread, to its own error and a term of order 1/40
    assert found.error == pytest.approx(np.std(again), rel=0.1)
    # were they not paired, the prompts' own difficulty would come on top
    assert found.error < 0.5 * np.std(one.sums / one.counts) / math.sqrt(40) * math.sqrt(2)
    assert difference(one, one).mean == difference(one, one).error == 0


def test_one_prompt_shows_nothing():
    one = Losses(np.array([3.0]), np.array([2]))
    assert difference(one, Losses(np.array([2.0]), np.array([2]))).equal


def test_a_row_of_losses_is_read_back(tmp_path):
    losses = Losses(np.array([1.5, math.nan]), np.array([3, 4]))
    again = from_row(json.loads(json.dumps(to_row(20, losses))))
    assert np.array_equal(again.sums, losses.sums, equal_nan=True)
    folder = TuneFolder(tmp_path)
    folder.losses.mkdir()
    folder.add(3, to_row(20, losses))
    path = folder.losses / "03.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 40, "su')  # a kill in the middle of a line
    folder.add(3, to_row(60, losses))
    assert [row["step"] for row in folder.rows(3)] == [20, 60]


# --- the choice and its reasons ----------------------------------------------------------------


def candidate(
    number: int,
    lr: float,
    rank: int,
    *losses: float,
    end: str = "finished",
    noise: float = 1e-3,
    start: float = 2.0,
    prompts: int = 40,
    **values,
) -> Candidate:
    """With losses before the first step and after 20, 40 and 80, as many as are given."""
    seen = {
        step: drawn(loss, number=prompts, seed=number, noise=noise)
        for step, loss in zip((20, 40, 80), losses, strict=False)
    }
    shown = {"lr": lr, "rank": rank, **values}
    reason = {"left": "weaker", "failed": "the loss is nan"}.get(end, "")
    return Candidate(  # type: ignore[arg-type]
        number, shown, seen, end, reason, lr, rank, parameters=1000,
        start=drawn(start, number=prompts),
    )  # fmt: skip


def said(choice: Choice, about: str) -> str:
    return next((reason.says for reason in choice.reasons if reason.about == about), "")


def text_of(choice: Choice, about: str) -> str:
    return next(reason.text for reason in choice.reasons if reason.about == about)


DEFAULT = candidate(0, 1e-3, 16, 1.8, 1.6, 1.50)


def test_more_rank_buys_nothing():
    table = [
        DEFAULT,
        candidate(1, 3e-3, 4, 1.7, 1.5, 1.40),
        candidate(2, 3e-3, 64, 1.7, 1.5, 1.40001),
        candidate(3, 6e-3, 16, 1.75, end="left"),
    ]
    choice = choose(table, SPACE, 80)
    assert choice.number == 1
    assert set(choice.equals) == {1, 2}
    assert said(choice, "rank") == "more rank buys nothing"
    assert "1.4000" in text_of(choice, "rank")
    assert said(choice, "default") == "better than the default"
    assert "6.7%" in text_of(choice, "default")  # 0.1 of 1.5
    assert said(choice, "rate") == "inside of the range"


def test_among_equals_the_smaller_rank_wins_and_that_is_said():
    table = [
        DEFAULT,
        candidate(1, 3e-3, 64, 1.7, 1.5, 1.3999),
        candidate(2, 3e-3, 4, 1.7, 1.5, 1.40),
    ]
    choice = choose(table, SPACE, 80)
    assert choice.number == 2
    assert "candidate 1 has a lower loss" in text_of(choice, "equal").lower()
    # the same numbers with less noise are a difference
    sharp = [candidate(c.number, c.lr, c.rank, *ls, noise=1e-6) for c, ls in zip(
        table, [(1.8, 1.6, 1.5), (1.7, 1.5, 1.3999), (1.7, 1.5, 1.40)], strict=True)]  # fmt: skip
    assert choose(sharp, SPACE, 80).number == 1


def test_the_highest_rank_is_still_improving():
    table = [
        DEFAULT,
        candidate(1, 3e-3, 64, 1.6, 1.4, 1.30),
        candidate(2, 3e-3, 4, 1.7, 1.5, 1.40),
    ]
    choice = choose(table, SPACE, 80)
    assert choice.number == 1
    assert said(choice, "rank") == "wants full fine-tuning"
    assert "difference 0.1000" in text_of(choice, "rank")


def test_a_rank_in_the_middle():
    table = [
        candidate(0, 3e-3, 16, 1.6, 1.4, 1.30),
        candidate(1, 3e-3, 64, 1.65, end="left"),
        candidate(2, 3e-3, 4, 1.7, 1.5, 1.40),
    ]
    choice = choose(table, SPACE, 80)
    assert [r.says for r in choice.reasons if r.about == "rank"] == [
        "more rank buys nothing",
        "less rank costs",
    ]
    assert "after 20 steps" in text_of(choice, "rank")  # where both were
    assert said(choice, "default") == "default is best"


def test_ranks_at_other_rates_tell_nothing_about_the_rank():
    table = [
        DEFAULT,  # a lower rank, and worse; but its rate is a third
        candidate(1, 3e-3, 64, 1.6, 1.4, 1.30),
        candidate(2, 8e-4, 4, 1.7, 1.5, 1.40),
    ]
    choice = choose(table, SPACE, 80)
    assert choice.number == 1
    assert said(choice, "rank") == "not compared"
    assert "--lr 0.003 --search" in text_of(choice, "rank")
    # the one at a rate like it was as good when it left
    table.append(candidate(3, 3.5e-3, 16, 1.6, 1.4001, end="left"))
    assert said(choose(table, SPACE, 80), "rank") == "less rank may do"


@pytest.mark.parametrize(
    ("best", "others", "says"),
    [
        (1e-2, (1e-3, 3e-3), "at the upper edge"),
        (8e-3, (1e-3, 9e-3), "at the upper edge"),  # too near to the end of the range
        (2e-3, (1e-3, 5e-4), "at the upper edge"),  # nothing higher was tried
        (1.1e-4, (1e-3, 3e-3), "at the lower edge"),
        (2e-3, (1e-3, 5e-3), "inside of the range"),
    ],
)
def test_the_edge_of_the_range(best, others, says):
    table = [
        candidate(0, others[0], 16, 1.8, 1.6, 1.5),
        candidate(1, others[1], 16, 1.8, 1.6, 1.5),
        candidate(2, best, 16, 1.7, 1.5, 1.3),
    ]
    choice = choose(table, SPACE, 80)
    assert choice.number == 2
    assert said(choice, "rate") == says
    if "edge" in says:
        wider = "1e-4..0.04" if "upper" in says else "2.5e-05..0.01"
        assert f'--search "lr={wider}"' in text_of(choice, "rate")


def test_who_failed_above_shows_that_the_range_was_wide_enough():
    table = [DEFAULT, candidate(1, 5e-3, 16, 1.7, 1.5, 1.4), candidate(2, 1e-2, 16, end="failed")]
    choice = choose(table, SPACE, 80)
    assert said(choice, "rate") == "inside of the range"
    assert said(choice, "failed") == "some failed"
    assert "the loss is nan" in text_of(choice, "failed")
    table[2] = table[2].with_(parameters=None)  # one that never began shows nothing
    assert said(choose(table, SPACE, 80), "rate") == "at the upper edge"


def test_no_better_than_the_defaults():
    table = [
        DEFAULT,
        candidate(1, 3e-3, 4, 1.8, 1.6, 1.5001),
        candidate(2, 3e-3, 64, 1.9, end="left"),
    ]
    choice = choose(table, SPACE, 80)
    assert choice.number == 1  # the smaller rank, of equals
    assert said(choice, "default") == "equal to the default"


def test_defaults_that_failed():
    table = [candidate(0, 1e-3, 16, end="failed"), candidate(1, 3e-3, 4, 1.8, 1.6, 1.5)]
    assert said(choose(table, SPACE, 80), "default") == "default failed"


def test_another_setting():
    space = {**SPACE, "targets": Choices(("all-linear", "attention"))}
    table = [
        candidate(0, 1e-3, 16, 1.8, 1.6, 1.5, targets="all-linear"),
        candidate(1, 3e-3, 16, 1.7, 1.5, 1.4, targets="all-linear"),
        candidate(2, 4e-3, 16, 1.75, end="left", targets="attention"),
    ]
    choice = choose(table, space, 80)
    assert said(choice, "targets") == "is better"
    assert "all-linear is better" in text_of(choice, "targets")
    table[2] = candidate(2, 4e-3, 16, 1.7, end="left", targets="attention")
    assert said(choose(table, space, 80), "targets") == "makes no difference"


def test_an_adapter_that_was_better_before_the_end_counts_as_what_is_kept():
    table = [DEFAULT, candidate(1, 3e-3, 16, 1.6, 1.2, 1.9), candidate(2, 2e-3, 16, 1.6, 1.5, 1.4)]
    assert choose(table, SPACE, 80).number == 1


def test_training_that_made_nothing_better_is_said():
    table = [
        candidate(0, 4e-3, 16, 1.8, 1.6, 1.61, start=1.5),
        candidate(1, 2e-3, 4, 1.7, 1.55, 1.53, start=1.5),
        candidate(2, 1e-2, 16, 1.75, start=1.5, end="left"),
    ]
    assert [c.kept.mean for c in table] == pytest.approx([1.5, 1.5, 1.75])
    choice = choose(table, SPACE, 80)
    assert choice.number == 1
    assert "validation loss is 1.5000" in text_of(choice, "chosen")
    assert [reason.about for reason in choice.reasons] == ["chosen", "start"]
    assert "the lowest loss after one is 1.5300" in text_of(choice, "start")
    assert '--search "lr=0.00013..0.002"' in text_of(choice, "start")
    # one that training made better is taken, by however little, and whatever its rank
    table[0] = candidate(0, 4e-3, 64, 1.8, 1.6, 1.4999, start=1.5)
    assert choose(table, SPACE, 80).number == 0
    assert choose(table, SPACE, 80).equals == (0,)


@pytest.mark.parametrize("prompts", [2, 7, 8])
def test_few_prompts_tell_nothing_and_that_is_said(prompts):
    candidates = [
        candidate(n, 1e-3, rank, loss, loss, loss, prompts=prompts)
        for n, (rank, loss) in enumerate([(16, 1.5), (4, 1.4), (64, 1.3)])
    ]
    choice = choose(candidates, SPACE, 80)
    assert choice.number == 2
    if prompts < 8:
        assert [reason.about for reason in choice.reasons] == ["chosen", "few"]
        assert f"{prompts} prompts of validation rows cannot tell" in text_of(choice, "few")
        assert "--valid" in text_of(choice, "few")
    else:
        assert said(choice, "few") == ""
        assert said(choice, "default") == "better than the default"


def test_nobody_is_left():
    table = [candidate(0, 1e-3, 16, end="failed"), candidate(1, 1.0, 16, end="failed")]
    with pytest.raises(TrainingError, match=r"none of the 2 candidates .* the loss is nan"):
        choose(table, SPACE, 80)


# --- Optuna ------------------------------------------------------------------------------------


def test_proposals_are_new_inside_and_the_same_again():
    seen = [
        ({"lr": lr, "rank": 16}, (math.log10(lr) + 2.5) ** 2) for lr in (1e-4, 1e-3, 3e-3, 1e-2)
    ]
    made = propose(SPACE, seen, 8, seed=1)
    assert made == propose(SPACE, seen, 8, seed=1)
    assert len(made) == 8
    assert all(values[name] in one for values in made for name, one in SPACE.items())
    assert not [values for values in made if values in [v for v, _ in seen]]
    near = [abs(math.log10(values["lr"]) + 2.5) for values in made]
    assert np.median(near) < 0.5  # of ±1 around the middle of the range
    # a space that has no more
    two = {"rank": Choices((4, 8))}
    assert propose(two, [({"rank": 4}, 1.0)], 5, seed=0) == [{"rank": 8}]


def test_a_study_is_read_back(tmp_path):
    study = Study(tmp_path / "study.db", SPACE)
    study.add({"lr": 1.0, "rank": 3})  # defaults outside of the space
    study.add({"lr": 1e-3, "rank": 16})
    study._study.ask()  # somebody else's
    study.decide(0, [1, 0])
    study.seconds = 3.5
    again = Study(tmp_path / "study.db", SPACE)
    assert again.candidates() == [{"lr": 1.0, "rank": 3}, {"lr": 1e-3, "rank": 16}]
    assert (again.decision(0), again.decision(1), again.seconds) == ([1, 0], None, 3.5)
    table = [candidate(0, 1.0, 3, end="failed"), candidate(1, 1e-3, 16, 1.7, 1.5, 1.4)]
    again.record(table)
    again.record(table)
    import optuna

    trials = optuna.load_study(
        study_name="lorakit tune", storage=f"sqlite:///{tmp_path}/study.db"
    ).trials
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE", "RUNNING"]
    assert trials[1].params == {"lr": 1e-3, "rank": 16}
    assert trials[1].intermediate_values == pytest.approx({20: 1.7, 40: 1.5, 80: 1.4})
    (tmp_path / "study.db").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match="cannot be read as an Optuna study"):
        Study(tmp_path / "study.db", SPACE)


# --- the field -----------------------------------------------------------------------------


def a_field(folder: Path, together=None) -> Field:
    """Without a base: whoever trains is made up."""
    means = Means(*[None] * 4, LoRASpec(), TrainSettings(lr=1e-3, steps=40))  # type: ignore[arg-type]
    return Field(TuneFolder(folder), means, Watcher(), together=together)


def test_values_that_are_impossible_together_are_a_candidate_that_failed(tmp_path):
    field = a_field(tmp_path)
    field.enter({"optimizer": "sgd", "weight_decay": 0.0})
    field.enter({"optimizer": "sgd", "weight_decay": 0.1, "rank": 4})
    assert [c.end for c in field.candidates] == ["waiting", "failed"]
    assert "sgd has no decoupled decay" in field.candidates[1].reason
    assert (field.candidates[1].lr, field.candidates[1].rank) == (1e-3, 4)


def disk_full() -> Exception:
    with pytest.raises(TrainingError) as caught, clear_disk_errors(Path("losses")):
        raise OSError(errno.ENOSPC, "no space")
    return caught.value


def failed_callback(error: Exception) -> Exception:
    class Failing(Callback):
        def on_step(self, metrics):
            raise error

    with pytest.raises(TrainingError) as caught:
        CallbackList([Failing()]).on_step(None)
    return caught.value


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (lambda: TrainingError("Stopped in step 3: the loss is nan"), True),
        (lambda: TargetError("never called"), True),
        (disk_full, False),
        (lambda: failed_callback(disk_full()), False),
        (lambda: failed_callback(ValueError("mine")), False),
        (lambda: InputError("another process is running it"), False),
        (lambda: MissingDependencyError("pip install it"), False),
    ],
)
def test_only_what_would_come_again_is_kept_as_a_failure(tmp_path, monkeypatch, error, stays):
    def together(trainers, on_result, **_):
        on_result(next(trainers), error())
        assert (next(trainers, None) is None) == (not stays)  # nobody else begins

    monkeypatch.setattr(Field, "_trainer", lambda *_: object())
    (tmp_path / "losses").mkdir()
    field = a_field(tmp_path, together)
    for rank in (4, 8):
        field.enter({"rank": rank})
    with contextlib.nullcontext() if stays else pytest.raises(type(error())):
        field.advance([0, 1], 20, more=lambda: True)
    again = a_field(tmp_path)
    again.enter({"rank": 4})
    assert again.candidates[0].end == ("failed" if stays else "waiting")


# --- the whole search --------------------------------------------------------------------------

SETTINGS = TrainSettings(steps=24, batch_size=4, eval_rows=24, schedule="linear")
SPEC = LoRASpec(rank=2, alpha=8)
PLAN = Plan(candidates=6, search={"lr": Range(1e-4, 1.0), "rank": Choices((2, 8))})


@pytest.fixture(autouse=True)
def _early_rungs(monkeypatch):
    """Rungs after 6, 12 and 24 steps."""
    monkeypatch.setattr(halving, "LEAST_STEPS", 6)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A base, data of 80 rows, and where they lie."""
    folder = tmp_path_factory.mktemp("tune")
    tiny.write_base(folder / "base")
    tiny.write_rows(folder / "data.jsonl", tiny.rows(80))
    return Shop(folder)


class Shop:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = lorakit.load_base(str(folder / "base"), device="cpu", dtype="float32")
        self.origin = Origin(
            base={"ref": str(folder / "base"), "device": "cpu", "dtype": "float32"},
            data=DataSpec(path=(str(folder / "data.jsonl"),)),
        )
        self.data = self.origin.load_data(self.base)

    def tune(self, out: Path, **options):
        options = {"plan": PLAN, "settings": SETTINGS, "spec": SPEC, **options}
        return tune(self.base, self.data, out=out, origin=self.origin, **options)


class Heard(Watcher):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rungs: list[tuple[int, int, int]] = []

    def on_note(self, text):
        self.notes.append(text)

    def on_rung(self, step, candidates, steps):
        self.rungs.append((step, len(candidates), steps))


@pytest.fixture(scope="module")
def whole(shop, tmp_path_factory):
    """A search that nothing disturbed, and what was told of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "LEAST_STEPS", 6)
        heard = Heard()
        return shop.tune(tmp_path_factory.mktemp("whole") / "out", watcher=heard), heard.rungs


def test_a_search_from_end_to_end(shop, whole, tmp_path):
    assert lorakit.tune is tune
    result, heard = whole
    assert heard[0] == (6, 3, 24)
    assert sum(number for step, number, _ in heard if step == 6) == 6
    assert [step for step, _, _ in heard][-2:] == [12, 24]

    # every candidate is a run
    ends = {c.number: c.end for c in result.candidates}
    assert ends[0] == "finished"  # the defaults are trained out
    assert {"left", "finished"} == set(ends.values())
    table = json.loads((result.out / "tune.json").read_text())
    assert table["chosen"] == result.choice.number
    assert len(table["candidates"]) == 6
    for one in table["candidates"]:
        run = result.out / "candidates" / f"{one['number']:02}"
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        seen = {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}
        # what was compared is what the run itself measured
        for step, loss in one["losses"].items():
            assert loss == pytest.approx(seen[int(step)], rel=1e-9)
        assert (one["end"] == "finished") == (max(seen) == 24)
        assert (run / "checkpoints").is_dir() == (one["end"] == "finished")

    # the chosen adapter is the one of a finished run of its settings
    chosen = result.candidates[result.choice.number]
    adapter = load_adapter(result.adapter)
    assert adapter.spec.rank == chosen.rank == result.spec.rank
    assert (result.run / "adapter/adapter_model.safetensors").read_bytes() == (
        result.adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert Trainer.resume(result.run, base=shop.base, data=shop.data).best_loss == pytest.approx(
        chosen.best().mean
    )
    assert result.settings.lr == chosen.lr
    page = (result.out / "report.html").read_text()
    assert all(reason.text.partition(";")[0][:40] in page for reason in result.choice.reasons[:1])
    assert (result.out / "tune.png").read_bytes().startswith(b"\x89PNG")

    # the rate is as good as the best of a grid that was trained alone
    grid = {}
    for rate in (1e-3, 1e-2, 3e-2, 1e-1, 1.0):
        settings = dataclasses.replace(SETTINGS, lr=rate, samples=0, eval_every=6)
        out = tmp_path / f"grid-{rate}"
        grid[rate] = Trainer(shop.base, SPEC, shop.data, settings, out).run().best_loss
    assert max(grid.values()) > min(grid.values()) + 0.05  # the rate matters
    assert chosen.best().mean < min(grid.values()) + 0.02

    # a search that has ended is the same when it goes on, and its folder is taken
    again = resume_tune(result.out, base=shop.base, data=shop.data)
    assert again.choice == result.choice
    with pytest.raises(InputError, match="lorakit tune --resume"):
        shop.tune(result.out)
    # the base is as it was when it was loaded
    fresh = Shop(shop.folder).base.model.state_dict()
    now = shop.base.model.state_dict()
    assert now.keys() == fresh.keys()
    assert all(bool((now[name] == fresh[name]).all()) for name in fresh)


def test_without_matplotlib_or_a_better_adapter_that_is_said(shop, tmp_path, monkeypatch):
    import lorakit.workflows.tuning.plot as plot

    def missing(*_, **__):
        raise MissingDependencyError("pip install 'lorakit[tune]'")

    monkeypatch.setattr(plot, "require", missing)
    heard = Heard()
    plan = Plan(quick=True, candidates=2, search={"lr": Range(10, 30)})  # far too high
    settings = TrainSettings(steps=4, batch_size=2, lr=20, optimizer="sgd", clip=0)
    result = shop.tune(tmp_path / "out", plan=plan, settings=settings, watcher=heard)
    assert not (result.out / "tune.png").exists()
    assert any("tune.png is not made: pip install" in note for note in heard.notes)
    assert all(c.end == "finished" for c in result.candidates)  # one rung: nobody leaves
    assert all(c.values.keys() == {"lr"} for c in result.candidates)
    # what the table says is what the run says, and the adapter that of before the first step
    run = json.loads((result.run / "result.json").read_text())
    assert run["best_step"] == 0
    for one in json.loads((result.out / "tune.json").read_text())["candidates"]:
        assert one["best_loss"] == pytest.approx(run["best_loss"])
    assert said(result.choice, "start") == "no training helped"
    assert not any(site.B.any() for site in load_adapter(result.adapter).sites.values())


def _search(folder: Path, out: Path, marker: Path | None) -> None:
    """In a process of its own: search or go on; at step 8 of any candidate wait to be killed."""
    import torch

    torch.set_num_threads(1)
    halving.LEAST_STEPS = 6

    class Waiting(Watcher):
        def on_step(self, number, metrics):
            if marker is not None and metrics.step == 8:
                marker.touch()
                time.sleep(60)

    shop = Shop(folder)
    if (out / "tune.yaml").exists():
        resume_tune(out, base=shop.base, data=shop.data)
    else:
        shop.tune(out, watcher=Waiting())


def test_a_killed_search_goes_on_as_if_it_had_not_been(shop, whole, tmp_path):
    whole, _ = whole
    marker = tmp_path / "marker"
    process = context().Process(target=_search, args=(shop.folder, tmp_path / "killed", marker))
    process.start()
    for _ in range(1200):
        if marker.exists() or not process.is_alive():
            break
        time.sleep(0.05)
    assert marker.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "killed" / "tune.json").exists()
    again = resume_tune(tmp_path / "killed")  # base and data from their files
    assert again.choice.number == whole.choice.number
    assert [c.values for c in again.candidates] == [c.values for c in whole.candidates]
    assert [c.end for c in again.candidates] == [c.end for c in whole.candidates]
    for one, other in zip(again.candidates, whole.candidates, strict=True):
        assert one.losses.keys() == other.losses.keys()
        for step in one.losses:
            # joint forwards may be composed in another way: rounding
            assert one.losses[step].mean == pytest.approx(other.losses[step].mean, abs=1e-4)


def test_a_signal_saves_and_the_search_goes_on(shop, tmp_path):
    class Stopping(Watcher):
        stopped = False

        def on_step(self, number, metrics):
            if metrics.step == 3 and not self.stopped:
                self.stopped = True  # a second signal would interrupt at once
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="lorakit tune --resume"):
        shop.tune(tmp_path / "out", watcher=Stopping())
    study = Study(tmp_path / "out" / "study.db", PLAN.search)
    assert study.seconds > 0

    class StoppingAtTheRung(Heard):
        evaluated = 0

        def on_eval(self, number, metrics):
            self.evaluated += metrics.step == 6
            if self.evaluated == self.rungs[0][1] and metrics.step == 6:
                os.kill(os.getpid(), signal.SIGINT)  # when nobody has a step left to make

    heard = StoppingAtTheRung()
    with pytest.raises(Interrupted, match="lorakit tune --resume"):
        resume_tune(tmp_path / "out", base=shop.base, data=shop.data, watcher=heard)
    assert len(heard.rungs) == 1
    result = resume_tune(tmp_path / "out", base=shop.base, data=shop.data)
    assert len(result.candidates) == 6
    rows = (tmp_path / "out/candidates/00/metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if row["kind"] == "step"]
    assert steps == list(range(1, 25))  # none twice, none missing


def test_little_time_means_fewer_candidates_and_that_is_said(shop, tmp_path, monkeypatch):
    monkeypatch.setattr("lorakit.workflows.tune.write_pages", lambda *_: [])
    heard = Heard()
    plan = Plan(candidates=6, max_seconds=1e-3, search=PLAN.search)
    result = shop.tune(tmp_path / "out", plan=plan, watcher=heard)
    ends = [c.end for c in result.candidates]
    assert ends[0] == "finished"  # at least one is trained out
    assert "finished" not in ends[2:]
    assert any("not begun" in c.reason for c in result.candidates)
    assert any("go on from step 6, for the time" in note for note in heard.notes)
    # what the clock decided stays so
    again = resume_tune(tmp_path / "out", base=shop.base, data=shop.data)
    assert [c.end for c in again.candidates] == ends
    assert any("not begun" in c.reason for c in again.candidates)


def test_settings_that_somebody_chose_stay():
    assert _prepared(TrainSettings(samples=4)).samples == 0
    assert _prepared(TrainSettings(samples=4), ["samples"]).samples == 4


def test_what_cannot_be_searched_is_refused_before_anything_is_written(shop, tmp_path):
    out = tmp_path / "out"
    cases = [
        (SpecError, "patience", {"settings": TrainSettings(steps=9, patience=2)}),
        (SpecError, "its rungs", {"settings": TrainSettings(steps=9, eval_every=2)}),
        (DataError, "--valid", {"settings": TrainSettings(steps=9, validation_fraction=0)}),
        (SpecError, "nothing to choose", {"plan": Plan(search={
            "lr": Choices((1e-3,)), "rank": Choices((2,)), "targets": Choices(("mlp",))})}),
        (TargetError, "nowhere", {"plan": Plan(search={"targets": Choices(("mlp", "nowhere"))})}),
        (TargetError, "rank 64 is above.*fit: --rank 2$",
         {"plan": Plan(search={"rank": Choices((2, 64))})}),
        (TargetError, 'rank 64 is above.*fit: --search "rank=2,4"$',
         {"plan": Plan(search={"rank": Choices((2, 4, 64))})}),
    ]  # fmt: skip
    for kind, says, options in cases:
        with pytest.raises(kind, match=f"(?s){says}"):
            shop.tune(out, **options)
    assert not out.exists()
    with pytest.raises(SpecError, match="at least 2"):
        Plan(candidates=1)


def test_few_prompts_are_said_before_anything_is_trained(shop, tmp_path):
    class Stop(Watcher):
        def on_note(self, text):
            raise InterruptedError(text)

    settings = TrainSettings(steps=9, validation_fraction=0.05)
    with pytest.raises(InterruptedError, match="4 prompts of validation rows cannot tell"):
        shop.tune(tmp_path / "out", settings=settings, watcher=Stop())


def test_other_data_is_refused_when_a_search_goes_on(shop, tmp_path):
    plan = Plan(quick=True, candidates=2, search={"lr": Range(1e-3, 1e-2)})
    shop.tune(tmp_path / "out", plan=plan, settings=TrainSettings(steps=2, batch_size=2))
    path = tiny.write_rows(tmp_path / "other.jsonl", tiny.rows(80, seed=5))
    other = Origin(base={}, data=DataSpec(path=(str(path),))).load_data(shop.base)
    with pytest.raises(DataError, match="training data changed"):
        resume_tune(tmp_path / "out", base=shop.base, data=other)
    with pytest.raises(InputError, match="no search to go on with"):
        resume_tune(tmp_path / "nothing")


def test_every_candidate_fails(shop, tmp_path):
    plan = Plan(quick=True, candidates=2, search={"lr": Range(1e30, 1e35)})
    settings = TrainSettings(steps=8, batch_size=2, lr=1e33, optimizer="sgd", clip=0)
    with pytest.raises(TrainingError):
        shop.tune(tmp_path / "out", plan=plan, settings=settings)
