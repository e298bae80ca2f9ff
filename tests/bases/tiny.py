"""Tiny bases as files: a Llama with a byte-level tokenizer, as a folder and as a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
#: one merge of two line breaks, one of two spaces: what the cutting rule of digits decides on
MERGES = ["Ċ Ċ", "Ġ Ġ"]
NUM_HEADS, NUM_KV_HEADS = 4, 2


def vocabulary() -> list[str]:
    """Special tokens, the 256 bytes as GPT-2 writes them, and the merged tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES)]


def llama(seed: int = 0, **changes: Any) -> Any:
    """A Llama of two layers, 32 wide (so that 32-wide GGUF blocks fit), random weights."""
    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,
    }
    settings.update(changes)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    with torch.no_grad():  # norms that are all one would hide a lost weight
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokenizer(**changes: Any) -> Any:
    """The tokenizer that :func:`write_gguf` describes, made without a GGUF."""
    tokens = {token: index for index, token in enumerate(vocabulary())}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    backend = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    settings: dict[str, Any] = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    settings.update(changes)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_folder(folder: Path, model: Any | None = None, **settings: Any) -> Path:
    """A base as ``save_pretrained`` writes it."""
    (model or llama()).save_pretrained(folder)
    tokenizer(**settings).save_pretrained(folder)
    return folder


def _permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows ``[out, in]`` of a rotary projection in llama.cpp's order: pairs beside each other."""
    rows = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _tensors(model: Any) -> dict[str, np.ndarray]:
    """llama.cpp's names → values of a Llama."""
    state = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in _NAMES.items():
            value = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                value = _permuted(value, NUM_HEADS if ours == "attn_q" else NUM_KV_HEADS)
            found[f"blk.{layer}.{ours}.weight"] = value
    return found


def write_gguf(
    path: Path,
    model: Any | None = None,
    *,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre_tokenizer: str = "smollm",
    with_tokenizer: bool = True,
    with_tensors: bool = True,
    extra: dict[str, Any] | None = None,
) -> Path:
    """A GGUF of a Llama, written with the `gguf` package in llama.cpp's layout."""
    model = model or llama()
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(key, value)
    if with_tokenizer:
        tokens = vocabulary()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if t in SPECIAL else 1 for t in tokens])
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHAT_TEMPLATE)
    for name, value in _tensors(model).items() if with_tensors else ():
        if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(value), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """``[len(ids), vocabulary]`` of a model."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]
