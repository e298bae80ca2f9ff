"""Prefixes, biases and norms in PEFT's folder: read there with equal logits, or refused there."""

from __future__ import annotations

import dataclasses
import logging
import warnings

import peft
import pytest
import torch
import transformers
from peft import PeftModel

from lorakit import LoRASpec, attach, load_adapter, save_adapter
from lorakit.bases.identity import identify
from lorakit.errors import FormatError
from tests.models import gpt2, llama, randomize

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

IDS = torch.tensor([[5, 9, 40, 7, 8, 3], [1, 2, 3, 4, 5, 6]])


def qwen2(**changes):
    """Its attention has biases."""
    config = transformers.Qwen2Config(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **changes,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()


def trained(make, spec, folder):
    """Our logits with an adapter of these settings, which is saved; and a bare copy."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    bare = make()
    bare.load_state_dict(model.state_dict())
    handle = attach(model, spec, "a")
    randomize(handle)
    adapter = handle.snapshot("a").with_(task_type="CAUSAL_LM")
    save_adapter(adapter, folder)
    with torch.no_grad():
        return model(IDS).logits, bare, adapter


def close(mine, theirs):
    # two float32 forwards that sum in different orders
    assert float((mine - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("make", [llama, gpt2, qwen2])
def test_a_prefix_alone_is_pefts(make, tmp_path):
    mine, bare, adapter = trained(make, LoRASpec(targets="none", prefix=3), tmp_path)
    with torch.no_grad():
        without = bare(IDS).logits
    theirs = PeftModel.from_pretrained(bare, tmp_path)
    with torch.no_grad():
        close(mine, theirs(IDS).logits)
    assert float((mine - without).abs().max()) > 1e-3
    again = load_adapter(tmp_path)
    assert again.spec == adapter.spec
    assert again.sites.keys() == adapter.sites.keys()
    for path, site in adapter.prefixes.items():
        assert torch.equal(again.prefixes[path].key, site.key)
        assert torch.equal(again.prefixes[path].value, site.value)


def test_a_prefix_without_a_task_acts_in_peft(tmp_path):
    """Without one PEFT's model runs the base as if there were none."""
    mine, bare, adapter = trained(llama, LoRASpec(targets="none", prefix=3), tmp_path / "a")
    save_adapter(adapter.with_(task_type=None), tmp_path / "b")
    theirs = PeftModel.from_pretrained(bare, tmp_path / "b")
    with torch.no_grad():
        close(mine, theirs(IDS).logits)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_pefts_own_folder_is_read(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    bare = make()
    bare.load_state_dict(model.state_dict())
    theirs = peft.get_peft_model(
        model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.eval()
    adapter = load_adapter(tmp_path / "theirs")
    assert (adapter.num_virtual_tokens, len(adapter.prefixes)) == (4, 2)
    attach(bare, adapter, "a")
    with torch.no_grad():
        close(bare(IDS).logits, theirs(IDS).logits)
    # and written again it is still theirs
    save_adapter(adapter, tmp_path / "again")
    assert load_adapter(tmp_path / "again").sites.keys() == adapter.sites.keys()


def test_lora_and_prefix_are_one_folder_which_peft_refuses(tmp_path):
    spec = LoRASpec(rank=2, prefix=3, norms=True)
    mine, bare, adapter = trained(llama, spec, tmp_path / "a")
    with pytest.raises((KeyError, ValueError), match="LORA_AND_PREFIX"):
        PeftModel.from_pretrained(bare, tmp_path / "a")
    again = load_adapter(tmp_path / "a")
    assert again.spec == adapter.spec
    handle = attach(bare, again, "a")
    with torch.no_grad():
        assert torch.equal(bare(IDS).logits, mine)
    save_adapter(handle.snapshot("a"), tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (qwen2, LoRASpec(rank=2, bias="all")),
        (qwen2, LoRASpec(rank=2, bias="lora", targets=("q_proj", "o_proj"))),
        (llama, LoRASpec(rank=2, bias="new")),
        (llama, LoRASpec(rank=2, norms=True)),
        (gpt2, LoRASpec(rank=2, norms=True, targets=("c_attn",))),
    ],
    ids=["bias-all", "bias-lora", "bias-new", "norms", "layer-norms"],
)
def test_biases_and_norms_beside_lora_are_pefts(make, spec, tmp_path):
    mine, bare, adapter = trained(make, spec, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*lora_bias=True. was passed"
        )  # merging, which we refuse
        theirs = PeftModel.from_pretrained(bare, tmp_path).eval()
    with torch.no_grad():
        close(mine, theirs(IDS).logits)
    assert load_adapter(tmp_path).spec == adapter.spec


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (qwen2, LoRASpec(targets="none", bias="all")),
        (llama, LoRASpec(targets="none", bias="new")),
        (llama, LoRASpec(targets="none", norms=True)),
        (llama, LoRASpec(targets="none", bias="new", norms=True, prefix=2)),
    ],
    ids=["biases", "new-biases", "norms", "all-but-lora"],
)
def test_alone_they_come_back(make, spec, tmp_path, caplog):
    mine, bare, adapter = trained(make, spec, tmp_path)
    again = load_adapter(tmp_path)
    assert again.spec == adapter.spec
    attach(bare, again, "a")
    with torch.no_grad():
        assert torch.equal(bare(IDS).logits, mine)


def test_a_new_bias_that_peft_would_pass_over_is_said(tmp_path, caplog):
    spec = LoRASpec(rank=2, targets=("q_proj",), bias="new")
    *_, adapter = trained(llama, spec, tmp_path / "a")
    base = identify(llama(), "base")
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        save_adapter(adapter.with_(base=base), tmp_path / "b")
    assert "PEFT has no place" in caplog.text
    caplog.clear()
    assert adapter.base is None  # the spec says it alone
    save_adapter(adapter, tmp_path / "c")
    assert "PEFT has no place" in caplog.text
    caplog.clear()
    old = adapter.with_(spec=dataclasses.replace(adapter.spec, bias="all"))
    save_adapter(old, tmp_path / "d")
    assert not caplog.text


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_layers": 3}, "has shape"),
        ({"num_virtual_tokens": "4"}, "whole number"),
        ({"num_transformer_submodules": 2}, "encoder-decoders"),
        ({"token_dim": 0}, "whole number"),
        ({"num_attention_heads": 3}, "in 3 heads"),
    ],
)
def test_damaged_prefixes_are_named(change, what, tmp_path):
    import json

    trained(llama, LoRASpec(targets="none", prefix=3), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=what):
        load_adapter(tmp_path)
