"""From a folder without weights to an estimate, and the command that prints it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors
from transformers import LlamaConfig

from lorakit.bases import load_tokenizer
from lorakit.cli.main import main
from lorakit.core.spec import LoRASpec
from lorakit.data import DataSpec, load_data
from lorakit.errors import BaseError
from lorakit.evaluate.estimate_machine import known_gpu
from lorakit.train.memory import resident_mb
from lorakit.train.settings import TrainSettings
from lorakit.workflows import estimate as workflow
from lorakit.workflows.estimate import answer, ask, cut_window
from tests.data.toys import make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of seven billion parameters, without any."""
    folder = tmp_path_factory.mktemp("base") / "seven-b"
    make_tokenizer().save_pretrained(folder)
    LlamaConfig(vocab_size=32000, max_position_embeddings=256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    draw = np.random.default_rng(0)
    rows = [
        {"prompt": f"what is {n}", "completion": "the cat " * int(draw.integers(1, 12))}
        for n in range(60)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Tests take no timings; and nobody reads weights."""
    monkeypatch.setattr(workflow, "measured_rates", lambda *_, **__: (known_gpu("L4").rates, False))

    def refused(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors, "safe_open", refused)


@pytest.fixture(scope="module")
def data(base, rows):
    return load_data(DataSpec(path=(str(rows),)), load_tokenizer(str(base)), context_length=256)


def test_seven_billion_parameters_are_never_in_memory(base, data):
    before = resident_mb()
    found = answer(ask(base, data, LoRASpec(), device="cpu", dtype="float32"))
    assert found.estimate.memory.weights > 24e9
    assert resident_mb() - before < 500


def test_forwards_are_those_of_training(data):
    from lorakit.train.job import Job

    settings = TrainSettings(
        steps=9, batch_size=7, micro_batch=4, micro_batch_tokens=90, seed=3, lr=1.0, warmup=0
    )
    job = Job.__new__(Job)
    job.settings = settings
    job.most_tokens = settings.micro_batch_tokens
    lengths, supervised = workflow._counts(data)
    training = np.arange(5, len(data))
    for step in range(9):
        places = workflow.indices_at(len(training), 3, step * 7, 7)
        examples = [data[int(i)] for i in training[places]]
        theirs = [
            (sum(len(e.ids) for e in part), sum(int(e.supervised[1:].sum()) for e in part))
            for part in job._cut(examples)
        ]
        ours = cut_window(settings, lengths, supervised, training, step)
        assert [(part.tokens, part.supervised) for part in ours] == theirs


def test_what_is_changed_is_predicted_anew(base, data):
    question = ask(base, data, LoRASpec(rank=16), device="cpu", dtype="float32")
    now = question.estimate()
    assert question.changed({"rank": 8}).estimate().num_trained == now.num_trained // 2
    assert question.changed({"quantize": "nf4"}).estimate().memory.weights < now.memory.weights / 4
    for changes in ({"recompute": "layers"}, {"micro_batch_tokens": 64}, {"max_length": 16}):
        then = question.changed(changes).estimate()
        assert then.memory.activations < now.memory.activations, changes
    flags = {one.flags.split()[0] for one in answer(question).options}
    assert {"--recompute", "--quantize"} <= flags


def test_a_rank_too_small_for_the_data_is_told(base, data):
    spec = LoRASpec(rank=1, targets=("layers.0.self_attn.q_proj",))
    few = answer(ask(base, data, spec, device="cpu", dtype="float32"))
    assert few.warnings == []  # 8192 parameters, a few hundred tokens
    question = ask(base, data, spec, device="cpu", dtype="float32")
    assert workflow._rank_that_holds(question, question.adapter(), 8192 * 3) == 4


def test_full_fine_tuning_is_not_quantised(base, data):
    with pytest.raises(BaseError, match="packed ones have no gradient"):
        ask(base, data, None, quantize="nf4")


def run(capsys, *arguments):
    code = main(["estimate", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_command_prints_components_and_changes(base, rows, capsys):
    code, out, _ = run(capsys, "--base", base, "--data", rows, "--device", "cpu", "--dtype",
                       "float32", "--batch-size", "40")  # fmt: skip
    assert code == 0
    assert "Peak memory" in out
    assert "activations" in out
    assert "What would change it" in out
    assert "--recompute layers" in out
    assert "--batch-size 40 is above 32" in out
    assert "was measured earlier (--measure measures it again)" in out


def test_shorter_rows_that_are_advised_can_be_asked_for(base, tmp_path, capsys):
    completion = "the cat " * 40
    rows = [{"prompt": f"what is {n}", "completion": completion} for n in range(20)]
    flags = ["--base", base, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--json"]
    flags += ["--device", "cpu", "--batch-size", "16", "--micro-batch-tokens", "4096"]
    code, out, _ = run(capsys, *flags)
    assert code == 0
    advised = [one["flags"].split() for one in json.loads(out)["options"]]
    shorter = [one for one in advised if "--max-length" in one]
    assert shorter
    for one in shorter:
        assert run(capsys, *flags, *one)[0] == 0
    length = shorter[0][:2]
    assert run(capsys, *flags, *length)[0] == 2


def test_json_is_one_object_that_adds_up(base, rows, capsys):
    code, out, _ = run(capsys, "--base", base, "--data", rows, "--json", "--device", "cpu")
    found = json.loads(out)
    assert code == 0
    assert found["peak_bytes"] == sum(found["memory"].values())
    assert found["seconds"] == pytest.approx(found["steps"] * found["seconds_per_step"])
    assert found["seconds_per_step"] == pytest.approx(sum(found["time"].values()))
    assert {"flags", "needed", "fits"} <= set(found["options"][0])


def test_a_gpu_by_its_memory_has_no_time_and_by_its_name_has(base, rows, capsys):
    where = ("--base", base, "--data", rows)
    code, out, _ = run(capsys, *where, "--gpu", "8GB")
    assert code == 0
    assert "DOES NOT FIT" in out
    assert "there is no time; name the GPU for one" in out
    line = next(line for line in out.splitlines() if "--quantize nf4" in line)
    assert "  fits" in line
    _, out, _ = run(capsys, *where, "--gpu", "RTX 4090", "--json")
    found = json.loads(out)
    assert found["fits"] is True
    assert found["memory"]["weights"] == pytest.approx(2 * 6.74e9, rel=0.01)
    assert found["seconds_per_step"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "GTX 1"], "neither an amount of memory"),
        (["--full", "--rank", "8"], "--rank is about an adapter"),
        (["--gpu", "24GB", "--device", "cpu"], "give one of them"),
        (["--gpu", "24GB", "--measure"], "--measure measures this machine"),
        (["--full", "--quantize", "nf4"], "packed ones have no gradient"),
        (["--targets", "nothing_like_it"], "matches nothing"),
        (["--steps", "3", "--epochs", "2"], "give one of them"),
    ],
)
def test_wrong_flags_exit_2_with_one_message(base, rows, capsys, flags, words):
    code, out, err = run(capsys, "--base", base, "--data", rows, *flags)
    assert code == 2
    assert out == ""
    assert words in err
    assert "Traceback" not in err
