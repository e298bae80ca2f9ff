"""``lorakit extract`` and ``lorakit compare``: what they print, write and refuse."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from lorakit import load_adapter
from lorakit.cli.main import main
from tests import models


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    base = models.llama()
    base.save_pretrained(folder / "base")
    for name in ("one", "two"):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        tuned.save_pretrained(folder / name)
    return folder


def extract(checkpoints, tuned, out, *more):
    base = ["--base", str(checkpoints / "base"), "--tuned", str(checkpoints / tuned)]
    return main(["extract", *base, "--out", str(out), *more])


@pytest.fixture(scope="module")
def adapters(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    assert extract(checkpoints, "one", folder / "one", "--rank", "4") == 0
    targets = ("--targets", "q_proj", "up_proj")
    assert extract(checkpoints, "two", folder / "two", "--energy", "0.5", *targets) == 0
    return [str(folder / "one"), str(folder / "two")]


def test_extract_prints_error_beside_the_best(checkpoints, tmp_path, capfd):
    assert extract(checkpoints, "one", tmp_path / "a", "--rank", "4") == 0
    text = " ".join(capfd.readouterr().out.split())  # a long line is broken anywhere
    for word in ("16 low-rank, 0 kept whole", "best possible", "q_proj", "--remainder keep"):
        assert word in text
    adapter = load_adapter(tmp_path / "a")
    assert {site.rank for site in adapter.low_rank.values()} == {4}
    assert adapter.base.architecture == "LlamaForCausalLM"
    assert adapter.provenance["extract"]["rank"] == 4


def test_extract_json(checkpoints, tmp_path, capfd):
    assert extract(
        checkpoints, "one", tmp_path / "a", "--rank", "full", "--remainder", "keep", "--json"
    ) == 0  # fmt: skip
    found = json.loads(capfd.readouterr().out)
    assert found["error"] < 1e-6
    assert (found["low_rank_sites"], found["replaced_sites"]) == (16, 5)
    assert found["sites"]["lm_head"]["rank"] == 32
    assert all(tensor["kept"] for tensor in found["remainder"]["tensors"].values())


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--rank", "0"), "whole number"),
        (("--rank", "some"), "whole number"),
        (("--energy", "1.5"), "above 0 and at most 1"),
        (("--rank", "2", "--energy", "0.5"), "not allowed with"),
        ((), "required"),
        (("--rank", "2", "--targets", "nothing"), "matches nothing"),
        (("--rank", "2", "--remainder", "refuse"), "have no low-rank site"),
    ],
)
def test_extract_refuses(checkpoints, tmp_path, capfd, flags, word):
    assert extract(checkpoints, "one", tmp_path / "a", *flags) == 2
    assert word in capfd.readouterr().err
    assert not (tmp_path / "a").exists()


def test_extract_refuses_the_base_itself_and_places(checkpoints, tmp_path, capfd):
    assert extract(checkpoints, "base", tmp_path / "a", "--rank", "2") == 2
    assert "nothing to extract" in capfd.readouterr().err
    (tmp_path / "file").write_text("x")
    assert extract(checkpoints, "one", tmp_path / "file", "--rank", "2") == 2
    assert "is a file" in capfd.readouterr().err
    assert extract(checkpoints, "gone", tmp_path / "a", "--rank", "2") == 2


def test_compare_prints_a_summary_first(adapters, capfd):
    assert main(["compare", *adapters]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("first")
    text = "\n".join(lines)
    for word in ("cosine", "φ right", "chance", "only first", "lm_head", "model.layers.1"):
        assert word in text
    assert "only second" not in text
    assert main(["compare", *adapters, "--layers"]) == 0
    assert "model.layers.1.mlp.up_proj" in capfd.readouterr().out


def test_compare_json(adapters, capfd):
    assert main(["compare", adapters[0], adapters[0], "--json"]) == 0
    same = json.loads(capfd.readouterr().out)
    assert same["cosine"] == pytest.approx(1.0)
    assert same["similarity"] == pytest.approx({"right": 1.0, "left": 1.0})
    assert main(["compare", *adapters, "--json", "--of", "factors"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert abs(found["cosine"]) < 0.2  # two random changes
    assert len(found["sites"]) == 4
    assert len(found["only_first"]) == 12
    assert len(found["sites"][0]["phi_right"]) == 4
    assert 0 < found["similarity"]["right"] < 1


def test_compare_refuses(adapters, tmp_path, capfd):
    assert main(["compare", adapters[0], str(tmp_path / "none")]) == 2
    pytest.importorskip("matplotlib")
    assert main(["compare", *adapters, "--plot", str(tmp_path / "x.txt")]) == 2
    assert ".png, .svg, .pdf" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "start"),
    [
        (".png", b"\x89PNG"),
        pytest.param(".svg", b"<?xml", marks=pytest.mark.slow),
        pytest.param(".pdf", b"%PDF", marks=pytest.mark.slow),
    ],
)
def test_compare_plots(adapters, tmp_path, suffix, start):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"x{suffix}"
    assert main(["compare", *adapters, "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(start)
