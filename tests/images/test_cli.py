"""`lorakit images`: from flags to files, and twenty ways to be wrong, each with exit code 2."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lorakit.cli.main import main
from lorakit.core.safetensors_io import read_safetensors_header
from tests.images import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.pictures(tmp_path / "data")


def base(family="sd"):
    return ["--base", str(tiny.folder(family)), "--device", "cpu"]


QUICK = [
    *("--resolution", "16", "--steps", "2", "--batch-size", "2", "--rank", "2"),
    *("--sample-steps", "1", "--sample-seeds", "1", "--sample-prompt", "a red thing"),
]


def test_train_sample_and_convert(folder, tmp_path, capsys):
    out = str(tmp_path / "run")
    flags = [*QUICK, "--trigger", "sks style", "--targets", "cross-attention", "--json"]
    assert main(["images", "train", *base(), "--data", str(folder), "--out", out, *flags]) == 0
    told, notes = capsys.readouterr()
    assert json.loads(told)["steps"] == 2
    assert "lr is 0.0001: usual for adapters of picture models" in notes
    assert main(["images", "train", "--resume", out, "--quiet"]) == 0  # it is finished
    pictures = tmp_path / "pictures"
    flags = ["--adapter", f"mine:{out}=0.5", "--prompt", "a red thing", "--seed", "7"]
    flags += ["--steps", "2", "--grid", "weight=0,1 seed=1,2", "--captions", "--json"]
    assert main(["images", "sample", *base(), *flags, "--out", str(pictures)]) == 0
    told, notes = capsys.readouterr()
    assert "Pictures are 16 × 16 pixels, as mine learnt" in notes
    facts = json.loads(told)
    assert [(p["seed"], p["adapters"]) for p in facts["pictures"]] == [
        (1, []),
        (2, []),
        (1, [{"name": "mine", "ref": out, "weight": 0.5}]),
        (2, [{"name": "mine", "ref": out, "weight": 0.5}]),
    ]
    assert (pictures / "sheet.png").is_file()
    with Image.open(facts["pictures"][3]["file"]) as one:
        assert json.loads(one.text["lorakit"])["seed"] == 2
        assert one.size == (16, 16)
    assert (pictures / "000-a-red-thing-1.txt").read_text() == "a red thing\n"
    kohya = tmp_path / "style.safetensors"
    assert main(["convert", out, "--to", "kohya", "--out", str(kohya)]) == 0
    header = read_safetensors_header(kohya)[1]
    assert header["modelspec.trigger_phrase"] == "sks style"
    assert json.loads(header["ss_tag_frequency"]) == {"data": {"sks style": 6}}
    assert header["ss_resolution"] == "(16, 16)"
    assert header["ss_sd_model_name"] == "sd"
    assert len(header["ss_new_sd_model_hash"]) == 64
    flags = ["--adapter", str(kohya), "--prompt", "a", "--steps", "1", "--out", str(tmp_path / "k")]
    assert main(["images", "sample", *base(), *flags, "--width", "16", "--height", "16"]) == 0


def test_a_run_for_each_folder_of_styles(tmp_path, capsys):
    for name in ("x", "y"):
        tiny.pictures(tmp_path / "styles" / name, 3)
    flags = ["--each", str(tmp_path / "styles"), "--out", str(tmp_path / "runs"), "--no-samples"]
    assert main(["images", "train", *base(), *QUICK[:8], *flags]) == 0
    assert "y: finished after 2 steps" in capsys.readouterr().err
    for name in ("x", "y"):
        assert (tmp_path / "runs" / name / "adapter" / "adapter_config.json").is_file()
    assert main(["images", "train", "--resume", str(tmp_path / "runs"), "--quiet"]) == 0


BAD_TRAIN = [
    ([], "--base: a folder or hub id"),
    (["--data", "{data}", "--out", "{out}", "--base", "{tmp}/none"], "does not exist"),
    (["--data", "{data}", "--out", "{out}", "--base", "{data}"], "it has no model_index.json"),
    (["--data", "{data}", "--out", "{out}", "--base", "{data}/00.png"], "is a file"),
    (["--data", "{tmp}/none", "{rest}"], "does not exist"),
    (["--data", "{data}/00.png", "{rest}"], "is a file. Give the folder"),
    (["--data", "{bare}", "{rest}"], "it has no caption"),
    (["--data", "{data}", "{rest}", "--resolution", "18"], "must be a multiple of 4"),
    (["--data", "{data}", "{rest}", "--resolution", "64"], "are too small for this resolution"),
    (["--data", "{data}", "{rest}", "--targets", "atention"], "matches nothing"),
    (["--data", "{data}", "{rest}", "--rank-pattern", "conv9=2"], "matches none"),
    (["--data", "{data}", "{rest}", "--masked"], "no picture has one"),
    (["--data", "{data}", "{rest}", "--prior-weight", "2"], "there is no --prior-data"),
    (["--data", "{data}", "{rest}", "--no-samples", "--sample-every", "2"], "draws nothing"),
    (["--data", "{data}", "{rest}", "--quantize", "nf4"], "this pipeline has a UNet"),
    (["--data", "{data}", "{rest}", "--text-tokens", "9"], "has no choice there"),
    (["--data", "{data}", "{rest}", "--caption-column", "x"], "has no metadata.jsonl"),
    (["--data", "{data}", "{rest}", "--max-concurrent", "2"], "it acts with --each"),
    (["--each", "{data}", "{rest}"], "holds no folder"),
    (["--resume", "{data}"], "has no run.yaml"),
    (["--resume", "{data}", "--lr", "1"], "cannot be changed in a run that goes on"),
    (["--data", "{data}", "{rest}", "--from", "{data}"], "adapter"),
    (["--data", "{data}", "{rest}", "--dtype", "float16"], "gradients vanish in it"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_TRAIN, ids=range(len(BAD_TRAIN)))
def test_wrong_training(flags, message, folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    tiny.pictures(bare, 2)
    (bare / "00.txt").unlink()
    names = {"data": folder, "tmp": tmp_path, "out": tmp_path / "run", "bare": bare}
    rest = [*base(), "--out", str(tmp_path / "run")]
    if "--resolution" not in flags:
        rest += ["--resolution", "16"]
    words = []
    for flag in flags:
        words += rest if flag == "{rest}" else [flag.format(**names)]
    assert main(["images", "train", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


BAD_SAMPLE = [
    ([], "no prompt is given"),
    (["--prompt", "a", "--grid", "weight=1"], "there is no adapter to weigh"),
    (["--prompt", "a", "--prompt", "b", "--grid", "seed=1"], "put prompt into --grid"),
    (["--prompt", "a", "--width", "17"], "must be a multiple of 4"),
    (["--prompt", "a", "--adapter", "{tmp}/none"], "none"),
    (["--prompt", "a", "--prompts", "x"], "both given"),
    (["--prompts", "{tmp}/none"], "cannot be read"),
    (["--prompt", "a", "--negative", "b", "--guidance", "1"], "cannot act"),
    (["--prompt", "a", "--out", "{data}"], "is not empty"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_SAMPLE, ids=range(len(BAD_SAMPLE)))
def test_wrong_sampling(flags, message, folder, tmp_path, capsys):
    words = [flag.format(data=folder, tmp=tmp_path) for flag in flags]
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert main(["images", "sample", *base(), *words, *out]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_base(folder, tmp_path, capsys):
    """An adapter of SD on SDXL's UNet is refused; so is a run of text."""
    out = str(tmp_path / "run")
    flags = ["--data", str(folder), "--out", out, *QUICK[:8], "--no-samples", "--quiet"]
    assert main(["images", "train", *base(), *flags]) == 0
    capsys.readouterr()
    flags = ["--adapter", out, "--prompt", "a", "--out", str(tmp_path / "out")]
    assert main(["images", "sample", *base("sdxl"), *flags]) == 2
    assert "The adapter was trained on 'sd'; this base, 'sdxl'" in capsys.readouterr().err
    assert main(["images"]) == 2
    assert "needs a command: train or sample" in capsys.readouterr().err
