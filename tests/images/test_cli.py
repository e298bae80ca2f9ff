"""`lorakit images`: from flags to files, and twenty ways to be wrong, each with exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lorakit.cli import images_train
from lorakit.cli.main import build_parser, main
from lorakit.core.safetensors_io import read_safetensors_header
from lorakit.errors import TrainingError
from lorakit.images import drawing
from lorakit.train import RunResult
from lorakit.train.folder import RunFolder
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
    flags += ["--flip", "--valid", str(folder)]
    assert main(["images", "train", *base(), "--data", str(folder), "--out", out, *flags]) == 0
    told, notes = capsys.readouterr()
    assert json.loads(told)["steps"] == 2
    settings = RunFolder(Path(out)).read_settings()
    flips = [settings[section]["settings"]["flip"] for section in ("data", "validation")]
    assert flips == [True, False]
    assert "lr is 0.0001: usual for adapters of picture models" in notes
    assert main(["images", "train", "--resume", out, "--quiet"]) == 0  # it is finished
    pictures = tmp_path / "pictures"
    flags = ["--adapter", f"mine:{out}=0.5", "--prompt", "a red thing"]
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
    with Image.open(pictures / "sheet.png") as page:
        told = json.loads(page.text["lorakit"])
        assert (told["grid"], told["prompt"], told["steps"]) == (
            "weight=0,1 seed=1,2", "a red thing", 2,
        )  # fmt: skip
        assert not {"seed", "adapters"} & told.keys()  # these differ from cell to cell
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
    assert header["ss_base_model_version"] == "sd_v1"
    flags = ["--adapter", str(kohya), "--prompt", "a", "--steps", "2", "--out", str(tmp_path / "k")]
    flags += ["--width", "16", "--height", "16", "--against", "-0.5", "--adapter-start", "0.25"]
    assert main(["images", "sample", *base(), *flags]) == 0
    with Image.open(next((tmp_path / "k").glob("*.png"))) as one:
        told = json.loads(one.text["lorakit"])
        assert (told["against"], told["adapter_start"]) == (-0.5, 0.25)
        assert "Against: -0.5, Adapter start: 0.25" in one.text["parameters"]


def test_a_run_for_each_folder_of_styles(tmp_path, capsys):
    for name in ("x", "y"):
        tiny.pictures(tmp_path / "styles" / name, 3)
    flags = ["--each", str(tmp_path / "styles"), "--out", str(tmp_path / "runs"), "--no-samples"]
    assert main(["images", "train", *base(), *QUICK[:8], *flags]) == 0
    assert "y: finished after 2 steps" in capsys.readouterr().err
    for name in ("x", "y"):
        assert (tmp_path / "runs" / name / "adapter" / "adapter_config.json").is_file()
    shutil.rmtree(tmp_path / "runs" / "y")
    capsys.readouterr()
    assert main(["images", "train", "--resume", str(tmp_path / "runs"), "--quiet", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]  # a list, however long
    assert told["steps"] == 2


def test_a_run_of_several_that_fails_is_named(tmp_path, capsys):
    options = SimpleNamespace(json=False, quiet=True)
    results = [RunResult(tmp_path, None, 2), TrainingError("no room")]
    with pytest.raises(TrainingError) as caught:
        images_train._all_told(options, ["runs/x", "runs/y"], results)
    assert caught.value.said
    assert capsys.readouterr().err == "y: no room\n"


def test_all_folders_are_read_before_the_base(tmp_path, capsys):
    for name in ("x", "y"):
        (tiny.pictures(tmp_path / "styles" / name, 2) / "01.txt").unlink()
    flags = ["--each", str(tmp_path / "styles"), "--out", str(tmp_path / "runs")]
    assert main(["images", "train", "--base", str(tmp_path / "nowhere"), *flags]) == 2
    told = capsys.readouterr().err
    for name in ("x", "y"):
        assert f"{tmp_path / 'styles' / name} has pictures that cannot be used" in told
    assert "nowhere" not in told


def test_one_flag_is_for_the_masks_of_all_folders():
    flags = ["--data", "a", "--prior-data", "b", "--masked"]
    options = build_parser("images").parse_args(["images", "train", *flags])
    plan = images_train._plan(options, "a")
    assert plan.pictures.masks
    assert plan.prior.masks


def test_a_pass_is_over_the_pictures_to_learn(monkeypatch, tmp_path):
    """60 passes over 50 pictures, which are every second example where there is a class."""
    flags = ["--data", "a", "--out", "b", "--no-samples", "--quiet"]
    for prior, steps in ((None, 750), ("c", 1500)):
        options = build_parser("images").parse_args(["images", "train", *flags])
        options.prior_data = prior
        report = SimpleNamespace(pictures=SimpleNamespace(used=50))
        data = SimpleNamespace(report=report)
        monkeypatch.setattr("lorakit.images.data.load_pictures", lambda *_, data=data: data)
        monkeypatch.setattr(images_train, "_spec", lambda *_: None)
        monkeypatch.setattr("lorakit.images.training.picture_trainer", lambda *given, **_: given[3])
        assert images_train._trainer(None, options, "a", "b", {}, []).steps == steps


def test_what_is_drawn_before_an_interrupt_stays(tmp_path, monkeypatch):
    own, calls = drawing._forward, []

    def forward(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*given)

    monkeypatch.setattr(drawing, "_forward", forward)
    flags = ["--prompt", "a", "--seed", "1,2", "--steps", "1", "--parallel", "1"]
    size, out = ["--width", "16", "--height", "16"], tmp_path / "out"
    assert main(["images", "sample", *base(), *flags, *size, "--out", str(out)]) == 130
    assert [path.name for path in out.iterdir()] == ["000-a-1.png"]


BAD_TRAIN = [
    ([], "--base: a folder or hub id"),
    (["--data", "{data}", "--out", "{out}", "--base", "{tmp}/none"], "does not exist"),
    (["--data", "{bare}", "--out", "{out}", "--base", "{tmp}/none"], "it has no caption"),
    (["--data", "{data}", "--out", "{out}", "--base", "{data}"], "it has no model_index.json"),
    (["--data", "{data}", "--out", "{out}", "--base", "{data}/00.png"], "is a file"),
    (["--data", "{tmp}/none", "{rest}"], "does not exist"),
    (["--data", "{data}/00.png", "{rest}"], "is a file. Give the folder"),
    (["--data", "{data}", "{rest}", "--targets", "atention"], "matches nothing"),
    (["--data", "{data}", "{rest}", "--prior-weight", "2"], "there is no --prior-data"),
    (["--data", "{data}", "{rest}", "--no-samples", "--sample-every", "2"], "draws nothing"),
    (["--data", "{data}", "{rest}", "--quantize", "nf4"], "this pipeline has a UNet"),
    (["--data", "{data}", "{rest}", "--text-tokens", "513"], "T5 reads 1 to 512 tokens"),
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
    rest = [*base(), "--out", str(tmp_path / "run"), "--resolution", "16"]
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
    (
        ["--prompt", "a", "--seed", "1,2", "--grid", "seed=4,5"],
        "--seed and seed in --grid are both",
    ),
    (
        ["--prompt", "a", "--steps", "3", "--grid", "step=4,5"],
        "--steps and step in --grid are both",
    ),
    (["--prompt", "a", "--adapter-start", "1"], "expected a number from 0 to below 1"),
    (["--prompt", "a", "--adapter-start", "0.5"], "no adapter that could"),
    (["--prompt", "a", "--text-tokens", "0"], "at least 1"),
    (["--prompt", "a", "--width", "17"], "must be a multiple of 4"),
    (["--prompt", "a", "--against", "it"], "'it'"),
    (
        ["--prompt", "a", "--against", "0"],
        "no adapter that it could weigh",
    ),
    (["--prompt", "a", "--adapter", "{tmp}/none"], "none"),
    (["--prompt", "a", "--prompts", "x"], "both given"),
    (["--prompts", "{tmp}/none"], "cannot be read"),
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
    flags = ["--data", str(folder), "--from", out, "--text-encoder-lr", "1e-4", "--out", f"{out}2"]
    assert main(["images", "train", "--base", str(tmp_path / "nowhere"), *flags]) == 2
    assert "--text-encoder-lr: the adapter of --from changes no text" in capsys.readouterr().err
    assert main(["images"]) == 2
    assert "needs a command: train or sample" in capsys.readouterr().err
