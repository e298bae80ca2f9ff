"""``lorakit eval``: what it prints, and that its numbers are those of the parts it is made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lorakit import LoRASpec, attach, load_adapter, load_base, save_adapter
from lorakit.cli import evaluate as command
from lorakit.cli.main import main
from lorakit.data import DataSpec, items, load_data
from lorakit.evaluate import METRICS, answer_length, loss, text_metrics
from lorakit.infer import generate

from .. import models
from ..tokenizers_ import chat_tokenizer

ROWS = [
    {"prompt": "w1 w2", "completion": "w3"},
    {"prompt": "w4", "completion": "w5 w6"},
    {"prompt": "w1 w2", "completion": "w3 w3"},
    {"prompt": "w7 w8 w9", "completion": "w1"},
]


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A base, two adapters, data."""
    root = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    model = models.llama(vocab_size=120)
    model.save_pretrained(root / "base")
    chat_tokenizer().save_pretrained(root / "base")
    for seed, (name, rank) in enumerate({"one": 2, "two": 3}.items()):
        handle = attach(model, LoRASpec(rank=rank), "a", seed=seed)
        models.randomize(handle, seed=seed)
        save_adapter(handle.snapshot("a"), root / name)
        handle.detach()
    write(root / "data.jsonl", ROWS)
    (root / "text.txt").write_text("w1 w2 w3\n\nw4 w5\n")
    write(root / "records.jsonl", [{"prompt": "w1", "completion": '{"a": 1}'}])
    return root


@pytest.fixture
def run(world, monkeypatch, capfd):
    """``run(*flags)`` → (exit code, stdout, stderr)."""
    monkeypatch.chdir(world)

    def call(*flags):
        start = ["eval", "--base", "base", "--device", "cpu"]
        data = [] if "--data" in flags else ["--data", "data.jsonl"]
        code = main([*start, *data, *flags])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def by_hand(world):
    """The base, both adapters attached, and the data."""
    base = load_base(world / "base", device="cpu")
    handle = attach(base.model, load_adapter(world / "one"), "one")
    handle.add(load_adapter(world / "two"), "two")
    data = load_data(DataSpec(str(world / "data.jsonl")), base.tokenizer, context_length=64)
    return base, handle, data


def test_json_as_the_design_pins_it(run, by_hand):
    base, handle, data = by_hand
    code, out, err = run(
        "--adapter", "one", "--adapter", "two=0.5", "--metrics", "bleu,exact", "--json",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out)
    assert [m["name"] for m in result["models"]] == ["base", "one", "two"]
    chosen = items(data)
    length = answer_length(data, chosen)
    assert f"at most {length} tokens" in err
    for model, mix in zip(result["models"], (None, "one", {"two": 0.5}), strict=True):
        found = loss(base.model, handle, mix, data)
        assert model["loss"] == pytest.approx(found.loss, rel=1e-6)
        assert model["perplexity"] == pytest.approx(math.exp(found.loss), rel=1e-6)
        texts = generate(
            base, handle, [i.prompt_ids for i in chosen], adapter=mix,
            max_new_tokens=length, stop_ids=[*data.stop_ids, 2],  # 2: the model's own end
        )  # fmt: skip
        expected = text_metrics(texts, [i.references for i in chosen], ["bleu", "exact"])
        assert model["metrics"] == pytest.approx(expected)
    assert result["models"][2]["adapters"] == [{"ref": "two", "weight": 0.5}]
    assert result["data"]["items"] == 3
    assert result["data"]["rows"] == 4
    assert result["data"]["digest"] == data.digest


def test_limit_counts_items_and_the_loss_is_over_all_their_rows(run, by_hand):
    base, handle, data = by_hand
    _, out, _ = run("--limit", "1", "--json")
    result = json.loads(out)
    assert result["data"]["items"] == 1
    assert result["data"]["rows"] == 2
    [model] = result["models"]
    assert model["metrics"] == {}
    assert model["loss"] == pytest.approx(loss(base.model, handle, None, data, [0, 2]).loss)


def test_a_blend_is_one_contestant(run, by_hand):
    base, handle, data = by_hand
    _, out, _ = run(
        "--adapter", "one=0.7", "--adapter", "two=-0.3", "--blend", "--no-base", "--json"
    )
    [model] = json.loads(out)["models"]
    assert model["name"] == "0.7·one + -0.3·two"
    expected = loss(base.model, handle, {"one": 0.7, "two": -0.3}, data).loss
    assert model["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_table_holds_every_number_and_some_answers(run):
    code, out, err = run("--adapter", "one", "--metrics", ",".join(METRICS[:4]), "--show", "1")
    assert code == 0
    for word in ("model", "loss", "perplexity", "bleu", "chrf", "rouge", "exact", "base", "one"):
        assert word in out
    assert "3 items" in out
    assert "(and 1 more)" in out
    assert out.count("reference") == 1
    assert "Base base: float32 on cpu" in err


def test_answers_are_saved(run, world, tmp_path):
    path = tmp_path / "answers.jsonl"
    code, out, _ = run("--adapter", "one", "--save", str(path), "--json")
    assert code == 0
    saved = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["references"] for row in saved] == [["w3", "w3 w3"], ["w5 w6"], ["w1"]]
    assert [row["row"] for row in saved] == [ROWS[0], ROWS[1], ROWS[3]]
    assert all([m["name"] for m in row["models"]] == ["base", "one"] for row in saved)
    tokens = json.loads(out)["data"]["supervised_tokens"]
    # the items' losses, weighted by their tokens (completion and end), are the whole's
    weights = [5, 3, 2]
    assert sum(weights) == tokens
    for k, model in enumerate(json.loads(out)["models"]):
        mean = sum(w * row["models"][k]["loss"] for w, row in zip(weights, saved, strict=True))
        assert mean / tokens == pytest.approx(model["loss"], rel=1e-6)


def test_plain_text_has_a_loss_and_no_answers(run):
    code, out, _ = run("--data", "text.txt", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["data"]["items"] is None
    assert result["models"][0]["loss"] > 0
    code, _, err = run("--data", "text.txt", "--metrics", "bleu")
    assert code == 2
    assert "nothing to generate from" in err.replace("\n", " ")


def test_it_says_when_the_adapter_knows_this_data_or_another_format(world, run, by_hand):
    _, handle, data = by_hand
    about = {"digest": data.digest, "format": "plain", "template": "Say {prompt}"}
    known = handle.snapshot("one").with_(provenance={"data": about})
    save_adapter(known, world / "known")
    _, _, err = run("--adapter", "known", "--format", "chat")
    assert "this is the very data that it was trained on" in err
    assert "--format plain writes them as it knows them" in err
    assert "--template 'Say {prompt}'" in err


@pytest.mark.parametrize(
    ("learnt", "flags", "written", "said"),
    [
        ({"format": "plain"}, [], "plain", "Rows are written plain, as one learnt"),
        ({"format": "chat", "system": "w9"}, [], "chat", "message 'w9', as one learnt"),
        ({"format": "plain"}, ["--format", "auto"], "chat", "--format plain writes them"),
        ({"format": "plain", "kind": "text"}, [], "chat", "--format plain writes them"),
        ({"format": "plain"}, ["--data", "text.txt"], "plain", ""),
    ],
)
def test_rows_are_written_as_the_adapter_learnt_them(
    tmp_path, run, by_hand, learnt, flags, written, said
):
    _, handle, _ = by_hand
    adapter = handle.snapshot("one").with_(provenance={"data": learnt})
    save_adapter(adapter, tmp_path / "one")
    code, out, err = run("--adapter", str(tmp_path / "one"), "--json", *flags)
    assert code == 0, err
    assert json.loads(out)["data"]["format"] == written
    assert said in err


def test_an_adapter_whose_loss_is_not_finite_is_null_and_said(world, run, by_hand):
    _, handle, _ = by_hand
    adapter = handle.snapshot("one")
    with torch.no_grad():
        for site in adapter.low_rank.values():
            site.B.mul_(1e30)
    save_adapter(adapter, world / "huge")
    code, out, err = run("--adapter", "huge", "--json")
    assert code == 0
    assert json.loads(out)["models"][1]["loss"] is None
    assert "huge: the loss of 4 of 4 rows is not a finite number, first at" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-base"], "leaves nothing to judge"),
        (["--adapter", "one", "--blend"], "at least two adapters"),
        (["--adapter", "one", "--adapter", "one"], "--adapter other:one"),
        (["--save", "base"], "is a folder"),
        (["--metrics", "json"], "no JSON"),
        (["--metrics", "blue"], "expected one or several of bleu"),
        (["--limit", "0"], "at least 1"),
        (["--adapter", "nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_mistakes(run, flags, message):
    code, out, err = run(*flags)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_json_metrics_of_records(run):
    code, out, _ = run("--data", "records.jsonl", "--metrics", "json", "--json")
    assert code == 0
    found = json.loads(out)["models"][0]["metrics"]
    assert set(found) == {"json_valid", "json_fields", "json_record"}


def test_the_metrics_in_the_help_are_those_there_are():
    assert command.METRICS == METRICS
