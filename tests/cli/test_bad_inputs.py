"""What users get wrong: exit 2, one message with the thing and the next step, nothing written."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from lorakit import LoRASpec, attach, save_adapter
from lorakit.cli.main import main

from .. import models
from ..tokenizers_ import chat_tokenizer

GOOD = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2}"} for i in range(10, 40)]


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with a base, adapters and data, good ones and every bad one."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    for name, size in (("base", 32), ("other", 32), ("wide", 64)):
        model = models.llama(hidden_size=size, vocab_size=120, max_position_embeddings=32)
        model.save_pretrained(root / name)
        chat_tokenizer().save_pretrained(root / name)
    _adapters(root)
    _bases(root)
    write(root / "good.jsonl", lines(*GOOD))
    write(root / "broken.jsonl", lines(*GOOD[:2]) + '{"prompt": "w3", \n' + lines(*GOOD[2:]))
    write(root / "object.json", '{"a": 1}')
    write(root / "empty.jsonl", "")
    write(root / "blank_completion.jsonl", lines(*GOOD[:3], {"prompt": "w1", "completion": ""}))
    write(root / "null.jsonl", lines(*GOOD[:3], {"prompt": None, "completion": "w1"}))
    write(root / "number.jsonl", lines(*GOOD[:3], {"prompt": "w1", "completion": ["w2"]}))
    write(root / "columns.jsonl", lines({"alpha": "w1", "omega": "w2"}))
    write(root / "no_assistant.jsonl", lines({"messages": [{"role": "user", "content": "w1"}]}))
    talk = [{"role": "boss", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    write(root / "role.jsonl", lines({"messages": talk}))
    write(root / "long.jsonl", lines({"prompt": "w1 " * 60, "completion": "w2"}))
    write(root / "latin.csv", "prompt,completion\ncaf\xe9,w1\n".encode("latin-1"))
    write(root / "ragged.csv", "prompt,completion\nw1,w2\nw1,w2,w3\n")
    write(root / "twice.csv", "prompt,prompt\nw1,w2\n")
    write(root / "header.csv", "prompt,completion\n")
    write(root / "repeated.jsonl", lines(*GOOD[:2]) + '{"prompt": "w1", "prompt": "w2"}\n')
    write(root / "repeated.json", '[{"messages": []}, {"messages": [{"role": "", "role": ""}]}]')
    write(root / "digits.jsonl", lines(*GOOD[:2]) + '{"prompt": ' + "9" * 5000 + "}\n")
    write(root / "digits.json", '[{"prompt": ' + "9" * 5000 + "}]")
    write(root / "deep.jsonl", "[" * 200_000 + "\n")
    write(root / "no_prompt.csv", "colour\nw1\n")
    write(root / "zero.txt", b"w1\x00w2\n")
    column = pyarrow.array(["w1"])
    table = pyarrow.Table.from_arrays([column, column], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, root / "twice.parquet")
    os.mkfifo(root / "pipe.jsonl")
    write(root / "noise.parquet", b"PAR1 this is no parquet file PAR1")
    write(root / "odd.xlsx", b"spreadsheet")
    (root / "nothing").mkdir()
    write(root / "a_file", "in the way")
    (root / "a_run").mkdir()
    write(root / "a_run" / "run.yaml", "{}\n")
    return root


def _adapters(root: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lorakit.bases import load_base

    def adapter(base: str):
        loaded = load_base(str(root / base), device="cpu")
        handle = attach(loaded.model, LoRASpec(rank=2, targets="q_proj"))
        models.randomize(handle)
        return handle.snapshot().with_(base=loaded.identity)

    assert AutoModelForCausalLM is not None
    save_adapter(adapter("base"), root / "good")
    save_adapter(adapter("other"), root / "of_other")
    save_adapter(adapter("wide"), root / "of_wide")
    shutil.copytree(root / "good", root / "elsewhere" / "good")

    def spoiled(name: str):
        shutil.copytree(root / "good", root / name)
        return root / name / "adapter_model.safetensors", root / name / "adapter_config.json"

    weights, _ = spoiled("truncated")
    weights.write_bytes(weights.read_bytes()[:-100])
    weights, _ = spoiled("nan")
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    weights.write_bytes(bytes(data))
    weights, _ = spoiled("no_weights")
    weights.unlink()
    _, config = spoiled("no_config")
    config.unlink()
    for name, change in (
        ("dora", {"use_dora": True}),
        ("ia3", {"peft_type": "IA3"}),
        ("wrong_rank", {"r": 7}),
    ):
        _, config = spoiled(name)
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    _, config = spoiled("bad_config")
    config.write_text("{not json")


def _bases(root: Path) -> None:
    for name in ("cut", "headless", "tokenless"):
        shutil.copytree(root / "base", root / name)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: 1 << 12])
    (root / "headless" / "config.json").unlink()
    for file in (root / "tokenless").glob("*token*"):
        file.unlink()
    write(root / "noise.gguf", b"GGML not really")


TRAIN = ["train", "--base", "base", "--data", "good.jsonl", "--out", "out", "--steps", "2"]
EVAL = ["eval", "--base", "base", "--adapter", "good", "--data", "good.jsonl"]
GENERATE = ["generate", "--base", "base", "--prompt", "w1", "--max-new-tokens", "2"]


def having(command: list[str], **changes: str | None) -> list[str]:
    """The command with some flags changed, added, or (None) taken away."""
    out, rest = [], dict(changes)
    i = 0
    while i < len(command):
        key = command[i].removeprefix("--").replace("-", "_")
        if command[i].startswith("--") and key in rest:
            value = rest.pop(key)
            out += [] if value is None else [command[i], value]
            i += 2
        else:
            out.append(command[i])
            i += 1
    for key, value in rest.items():
        out += [] if value is None else ["--" + key.replace("_", "-"), value]
    return out


#: what is wrong → (command, words that the message must hold)
CASES: dict[str, tuple[list[str], list[str]]] = {
    # data
    "missing data": (having(TRAIN, data="god.jsonl"), ["god.jsonl", "good.jsonl"]),
    "data folder is empty": (having(TRAIN, data="nothing"), ["nothing"]),
    "broken JSON": (having(TRAIN, data="broken.jsonl"), ["broken.jsonl", "3"]),
    "JSON is no list": (having(TRAIN, data="object.json"), ["object.json", "list"]),
    "empty file": (having(TRAIN, data="empty.jsonl"), ["empty.jsonl"]),
    "only a header": (having(TRAIN, data="header.csv"), ["header.csv"]),
    "empty completion": (having(TRAIN, data="blank_completion.jsonl"), ["4", "completion"]),
    "null prompt": (having(TRAIN, data="null.jsonl"), ["4", "prompt"]),
    "completion is a list": (having(TRAIN, data="number.jsonl"), ["4", "completion", "list"]),
    "unknown columns": (having(TRAIN, data="columns.jsonl"), ["alpha", "--map"]),
    "mapped column is not there": (having(TRAIN, map="prompt=mr,completion=completion"), ["mr"]),
    "map without =": (having(TRAIN, map="prompt"), ["prompt", "="]),
    "a field mapped twice": (
        [*TRAIN, "--map", "prompt=a", "--map", "prompt=b"],
        ["prompt", "twice"],
    ),
    "map of an unknown name": (having(TRAIN, map="promt=prompt,completion=completion"), ["promt"]),
    "template field is not there": (having(TRAIN, template="{nope}"), ["nope"]),
    "a long template with a slash": (having(TRAIN, template="a/b " * 100 + "{nope}"), ["nope"]),
    "template is not UTF-8": (having(TRAIN, template="./latin.csv"), ["latin.csv", "UTF-8"]),
    "no assistant turn": (having(TRAIN, data="no_assistant.jsonl"), ["1", "assistant"]),
    "unknown role": (having(TRAIN, data="role.jsonl"), ["1", "boss"]),
    "longer than the context": (having(TRAIN, data="long.jsonl"), ["32", "--truncate"]),
    "max length above the context": (having(TRAIN, max_length="64"), ["64", "32"]),
    "not UTF-8": (having(TRAIN, data="latin.csv"), ["latin.csv", "UTF-8"]),
    "a row with more columns": (having(TRAIN, data="ragged.csv"), ["ragged.csv", "3"]),
    "a column twice": (having(TRAIN, data="twice.csv"), ["twice.csv", "prompt"]),
    "a Parquet column twice": (having(TRAIN, data="twice.parquet"), ["twice.parquet", "prompt"]),
    "a JSON key twice": (having(TRAIN, data="repeated.jsonl"), ["line 3", "'prompt'", "twice"]),
    "a JSON key twice, deep": (having(TRAIN, data="repeated.json"), ["item 2", "'role'"]),
    "a number of 5000 digits": (having(TRAIN, data="digits.jsonl"), ["line 3", "digits"]),
    "a number of 5000 digits in a list": (having(TRAIN, data="digits.json"), ["digits"]),
    "JSON nested too deeply": (having(TRAIN, data="deep.jsonl"), ["deep.jsonl", "nested"]),
    "data is a pipe": (having(TRAIN, data="pipe.jsonl"), ["pipe.jsonl", "is a pipe"]),
    "data with a long name": (having(TRAIN, data="x" * 300 + ".jsonl"), ["no such file"]),
    "data with a long path": (having(TRAIN, data="x/" * 2500 + "y.csv"), ["no such file"]),
    "data of no user": (having(TRAIN, data="~nouser/y.csv"), ["~nouser"]),
    "not a Parquet file": (having(TRAIN, data="noise.parquet"), ["noise.parquet"]),
    "unknown ending": (having(TRAIN, data="odd.xlsx"), ["odd.xlsx", "jsonl"]),
    "validation data is missing": (having(TRAIN, valid="nope.jsonl"), ["nope.jsonl"]),
    "preview of missing data": (["preview", "--base", "base", "--data", "no.csv"], ["no.csv"]),
    "bad rows in preview": (
        ["preview", "--base", "base", "--data", "role.jsonl"],
        ["boss"],
    ),
    # settings
    "unknown target": (having(TRAIN, targets="q_prj"), ["q_prj", "q_proj"]),
    "exclude matches nothing": (having(TRAIN, exclude="zzz"), ["zzz"]),
    "no such layers": (having(TRAIN, layers="5-9"), ["0 to 1"]),
    "layers without a start": (having(TRAIN, layers="-1"), ["'-1'", "Write 0-1"]),
    "layers far beyond": (having(TRAIN, layers="0-999999999"), ["0 to 1"]),
    "too many steps": (having(TRAIN, steps="9" * 12), ["steps", "1,000,000,000"]),
    "steps of 400 digits": (having(TRAIN, steps="9" * 400), ["--steps"]),
    "too many epochs": (having(TRAIN, steps=None, epochs="1e308"), ["epochs", "1e+308"]),
    "alpha beyond float32": (having(TRAIN, alpha="1e40"), ["alpha", "1e30"]),
    "rank 0": (having(TRAIN, rank="0"), ["rank", "0"]),
    "rank above the width": (having(TRAIN, rank="33"), ["33", "16"]),
    "dropout 1.5": (having(TRAIN, dropout="1.5"), ["1.5"]),
    "negative rate": (having(TRAIN, lr="-1"), ["-1"]),
    "rate is no number": (having(TRAIN, lr="fast"), ["fast"]),
    "batch of 0": (having(TRAIN, batch_size="0"), ["batch", "0"]),
    "0 steps": (having(TRAIN, steps="0"), ["steps", "0"]),
    "steps and epochs": (having(TRAIN, epochs="2"), ["steps", "epochs"]),
    "warm-up longer than the run": (having(TRAIN, warmup="50"), ["warmup", "50"]),
    "unknown schedule": (having(TRAIN, schedule="wavy"), ["wavy", "cosine"]),
    "unknown tracker": (having(TRAIN, report_to="paper"), ["paper", "wandb"]),
    "unknown flag": ([*TRAIN, "--rnk", "4"], ["--rnk"]),
    "unknown command": (["trian"], ["trian", "train"]),
    "unknown device": (having(TRAIN, device="gpu9"), ["gpu9"]),
    "unknown dtype": (having(TRAIN, dtype="fp33"), ["fp33"]),
    # bases
    "no such base folder": (having(TRAIN, base="./bsae"), ["bsae", "base"]),
    "base without config": (having(TRAIN, base="headless"), ["headless", "config.json"]),
    "base is an adapter": (having(TRAIN, base="good"), ["good", "--adapter"]),
    "base is cut off": (having(TRAIN, base="cut"), ["cut"]),
    "base without tokenizer": (having(TRAIN, base="tokenless"), ["tokenless", "tokenizer"]),
    "not a GGUF": (having(TRAIN, base="noise.gguf"), ["noise.gguf"]),
    "hub id without network": (having(TRAIN, base="someone/nothing"), ["someone/nothing"]),
    "base with a long name": (having(TRAIN, base="./" + "x" * 300), ["no file or folder"]),
    "base with a long path": (having(TRAIN, base="x/" * 2500), ["no file or folder"]),
    "base of no user": (having(TRAIN, base="~nouser/x"), ["~nouser"]),
    # folders
    "a file where the run would be": (having(TRAIN, out="a_file"), ["a_file"]),
    "a file above the run": (having(TRAIN, out="a_file/run"), ["a_file"]),
    "a run is there already": (having(TRAIN, out="a_run"), ["a_run", "--resume"]),
    "nothing to resume": (["train", "--resume", "nothing"], ["nothing"]),
    "no data given": (having(TRAIN, data=None), ["--data"]),
    # adapters
    "go on from no adapter": ([*TRAIN, "--from", "nothing"], ["nothing"]),
    "go on with another rank": ([*TRAIN, "--from", "good", "--rank", "8"], ["rank"]),
    "no such adapter": (having(EVAL, adapter="godd"), ["godd"]),
    "truncated adapter": (having(EVAL, adapter="truncated"), ["truncated"]),
    "NaN in an adapter": (having(EVAL, adapter="nan"), ["NaN", "q_proj"]),
    "adapter without weights": (having(EVAL, adapter="no_weights"), ["adapter_model.safetensors"]),
    "adapter without config": (having(EVAL, adapter="no_config"), ["adapter_config.json"]),
    "adapter config is broken": (having(EVAL, adapter="bad_config"), ["adapter_config.json"]),
    "DoRA": (having(EVAL, adapter="dora"), ["use_dora"]),
    "not LoRA at all": (having(EVAL, adapter="ia3"), ["IA3"]),
    "rank differs from config": (having(EVAL, adapter="wrong_rank"), ["7", "2"]),
    "adapter of a wider base": (having(EVAL, adapter="of_wide"), ["wide", "(32, 32)"]),
    "adapter of another base": (
        having(EVAL, adapter="of_other"),
        ["other", "--allow-other-base"],
    ),
    "two adapters of one name": ([*EVAL, "--adapter", "elsewhere/good"], ["good", "name"]),
    "weight is no number": (having(EVAL, adapter="good=much"), ["much"]),
    "weight beyond float32": (having(EVAL, adapter="good=1e300"), ["1e300", "1e6"]),
    "adapter with a long path": (having(EVAL, adapter="x/" * 2500), ["does not exist"]),
    "adapter of no user": (having(EVAL, adapter="~nouser/x"), ["~nouser"]),
    "answers saved over the data": (having(EVAL, save="good.jsonl"), ["good.jsonl", "--data"]),
    "answers saved into no folder": (having(EVAL, save="nowhere/a.jsonl"), ["nowhere"]),
    "answers saved below a file": (having(EVAL, save="a_file/a.jsonl"), ["a_file"]),
    "answers saved under a long name": (having(EVAL, save="x" * 300), ["--save", "too long"]),
    "unknown metric": (having(EVAL, metrics="blue"), ["blue", "bleu"]),
    "limit 0": (having(EVAL, limit="0"), ["limit", "0"]),
    "no prompt": (having(GENERATE, prompt=None), ["--prompt"]),
    "prompts file is missing": (having(GENERATE, prompt=None, prompts="no.txt"), ["no.txt"]),
    "prompts without a column": (
        having(GENERATE, prompt=None, prompts="no_prompt.csv"),
        ["colour"],
    ),
    "prompts of zero bytes": (having(GENERATE, prompt=None, prompts="zero.txt"), ["zero.txt"]),
    "prompt is not UTF-8": (having(GENERATE, prompt="caf\udce9"), ["--prompt", "UTF-8"]),
    "system is not UTF-8": (having(GENERATE, system="caf\udce9"), ["--system", "UTF-8"]),
    "0 new tokens": (having(GENERATE, max_new_tokens="0"), ["0"]),
    "negative temperature": (having(GENERATE, temperature="-1"), ["-1"]),
    "inspect nothing": (["inspect", "godd"], ["godd"]),
    "inspect a long name": (["inspect", "./" + "x" * 300], ["does not exist"]),
    "inspect a base": (["inspect", "base"], ["base"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, world, tmp_path, monkeypatch, capfd):
    command, words = CASES[case]
    here = tmp_path / "here"
    here.mkdir()
    for thing in world.iterdir():
        os.symlink(thing, here / thing.name)
    monkeypatch.chdir(here)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    if "--prompt" not in command and "--prompts" not in command and "generate" in command:
        monkeypatch.setattr("sys.stdin", io.StringIO())
    before = {path.name for path in here.iterdir()}
    code = main(command)
    out, err = capfd.readouterr()
    assert code == 2, f"exit {code}: {err}"
    assert "Traceback" not in err
    assert out == "", "stdout belongs to results"
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
    assert {path.name for path in here.iterdir()} == before, "nothing is half-written"
    assert {p.name for p in (world / "a_run").iterdir()} == {"run.yaml"}


def test_there_are_enough():
    assert len(CASES) >= 40


def run_in(folder: Path, redirect: str, *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a shell, as only a shell can close or redirect what a program gets."""
    line = f"{shlex.join([sys.executable, '-m', 'lorakit.cli.main', *command])} {redirect}"
    return subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, timeout=120)


def test_json_alone_where_stderr_is_closed(world):
    done = run_in(world, "2>&-", "inspect", "good", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("flags", [["--json"], []], ids=["json", "table"])
def test_stdout_that_takes_nothing(world, flags):
    done = run_in(world, ">/dev/full", "inspect", "good", *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == b"lorakit inspect: No space left on device"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_json_of_a_path_that_is_no_text(world, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    shutil.copytree(world / "good", tmp_path / name)
    done = run_in(tmp_path, "", "inspect", name, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("utf-8"))


@pytest.mark.parametrize("stdin", ["<&-", "</dev/null", "<zero.txt", "<latin.csv"])
def test_stdin_without_a_prompt(world, stdin):
    done = run_in(world, stdin, "generate", "--base", "base")
    assert done.returncode == 2, done.stderr
    assert b"stdin" in done.stderr
    assert b"Traceback" not in done.stderr


def test_answers_go_where_the_name_leads(world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(world)
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    assert main(having(EVAL, limit="1", save=str(link))) == 0
    assert link.is_symlink()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        assert main(having(EVAL, limit="1", save=str(pipe))) == 0
        assert os.read(reader, 1 << 16) == target.read_bytes() != b""
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    link.unlink()
    link.symlink_to(world / "good.jsonl")
    assert main(having(EVAL, save=str(link))) == 2
    assert "--data" in capfd.readouterr().err
