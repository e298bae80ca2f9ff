"""Tiny models built from configs, and what PEFT is told to adapt on each.

No weights are downloaded. Every case is a model that the real PEFT trains in the field.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .. import moe_models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


@dataclass(frozen=True)
class Case:
    """A model, a PEFT config for it, and an input."""

    model: Callable[[], nn.Module]
    config: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    warns: tuple[str, ...] = field(default=())
    """Beginnings of warnings that PEFT gives for such a model whatever the file holds."""


def ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(2 * 7).reshape(2, 7) % 29 + 1}


def _text(**more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {**sizes, "intermediate_size": 24, "max_position_embeddings": 32, **tokens, **more}


def llama(**more: Any) -> nn.Module:
    config = transformers.LlamaConfig(**_text(num_key_value_heads=1, **more))
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(**_text(num_labels=3))
    return transformers.BertForSequenceClassification(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**_text(num_labels=3))
    return transformers.RobertaForSequenceClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


class ConvNet(nn.Module):
    """Convolutions in one, two and three dimensions, with groups, stride and padding.

    Dilation and other paddings than zeros are left out: PEFT's A ignores both, so that its own
    forward fails or differs from the layer that it adapts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.one = nn.Conv1d(8, 12, 3, padding=1, groups=4)
        self.two = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 8, (3, 1), groups=2, padding=(1, 0))
        self.three = nn.Conv3d(2, 4, 2)
        self.head = nn.Linear(12 + 8 + 4, 3)

    def forward(self, x: torch.Tensor, image: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
        text = self.one(self.embed(x).transpose(1, 2)).mean(-1)
        flat = self.grouped(self.two(image).relu()).mean((-1, -2))
        deep = self.three(volume).mean((-1, -2, -3))
        return self.head(torch.cat([text, flat, deep], -1))


class Conv1dNet(nn.Module):
    """One ungrouped convolution over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.conv = nn.Conv1d(8, 6, 3, stride=2, padding=1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.conv(self.embed(input_ids).transpose(1, 2)).mean(-1)


def conv_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.arange(10).reshape(2, 5),
        "image": torch.randn(2, 3, 16, 8, generator=generator),
        "volume": torch.randn(2, 2, 4, 4, 4, generator=generator),
    }


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def _pairs() -> dict[str, torch.Tensor]:
    return {**ids(), "decoder_input_ids": ids()["input_ids"][:, :4]}


GROUPS = "LoRA adapter added to ConvNd layer with groups > 1"

CASES = {
    "llama": Case(llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, ids),
    "llama, patterns, rsLoRA": Case(
        llama,
        {
            "target_modules": ["q_proj", "down_proj", "k_proj"],
            "use_rslora": True,
            "r": 6,
            "lora_alpha": 5,
            "rank_pattern": {"k_proj": 3, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 1.7},
        },
        ids,
    ),
    "llama, expression": Case(
        llama,
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["layers.0.mlp"]},
        ids,
    ),
    "llama, one layer": Case(
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
            "lora_alpha": 32,
        },
        ids,
    ),
    "llama, embedding": Case(
        llama, {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "lora_alpha": 3}, ids
    ),
    "llama, tied embedding": Case(
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "o_proj"]},
        ids,
        warns=("Model has `tie_word_embeddings=True`",),
    ),
    "llama, embedding saved": Case(
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, ids
    ),
    "gpt2": Case(
        gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, ids
    ),
    "gpt2, biases": Case(
        gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all", "lora_bias": True},
        ids,
    ),
    "t5": Case(t5, {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}, _pairs),
    "bert, head": Case(bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, ids),
    "bert, head, all biases": Case(
        bert,
        {
            "target_modules": ["query", "value", "word_embeddings"],
            "task_type": "SEQ_CLS",
            "bias": "all",
        },
        ids,
    ),
    "bert, their biases": Case(
        bert, {"target_modules": ["query", "dense"], "bias": "lora_only", "lora_bias": True}, ids
    ),
    "roberta, nested head, norms": Case(
        roberta,
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["LayerNorm"]},
        ids,
    ),
    "vit": Case(
        vit,
        {"target_modules": ["q_proj", "fc1", "projection"], "modules_to_save": ["classifier"]},
        _pixels,
    ),
    "conv": Case(
        ConvNet,
        {
            "target_modules": ["one", "two", "grouped", "three", "embed"],
            "modules_to_save": ["head"],
        },
        conv_inputs,
        warns=(GROUPS,),
    ),
    "llama, DoRA": Case(
        llama,
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": True},
        ids,
    ),
    "llama, DoRA, embedding, patterns, rsLoRA": Case(
        llama,
        {
            "target_modules": ["embed_tokens", "q_proj", "down_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 3},
        },
        ids,
    ),
    "gpt2, DoRA, biases": Case(
        gpt2,
        {
            "target_modules": ["c_attn", "c_fc"],
            "fan_in_fan_out": True,
            "use_dora": True,
            "bias": "lora_only",
        },
        ids,
    ),
    "bert, DoRA, head": Case(
        bert,
        {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "use_dora": True},
        ids,
    ),
    # grouped convolutions are left out: PEFT takes the lengths of another product there
    "conv, DoRA": Case(
        ConvNet,
        {
            "target_modules": ["two", "three", "embed"],
            "use_dora": True,
            "modules_to_save": ["head"],
        },
        conv_inputs,
    ),
    "conv 1, DoRA": Case(Conv1dNet, {"target_modules": ["conv", "embed"], "use_dora": True}, ids),
    "conv, biases": Case(
        ConvNet,
        {"target_modules": ["one", "two", "three"], "lora_bias": True, "bias": "lora_only"},
        conv_inputs,
        warns=(GROUPS,),
    ),
}

#: routers and fused experts, which PEFT adapts as parameters
EXPERT_CASES: dict[str, Case] = {
    "mixtral, experts, router": Case(
        moe_models.mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        },
        ids,
    ),
    # whose first layer is dense: its modules are called as the other's parameters are
    "qwen3 moe, bare names, patterns, rsLoRA": Case(
        moe_models.qwen3_moe,
        {
            "target_modules": [],
            "target_parameters": ["gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
            "use_rslora": True,
            "rank_pattern": {"experts.down_proj": 3, "gate.weight": 2},
            "alpha_pattern": {".*gate_up_proj": 5},
        },
        ids,
        # it looks for patterns among modules alone, says so, and uses them all the same
        warns=("The following (rank|alpha)_pattern keys did not match",),
    ),
    "gpt-oss, transposed experts, router": Case(
        moe_models.gpt_oss,
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["gate_up_proj", "down_proj", "router.weight"],
        },
        ids,
    ),
    "mixtral, down_proj alone in one layer": Case(
        moe_models.mixtral,
        {"target_modules": [], "target_parameters": ["model.layers.1.mlp.experts.down_proj"]},
        ids,
    ),
}


def build(case: Case, seed: int = 0) -> nn.Module:
    """The case's model; the same for the same seed."""
    torch.manual_seed(seed)
    return case.model().eval()


def train_with_peft(case: Case, folder: Path, seed: int = 0) -> nn.Module:
    """A model adapted by PEFT with random values in all that it would train, and saved."""
    # a copy, because PEFT extends the list of modules to save
    config = peft.LoraConfig(**copy.deepcopy({"r": 4, "lora_alpha": 8, **case.config}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(case), config)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model.eval()


def load_with_peft(case: Case, folder: Path) -> nn.Module:
    """PEFT's own loading of a folder; a warning is an error.

    Args:
        case: its ``warns`` are let through: they are about the model, not about the file.
    """
    model = build(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers 5 deprecates a property that PEFT reads on every model
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
        for text in case.warns:
            warnings.filterwarnings("ignore", text)
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def logits(model: nn.Module, case: Case) -> torch.Tensor:
    with torch.no_grad():
        out = model(**case.inputs())
    return out if isinstance(out, torch.Tensor) else out.logits
