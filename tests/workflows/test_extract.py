"""Extraction from real checkpoints: at full rank, the fine-tuned model's logits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit import attach, load_adapter, save_adapter
from lorakit.bases import load_base
from lorakit.core.sites import LowRank, Replace
from lorakit.errors import BaseError, FormatError, InputError, TargetError
from tests import models


def tuned_from(model, scale=0.02):
    """The model with every weight moved."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return moved


@pytest.fixture(autouse=True)
def _quiet():
    import transformers

    transformers.utils.logging.disable_progress_bar()


def inputs_of(model):
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    given = {"input_ids": torch.randint(2, 100, (1, 9))}
    return given | ({"decoder_input_ids": given["input_ids"]} if hasattr(model, "decoder") else {})


def saved(model, tuned, folder):
    """Both on disk, in other shards."""
    model.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned", max_shard_size="20KB")
    assert len(list((folder / "tuned").glob("*.safetensors"))) > 1
    return folder / "base", folder / "tuned"


MODELS = {
    "llama": models.llama,
    "tied llama": lambda: models.llama(tie_word_embeddings=True),
    "gpt2": models.gpt2,  # transposed linears, tied, biases, position embeddings
    "bert": models.bert_classifier,
    "t5": models.t5,  # a module that only holds what others are tied to
    "vit": models.vit,  # convolution; names in the file are older than the modules'
}


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_gives_the_tuned_logits(name, tmp_path):
    model = MODELS[name]()
    tuned = tuned_from(model)
    base_path, tuned_path = saved(model, tuned, tmp_path)
    adapter = lorakit.extract(base_path, tuned_path, rank="full", remainder="keep")
    assert adapter.provenance["extract"]["error"] < 1e-6
    given = inputs_of(model)
    with torch.no_grad():
        before, wanted = model(**given).logits, tuned(**given).logits
        handle = attach(model, adapter)
        assert not handle_notes(adapter, model)
        after = model(**given).logits
        handle.detach()
        assert float((before - wanted).abs().max()) > 1e-2
        assert float((after - wanted).abs().max()) < 1e-4

        if name != "vit":  # PEFT has no place for its bare parameters
            attach(model, load_adapter(save_adapter(adapter, tmp_path / "out")))
            assert float((model(**given).logits - wanted).abs().max()) < 1e-4


def handle_notes(adapter, model):
    """What is said of an identity, less the name, which a bare model does not have."""
    from lorakit.bases import check_base, identify

    return check_base(adapter, identify(model, adapter.base.name))


@pytest.mark.parametrize("drop", ["layernorm", "bias", "lm_head"])
def test_what_is_left_out_is_missed(drop, tmp_path):
    """The negative of the above: without one kind of site the logits differ."""
    model = models.gpt2() if drop == "bias" else models.llama(tie_word_embeddings=True)
    tuned = tuned_from(model)
    base_path, tuned_path = saved(model, tuned, tmp_path)
    adapter = lorakit.extract(base_path, tuned_path, rank="full", remainder="keep")
    sites = {p: s for p, s in adapter.sites.items() if drop not in p}
    assert 0 < len(sites) < len(adapter.sites)
    given = inputs_of(model)
    with torch.no_grad():
        wanted = tuned(**given).logits
        attach(model, adapter.with_(sites=sites))
        assert float((model(**given).logits - wanted).abs().max()) > 1e-3


def test_convolutions_of_a_given_structure(tmp_path):
    """No config.json: a model tells the groups, which the file cannot."""
    model = models.ConvNet()
    tuned = tuned_from(model, 0.2)
    for name, one in (("b", model), ("t", tuned)):
        save_file(one.state_dict(), tmp_path / f"{name}.safetensors")
    adapter = lorakit.extract(
        tmp_path / "b.safetensors", tmp_path / "t.safetensors",
        rank="full", remainder="keep", model=models.ConvNet(),
    )  # fmt: skip
    x = torch.randn(2, 4, 10)
    with torch.no_grad():
        before, wanted = model(x), tuned(x)
        attach(model, adapter)
        assert float((before - wanted).abs().max()) > 1e-2
        assert float((model(x) - wanted).abs().max()) < 1e-5


def test_structure_guessed_from_names_and_shapes(tmp_path):
    def tensors(seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator)
            for name, shape in {
                "embed_tokens.weight": (11, 4),
                "h.0.attn.c_attn.weight": (4, 12),
                "h.0.attn.c_attn.bias": (12,),
                "stem.weight": (6, 3, 2, 2),
                "depthwise.weight": (6, 1, 2, 2),
                "norm.weight": (4,),
            }.items()
        }

    for name, seed in (("b", 0), ("t", 1)):
        (tmp_path / name).mkdir()
        save_file(tensors(seed), tmp_path / name / "model.safetensors")
    said = []
    adapter = lorakit.extract(tmp_path / "b", tmp_path / "t", rank=2, say=said.append)
    kinds = {path: site.kind for path, site in adapter.low_rank.items()}
    assert kinds == {"embed_tokens": "embedding", "h.0.attn.c_attn": "linear", "stem": "conv"}
    assert adapter.sites["h.0.attn.c_attn"].A.shape == (2, 12)
    assert adapter.base is None
    assert "no config.json" in said[0]
    left = adapter.provenance["extract"]["remainder"]["tensors"]
    assert set(left) == {"h.0.attn.c_attn.bias", "depthwise.weight", "norm.weight"}

    config = json.dumps({"model_type": "gpt2", "architectures": ["NoSuchModel"]})
    for name in ("b", "t"):
        (tmp_path / name / "config.json").write_text(config)
    adapter = lorakit.extract(tmp_path / "b", tmp_path / "t", rank=2, say=said.append)
    assert adapter.sites["h.0.attn.c_attn"].A.shape == (2, 4)
    assert "transformers has no NoSuchModel" in said[-2]


def test_identity_is_that_of_the_loaded_base(tmp_path):
    model = models.llama(num_hidden_layers=3)
    base_path, tuned_path = saved(model, tuned_from(model), tmp_path)
    adapter = lorakit.extract(base_path, tuned_path, rank=2)
    loaded = load_base(base_path, dtype="float32").identity
    assert adapter.base == loaded
    assert len(adapter.base.samples) > 8
    other = models.llama(num_hidden_layers=3)
    with pytest.raises(BaseError, match="sampled weights differ"):
        attach(other, adapter)


def test_names_without_the_inner_models_prefix(tmp_path):
    """The hub's oldest checkpoints were saved from the inner model."""
    model = models.gpt2()
    base_path, tuned_path = saved(model, tuned_from(model), tmp_path)
    file = base_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    adapter = lorakit.extract(base_path, tuned_path, rank=2)
    assert "transformer.h.0.attn.c_attn" in adapter.sites
    assert adapter.base == load_base(base_path, dtype="float32").identity


def test_a_head_that_came_loose(tmp_path):
    """Tied in the base, of its own in the tuned checkpoint."""
    model = models.llama(tie_word_embeddings=True)
    tuned = models.llama(tie_word_embeddings=False)
    tuned.load_state_dict(tuned_from(model).state_dict())
    with torch.no_grad():
        tuned.lm_head.weight.add_(torch.randn_like(tuned.lm_head.weight))
    base_path, tuned_path = saved(model, tuned, tmp_path)
    adapter = lorakit.extract(base_path, tuned_path, rank="full", remainder="keep")
    given = inputs_of(model)
    with torch.no_grad():
        wanted = tuned(**given).logits
        attach(model, adapter)
        assert float((model(**given).logits - wanted).abs().max()) < 1e-4


def test_resized_vocabulary_and_a_new_head_are_listed(tmp_path):
    model = models.llama()
    tuned = tuned_from(model)
    tuned.resize_token_embeddings(104)
    base_path, tuned_path = saved(model, tuned, tmp_path)
    with pytest.raises(FormatError) as error:
        lorakit.extract(base_path, tuned_path, rank=2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert f"{name}: (100, 32) in the base, (104, 32) tuned" in str(error.value)


def test_targets_and_exclude(tmp_path):
    model = models.llama()
    base_path, tuned_path = saved(model, tuned_from(model), tmp_path)
    adapter = lorakit.extract(base_path, tuned_path, rank=2, targets="attention", exclude="o_proj")
    assert {p.rpartition(".")[2] for p in adapter.sites} == {"q_proj", "k_proj", "v_proj"}
    assert adapter.spec.targets == ("k_proj", "q_proj", "v_proj")
    left = adapter.provenance["extract"]["remainder"]["tensors"]
    assert "lm_head.weight" in left
    with pytest.raises(TargetError, match="matches nothing; close: q_proj"):
        lorakit.extract(base_path, tuned_path, rank=2, targets="q_projj")
    with pytest.raises(InputError, match="embed_tokens"):
        lorakit.extract(base_path, tuned_path, rank=2, targets="q_proj", remainder="refuse")


def test_what_did_not_change_gets_no_site(tmp_path):
    model = models.llama()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.add_(0.1)
    base_path, tuned_path = saved(model, tuned, tmp_path)
    adapter = lorakit.extract(base_path, tuned_path, rank=4, remainder="refuse")
    site = adapter.sites["model.layers.0.mlp.up_proj"]
    assert isinstance(site, LowRank)
    assert len(adapter.sites) == 1
    assert adapter.provenance["extract"]["unchanged_tensors"] == 20


def test_dtypes(tmp_path):
    model = models.llama().bfloat16()
    tuned = tuned_from(model.float())
    base_path, tuned_path = saved(model.bfloat16(), tuned, tmp_path)
    adapter = lorakit.extract(base_path, tuned_path, rank=4, dtype=torch.bfloat16)
    assert adapter.dtypes == {torch.bfloat16}
    assert adapter.base.storage == "bfloat16"
    assert all(not isinstance(site, Replace) for site in adapter.sites.values())


def test_the_tokenizer_travels_where_it_changed(tmp_path):
    model = models.llama()
    base_path, tuned_path = saved(model, tuned_from(model), tmp_path)
    (base_path / "tokenizer_config.json").write_text("{}")
    (tuned_path / "tokenizer_config.json").write_text("{}")
    assert not lorakit.extract(base_path, tuned_path, rank=2).tokenizer_files
    (tuned_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    adapter = lorakit.extract(base_path, tuned_path, rank=2)
    assert adapter.tokenizer_files["tokenizer_config.json"] == b'{"chat_template": "x"}'


def test_a_tied_remainder_counts_once(tmp_path):
    model = models.llama(tie_word_embeddings=True)
    base_path, tuned_path = saved(model, tuned_from(model), tmp_path)
    adapter = lorakit.extract(base_path, tuned_path, rank="full", targets="all-linear")
    facts = adapter.provenance["extract"]
    left = facts["remainder"]["tensors"]
    assert left["lm_head.weight"]["tied_to"] == "model.embed_tokens.weight"
    own = sum(t["norm"] ** 2 for t in left.values() if "tied_to" not in t)
    sites = sum(s["norm"] ** 2 for s in facts["sites"].values())
    assert facts["error"] == pytest.approx((own / (own + sites)) ** 0.5, rel=1e-4)
