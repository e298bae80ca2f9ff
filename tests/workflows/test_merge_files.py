"""Merged files: the bits of a model merged in memory, the layout of the base, whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import transformers

from lorakit import Adapter, LoRASpec, attach, merge, save_adapter
from lorakit.core.checkpoint import open_checkpoint
from lorakit.core.safetensors_io import read_safetensors, write_safetensors
from lorakit.core.sites import LowRank, Replace
from lorakit.errors import BaseError, FormatError, InputError, TrainingError
from lorakit.workflows.merge import files as module
from lorakit.workflows.merge.files import merge_files
from lorakit.workflows.merge.memory import merge_in_memory
from tests import models
from tests.bases import tiny


def adapter_for(model, targets="all-linear", seed=1):
    handle = attach(model, LoRASpec(rank=4, alpha=8, targets=targets), seed=seed)
    models.randomize(handle, seed=seed)
    adapter = handle.snapshot().with_(base=None)
    handle.detach()
    return adapter


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def load(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def equal(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("shard_size", ["10GB", "20kB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_hold_the_bits_of_a_merged_model(tmp_path, dtype, shard_size):
    model = models.llama().to(dtype)
    base = saved(model, tmp_path / "base", max_shard_size=shard_size)
    pairs = [(adapter_for(models.llama()), 0.7), (adapter_for(models.llama(), ("q_proj",)), -1.5)]
    done = []
    found = merge_files(base, pairs, tmp_path / "out", progress=lambda *at: done.append(at))
    merge(model, pairs, undo=None)
    assert equal(load(tmp_path / "out", dtype), model)
    assert not equal(load(base, dtype), model)
    assert found.num_changed == 14
    assert found.rows_checked == 14 * 8
    assert found.worst_row <= 1
    old, new = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    assert len(old.shards) == (1 if shard_size == "10GB" else len(found.shards))
    assert [s.path.name for s in new.shards] == [s.path.name for s in old.shards]
    for a, b in zip(old.shards, new.shards, strict=True):
        assert a.metadata == b.metadata
        assert {n: (e.dtype, e.shape) for n, e in a.entries.items()} == {
            n: (e.dtype, e.shape) for n, e in b.entries.items()
        }
    if old.index is not None:
        assert json.loads(old.index.read_text()) == json.loads(new.index.read_text())
    total = sum(e.end - e.begin for e in old.entries.values())
    assert done[-1] == (total, total)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {p.name for p in base.iterdir()} | {"lorakit_merge.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert_classifier"])
def test_other_architectures_and_tied_weights(tmp_path, name):
    """Transposed linears, a shared embedding, a prefix; each by its own class."""
    model = getattr(models, name)()
    model.save_pretrained(tmp_path / "base")
    adapter = adapter_for(model)
    merge_files(tmp_path / "base", adapter, tmp_path / "out")
    merge(model, adapter, undo=None)
    assert equal(type(model).from_pretrained(tmp_path / "out"), model)


def test_a_dtype_is_cast_once(tmp_path):
    model = models.llama()
    base = saved(model, tmp_path / "base")
    adapter = adapter_for(models.llama())
    merge_files(base, adapter, tmp_path / "out", dtype=torch.bfloat16)
    merge(model, adapter)
    assert equal(load(tmp_path / "out", torch.bfloat16), model.bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_tied_embeddings(tmp_path):
    model = models.llama(tie_word_embeddings=True)
    base = saved(model, tmp_path / "base")
    sites = {
        "model.embed_tokens": LowRank(torch.randn(2, 100), torch.randn(32, 2), 0.5, "embedding")
    }
    with pytest.raises(FormatError, match="untie"):
        merge_files(base, Adapter(sites), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = merge_files(base, Adapter(sites), tmp_path / "out", untie=True)
    assert any("stored by itself" in note for note in found.notes)
    merge(model, Adapter(sites), untie=True)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        merged = load(tmp_path / "out", torch.float32)
        assert torch.equal(merged(ids).logits, model(ids).logits)
    head = Adapter({"lm_head": LowRank(torch.randn(2, 32), torch.randn(100, 2), 0.5)})
    merge_files(base, head, tmp_path / "head", untie=True)
    old, new = load(base, torch.float32), load(tmp_path / "head", torch.float32)
    assert torch.equal(old.model.embed_tokens.weight, new.model.embed_tokens.weight)
    site = head.sites["lm_head"]
    assert (new.lm_head.weight - old.lm_head.weight - 0.5 * site.B @ site.A).abs().max() < 1e-5


def test_tokenizers_and_heads_travel(tmp_path):
    base = saved(models.llama(), tmp_path / "base")
    new = torch.randn(100, 32)
    template = b"{{ messages }}"
    adapter = Adapter(
        {"lm_head": Replace({"weight": new})}, tokenizer_files={"chat_template.jinja": template}
    )
    merge_files(base, adapter, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", torch.float32).lm_head.weight, new)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == template
    other = adapter.with_(tokenizer_files={"chat_template.jinja": b"x"})
    with pytest.raises(InputError, match="different tokenizer"):
        merge_files(base, [other, adapter_with_template(template)], tmp_path / "two")
    assert not (tmp_path / "two").exists()


def adapter_with_template(template):
    adapter = adapter_for(models.llama(), ("q_proj",))
    return adapter.with_(tokenizer_files={"chat_template.jinja": template})


# --- what is refused, and leaves nothing ---------------------------------------------------------


def nothing_left(folder):
    return sorted(p.name for p in folder.iterdir()) == ["base"]


def test_wrong_rows_are_found(tmp_path, monkeypatch):
    base, adapter = saved(models.llama(), tmp_path / "base"), adapter_for(models.llama())

    def careless(weight, recipe, asked, *, write=True):
        weight.add_(1e-4)
        return torch.tensor(True)

    monkeypatch.setattr(module, "merge_", careless)
    with pytest.raises(TrainingError, match="times the difference that rounding allows"):
        merge_files(base, adapter, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_bad_inputs(tmp_path):
    base, adapter = saved(models.llama().half(), tmp_path / "base"), adapter_for(models.llama())
    path, site = next(iter(adapter.sites.items()))
    cases = [
        (Adapter({path: LowRank(site.A, site.B, 1e7)}), InputError, "NaN or Inf in float16"),
        (Adapter({"model.layers.0.nowhere": site}), FormatError, "not in this model"),
        (Adapter({path: LowRank(site.A[:, 1:], site.B, 1.0)}), FormatError, "A has shape"),
    ]
    for what, error, match in cases:
        with pytest.raises(error, match=match):
            merge_files(base, what, tmp_path / "out")
        assert nothing_left(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        merge_files(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match="in-memory"):
        merge_files(base, adapter, tmp_path / "new")


def test_a_tensor_that_is_not_there(tmp_path):
    base, adapter = saved(models.llama(), tmp_path / "base"), adapter_for(models.llama())
    tensors, metadata = read_safetensors(base / "model.safetensors")
    tensors["model.layers.0.fused"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    write_safetensors(base / "model.safetensors", tensors, metadata)
    with pytest.raises(FormatError, match="in-memory") as caught:
        merge_files(base, adapter, tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.weight: no tensor" in str(caught.value)
    assert nothing_left(tmp_path)


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    base, adapter = saved(models.llama(), tmp_path / "base"), adapter_for(models.llama())

    def interrupted(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(base, adapter, tmp_path / "out", progress=interrupted)
    assert nothing_left(tmp_path)
    (tmp_path / "out").mkdir()  # an empty folder is filled, or stays empty
    with pytest.raises(KeyboardInterrupt):
        merge_files(base, adapter, tmp_path / "out", progress=interrupted)
    assert list((tmp_path / "out").iterdir()) == []
    merge_files(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_process_leaves_no_model(tmp_path, exists):
    base = saved(models.llama(), tmp_path / "base")
    save_adapter(adapter_for(models.llama()), tmp_path / "adapter")
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    code = (
        "import sys, time\n"
        "from lorakit import load_adapter\n"
        "from lorakit.workflows.merge.files import merge_files\n"
        "def wait(done, total):\n"
        "    if done > total // 2: print('half', flush=True); time.sleep(60)\n"
        "merge_files(sys.argv[1], load_adapter(sys.argv[2]), sys.argv[3], progress=wait)\n"
    )
    arguments = [sys.executable, "-c", code, str(base), str(tmp_path / "adapter"), str(out)]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert not (out / "config.json").exists()
    assert exists or not out.exists()
    time.sleep(0.05)  # the system releases a dead process's lock
    found = merge_files(base, adapter_for(models.llama()), out)
    assert found.num_changed == 14
    assert not [p for p in [*tmp_path.iterdir(), *out.iterdir()] if p.name.endswith(".tmp")]


def test_in_memory_gives_the_same(tmp_path):
    base, adapter = saved(models.llama(), tmp_path / "base"), adapter_for(models.llama())
    merge_files(base, adapter, tmp_path / "files")
    merge_in_memory(base, adapter, tmp_path / "memory")
    assert equal(load(tmp_path / "files", torch.float32), load(tmp_path / "memory", torch.float32))


def test_a_quantised_base_becomes_dense(tmp_path):
    pytest.importorskip("bitsandbytes")
    from lorakit.bases import load_base
    from lorakit.bases.stored import packed_modules

    sizes = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    saved(models.llama(**sizes), tmp_path / "dense")
    model = load_base(tmp_path / "dense", device="cpu", dtype="float32", quantize="nf4").model
    saved(model, tmp_path / "base")
    adapter = adapter_for(models.llama(**sizes))
    with pytest.raises(BaseError, match="in-memory"):
        merge_files(tmp_path / "base", adapter, tmp_path / "out")
    found = merge_in_memory(tmp_path / "base", adapter, tmp_path / "out")
    assert any("became dense" in note for note in found.notes)
    merged = load(tmp_path / "out", torch.float32)
    stored = {path: packed.dense(torch.float32) for path, _, packed in packed_modules(model)}
    assert len(stored) == 14
    for path, weight in stored.items():
        site = adapter.sites[path]
        wanted = weight + site.scaling * site.B @ site.A
        assert type(merged.get_submodule(path)) is torch.nn.Linear
        assert (merged.get_submodule(path).weight - wanted).abs().max() < 1e-5


def test_memory_is_a_tensor_and_not_a_model(tmp_path):
    """Of all tensors that are made, the last and the one before are alive at most."""
    model = models.llama(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=1024,
        tie_word_embeddings=False,
    )  # fmt: skip
    base, adapter = tmp_path / "base", adapter_for(model)
    model.save_pretrained(base)
    del model
    made, real = [], module._made

    def counted(*args):
        tensor = real(*args)
        made.append(weakref.ref(tensor))
        assert sum(1 for one in made if one() is not None) <= 2
        return tensor

    patch = pytest.MonkeyPatch()
    with patch.context() as scope:
        scope.setattr(module, "_made", counted)
        merge_files(base, adapter, tmp_path / "out")
    assert len(made) == len(open_checkpoint(base).entries)
