"""Whole models as GGUF for llama.cpp: SmolLM2 with an adapter merged in, and tiny models.

What they must give is transformers' and PEFT's, in float32. Of the quantised file it is what
transformers makes of the same file: what quantising costs is not llama.cpp's doing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import torch

from lorakit.bases.gguf_cache import dequantised
from lorakit.bases.source import find_source
from lorakit.formats import load_adapter
from lorakit.workflows.merge.gguf import merge_to_gguf
from tests.interop.runtimes.cases import Work
from tests.workflows import gguf_cases

torch.set_num_threads(1)
work = Work("llama_cpp_model")


def logits(model: object, ids: list[int]) -> np.ndarray:
    """[T, V]"""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()  # type: ignore


def unpermuted(source: Path, out: Path) -> None:
    """The same file with q and k in transformers' order of rows: (half, 2) → (2, half)."""
    shutil.copy(source, out)
    reader = gguf.GGUFReader(out, "r+")
    for tensor in reader.tensors:
        for name, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
            if tensor.name.endswith(f"{name}.weight"):
                heads = reader.fields[f"llama.attention.{key}"].contents()
                rows = np.array(tensor.data).reshape(heads, -1, 2, tensor.data.shape[-1])
                tensor.data[:] = rows.swapaxes(1, 2).reshape(tensor.data.shape)
    reader.data.flush()


def smollm2() -> None:
    """The large files."""
    plain = load_adapter(work.adapter("plain"))
    merge_to_gguf(work.gguf, [(plain, 1.0)], work.own / "from_gguf.gguf")
    unpermuted(work.own / "from_gguf.gguf", work.own / "unpermuted.gguf")
    merge_to_gguf(work.base, [(plain, 1.0)], work.own / "from_folder.gguf")
    for case in ("embedding", "dora"):
        one = load_adapter(work.adapter(case))
        merge_to_gguf(work.gguf, [(one, 1.0)], work.own / f"{case}.gguf")
    shutil.copy(find_source("smollm2").location, work.own / "original.gguf")
    for kind in ("q8_0", "q4_0"):
        path = work.own / f"{kind}.gguf"
        merge_to_gguf("smollm2", [(plain, 1.0)], path, quantize=kind)
        np.save(work.own / f"{kind}.npy", logits(dequantised(path), work.prompt))


def tiny() -> None:
    """A model of each kind, with its adapter merged in and every text's tokens and logits."""
    for name, case in gguf_cases.CASES.items():
        folder = work.own / "folders" / name
        made = gguf_cases.write_folder(folder, case)
        changes = gguf_cases.adapter(made)
        merge_to_gguf(folder, [(changes, 1.0)], work.own / f"tiny_{name}.gguf")
        gguf_cases.merged(made, changes)
        tokenizer = gguf_cases.tokenizer(case)
        found = {}
        for number, text in enumerate(gguf_cases.TEXTS):
            ids = tokenizer(text)["input_ids"]
            found[f"ids_{number}"] = np.array(ids)
            found[f"logits_{number}"] = logits(made, ids)
            found[f"text_{number}"] = np.array(text)
        np.savez(work.own / f"tiny_{name}.npz", **found)
    right = (work.own / "tiny_qwen2.gguf").read_bytes()
    rule = b"tokenizer.ggml.pre\x08\0\0\0\x05\0\0\0\0\0\0\0"
    wrong = right.replace(rule + b"qwen2", rule + b"gpt-2")
    assert wrong != right
    (work.own / "wrong_rule.gguf").write_bytes(wrong)


if __name__ == "__main__":
    tiny()
    smollm2()
