"""A tiny base with a tokenizer of its own, and a task that it can learn, as files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(50)]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def write_base(folder: Path, *, seed: int = 0, width: int = 16) -> Path:
    """A Llama of two layers with random weights, and a tokenizer of 54 words."""
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(number: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of unequal length, and the same words reversed; every prompt occurs once."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < number:
        words = draw.choices(WORDS[:8], k=draw.randint(2, 9))
        found.setdefault(" ".join(words), " " + " ".join(reversed(words)))
    return [{"prompt": prompt, "completion": answer} for prompt, answer in found.items()]


def write_rows(path: Path, content: list[dict[str, str]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path
