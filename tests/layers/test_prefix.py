"""A prefix on a model that is copied, checkpointed, compiled; and where a prefix is refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.func import functional_call
from transformers import DynamicCache

import lorakit
from lorakit import LoRASpec, attach
from lorakit.core.adapter import Adapter
from lorakit.core.sites import Prefix
from lorakit.errors import FormatError, InputError, RoutingError, TargetError
from lorakit.formats.convert import check_nothing_lost, plan_reading
from lorakit.formats.format import Hints, Reading
from lorakit.formats.load import cast
from lorakit.layers import Routing
from tests.models import bert_classifier, gpt2, llama, randomize, t5, vit

IDS = torch.tensor([[5, 9, 40, 7, 8, 3], [1, 2, 3, 4, 5, 6]])
PREFIX = LoRASpec(targets="none", prefix=3)


def with_prefix(make=llama, spec=PREFIX, **options):
    torch.manual_seed(0)
    model = make(**options).double()
    handle = attach(model, spec, "a")
    randomize(handle)
    return model, handle


def behind(model, handle, ids):
    """Logits of the bare model behind a cache of the prefix's values, with autograd."""
    bank, rows = handle._banks["a"], len(ids)
    past = [
        tuple(
            bank.get(f"{path}.prefix_{name}").transpose(0, 1)[None].expand(rows, -1, -1, -1)
            for name in ("key", "value")
        )
        for path in handle.snapshot("a").prefixes
    ]
    with handle.use(None):
        return model(ids, past_key_values=DynamicCache(past)).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_way_of_calling_the_model(make, implementation):
    model, handle = with_prefix(make)
    model.set_attn_implementation(implementation)
    expected = behind(model, handle, IDS)
    # transformers' eager attention takes its softmax in float32
    bar = 1e-12 if implementation == "sdpa" else 1e-6
    before = model.config._attn_implementation
    assert torch.allclose(model(IDS).logits, expected, atol=bar)
    # positions and a mask that are given; a padded row; embeddings in place of ids
    positions = torch.arange(6)[None].expand(2, -1)
    assert torch.allclose(model(IDS, position_ids=positions).logits, expected, atol=bar)
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 2:]
    assert torch.allclose(logits, expected, atol=bar)
    logits = model(padded, attention_mask=mask).logits[:, 2:]  # which are the same, unasked
    assert torch.allclose(logits, expected, atol=bar)
    embedded = model.get_input_embeddings()(IDS)
    assert torch.allclose(model(inputs_embeds=embedded).logits, expected, atol=bar)
    # in two parts, over a cache that never holds the prefix
    first = model(IDS[:, :4], use_cache=True)
    assert first.past_key_values.get_seq_length() == 4
    rest = model(IDS[:, 4:], past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, expected[:, 4:], atol=bar)
    assert model.config._attn_implementation == before


def test_it_is_gone_when_it_is_off_removed_or_detached():
    model = llama()
    before = model(IDS).logits
    handle = attach(model, PREFIX, "a")
    assert not torch.equal(model(IDS).logits, before)
    with handle.use(None):
        assert torch.equal(model(IDS).logits, before)
    handle.add(LoRASpec(targets="none", prefix=5), "b")
    handle.activate("b")
    handle.remove("a")
    assert handle.names == ("b",)
    handle.detach()
    assert torch.equal(model(IDS).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_copied_model_has_its_own():
    model, handle = with_prefix()
    other = copy.deepcopy(model)
    expected = model(IDS).logits
    with torch.no_grad():
        for parameter in handle.parameters("a"):
            parameter.zero_()
    assert torch.equal(other(IDS).logits, expected)
    assert not torch.allclose(model(IDS).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_models_own_gradient_checkpointing(reentrant):
    model, handle = with_prefix(spec=dataclasses.replace(PREFIX, targets="attention", rank=2))
    parameters = handle.parameters("a")
    expected = torch.autograd.grad(model(IDS).logits.square().sum(), parameters)
    # as transformers calls it since 5.20
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    with handle.use("a"):
        loss = model(IDS, use_cache=False).logits.square().sum()
    handle.activate(None)  # the backward recomputes the forward that was
    loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", ["new", "all"])
def test_new_biases_and_norms_against_functional_call(bias):
    """Alone, and by rows; gradients of values that stand in place of the model's own."""
    torch.manual_seed(0)
    model = (llama if bias == "new" else gpt2)().double()
    bare = copy.deepcopy(model)
    if bias == "new":
        for name, module in bare.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.bias = torch.nn.Parameter(torch.zeros(module.out_features).double())
    handle = attach(model, LoRASpec(targets="none", bias=bias, norms=True), "a")
    randomize(handle, scale=0.05)
    bank = handle._banks["a"]
    values = {
        f"{path}.{name}" if name else path: bank.get(f"{path}.{name}" if name else path)
        for path, site in handle.snapshot("a").replaced.items()
        for name in site.tensors_by_name
    }
    assert {name.rpartition(".")[2] for name in values} == {"weight", "bias"}
    logits = model(IDS).logits
    expected = functional_call(bare, values, (IDS,)).logits
    assert torch.allclose(logits, expected, atol=1e-12)
    found = torch.autograd.grad(logits.square().sum(), list(values.values()))
    wanted = torch.autograd.grad(expected.square().sum(), list(values.values()))
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-9)
    with handle.use(rows=["a", None]):
        mixed = model(IDS).logits
    assert torch.allclose(mixed[0], expected[0], atol=1e-12)
    assert torch.allclose(mixed[1], bare(IDS).logits[1], atol=1e-12)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "why"),
    [(t5, "encoder-decoder"), (vit, "does not run on token ids"), (torch.nn.Linear, "no transf")],
)
def test_models_that_have_no_past(make, why):
    model = make(3, 3) if make is torch.nn.Linear else make()
    with pytest.raises(TargetError, match=why):
        attach(model, PREFIX)
    assert not model._forward_pre_hooks


def test_an_encoder_has_one_too():
    """No order and no cache: every token sees the prefix."""
    model = bert_classifier()
    before = model(IDS).logits
    handle = attach(model, PREFIX, "a")
    assert not torch.allclose(model(IDS).logits, before)
    with handle.use(rows=[None, "a"]):
        assert torch.allclose(model(IDS).logits[0], before[0], atol=1e-6)


def test_an_attention_that_is_trained_whole():
    spec = LoRASpec(targets="none", prefix=2, train_modules=("layers.1.self_attn",))
    with pytest.raises(TargetError, match=r"layers\.1\.self_attn"):
        attach(llama(), spec)


def test_another_models_prefix():
    _, handle = with_prefix()
    with pytest.raises(FormatError, match="its prefix has 2 heads; the model has 4"):
        attach(llama(num_key_value_heads=4), handle.snapshot("a"))
    with pytest.raises(FormatError, match=r"model\.layers\.1\.self_attn: not in this model"):
        attach(llama(num_hidden_layers=1), handle.snapshot("a"))


def test_compiled_code():
    model, _ = with_prefix()
    with pytest.raises(Exception, match="has a prefix, which compiled code does not read"):
        torch.compile(model, backend="eager")(IDS)


def test_merging_names_the_way_out():
    model, handle = with_prefix(spec=LoRASpec(rank=2, prefix=3))
    adapter = handle.snapshot("a")
    handle.detach()
    with pytest.raises(FormatError, match=r"Keep the adapter attached .* merge the rest"):
        lorakit.merge(model, adapter)
    rest = adapter.with_(sites={**adapter.low_rank, **adapter.replaced})
    lorakit.merge(model, rest)()


def test_new_biases_are_not_merged():
    model = llama()
    handle = attach(model, LoRASpec(targets="none", bias="new"), "a")
    adapter = handle.snapshot("a")
    handle.detach()
    with pytest.raises(FormatError, match="it is a new bias"):
        lorakit.merge(model, adapter)


def test_sums_of_prefixes():
    _, handle = with_prefix(spec=LoRASpec(rank=2, prefix=3))
    adapter = handle.snapshot("a")
    with pytest.raises(InputError, match="the attention to a sum of keys is no sum"):
        lorakit.combine([(adapter, 0.5), (adapter, 0.5)])
    small = lorakit.compress(adapter, rank=1)
    assert small.prefixes.keys() == adapter.prefixes.keys()
    assert {site.rank for site in small.low_rank.values()} == {1}


@pytest.mark.parametrize("to", ["kohya", "diffusers", "loralib", "gguf", "mlx", "onnx"])
def test_other_formats_list_it_as_lost(to):
    _, handle = with_prefix(spec=LoRASpec(rank=2, prefix=3))
    adapter = handle.snapshot("a")
    if to in ("kohya", "diffusers"):  # whose modules lie in a pipeline's components
        adapter = adapter.with_(sites={f"unet.{p}": site for p, site in adapter.sites.items()})
    config = llama().config.to_dict()
    with pytest.raises(Exception, match="prefix") as error:
        check_nothing_lost(
            plan_reading(Reading(adapter), source="peft", to=to, hints=Hints(base=config))
        )
    assert isinstance(error.value, InputError), repr(error.value)


def test_values():
    _, handle = with_prefix()
    adapter = handle.snapshot("a")
    assert adapter.num_parameters == 2 * 2 * 3 * 2 * 8
    assert cast(adapter, torch.bfloat16).dtypes == {torch.bfloat16}
    site = next(iter(adapter.prefixes.values()))
    for wrong in (
        Prefix(site.key[0], site.value),
        Prefix(site.key, site.value[:1]),
        Prefix(site.key * float("nan"), site.value),
    ):
        with pytest.raises(FormatError, match="not a usable adapter"):
            Adapter({"model.layers.0.self_attn": wrong})
    short = Prefix(site.key[:1], site.value[:1])
    with pytest.raises(FormatError, match="prefixes of 1, 3 virtual tokens"):
        Adapter({"layers.0.attn": site, "layers.1.attn": short})


def test_a_routing_by_token_outside_of_a_packed_row():
    model, handle = with_prefix()
    routing = Routing.tokens([("a", 6), (None, 6)])
    with pytest.raises(RoutingError, match="sees rows"), handle.forward_scope(routing):
        model(IDS)
