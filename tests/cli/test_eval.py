"""``lorakit eval``: what it prints, and that its numbers are those of the parts it is made of."""

from __future__ import annotations

import json
import math
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from lorakit import LoRASpec, attach, load_adapter, load_base, save_adapter
from lorakit.cli import evaluate as command
from lorakit.cli.main import main
from lorakit.data import DataSpec, items, load_data
from lorakit.evaluate import METRICS, answer_length, loss, text_metrics
from lorakit.evaluate.weights import adapter_bytes, model_bytes
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
        "--adapter", "one", "--adapter", "two=0.5", "--metrics", "BLEU,exact", "--json",
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


def test_flags_about_answers_need_answers(run):
    code, _, err = run("--show", "3", "--parallel", "2", "--max-new-tokens", "9")
    assert code == 2
    for flag in ("--show", "--parallel", "--max-new-tokens"):
        assert f"{flag}: answers are made for --metrics or --save alone" in err


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


# --- fully fine-tuned models, sizes, forgetting --------------------------------------------------


#: adapters, and transformers' norms, compute in float32 whatever the dtype of the model
FLOAT32 = 1e-6


def own_model(folder: Path, seed: int = 7, tokenizer=None, **changes) -> Path:
    """A model of the base's shapes with other weights, as ``save_pretrained`` leaves it."""
    torch.manual_seed(seed)
    models.llama(**{"vocab_size": 120, **changes}).save_pretrained(folder)
    (tokenizer or chat_tokenizer()).save_pretrained(folder)
    return folder


def as_full_run(run: Path, report: dict) -> Path:
    """The layout of a run that trained all weights: ``model/`` and ``run.yaml``."""
    own_model(run / "model")
    settings = {"data_report": report, "content": {"data": "0" * 64}}
    (run / "run.yaml").write_text(yaml.safe_dump(settings))
    return run


def merged_by_hand(base: Path, adapter: Path):
    """The base in float64 with W + scaling · B · A written into its weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for path, site in load_adapter(adapter).low_rank.items():
        weight = model.get_submodule(path).weight
        weight.data += site.scaling * site.B.double() @ site.A.double()
    return model


def nats(model, rows) -> tuple[float, int]:
    """Summed −log p of the tokens after the first ``prompt`` ones of each row, and their number."""
    total, tokens = 0.0, 0
    for ids, prompt in rows:
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0].double().softmax(-1)
        total -= sum(math.log(p[i - 1, ids[i]]) for i in range(prompt, len(ids)))
        tokens += len(ids) - prompt
    return total, tokens


def test_base_adapter_and_full_model_against_float64_models(world, run, tmp_path):
    own_model(tmp_path / "whole")
    general = ["w1 w2 w3 w4", "w9 w8", "w5 w6 w7 w1 w1"]
    (tmp_path / "general.txt").write_text("\n\n".join(general))
    code, out, err = run(
        "--adapter", "one", "--full", str(tmp_path / "whole"), "--dtype", "float64",
        "--forgetting", str(tmp_path / "general.txt"), "--metrics", "exact", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert [m["name"] for m in result["models"]] == ["base", "one", "whole"]
    tokenizer = chat_tokenizer()
    turn = "<|im_start|> user {prompt} <|im_end|> <|im_start|> assistant"
    rows = []
    for row in ROWS:
        prompt = tokenizer(turn.format(**row)).input_ids
        answer = tokenizer(row["completion"] + " <|im_end|>").input_ids
        rows.append((prompt + answer, len(prompt)))
    texts = [(tokenizer(text).input_ids, 1) for text in general]
    read = transformers.AutoModelForCausalLM.from_pretrained
    by_hand = [
        read(world / "base", dtype=torch.float64),
        merged_by_hand(world / "base", world / "one"),
        read(tmp_path / "whole", dtype=torch.float64),
    ]
    before, tokens = nats(by_hand[0], texts)
    assert result["general_text"]["tokens"] == tokens == 8
    assert result["general_text"]["passages"] == 3
    for model, found in zip(by_hand, result["models"], strict=True):
        total, supervised = nats(model, rows)
        assert found["loss"] == pytest.approx(total / supervised, abs=FLOAT32)
        assert found["perplexity"] == pytest.approx(math.exp(total / supervised), rel=FLOAT32)
        assert set(found["metrics"]) == {"exact"}
        after, _ = nats(model, texts)
        about = found["forgetting"]
        assert about["before"] == pytest.approx(before / tokens, abs=FLOAT32)
        assert about["loss"] == pytest.approx(after / tokens, abs=FLOAT32)
        assert about["difference"] == pytest.approx((after - before) / tokens, abs=FLOAT32)
    base, one, whole = result["models"]
    assert base["forgetting"]["difference"] == base["forgetting"]["standard_error"] == 0.0
    assert whole["forgetting"]["standard_error"] > 0
    assert base["size_bytes"] == (world / "base/model.safetensors").stat().st_size
    assert one["size_bytes"] == (world / "one/adapter_model.safetensors").stat().st_size
    assert whole["size_bytes"] == (tmp_path / "whole/model.safetensors").stat().st_size
    assert (base["full"], one["full"], whole["full"]) == (None, None, str(tmp_path / "whole"))
    assert whole["adapters"] == []


def test_the_table_of_all_three(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = run("--forgetting")
    assert "general" in out
    assert "± 0" not in out  # the base beside itself
    own_model(tmp_path / "whole")
    code, out, err = run("--adapter", "one", "--full", str(tmp_path / "whole"), "--forgetting")
    assert code == 0, err
    head, *lines = out.splitlines()
    assert head.split() == ["model", "loss", "perplexity", "general", "forgetting", "size"]
    assert [line.split()[0] for line in lines[:3]] == ["base", "one", "whole"]
    assert "±" not in lines[0]  # what the others are held against
    assert all(re.search(r"[+-]\d\.\d{3} ± \d\.\d{3}", line) for line in lines[1:3])
    assert all(re.search(r"\d+\.\d kB$", line.rstrip()) for line in lines[:3])
    assert "62 passages" in out
    assert "whole: loss " in err  # at once, should a later model not load


def test_forgetting_is_against_the_base_also_where_that_is_left_out(run, by_hand):
    _, with_base, _ = run("--adapter", "one", "--forgetting", "text.txt", "--json")
    _, without, _ = run("--adapter", "one", "--forgetting", "text.txt", "--json", "--no-base")
    [model] = json.loads(without)["models"]
    assert model["forgetting"] == json.loads(with_base)["models"][1]["forgetting"]
    assert model["forgetting"]["before"] != model["forgetting"]["loss"]


def test_one_model_at_a_time_is_in_memory(run, tmp_path, monkeypatch):
    from lorakit import bases

    alive, seen = [], []
    load = bases.load_base

    def counted(*args, **kwargs):
        seen.append([ref for ref in alive if ref() is not None])
        loaded = load(*args, **kwargs)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(bases, "load_base", counted)
    folders = [own_model(tmp_path / name, seed) for seed, name in enumerate(("x", "y"))]
    code, _, err = run(
        "--adapter", "one", "--full", str(folders[0]), "--full", f"other:{folders[1]}",
        "--metrics", "exact", "--forgetting", "text.txt",
    )  # fmt: skip
    assert code == 0, err
    assert seen == [[], [], []]


def test_a_run_folder_tells_its_model_and_how_its_rows_were_written(run, tmp_path):
    report = {"kind": "prompt/completion", "format": "plain", "template": None, "system": None}
    folder = as_full_run(tmp_path / "mine", report)
    code, out, err = run("--full", str(folder), "--json")
    assert code == 0, err
    assert [m["name"] for m in json.loads(out)["models"]] == ["base", "mine"]
    assert json.loads(out)["data"]["format"] == "plain"
    assert "Rows are written plain, as mine learnt" in err
    (folder / "run.yaml").write_text("data_report: [")
    code, out, err = run("--full", str(folder), "--json")
    assert code == 0, err
    assert json.loads(out)["data"]["format"] == "chat"
    assert "does not tell how its rows were written" in err


def test_sharded_and_pickled_weights_have_sizes(tmp_path):
    model = models.llama(vocab_size=120)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    parts = list((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 1
    (tmp_path / "parts/optimizer.bin").write_bytes(b"0" * 9999)
    (tmp_path / "parts/adapter_model.safetensors").write_bytes(b"0" * 9999)
    assert model_bytes(str(tmp_path / "parts")) == sum(p.stat().st_size for p in parts)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/adapter_model.bin").write_bytes(b"0" * 5)
    assert adapter_bytes(str(tmp_path / "old")) == 5
    assert adapter_bytes("nobody/has-this") is None


@pytest.mark.parametrize(
    ("changes", "tokenizer", "said"),
    [
        ({}, "none", "whole has no tokenizer of its own"),
        ({}, "no template", "whole brings no chat template; all are asked as the base is"),
        ({"hidden_size": 16}, None, "it is not the base fine-tuned"),
        ({"seed": 0}, None, "was it trained?"),
    ],
)
def test_what_is_odd_about_a_full_model_is_said(run, tmp_path, changes, tokenizer, said):
    own = chat_tokenizer()
    if tokenizer == "no template":
        own.chat_template = None
    folder = own_model(tmp_path / "whole", tokenizer=own, **changes)
    if tokenizer == "none":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    code, _, err = run("--full", str(folder))
    assert code == 0, err
    assert said in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--full", "one"], "is an adapter, not a model"),
        (["--adapter", "x:base"], "base is a whole model; give it as --full base"),
        (["--adapter", "whole-run"], "whole-run is a whole model; give it as --full whole-run"),
        (["--full", "cut"], "model.safetensors"),
        (["--full", "nan"], "nan holds NaN or infinite values in 1 weight, such as model.norm"),
        (["--data", "prompts.jsonl"], "lorakit generate --prompts"),
        (["--full", "nowhere/at/all"], "nowhere/at/all"),
        (["--full", "base"], "the name that stands for the bare base"),
        (["--full", "x:base=0.5"], "has no weight"),
        (["--adapter", "x:one", "--full", "x:base"], "as in --full other:base"),
        (["--full", "x:run"], "this run trained an adapter. Give it as --adapter run"),
        (
            ["--full", "x:words"],
            "109 tokens, and 108 in the tokenizer",
        ),
        (["--full", "x:short"], "x takes 4 tokens, and an example has"),
        (["--forgetting", "data.jsonl"], "its rows are prompt/completion; general text is"),
        (["--forgetting", "no.txt"], "no.txt"),
        (["--forgetting", "text.txt", "--save", "text.txt"], "would be lost"),
    ],
)
def test_mistakes_with_full_models_and_general_text(world, run, flags, message):
    if not (world / "words").exists():
        other = chat_tokenizer()
        other.add_tokens(["w100"])
        own_model(world / "words", tokenizer=other)
        own_model(world / "short", max_position_embeddings=4)
        (world / "run").mkdir()
        shutil.copytree(world / "one", world / "run/adapter")
        as_full_run(world / "whole-run", {})
        broken = own_model(world / "nan") / "model.safetensors"
        weights = load_file(broken)
        weights["model.norm.weight"][3] = math.nan
        save_file(weights, broken, metadata={"format": "pt"})
        own_model(world / "cut")
        content = (world / "cut/model.safetensors").read_bytes()
        (world / "cut/model.safetensors").write_bytes(content[:-9])
        write(world / "prompts.jsonl", [{"prompt": "w1"}])
    code, out, err = run(*flags)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert out == ""
