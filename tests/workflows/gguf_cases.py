"""Tiny models of each kind that is written as GGUF, with a tokenizer of each cutting rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from lorakit.bases.gguf_tokenizer import PROBE
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from tests.bases.tiny import CHAT_TEMPLATE, SPECIAL

#: text in which the rules differ: digits, line breaks, contractions, signs, scripts
TEXTS = (
    PROBE,
    "In 2024, 1234567 people's cats DIDN'T eat...\n\n\n  they'd\tslept  \n x+=1;\r\n\r\n",
    "Ünïcödé straße, Привет мир 12½ — हिन्दी 한국어 \N{ROCKET}\N{ROCKET}!!",
)
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = _LETTERS + r"\p{N}" + _REST
LLAMA3 = _LETTERS + r"\p{N}{1,3}" + _REST


@dataclass(frozen=True)
class Case:
    """A model of two layers and its tokenizer."""

    model_class: str
    rule: str
    """``"gpt-2"``, ``"digits"`` or an expression."""
    whole_words: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("Llama", "digits"),
    "biases": Case(
        "Llama",
        "gpt-2",
        settings={"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama3": Case(
        "Llama",
        LLAMA3,
        whole_words=True,
        settings={
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear": Case(
        "Llama",
        LLAMA3,
        settings={"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": Case("Mistral", "gpt-2", settings={"sliding_window": None, "head_dim": 32}),
    "qwen2": Case("Qwen2", QWEN2),
    # transformers reads a Qwen 3 from a GGUF only with the heads that all published ones have
    "qwen3": Case("Qwen3", QWEN2, settings={"head_dim": 128}),
}


def tokenizer(case: Case) -> Any:
    """A byte-level BPE of 400 tokens that was trained on the texts above."""
    backend = Tokenizer(models.BPE(ignore_merges=case.whole_words))
    if case.rule == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        rule = Regex(case.rule) if case.rule != "digits" else None
        first = (
            pre_tokenizers.Digits(individual_digits=True)
            if rule is None
            else pre_tokenizers.Split(rule, "isolated")
        )
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule is None)
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, last])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(list(TEXTS) * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model(case: Case, seed: int = 0) -> Any:
    """Random weights, large enough that a wrong one shows; no norm is all ones, no bias zero."""
    settings: dict[str, Any] = {
        "vocab_size": 416,  # more rows than tokens, as many published models have
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
    }
    settings.update(case.settings)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{case.model_class}Config")(**settings)
    made = getattr(transformers, f"{case.model_class}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def write_folder(folder: Path, case: Case, **options: Any) -> Any:
    """The case as ``save_pretrained`` writes it; returns the model."""
    made = model(case)
    made.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    tokenizer(case).save_pretrained(folder)
    return made


def adapter(made: Any, *, rank: int = 4, seed: int = 1, only: str = "") -> Adapter:
    """Low-rank changes of every linear of the blocks, large enough to move all logits."""
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for path, module in made.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in path and path.endswith(only):
            A = torch.randn(rank, module.in_features, generator=generator) / 8
            B = torch.randn(module.out_features, rank, generator=generator) / 8
            sites[path] = LowRank(A, B, 1.7)
    return Adapter(sites)


def merged(made: Any, changes: Adapter, weight: float = 1.0) -> Any:
    """The model with ``W + weight · scaling · B A``, computed in float64; changes it."""
    with torch.no_grad():
        for path, site in changes.low_rank.items():
            parameter = made.get_submodule(path).weight
            delta = site.B.double() @ site.A.double() * site.scaling * weight
            parameter.copy_((parameter.double() + delta).to(parameter.dtype))
    return made
