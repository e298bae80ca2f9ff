"""The same base is recognised whatever it is stored as; another one is refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from lorakit.bases import check_base, context_length, identify
from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity, compare_identities, storage_error
from lorakit.core.sites import LowRank
from lorakit.errors import BaseError
from tests import models
from tests.bases import tiny


def _adapter(base: BaseIdentity | None) -> Adapter:
    site = LowRank(torch.ones(2, 3), torch.ones(4, 2), scaling=1.0)
    return Adapter({"x": site}, base=base)


def test_what_is_sampled() -> None:
    model = tiny.llama(num_hidden_layers=10)
    identity = identify(model, "tiny")
    paths = list(identity.shapes)
    assert paths[0] == "model.embed_tokens.weight"
    assert paths[-1] == "model.norm.weight"
    linears = [p.removesuffix(".weight") for p in paths[1:-1]]
    assert len(linears) == 8
    # all seven kinds of a Llama's linears, and both ends of its depth
    assert {path.rpartition(".")[2] for path in linears} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    depths = [int(re.search(r"layers\.(\d+)", path)[1]) for path in linears]
    assert min(depths) == 0
    assert max(depths) == 9
    assert depths == sorted(depths)
    assert all(len(values) == 32 for values in identity.samples.values())
    assert identity.architecture == "LlamaForCausalLM"
    assert (identity.storage, identity.stored) == ("float32", {})


def test_samples_are_numbers_of_the_weights() -> None:
    model = tiny.llama()
    identity = identify(model, "tiny")
    for path, values in identity.samples.items():
        weight = set(model.get_parameter(path).detach().numpy().ravel().tolist())
        rounded = {float(np.float32(v)) for v in values}
        assert rounded <= weight, path


def test_it_is_reproducible_and_travels_as_json() -> None:
    first, second = identify(tiny.llama(), "tiny"), identify(tiny.llama(), "tiny")
    assert first == second
    text = json.dumps(first.to_dict(), sort_keys=True)
    assert text == json.dumps(second.to_dict(), sort_keys=True)
    assert BaseIdentity.from_dict(json.loads(text)) == first


@pytest.mark.parametrize(
    "make",
    [models.gpt2, models.t5, models.bert_classifier, models.vit, models.ConvNet, models.llama],
)
def test_every_architecture_has_an_identity(make) -> None:
    torch.manual_seed(0)
    first = make()
    torch.manual_seed(1)
    other = make()
    identity = identify(first, "x")
    assert len(identity.samples) >= 2
    assert compare_identities(identity, identify(first, "x")) == []
    with pytest.raises(BaseError, match="sampled weights differ"):
        compare_identities(identity, identify(other, "x"))


def test_a_new_head_is_not_another_base() -> None:
    model = models.bert_classifier()
    before = identify(model, "x")
    nn.init.normal_(model.classifier.weight)
    assert compare_identities(before, identify(model, "x")) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_allowed_and_said(dtype: torch.dtype) -> None:
    full = identify(tiny.llama(), "tiny")
    other = identify(tiny.llama().to(dtype), "tiny")
    assert other.storage == str(dtype).removeprefix("torch.")
    for first, second in ((full, other), (other, full)):
        [note] = compare_identities(first, second)
        assert first.storage in note
        assert second.storage in note
        assert "differ by up to" in note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fine_tuned_variant_is_refused(dtype: torch.dtype) -> None:
    model = tiny.llama()
    before = identify(model.to(dtype), "tiny")
    with torch.no_grad():  # one kind of linear, by a percent: what a light merge leaves
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(1.01)
    with pytest.raises(BaseError, match=r"v_proj\.weight: sampled weights differ by") as caught:
        compare_identities(before, identify(model, "tiny"))
    assert "--allow-other-base" in str(caught.value)


def test_another_shape_or_class_is_refused() -> None:
    identity = identify(tiny.llama(), "tiny")
    wider = identify(tiny.llama(intermediate_size=96), "wider")
    with pytest.raises(BaseError, match=r"trained on shape \(64, 32\), used on \(96, 32\)"):
        compare_identities(identity, wider)
    gpt2 = identify(models.gpt2(), "gpt2")
    with pytest.raises(BaseError, match="trained on LlamaForCausalLM, used on GPT2LMHeadModel"):
        compare_identities(identity, gpt2)


@pytest.mark.parametrize(
    ("make", "embedding"),
    [
        (models.llama, "model.embed_tokens.weight"),
        (models.gpt2, "transformer.wte.weight"),
        (models.t5, "shared.weight"),
    ],
)
def test_added_tokens_do_not_make_another_base(make, embedding) -> None:
    torch.manual_seed(0)
    model = make()
    before = identify(model, "tiny")
    assert before.embedding == embedding
    model.resize_token_embeddings(300, mean_resizing=False)
    after = identify(model, "tiny")
    assert after.shapes[embedding][0] == 300
    assert compare_identities(before, after) == compare_identities(after, before) == []


def test_another_name_is_said() -> None:
    first, second = identify(tiny.llama(), "owner/tiny"), identify(tiny.llama(), "copy")
    [note] = compare_identities(first, second)
    assert "'owner/tiny'" in note
    assert "'copy'" in note


def test_weights_that_are_not_in_memory_are_skipped() -> None:
    model = tiny.llama()
    full = identify(model, "tiny")
    model.model.layers[0].to("meta")
    part = identify(model, "tiny")
    gone = {p for p in full.samples if "layers.0." in p}
    assert gone
    assert set(part.samples) == set(full.samples) - gone
    assert part.shapes == full.shapes
    assert compare_identities(full, part) == []


def test_attaching_changes_nothing() -> None:
    layers = pytest.importorskip("lorakit.layers")
    from lorakit.core.spec import LoRASpec

    model = tiny.llama()
    before = identify(model, "tiny")
    handle = layers.attach(model, LoRASpec(rank=2, alpha=4, targets="all-linear"))
    assert identify(model, "tiny") == before
    handle.detach()
    assert identify(model, "tiny") == before


def test_tied_weights() -> None:
    tied, untied = tiny.llama(), tiny.llama(tie_word_embeddings=False)
    assert "lm_head.weight" not in identify(tied, "x").shapes
    assert identify(tied, "x").shapes == identify(untied, "x").shapes


# --- how far storing may move a weight


def _drawn(weight: torch.Tensor, stored: torch.Tensor, num_draws: int = 200) -> np.ndarray:
    """Relative L2 differences over 32 numbers, as compare_identities takes them."""
    draw = torch.Generator().manual_seed(0)
    places = torch.randint(weight.numel(), (num_draws, 32), generator=draw)
    first, second = weight.flatten()[places], stored.flatten()[places]
    return ((first - second).norm(dim=1) / first.norm(dim=1)).numpy()


def _weights() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    gauss = torch.randn(128, 512, generator=draw) * 0.03
    heavy = gauss / torch.rand(128, 512, generator=draw).clamp_min(0.05).sqrt()
    return [gauss, heavy]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_bounds_hold_for_gguf(kind: str) -> None:
    import gguf

    quant = gguf.GGMLQuantizationType[kind]
    for weight in _weights():
        packed = gguf.quants.quantize(weight.numpy(), quant)
        stored = torch.from_numpy(gguf.quants.dequantize(packed, quant))
        found = _drawn(weight, stored)
        assert found.max() <= storage_error(kind)
        assert np.median(found) > storage_error(kind) / 10  # it is no wider than it must be


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bounds_hold_for_dtypes(dtype: torch.dtype) -> None:
    for weight in _weights():
        found = _drawn(weight, weight.to(dtype).float())
        assert found.max() <= storage_error(str(dtype).removeprefix("torch."))


def test_names_of_storages() -> None:
    assert storage_error("Q4_K") == storage_error("Q4_1") == storage_error("IQ4_XS")
    assert storage_error("TQ2_0") == storage_error("Q2_K") > storage_error("Q6_K")
    assert storage_error("something new") == storage_error("4-bit")


# --- check_base


def test_check_base() -> None:
    base, other = identify(tiny.llama(), "tiny"), identify(tiny.llama(seed=5), "tiny")
    assert check_base(_adapter(base), base) == []
    with pytest.raises(BaseError, match="is another one"):
        check_base(_adapter(base), other)
    [note] = check_base(_adapter(base), other, allow_other=True)
    assert "as allowed" in note
    assert "sampled weights differ" in note
    assert "allow_other_base" not in note
    [note] = check_base(_adapter(None), base)
    assert "does not say" in note


def test_check_base_of_another_tools_adapter() -> None:
    """PEFT writes the name of the base and nothing else."""
    base = identify(tiny.llama(), "owner/Tiny")
    assert check_base(_adapter(BaseIdentity("/home/x/tiny", "")), base) == []
    [note] = check_base(_adapter(BaseIdentity("owner/other", "")), base)
    assert "only shapes are checked" in note
    wrong = _adapter(BaseIdentity("owner/tiny", "GPT2LMHeadModel"))
    with pytest.raises(BaseError, match="a GPT2LMHeadModel; this base"):
        check_base(wrong, base)
    [note] = check_base(wrong, base, allow_other=True)
    assert "as allowed" in note


# --- context_length


@pytest.mark.parametrize(
    ("make", "expected"),
    [(tiny.llama, 128), (models.gpt2, 64), (models.bert_classifier, 64), (models.t5, None)],
)
def test_context_length(make, expected) -> None:
    model = make()
    assert context_length(model) == expected
    assert context_length(model.config) == expected


def test_context_length_of_roberta() -> None:
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=18, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RobertaModel(config).eval()
    longest = context_length(model)
    assert longest == 16
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


def test_a_module_without_a_config() -> None:
    assert context_length(nn.Linear(2, 2)) is None
