"""`lorakit merge --to gguf`: flags, the printed facts, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from lorakit import save_adapter
from lorakit.cli.main import main
from tests.bases import tiny
from tests.workflows import gguf_cases


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    # with every token of the vocabulary in the embedding, so that any text can be read
    tiny.write_gguf(tmp_path / "base.gguf")
    save_adapter(gguf_cases.adapter(tiny.llama()), tmp_path / "mine")
    return tmp_path


def _merge(place: Path, *flags: str) -> int:
    base = ["merge", "--base", str(place / "base.gguf"), "--adapter", f"{place / 'mine'}=0.5"]
    return main([*base, "--to", "gguf", "--out", str(place / "out" / "model.gguf"), *flags])


def test_facts_as_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _merge(place, "--quantize", "q8_0", "--json") == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["adapters"] == [{"name": "mine", "weight": 0.5}]
    assert facts["num_changed"] == 14
    assert facts["by_type"]["Q8_0"]["num_tensors"] == 15
    assert facts["checked"]["num_tensors"] == 14
    # two models of random weights: the file's perplexity is that of base + adapter, nearly
    text = facts["text"]
    assert text["perplexity_merged"] == pytest.approx(text["perplexity_adapter"], rel=0.02)
    assert text["largest_logit_difference"] < 0.5
    assert "does not say which base" in err
    assert [f.name for f in (place / "out").iterdir()] == ["model.gguf"]
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(place / "out" / "model.gguf").tensors}
    assert kinds == {"Q8_0", "F32"}


def test_lines_for_a_person(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _merge(place, "--no-verify") == 0
    out = capsys.readouterr().out
    assert "changed   14 tensors; 6 copied as they were" in out
    assert "rows in float64" in out
    assert "on text" not in out


def test_flags_that_cannot_act(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _merge(place, "--dtype", "float16", "--untie", "--in-memory") == 2
    err = capsys.readouterr().err
    assert "--dtype: here it is --quantize" in err
    assert "--untie" in err
    assert "--in-memory" in err
    assert _merge(place, "--quantize", "q4_k_m") == 2
    assert "llama-quantize" in capsys.readouterr().err
    base, adapter = str(place / "base.gguf"), str(place / "mine")
    flags = ["--out", str(place / "folder"), "--quantize", "q8_0"]
    assert main(["merge", "--base", base, "--adapter", adapter, *flags]) == 2
    assert "--to gguf" in capsys.readouterr().err
    assert not (place / "out").exists()
    assert not (place / "folder").exists()
