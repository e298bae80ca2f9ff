"""A transformers folder of the Llama family as the parts of a GGUF.

Fields as llama.cpp's ``convert_hf_to_gguf.py`` writes them for these architectures; tensors are
read from the checkpoint one at a time, and the rows of query and key projections put into its
order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakit.bases.gguf_base import BaseTensor, GgufBase
from lorakit.bases.gguf_vocabulary import Vocabulary, vocabulary_of
from lorakit.bases.gguf_write import FILE_TYPES, real, text, whole
from lorakit.core.checkpoint import Checkpoint, open_checkpoint
from lorakit.core.gguf_names import (
    ARCHITECTURES,
    architecture_of,
    gguf_name,
    interleaved_heads,
    norm_offset,
    to_gguf_rows,
)
from lorakit.errors import BaseError, collected

_WAY_OUT = (
    "Merge into a folder instead (lorakit merge --out DIR), and convert that with llama.cpp's "
    "convert_hf_to_gguf.py."
)
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def from_folder(folder: Path, name: str, tokenizer: Any) -> GgufBase:
    """The parts of a model folder; weights stay in their files.

    Args:
        name: how the user calls the base.
        tokenizer: transformers' fast tokenizer of this model.

    Raises:
        BaseError: another architecture, a setting or a tokenizer that the file could not express,
            or tensors without a name there. The way out is in the message.
    """
    config = _config(folder)
    architecture = _checked(config, folder)
    checkpoint = open_checkpoint(folder)
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    tensors = _tensors(checkpoint, config, architecture, heads, kv_heads)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise BaseError(f"{folder} holds no model.embed_tokens.weight; it is no whole model.")
    vocabulary = vocabulary_of(tokenizer, embedding.shape[0])
    scaling, factors, notes = _rope(config, architecture, folder)
    if factors is not None:
        tensors["rope_freqs.weight"] = BaseTensor(
            "rope_freqs.weight", factors.shape, "F32", lambda begin, end: factors[None]
        )
    return GgufBase(
        name=name,
        architecture=architecture,
        num_heads=heads,
        num_kv_heads=kv_heads,
        fields=_fields(
            config, architecture, name, embedding.shape[0], vocabulary, scaling, embedding.kind
        ),
        tensors=tensors,
        tokens=vocabulary.tokens,
        notes=(*vocabulary.notes, *notes),
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BaseError(f"{folder}/config.json cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise BaseError(f"{folder}/config.json is no JSON object.")
    return found


def _checked(config: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's architecture, where the model is one that this can write whole."""
    architecture = architecture_of(config)
    if architecture is None:
        raise BaseError(
            f"{folder} is of the model type {config.get('model_type')!r}; written as GGUF here are "
            f"{', '.join(sorted(ARCHITECTURES))}. {_WAY_OUT}"
        )
    problems = [f"{key} is missing" for key in _NEEDED if config.get(key) is None]
    activation = config.get("hidden_act", config.get("hidden_activation", "silu"))
    if activation not in (("gelu", "gelu_pytorch_tanh") if architecture == "gemma" else ("silu",)):
        problems.append(f"hidden_act is {activation!r}, which llama.cpp's {architecture} lacks")
    if config.get("quantization_config"):
        problems.append("its weights are quantised; give the model that they were made of")
    # 4.x wrote a window that `use_sliding_window: false` switches off
    if config.get("use_sliding_window"):
        problems.append("it uses sliding-window attention, which would be lost")
    if problems:
        raise BaseError(
            collected(f"{folder} cannot be written as GGUF", problems) + f"\n{_WAY_OUT}"
        )
    return architecture


# --- fields


def _fields(
    config: Mapping[str, Any],
    architecture: str,
    name: str,
    num_rows: int,
    vocabulary: Vocabulary,
    scaling: Mapping[str, bytes],
    kind: str,
) -> dict[str, bytes]:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    numbers = {
        "block_count": whole(config["num_hidden_layers"]),
        "context_length": whole(config["max_position_embeddings"]),
        "embedding_length": whole(config["hidden_size"]),
        "feed_forward_length": whole(config["intermediate_size"]),
        "attention.head_count": whole(heads),
        "attention.head_count_kv": whole(config.get("num_key_value_heads") or heads),
        "attention.key_length": whole(head_dim),
        "attention.value_length": whole(head_dim),
        "attention.layer_norm_rms_epsilon": real(config["rms_norm_eps"]),
        "rope.dimension_count": whole(head_dim),
        "vocab_size": whole(num_rows),
        **scaling,
    }
    return {
        "general.architecture": text(architecture),
        "general.type": text("model"),
        "general.name": text(name.rpartition("/")[2]),
        "general.file_type": whole(FILE_TYPES[kind.lower()]),
        **{f"{architecture}.{key}": value for key, value in numbers.items()},
        **vocabulary.fields,
        "general.quantization_version": whole(2),
    }


def _rope(
    config: Mapping[str, Any], architecture: str, folder: Path
) -> tuple[dict[str, bytes], np.ndarray | None, list[str]]:
    """Fields of the rotation, the factors of a Llama 3, and what to say.

    transformers 5 keeps all in ``rope_parameters``; before, ``rope_theta`` stood beside
    ``rope_scaling``.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = {"rope.freq_base": real(theta)}
    notes = []
    if config.get("sliding_window") and "use_sliding_window" not in config:
        notes.append(
            f"the model looks back {config['sliding_window']} tokens; llama.cpp's {architecture} "
            "looks back to the beginning, so longer texts differ"
        )
    if kind == "default":
        return fields, None, notes
    if kind == "linear":
        fields["rope.scaling.type"] = text("linear")
        fields["rope.scaling.factor"] = real(float(rope["factor"]))
        return fields, None, notes
    if kind == "llama3":
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        return fields, llama3_factors(rope, theta, head_dim), notes
    raise BaseError(
        f"{folder} scales its rotation by {kind!r}, which is not written here. {_WAY_OUT}"
    )


def llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What llama.cpp divides each frequency by, float32 [head_dim / 2] (Llama 3.1's scaling:
    long waves by the factor, short ones not, those between smoothly)."""
    factor, old = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    found = []
    for i in range(0, head_dim, 2):
        length = 2 * math.pi * theta ** (i / head_dim)
        if length < old / high:
            found.append(1.0)
        elif length > old / low:
            found.append(factor)
        else:
            smooth = (old / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


# --- tensors


def _tensors(
    checkpoint: Checkpoint, config: Mapping[str, Any], architecture: str, heads: int, kv_heads: int
) -> dict[str, BaseTensor]:
    tied = bool(config.get("tie_word_embeddings", False))
    reader = _Reader(checkpoint)
    found: dict[str, BaseTensor] = {}
    problems = []
    for key, entry in checkpoint.entries.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "inv_freq" or (tied and key == "lm_head.weight"):
            continue  # computed, or the embedding once more
        ours = gguf_name(module)
        if ours is None or leaf not in ("weight", "bias"):
            problems.append(f"{key}: llama.cpp's {architecture} has no such tensor")
        elif entry.dtype not in _KINDS:
            problems.append(f"{key}: dtype {entry.dtype}; expected a float of 16 or 32 bits")
        else:
            name = f"{ours}.{leaf}"
            num_heads = interleaved_heads(architecture, name, heads, kv_heads)
            offset = norm_offset(architecture, name)
            found[name] = reader.tensor(key, name, num_heads, offset)
    if problems:
        raise BaseError(
            collected(f"{checkpoint.path} cannot be written as GGUF", problems) + f"\n{_WAY_OUT}"
        )
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, int, str]:
    """Embedding, blocks by number, the rest: the same file whatever the shards' order."""
    block = int(name.split(".")[1]) if name.startswith("blk.") else -1
    place = 0 if name.startswith("token_embd") else 2 if block < 0 else 1
    return place, block, name


class _Reader:
    """Reads tensors of a checkpoint in llama.cpp's order and keeps the last, for rows come in
    blocks and a tensor may be large."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._last: tuple[str, torch.Tensor] | None = None

    def tensor(self, key: str, name: str, num_heads: int, offset: float) -> BaseTensor:
        """One of the checkpoint under llama.cpp's name."""
        entry = self._checkpoint.entries[key]

        def rows(begin: int, end: int) -> np.ndarray:
            block = self._whole(key, num_heads)[begin:end].float()
            return (block + offset if offset else block).numpy()

        kind = _KINDS[entry.dtype] if len(entry.shape) > 1 else "F32"
        return BaseTensor(name, tuple(entry.shape), kind, rows)

    def _whole(self, key: str, num_heads: int) -> torch.Tensor:
        if self._last is None or self._last[0] != key:
            self._last = None  # let it go before the next is there
            value = to_gguf_rows(self._checkpoint.read(key), num_heads)
            self._last = (key, value.reshape(-1, value.shape[-1]))
        return self._last[1]
