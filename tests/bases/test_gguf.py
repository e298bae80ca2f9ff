"""A GGUF becomes a folder once: the same model, whole or not at all, one builder at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
import torch

from lorakit.bases import load_base, load_tokenizer, resolve_base
from lorakit.bases.gguf_cache import cached_base
from lorakit.errors import BaseError
from tests.bases import tiny

IDS = [1, 40, 50, 60, 70, 2]
TEXT = "Line\n\n12 a  3, it's 日本\t\n\n\nx"


def _folders(cache: Path) -> list[Path]:
    return [f for f in (cache / "bases").iterdir() if f.is_dir() and f.name != "hashes"]


def test_the_model_is_the_one_that_was_written(gguf_file: Path) -> None:
    base = load_base(gguf_file, device="cpu")
    original = tiny.llama()
    # rms_norm_eps is kept in float32 by the file, and the rest is copied bit for bit
    torch.testing.assert_close(
        tiny.logits(base.model, IDS), tiny.logits(original, IDS), rtol=0, atol=1e-6
    )
    state = base.model.state_dict()
    for name, value in original.state_dict().items():
        assert torch.equal(state[name], value), name
    assert base.identity.name == "tiny.gguf"
    assert base.identity.storage == "float32"
    assert any("tiny.gguf" in note for note in base.notes)
    assert base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight


def test_the_saved_model_is_an_ordinary_one(gguf_file: Path) -> None:
    folder = Path(resolve_base(gguf_file))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 128
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(tiny.logits(again, IDS), tiny.logits(load_base(folder).model, IDS))


def test_tokenizer_and_chat_template_survive(gguf_file: Path) -> None:
    expected = tiny.tokenizer()
    before = load_tokenizer(gguf_file)  # straight from the GGUF: nothing is dequantised for it
    after = load_base(gguf_file, device="cpu").tokenizer
    cached = load_tokenizer(gguf_file)
    for found in (before, after, cached):
        assert found(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
        assert found.decode(found(TEXT)["input_ids"]) == TEXT
        assert found.chat_template == tiny.CHAT_TEMPLATE
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 2)
        assert found("<|im_start|>")["input_ids"] == [1]
        assert found.model_max_length == 128


def test_an_unknown_cutting_rule_is_said(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "odd.gguf", pre_tokenizer="bloom")
    assert any("'bloom'" in note for note in load_base(path, device="cpu").notes)
    known = tiny.write_gguf(tmp_path / "known.gguf", pre_tokenizer="gpt-2")
    assert not any("cutting rule" in note for note in load_base(known, device="cpu").notes)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_quantised_weights_are_dequantised(tmp_path: Path, kind: str) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    base = load_base(tiny.write_gguf(tmp_path / "q.gguf", kind=quant), device="cpu")
    assert base.identity.storage == {"F16": "float16"}.get(kind, kind)
    assert base.identity.stored == {"model.norm.weight": "float32"}
    weight = tiny.llama().model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, quant), quant)
    found = base.model.model.layers[1].mlp.down_proj.weight
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(expected))


def test_a_scaling_that_cannot_be_taken_over(tmp_path: Path) -> None:
    extra = {"llama.rope.scaling.type": "yarn"}
    path = tiny.write_gguf(tmp_path / "yarn.gguf", extra=extra)
    with pytest.raises(BaseError, match=r"(?s)llama\.rope\.scaling\.type: 'yarn'.*safetensors"):
        load_base(path, device="cpu")
    extra = {"llama.rope.scaling.type": "none"}
    load_base(tiny.write_gguf(tmp_path / "none.gguf", extra=extra), device="cpu")


def test_without_a_tokenizer(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "bare.gguf", with_tokenizer=False)
    base = load_base(path, device="cpu")
    assert base.tokenizer is None
    assert any("tokenizer" in note for note in base.notes)
    with pytest.raises(BaseError, match="no tokenizer"):
        base.require_tokenizer()
    with pytest.raises(BaseError, match="no tokenizer"):
        load_tokenizer(path)


# --- the cache


def test_the_second_time_nothing_is_built(gguf_file: Path, cache: Path) -> None:
    said: list[str] = []
    first = cached_base(gguf_file, said.append)
    assert "dequantising tiny.gguf" in said[0]
    before = {f: f.stat().st_mtime_ns for f in first.folder.iterdir()}
    said.clear()
    assert cached_base(gguf_file, said.append) == first
    assert said == []
    assert {f: f.stat().st_mtime_ns for f in first.folder.iterdir()} == before


def test_the_key_is_the_content(gguf_file: Path, tmp_path: Path, cache: Path) -> None:
    moved = tmp_path / "elsewhere" / gguf_file.name
    moved.parent.mkdir()
    moved.write_bytes(gguf_file.read_bytes())
    first, second = resolve_base(gguf_file), resolve_base(moved)
    assert first == second
    content = bytearray(moved.read_bytes())
    content[-3] ^= 1  # one bit of one weight; the size stays
    moved.write_bytes(content)
    assert resolve_base(moved) != first
    assert len(_folders(cache)) == 2


@pytest.mark.parametrize("damage", ["cut", "lost", "no seal", "broken seal", "same size", "empty"])
def test_a_damaged_folder_is_made_again(gguf_file: Path, damage: str) -> None:
    folder = Path(resolve_base(gguf_file))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(whole[:-100])
    elif damage == "lost":
        (folder / "tokenizer.json").unlink()
    elif damage == "no seal":
        (folder / "lorakit.json").unlink()
    elif damage == "broken seal":
        (folder / "lorakit.json").write_text('{"files": 3')
    elif damage == "same size":
        weights.write_bytes(whole[:-100] + bytes(100))
    else:
        for file in folder.iterdir():
            file.unlink()
    said: list[str] = []
    assert Path(resolve_base(gguf_file, say=said.append)) == folder
    assert said, "it was used although it is damaged"
    assert weights.read_bytes() == whole


#: makes the cache of a GGUF in a process of its own
_BUILD = """
import sys, torch
torch.set_num_threads(1)
import lorakit.bases.gguf_cache as cache
from pathlib import Path
if len(sys.argv) > 2:  # stop inside the build, after the weights were written, until we are killed
    check = cache._check_tokenizer
    def stop(*arguments):
        check(*arguments)
        print("inside", flush=True)
        import time
        time.sleep(60)
    cache._check_tokenizer = stop
found = cache.cached_base(Path(sys.argv[1]), lambda text: print("said:", text, flush=True))
print("done:", found.folder, flush=True)
"""


def _start(gguf_file: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _BUILD, str(gguf_file), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_a_killed_builder_leaves_nothing_and_a_waiting_one_takes_over(
    gguf_file: Path, cache: Path
) -> None:
    killed = _start(gguf_file, "stop")
    assert killed.stdout is not None
    while killed.stdout.readline().strip() != "inside":
        assert killed.poll() is None, killed.stderr and killed.stderr.read()
    assert not [f for f in _folders(cache) if not f.name.startswith(".")]
    waiting = _start(gguf_file)
    assert waiting.stdout is not None
    assert "another process" in waiting.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    out, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, err
    assert "dequantising" in out
    [folder] = _folders(cache)  # what the killed one had half written is gone
    assert f"done: {folder}" in out
    base = load_base(gguf_file, device="cpu")
    assert torch.equal(base.model.model.norm.weight, tiny.llama().model.norm.weight)


@pytest.mark.slow  # two more processes that import everything; the test above covers the lock
def test_two_at_once_build_it_once(gguf_file: Path, cache: Path) -> None:
    both = [_start(gguf_file) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    told = "".join(out for out, _ in outputs)
    assert told.count("said: dequantising") == 1
    assert told.count("done:") == 2
    assert len(_folders(cache)) == 1


def test_the_lock_outlives_nobody(gguf_file: Path, cache: Path) -> None:
    """A lock file that a crash left behind does not block."""
    folder = Path(resolve_base(gguf_file))
    (folder / "lorakit.json").unlink()
    assert (cache / "bases" / f".{folder.name}.lock").exists()
    began = time.monotonic()
    resolve_base(gguf_file)
    assert time.monotonic() - began < 60


# --- files that cannot be used


def _refused(path: Path, *words: str) -> None:
    for load in (load_base, load_tokenizer):
        with pytest.raises(BaseError) as caught:
            load(path)
        for word in (path.name, *words):
            assert word in str(caught.value)


def test_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    _refused(path, "not a GGUF", "Download it again")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    _refused(path, "Git LFS pointer", "git lfs pull")
    path.write_bytes(b"tjgg" + bytes(100))
    _refused(path, "old GGML", "convert")
    path.write_bytes(b"")
    _refused(path, "not a GGUF")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_truncated_gguf(tmp_path: Path, gguf_file: Path, share: float) -> None:
    path = tmp_path / "cut.gguf"
    content = gguf_file.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    _refused(path, "not downloaded completely", "MB are here")


def test_an_architecture_that_transformers_lacks(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "rwkv.gguf", architecture="rwkv7")
    _refused(path, "'rwkv7'", "llama", "safetensors")


def test_other_things_in_a_gguf(tmp_path: Path) -> None:
    lora = tiny.write_gguf(tmp_path / "lora.gguf", extra={"general.type": "adapter"})
    _refused(lora, "is an adapter, not a model")
    part = tiny.write_gguf(tmp_path / "part.gguf", extra={"split.count": 3})
    _refused(part, "one of 3 parts", "llama-gguf-split --merge")
    vision = tiny.write_gguf(tmp_path / "mmproj.gguf", architecture="clip")
    _refused(vision, "image part")
    empty = tiny.write_gguf(tmp_path / "vocab.gguf", with_tensors=False)
    _refused(empty, "holds no weights")


def test_no_room_on_the_disk(gguf_file: Path, cache: Path, monkeypatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(BaseError, match="LORAKIT_CACHE"):
        resolve_base(gguf_file)
    assert _folders(cache) == []


def test_a_cache_that_cannot_be_written(gguf_file: Path, tmp_path: Path, monkeypatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("LORAKIT_CACHE", str(blocked))
    with pytest.raises(ValueError, match="cannot be written"):
        resolve_base(gguf_file)
