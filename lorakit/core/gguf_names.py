"""llama.cpp's names of a language model's modules, and the order in which it keeps their rows.

What a GGUF model and a GGUF adapter need to know alike: transformers' module path ↔ the tensor's
name without its suffix (``model.layers.3.self_attn.q_proj`` ↔ ``blk.3.attn_q``), and which
projections have their rows in another order. Pure tables; no library and no file is needed.

The order: where transformers rotates the halves of a head (features i and i + d/2 form a pair),
llama.cpp's ``llama`` architecture rotates neighbours (2i and 2i + 1), so the rows of its query and
key projections are interleaved, head by head: llama.cpp's ``LlamaModel.permute``. Every other
architecture below rotates halves in llama.cpp too and keeps its rows.

Source of the names: ``gguf.tensor_mapping`` of llama.cpp. The tests compare with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: transformers' ``model_type`` → llama.cpp's architecture. These share the module names below.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
}

#: in a block: transformers' path behind ``model.layers.N.`` → llama.cpp's behind ``blk.N.``
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
#: outside the blocks
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_BLOCK_BACK = {ours: theirs for theirs, ours in _BLOCK.items()}
_WHOLE_BACK = {ours: theirs for theirs, ours in _WHOLE.items()}

#: llama.cpp's architectures that rotate neighbours, and whose query and key rows are interleaved
_INTERLEAVED = {"llama"}
#: those whose norms multiply by (1 + weight) in transformers and by the weight in llama.cpp
_NORMS_PLUS_ONE = {"gemma"}


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """llama.cpp's architecture for a ``config.json``; ``None`` where its names are not known here.

    A key ``model_type`` alone is enough.
    """
    return ARCHITECTURES.get(str(config.get("model_type")))


def gguf_name(path: str) -> str | None:
    """``"model.layers.3.mlp.up_proj"`` → ``"blk.3.ffn_up"``; ``None`` if llama.cpp has no name."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if match is None:
        return _WHOLE.get(path)
    ours = _BLOCK.get(match[2])
    return None if ours is None else f"blk.{match[1]}.{ours}"


def module_path(name: str) -> str | None:
    """The inverse of :func:`gguf_name`: ``"blk.3.ffn_up"`` → ``"model.layers.3.mlp.up_proj"``."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match is None:
        return _WHOLE_BACK.get(name)
    theirs = _BLOCK_BACK.get(match[2])
    return None if theirs is None else f"model.layers.{match[1]}.{theirs}"


def interleaved_heads(architecture: str, name: str, num_heads: int, num_kv_heads: int) -> int:
    """Heads by which the rows of a module are interleaved; 0 where they keep their order.

    Args:
        architecture: llama.cpp's name, such as ``"llama"``.
        name: llama.cpp's name of the module, with or without ``.weight`` or ``.bias``.
        num_heads: query heads of the model (``num_attention_heads``, ``attention.head_count``).
        num_kv_heads: key heads (``num_key_value_heads``, ``attention.head_count_kv``).
    """
    if architecture not in _INTERLEAVED:
        return 0
    kind = re.fullmatch(r"blk\.\d+\.attn_([qk])(?:\.(?:weight|bias))?", name)
    if kind is None:
        return 0
    return num_heads if kind[1] == "q" else num_kv_heads


def norm_offset(architecture: str, name: str) -> float:
    """What llama.cpp's tensor has more than transformers' parameter: 1 in norms of Gemma."""
    is_norm = name.removesuffix(".weight").endswith("_norm")
    return 1.0 if is_norm and architecture in _NORMS_PLUS_ONE else 0.0


def row_order(num_rows: int, num_heads: int) -> Tensor:
    """Row i of llama.cpp's tensor is row ``order[i]`` of transformers'; int64 [num_rows].

    Args:
        num_rows: of the weight, the bias, or the adapter's B.
        num_heads: from :func:`interleaved_heads`; 0 keeps the order.

    Raises:
        ValueError: the rows do not split into heads of an even size.
    """
    rows = torch.arange(num_rows)
    if num_heads == 0:
        return rows
    if num_heads < 0 or num_rows % (2 * num_heads):
        raise ValueError(f"{num_rows} rows do not split into {num_heads} heads of an even size")
    return rows.view(num_heads, 2, -1).transpose(1, 2).reshape(-1)


def to_gguf_rows(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows ``[out, …]`` from transformers' order to llama.cpp's; itself where none changes."""
    return tensor[row_order(tensor.shape[0], num_heads)] if num_heads else tensor


def from_gguf_rows(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`to_gguf_rows`."""
    return tensor[row_order(tensor.shape[0], num_heads).argsort()] if num_heads else tensor
