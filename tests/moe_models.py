"""Tiny mixtures of experts of the three layouts that transformers 5 stores."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

_COMMON: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


def mixtral(**changes: Any) -> nn.Module:
    """[E, 2·inner, d] and [E, d, inner]."""
    config = {**_COMMON, "intermediate_size": 24, "num_local_experts": 4, **changes}
    return _made(transformers.MixtralForCausalLM, transformers.MixtralConfig(**config))


def qwen3_moe(**changes: Any) -> nn.Module:
    """The first layer is dense, with modules that are called as the experts' parameters are."""
    config = {
        **_COMMON, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 4,
        "mlp_only_layers": [0], "norm_topk_prob": True, "head_dim": 8, **changes,
    }  # fmt: skip
    return _made(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**config))


def gpt_oss(**changes: Any) -> nn.Module:
    """[E, d, 2·inner] and [E, inner, d], gate and up alternating, with biases."""
    config = {
        **_COMMON, "intermediate_size": 24, "num_local_experts": 4, "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, **changes,
    }  # fmt: skip
    return _made(transformers.GptOssForCausalLM, transformers.GptOssConfig(**config))


def _made(kind: Any, config: Any) -> nn.Module:
    """A model whose every weight is drawn: experts and routers of a new one may be zero."""
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                scale = 0.5 if "gate.weight" in name or "router.weight" in name else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


FAMILIES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
