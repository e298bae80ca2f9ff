"""Prefixes against the model's own cache: keys and values that were read before the text."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import DynamicCache

from lorakit import LoRASpec, attach
from lorakit.core.sites import LowRank, Prefix
from lorakit.errors import RoutingError, SpecError, TargetError
from lorakit.infer import answers
from lorakit.infer.packed import PackedModel
from lorakit.layers import Routing, token_keys

from .test_fused import gradient
from .test_packed import Batch, batch_of

FAMILIES = ["llama", "qwen3", "gpt2", "gemma2-window-softcap", "gemma3-window", "mistral-window"]
LENGTHS = (9, 2, 13, 5)
TOKENS = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}


def adapted(model, *specs):
    """The model with trainable adapters "a", "b", … away from where they begin."""
    handle = attach(model, specs[0], "a")
    for name, spec in zip("bcdef", specs[1:], strict=False):
        handle.add(spec, name, seed=ord(name))
    generator = torch.Generator().manual_seed(3)
    for name in handle.names:
        for parameter in handle.parameters(name):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(0.2 * noise)
    return handle


def parameters_of(handle, name):
    """Site path → its trained tensors, on the model, by field."""
    bank, found = handle._banks[name], {}
    for path, site in handle.snapshot(name).sites.items():
        names = {"A": "lora_A", "B": "lora_B", "key": "prefix_key", "value": "prefix_value"}
        found[path] = (site, {k: bank.get(f"{path}.{names[k]}") for k in site.tensors()})
    return found


def behind(bare, handle, name, ids):
    """Logits of one text by the model's own code: weights with the products added, and a cache
    that holds the prefix. A window is the text's own; the prefix is always seen."""
    weights, past = {}, []
    for path, (site, tensors) in {} if name is None else parameters_of(handle, name).items():
        if isinstance(site, LowRank):
            change = site.scaling * tensors["B"] @ tensors["A"]
            own = bare.get_submodule(path)
            weights[f"{path}.weight"] = own.weight + (
                change.T if type(own).__name__ == "Conv1D" else change
            )
        else:
            assert isinstance(site, Prefix)
            past.append(tuple(tensors[k].transpose(0, 1)[None] for k in ("key", "value")))
    if "lm_head.weight" in weights:
        raise AssertionError
    n = past[0][0].shape[2] if past else 0
    given = {"input_ids": ids[None]}
    if past:
        cache = DynamicCache(past)
        given["past_key_values"] = cache
    window = getattr(bare.config, "sliding_window", None)
    if window:
        i, j = torch.arange(len(ids))[:, None], torch.arange(len(ids))
        seen = torch.cat([torch.ones(len(ids), n, dtype=torch.bool), j <= i], 1)
        near = torch.cat(
            [torch.ones(len(ids), n, dtype=torch.bool), (j <= i) & (j > i - window)], 1
        )
        full, sliding = ((~m).double()[None, None] * -1e300 for m in (seen, near))
        kinds = {"full_attention": full, "sliding_attention": sliding}
        given["attention_mask"] = kinds if hasattr(bare.config, "layer_types") else sliding
    return functional_call(bare, weights, kwargs=given).logits[0]


def expected_loss(bare, handle, names, batch):
    """The summed loss of a batch whose examples use these adapters, one example at a time."""
    total, start = 0.0, 0
    for name, length in zip(names, batch.lengths, strict=True):
        logits = behind(bare, handle, name, batch.input_ids[0, start : start + length])
        mine = (batch.supervised >= start) & (batch.supervised < start + length)
        total = total + F.cross_entropy(
            logits[batch.supervised[mine] - start], batch.labels[mine], reduction="sum"
        )
        start += length
    return total


def same(handle, loss, expected, bar=1e-9):
    assert abs(float((loss - expected).detach())) <= 1e-10 * abs(float(expected.detach()))
    mine, theirs = gradient(handle, loss), gradient(handle, expected)
    assert float(theirs.norm()) > 1e-3
    assert float((mine - theirs).norm()) <= bar * float(theirs.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["none", "attention"], ids=["alone", "beside-lora"])
def test_loss_and_gradient_are_those_behind_a_cache(family, targets, tiny, all_double):
    model = tiny(family).double()
    bare = copy.deepcopy(model)
    handle = adapted(model, LoRASpec(targets=targets, rank=2, prefix=3))
    batch = batch_of(LENGTHS)
    for options in ({}, {"fused": False}, {"fused": False, "mode": "padded"}):
        packed = PackedModel(model, handle, chunk=4, **options)
        loss, _ = packed.supervised_loss(batch, Routing.uniform("a"))
        same(handle, loss, expected_loss(bare, handle, "aaaa", batch))
        if packed.fused is not None:
            assert set(packed.fused.counts) == {"fused"}
    # and the model called as anybody calls it
    with handle.use("a"):
        logits = model(batch.input_ids[:, :9]).logits[0]
    theirs = behind(bare, handle, "a", batch.input_ids[0, :9])
    assert torch.allclose(logits, theirs, rtol=0, atol=1e-10 * float(theirs.detach().abs().max()))
    # it must be able to fail: without its prefix it is another loss
    with handle.use(None):
        other = model(batch.input_ids[:, :9]).logits[0]
    assert float((other - theirs).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-window"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "layers"])
def test_one_batch_of_several_prefixes_and_none(family, recompute, tiny, all_double):
    if family == "gpt2" and recompute == "mlp":
        pytest.skip("it has no fused layers")
    model = tiny(family).double().train()
    bare = copy.deepcopy(model).eval()
    handle = adapted(
        model,
        LoRASpec(targets="none", prefix=2),
        LoRASpec(targets="attention", rank=2, prefix=5),
        LoRASpec(rank=2, targets="attention"),
    )
    model.eval()
    batch = batch_of(LENGTHS)
    names = ("a", "b", None, "c")
    routing = Routing.tokens(list(zip(names, LENGTHS, strict=True)))
    for options in ({"recompute": recompute}, {"fused": False, "mode": "padded"}):
        packed = PackedModel(model, handle, chunk=4, **options)
        loss, _ = packed.supervised_loss(batch, routing)
        same(handle, loss, expected_loss(bare, handle, names, batch))
    # an example alone is that example in the batch
    sums, _ = packed.per_example_loss(batch, routing)
    first = batch.supervised < LENGTHS[0]
    one = Batch(
        batch.input_ids[:, : LENGTHS[0]],
        batch.position_ids[:, : LENGTHS[0]],
        LENGTHS[:1],
        batch.supervised[first],
        batch.labels[first],
    )
    (alone,), _ = packed.per_example_loss(one, Routing.uniform("a"))
    assert abs(float(sums[0] - alone)) < 1e-10


def test_a_blend_with_lora_and_dropout(tiny, all_double):
    """A prefix at weight 1 beside others' products at any; keyed dropout stays the example's."""
    model = tiny("llama").double()
    handle = adapted(
        model, LoRASpec(targets="none", prefix=3), LoRASpec(rank=2, dropout=0.3, targets="mlp")
    )
    for module in model.modules():
        module.training = True
    batch = batch_of(LENGTHS)
    keys = token_keys(1, 2, torch.arange(29) // 10, batch.position_ids[0])[None]
    routing = Routing.uniform({"a": 1.0, "b": -0.7}).with_dropout_keys(keys)
    one = PackedModel(model, handle, chunk=4).supervised_loss(batch, routing)[0]
    other = PackedModel(model, handle, chunk=4, fused=False).supervised_loss(batch, routing)[0]
    same(handle, one, other)
    without = Routing.uniform({"b": -0.7}).with_dropout_keys(keys)
    third = PackedModel(model, handle, chunk=4).supervised_loss(batch, without)[0]
    assert abs(float((one - third).detach())) > 1e-3


# --- generation ------------------------------------------------------------------------------


@pytest.fixture
def base(tiny, tokenizer):
    def make(family="llama", **settings):
        model = tiny(family, **{**TOKENS, **settings}).double()
        with torch.no_grad():  # larger weights, so that answers differ
            for parameter in model.parameters():
                parameter.mul_(2)
        return SimpleNamespace(model=model, tokenizer=tokenizer)

    return make


def greedy(bare, handle, name, prompt, count):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(behind(bare, handle, name, torch.tensor(ids))[-1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[5, 9, 40], [7] * 11, [1, 2], [9, 8, 7, 6, 5, 4], [33, 200, 3, 77, 12, 13, 14], [60]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3-window"])
def test_answers_with_the_prefix_on_off_and_swapped(family, base, all_double):
    one = base(family)
    bare = copy.deepcopy(one.model)
    handle = adapted(
        one.model,
        LoRASpec(targets="attention", rank=2, prefix=4),
        LoRASpec(targets="none", prefix=2),
    )
    names = ["a", "b", None, "b", "a", None]
    found = answers(one, handle, PROMPTS, mixes=names, max_new_tokens=7, batch_size=3, stop_ids=())
    texts = [
        one.tokenizer.decode(
            greedy(bare, handle, name, prompt, 7),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        for name, prompt in zip(names, PROMPTS, strict=True)
    ]
    assert [answer.text for answer in found] == texts
    assert len({greedy(bare, handle, name, PROMPTS[0], 7)[-1] for name in ("a", "b", None)}) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_generate_with_padding_and_beams(family, base, all_double):
    one = base(family)
    bare = copy.deepcopy(one.model)
    handle = adapted(one.model, LoRASpec(targets="attention", rank=2, prefix=4))
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    names = ["a", None, "a", "a", None, "a"]
    with handle.use(rows=names):
        found = one.model.generate(ids, **settings)[:, width:].tolist()
    assert found == [
        greedy(bare, handle, name, prompt, 6) for name, prompt in zip(names, PROMPTS, strict=True)
    ]
    # beams: the model's own over a cache that begins with the prefix, one row at a time
    with handle.use(rows=names):
        beams = one.model.generate(ids, num_beams=3, **settings)[:, width:]
    with handle.use("a"):
        alone = one.model.generate(
            ids[:1, width - 3 :], **{**settings, "attention_mask": None}, num_beams=3
        )[:, 3:]
    assert beams[:1].tolist() == alone.tolist()
    best = sum_of_log_probabilities(bare, handle, PROMPTS[0], beams[0].tolist())
    assert best >= sum_of_log_probabilities(bare, handle, PROMPTS[0], found[0]) - 1e-9


def sum_of_log_probabilities(bare, handle, prompt, answer):
    with torch.no_grad():
        logits = behind(bare, handle, "a", torch.tensor([*prompt, *answer]))[len(prompt) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return float(chosen.sum())


def test_the_context_is_shorter_by_the_prefix(base):
    one = base("gpt2")
    handle = attach(one.model, LoRASpec(targets="none", prefix=4), "a")
    (answer,) = answers(one, handle, [[3] * 50], adapter="a", max_new_tokens=99, stop_ids=())
    assert (answer.num_tokens, answer.finish) == (10, "context")
    (answer,) = answers(one, handle, [[3] * 50], max_new_tokens=99, stop_ids=())
    assert answer.num_tokens == 14


# --- what is refused -------------------------------------------------------------------------


def test_blends_of_prefixes_are_refused(tiny):
    handle = attach(tiny("llama"), LoRASpec(targets="none", prefix=2), "a")
    handle.add(LoRASpec(targets="none", prefix=3), "b")
    with pytest.raises(SpecError, match=r"weight 0\.5"), handle.use({"a": 0.5}):
        pass
    with pytest.raises(SpecError, match="'a', 'b' each have a prefix"):
        handle.routing({"a": 1.0, "b": 1.0})
    with pytest.raises(SpecError, match="at weight 1"):
        handle.forward_scope(Routing.uniform({"a": 2.0}))


def test_an_example_has_one_prefix(tiny):
    model = tiny("llama")
    handle = attach(model, LoRASpec(targets="none", prefix=2), "a")
    packed = PackedModel(model, handle, chunk=4)
    with pytest.raises(RoutingError, match="whole examples"):
        packed.supervised_loss(batch_of((9, 4)), Routing.tokens([("a", 5), (None, 8)]))


def test_models_without_such_attention_are_refused(tiny):
    with pytest.raises(TargetError, match="prefix: no attention of MambaForCausalLM"):
        attach(tiny("mamba-state"), LoRASpec(targets="none", prefix=2))
