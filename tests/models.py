"""Tiny randomly initialised models of every architecture that the tests use."""

from __future__ import annotations

import torch
import transformers
from torch import nn


def llama(**changes) -> nn.Module:
    config = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config.update(changes)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def bert_classifier() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


class ConvNet(nn.Module):
    """Convolutions of one to three dimensions, grouped, dilated and padded in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3, padding=1, groups=2)
        self.two = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2)
        self.three = nn.Conv3d(1, 4, (1, 2, 3), padding="same", padding_mode="circular")
        self.out = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, 4, L] → [N, 5]."""
        h = self.one(x)
        h = self.two(h.unsqueeze(-1).expand(-1, -1, -1, 6))
        h = self.three(h.unsqueeze(1))
        return self.out(h.mean(dim=(2, 3, 4)))


def randomize(handle, scale: float = 0.2, seed: int = 1) -> None:
    """Give every attached adapter values whose delta is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in handle.names:
            for p in handle.parameters(name):
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
