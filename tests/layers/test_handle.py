"""Attach, detach, snapshot: the model keeps what is its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lorakit import LoRASpec
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Replace
from lorakit.errors import (
    BaseError,
    FormatError,
    LorakitError,
    RoutingError,
    SpecError,
    TargetError,
)
from lorakit.layers import attach, handle_of

from .. import models

ALL = {
    "llama": (models.llama, "all-linear"),
    "gpt2": (models.gpt2, "all-linear"),
    "t5": (models.t5, "all-linear"),
    "bert": (models.bert_classifier, "all-linear"),
    "vit": (models.vit, "all-linear"),
    "conv": (models.ConvNet, ("one", "two", "three", "out")),
    "embedding": (models.llama, ("embed_tokens", "q_proj")),
}


def inputs(kind, batch=2):
    generator = torch.Generator().manual_seed(5)
    if kind == "conv":
        return {"x": torch.randn(batch, 4, 9, generator=generator)}
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 100, (batch, 6), generator=generator)
    extra = {"decoder_input_ids": ids[:, :3]} if kind == "t5" else {}
    return {"input_ids": ids, **extra}


def output(model, kind):
    with torch.no_grad():
        out = model(**inputs(kind))
    return out if isinstance(out, torch.Tensor) else out.logits


def traces(model):
    """Everything that attaching might leave behind."""
    return {
        path: (
            type(m), tuple(sorted(m.__dict__)), tuple(m._modules), len(m._forward_hooks),
            len(m._forward_pre_hooks),
        )
        for path, m in model.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_attach_is_a_no_op_and_detach_leaves_nothing(kind):
    make, targets = ALL[kind]
    model = make()
    before, expected = traces(model), output(model, kind)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    handle = attach(model, LoRASpec(rank=2, targets=targets))
    assert torch.equal(output(model, kind), expected)
    own = [k for k in model.state_dict() if not k.startswith("lorakit_adapters.")]
    assert own == keys, "the base keeps its keys"
    assert [type(m) for m in model.modules()][: len(classes)] == classes
    models.randomize(handle)
    assert not torch.equal(output(model, kind), expected)
    handle.detach()
    assert traces(model) == before
    assert torch.equal(output(model, kind), expected)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert handle_of(model) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "vit", "embedding"])
def test_the_base_is_bitwise_unchanged_after_training(kind):
    make, targets = ALL[kind]
    model = make()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = attach(model, LoRASpec(rank=2, targets=targets))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    start = [p.detach().clone() for p in handle.parameters()]
    for _ in range(20):
        out = model(**inputs(kind))
        out.logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        if name in base:
            assert p.grad is None
            assert torch.equal(p, base[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(start, handle.parameters(), strict=True))


def test_snapshot_is_a_copy_and_comes_back_equal():
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2, alpha=3.0))
    models.randomize(handle)
    expected = output(model, "llama")
    adapter = handle.snapshot()
    with torch.no_grad():
        handle.flat().zero_()
    handle.detach()
    again = attach(model, adapter)
    assert torch.equal(output(model, "llama"), expected)
    assert not any(p.requires_grad for p in again.parameters()), "a given adapter is frozen"
    again.detach()
    again = attach(model, adapter, trainable=True)
    assert all(p.requires_grad for p in again.parameters())
    with torch.no_grad():
        again.flat().zero_()  # must not write into the value
    assert adapter.low_rank["model.layers.0.mlp.up_proj"].B.abs().sum() > 0


def test_the_flat_buffer_is_what_the_sites_use():
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2))
    flat = handle.flat()
    assert flat.dtype == torch.float32
    assert flat.numel() == sum(p.numel() for p in handle.parameters())
    model(**inputs("llama")).logits.square().mean().backward()
    assert flat.grad.abs().sum() > 0
    assert torch.equal(flat.grad, torch.cat([p.grad.flatten() for p in handle.parameters()]))
    optimizer = torch.optim.SGD([flat], lr=0.1)
    before = output(model, "llama")
    optimizer.step()
    assert not torch.equal(output(model, "llama"), before)
    assert torch.equal(flat, torch.cat([p.detach().flatten() for p in handle.parameters()]))


def test_a_copied_model_has_its_own_adapters():
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2))
    models.randomize(handle)
    expected = output(model, "llama")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = handle_of(twin)
        assert own is not handle
        assert torch.equal(output(twin, "llama"), expected)
        with torch.no_grad():
            own.flat().zero_()
        assert not torch.equal(output(twin, "llama"), expected)
        assert torch.equal(output(model, "llama"), expected)
        own.add(LoRASpec(rank=2), "more")
        own.detach()


def test_a_moved_model_stays_flat():
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2))
    model.double()
    flat = handle.flat()
    assert flat.dtype == torch.float64
    with torch.no_grad():
        flat.fill_(0.5)
    assert all((p == 0.5).all() for p in handle.parameters())


def test_one_seed_one_initialisation():
    def values(seed):
        handle = attach(models.llama(), LoRASpec(rank=2), seed=seed)
        return handle.flat().detach().clone()

    assert torch.equal(values(1), values(1))
    assert not torch.equal(values(1), values(2))


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_initialisations(init):
    handle = attach(models.llama(hidden_size=256), LoRASpec(rank=4, targets="q_proj", init=init))
    site = handle.snapshot().sites["model.layers.0.self_attn.q_proj"]
    assert site.B.abs().sum() == 0
    if init == "kaiming":  # uniform on ±1/√d_in
        assert site.A.abs().max() <= 1 / 16
        assert abs(site.A.std() * 16 * 3**0.5 - 1) < 0.1
    elif init == "gaussian":
        assert abs(site.A.std() * 4 - 1) < 0.1
    else:
        assert torch.allclose(site.A @ site.A.T, torch.eye(4), atol=1e-5)


def test_modules_trained_whole():
    model = models.bert_classifier()
    handle = attach(model, LoRASpec(rank=2, targets="attention", train_modules=("classifier",)))
    before = model.classifier.weight.detach().clone()
    expected = output(model, "bert")
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
    for _ in range(3):
        model(**inputs("bert"), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = handle.snapshot()
    head = adapter.sites["classifier"]
    assert isinstance(head, Replace)
    assert set(head.tensors()) == {"weight", "bias"}
    assert not torch.equal(head.tensors()["weight"], before)
    assert torch.equal(model.classifier.weight, before), "the base's own head is untouched"
    with handle.use(None):
        assert torch.equal(output(model, "bert"), expected)
    trained = output(model, "bert")
    with handle.use(rows=["default", None]):
        mixed = output(model, "bert")
    assert torch.allclose(mixed[0], trained[0], atol=1e-6)  # a sum of differences in float32
    assert torch.equal(mixed[1], expected[1])


@pytest.mark.parametrize("bias", ["lora", "all"])
def test_trained_biases(bias):
    model = models.gpt2()
    expected = output(model, "gpt2")
    handle = attach(model, LoRASpec(rank=2, targets="c_attn", bias=bias))
    assert torch.equal(output(model, "gpt2"), expected)
    paths = set(handle.snapshot().replaced)
    assert "transformer.h.0.attn.c_attn.bias" in paths
    assert ("transformer.ln_f.bias" in paths) == (bias == "all")
    models.randomize(handle)
    assert not torch.equal(output(model, "gpt2"), expected)
    with handle.use(None):
        assert torch.equal(output(model, "gpt2"), expected)


def test_a_shared_module_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared})
    model.forward = lambda x: model["second"](model["first"](x))
    handle = attach(model, LoRASpec(rank=2, targets=("first", "second")))
    assert list(handle.snapshot().sites) == ["first"]


def test_tied_weights_are_adapted_apart():
    """The head shares its weight with the embedding; adapting one leaves the other alone."""
    model = models.llama(tie_word_embeddings=True)
    expected = output(model, "llama")
    handle = attach(model, LoRASpec(rank=2, targets="lm_head"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    models.randomize(handle)
    assert not torch.equal(output(model, "llama"), expected)
    hidden = model.model(**inputs("llama")).last_hidden_state
    handle.detach()
    assert torch.equal(model.model(**inputs("llama")).last_hidden_state, hidden)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return self.layer(x)


def test_a_target_that_a_fused_path_never_calls_raises():
    model = Encoder().eval()
    attach(model, LoRASpec(rank=2, targets="out_proj"))
    with pytest.raises(TargetError, match=r"never called.*\n.*out_proj"), torch.no_grad():
        model(torch.randn(2, 3, 16))


def test_a_linear_of_an_encoder_acts_in_training_and_after():
    """In eval torch would take its fused path, which reads the linears' weights."""
    model = Encoder().train()
    model.layer.dropout.p = model.layer.dropout1.p = model.layer.dropout2.p = 0.0
    model.layer.self_attn.dropout = 0.0
    before = traces(model)
    handle = attach(model, LoRASpec(rank=2, targets=("linear1", "linear2")))
    x = torch.randn(2, 3, 16)
    model(x).sum().backward()
    assert handle.parameters()[1].grad.abs().sum() > 0
    models.randomize(handle)
    expected = model(x).detach()
    for one in (model.eval(), copy.deepcopy(model)):
        with torch.no_grad():
            assert torch.allclose(one(x), expected, atol=1e-6)
    with torch.no_grad(), handle.use(None):
        assert not torch.allclose(model(x), expected, atol=1e-3)
    handle.detach()
    assert traces(model) == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_packs_its_padding_is_named():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    attach(model, LoRASpec(rank=2, targets="linear1"))
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad(), pytest.raises(RoutingError, match="enable_nested_tensor=False"):
        model(torch.randn(2, 3, 16), src_key_padding_mask=padding)


class Pair(nn.Module):
    """A head that is not called with a tensor."""

    def __init__(self, how: str):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Module()
        self.head.inner = nn.Linear(4, 3)
        self.head.__class__ = type("Head", (nn.Module,), {"forward": getattr(self, f"_{how}")})
        self.how = how

    @staticmethod
    def _tuple(head, parts):
        return head.inner(parts[0] + parts[1])

    @staticmethod
    def _keyword(head, mask=None, hidden=None):
        return head.inner(hidden)

    def forward(self, x):
        z = self.body(x)
        return self.head((z, x)) if self.how == "tuple" else self.head(mask=None, hidden=z)


@pytest.mark.parametrize("how", ["tuple", "keyword"])
def test_a_module_trained_whole_needs_no_tensor_first(how):
    model = Pair(how)
    handle = attach(model, LoRASpec(rank=2, targets="body", train_modules=("head",)))
    x = torch.randn(2, 4)
    before = model(x)
    before.sum().backward()
    weight = next(p for p in handle.parameters() if p.shape == (3, 4))
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        weight.add_(1.0)
    assert not torch.equal(model(x), before)
    for routing in ({"rows": ["default", None]}, {"mix": {"default": 0.5}}):
        with handle.use(**routing), pytest.raises(RoutingError, match=r"head .*cannot be mixed"):
            model(x)


def test_a_low_rank_site_called_without_a_tensor_raises():
    class First(nn.Linear):
        def forward(self, x):
            return super().forward(x[0] if isinstance(x, tuple) else x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = First(4, 4)

        def forward(self, x):
            return self.one((x,))

    model = Model()
    attach(model, LoRASpec(rank=2, targets="one"))
    with pytest.raises(RoutingError, match="one was called with a tuple first"):
        model(torch.randn(2, 4))


def test_values_put_in_the_parameters_place_act():
    """By ``load_state_dict(assign=True)``, and by ``functional_call``, with gradients."""
    spec = LoRASpec(rank=2, targets=("q_proj",), train_modules=("lm_head",), prefix=2)
    model = models.llama()
    twin = copy.deepcopy(model)
    models.randomize(attach(model, spec))
    expected = output(model, "llama")
    values = {name: p.detach().clone() for name, p in model.state_dict().items()}
    again = attach(twin, spec)
    assert not torch.equal(output(twin, "llama"), expected)
    mine = {n: p.requires_grad_() for n, p in values.items() if n.startswith("lorakit_adapters")}
    with torch.no_grad():
        found = torch.func.functional_call(twin, mine, (), inputs("llama")).logits
    assert torch.equal(found, expected)
    found = torch.func.functional_call(twin, mine, (), inputs("llama")).logits
    gradients = torch.autograd.grad(found.square().sum(), list(mine.values()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    twin.load_state_dict({n: p.detach() for n, p in values.items()}, assign=True)
    assert torch.equal(output(twin, "llama"), expected)
    twin(**inputs("llama")).logits.square().sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    flat = again.flat()
    assert flat.grad.abs().sum() > 0
    with torch.no_grad():
        flat.zero_()
    assert not torch.equal(output(twin, "llama"), expected)


def test_a_module_under_two_paths_has_one_site():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x))

    low = LowRank(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    whole = Replace({"weight": torch.ones(4, 4)})
    for sites in ({"a": low, "b": low}, {"a": whole, "b": whole}):
        with pytest.raises(FormatError, match="b: it is the same module as a"):
            attach(Twice(), Adapter(sites))
    bias = {"a": low, "b.bias": Replace({"": torch.ones(4)})}
    attach(Twice(), Adapter(bias))
    handle = attach(Twice(), LoRASpec(targets="none", train_modules=("a", "b")))
    assert list(handle.snapshot().sites) == ["a"]


def test_the_flat_gradient_has_what_was_there_before():
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2))
    models.randomize(handle)

    def backward():
        model(**inputs("llama")).logits.square().mean().backward()

    backward()
    expected = torch.cat([p.grad.flatten() for p in handle.parameters()])
    assert torch.equal(handle.flat().grad, expected), "a backward before the first flat()"
    backward()
    assert torch.equal(handle.flat().grad, 2 * expected)
    model.double().float()
    assert torch.equal(handle.flat().grad, 2 * expected), "moved"
    handle.arrange("default", lambda name: name.endswith("lora_B"))
    found = torch.cat([p.grad.flatten() for p in handle.parameters()])
    assert torch.equal(found, handle.flat().grad), "arranged"
    assert torch.equal(found.sort().values, (2 * expected).sort().values)
    model.zero_grad()
    backward()
    assert torch.equal(handle.flat().grad.sort().values, expected.sort().values), "zero_grad"
    handle.flat().grad = None
    assert handle.flat().grad.abs().sum() == 0, "cleared"


def test_first_adapter_is_active_and_names_are_checked():
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2), "first")
    assert handle.active.names == {"first"}
    handle.add(LoRASpec(rank=2), "second")
    assert handle.names == ("first", "second")
    assert handle.active.names == {"first"}, "adding does not switch"
    for action, words in (
        (lambda: handle.add(LoRASpec(rank=2), "second"), "is taken"),
        (lambda: handle.add(LoRASpec(rank=2), ""), "is empty"),
        (lambda: attach(model, LoRASpec(rank=2)), "has adapters attached already"),
        (lambda: handle.remove("first"), "is in use"),
        (lambda: handle.remove("secnd"), "did you mean 'second'"),
    ):
        with pytest.raises(LorakitError, match=words):
            action()
    handle.remove("second")
    assert handle.names == ("first",)
    handle.activate(None)
    handle.remove("first")
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_failed_attach_leaves_the_model_alone():
    model = models.llama()
    before = traces(model)
    with pytest.raises(TargetError):
        attach(model, LoRASpec(targets="nothing_like_it"))
    assert traces(model) == before


def test_an_adapter_for_another_model_is_refused_whole():
    model = models.llama()
    adapter = attach(models.llama(hidden_size=64), LoRASpec(rank=2)).snapshot()
    wrong = adapter.with_(
        sites={**adapter.sites, "model.nowhere": next(iter(adapter.sites.values()))}
    )
    before = traces(model)
    with pytest.raises(FormatError) as caught:
        attach(model, wrong)
    text = str(caught.value)
    assert "model.nowhere: not in this model" in text
    assert "at rank 2 this model needs (2, 32)" in text
    assert traces(model) == before


def test_an_adapter_is_a_value():
    adapter = Adapter({"x": LowRank(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)})
    with pytest.raises(TypeError, match="cannot be changed"):
        adapter.sites["y"] = adapter.sites["x"]
    twin = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(twin.sites["x"].A, adapter.sites["x"].A)
    with pytest.raises(FormatError, match="rank 2"):
        Adapter({"x": LowRank(torch.zeros(2, 3), torch.zeros(4, 3), 1.0)})
    A = torch.zeros(2, 3)
    A[0, 0] = float("nan")
    with pytest.raises(FormatError, match="1 of 6 values that are NaN"):
        Adapter({"x": LowRank(A, torch.zeros(4, 2), 1.0)})


def test_under_an_offloading_device_map(tmp_path):
    from accelerate import dispatch_model

    model = models.llama()
    expected = output(model, "llama")
    places = {
        "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    handle = attach(model, LoRASpec(rank=2))
    assert torch.equal(output(model, "llama"), expected)
    models.randomize(handle)
    model(**inputs("llama")).logits.sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
    handle.detach()
    assert torch.equal(output(model, "llama"), expected)


def test_every_adapter_is_checked_for_uncalled_modules():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Half()
    handle = attach(model, LoRASpec(rank=2, targets="used"), "a")
    handle.add(LoRASpec(rank=2, targets=("used", "unused")), "b")
    x = torch.randn(2, 4)
    model(x)
    for _ in range(2):  # again and again, not only the first time
        with pytest.raises(TargetError, match=r"never called.*\n.*unused"), handle.use("b"):
            model(x)
    model(x)


def test_names_that_are_attributes_of_modules():
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2), "train")
    for name in ("eval", "type", "keys", "a.b"):
        handle.add(LoRASpec(rank=2), name)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert all(id(p) in trained for name in handle.names for p in handle.parameters(name))
    with pytest.raises(LorakitError, match="is taken"):
        handle.add(LoRASpec(rank=2), "a·b")
    handle.detach()
    with pytest.raises(LorakitError, match="was detached"):
        handle.add(LoRASpec(rank=2), "late")
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_part_with_adapters_is_not_attached_around():
    model = models.llama()
    inner = attach(model.model, LoRASpec(rank=2))
    with pytest.raises(LorakitError, match="a part of this model has adapters attached"):
        attach(model, LoRASpec(rank=2))
    assert all(p.requires_grad for p in inner.parameters())


def test_a_trainable_adapter_is_a_copy_and_a_frozen_one_takes_no_memory_of_its_own():
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2))
    models.randomize(handle)
    adapter = handle.snapshot()
    handle.add(adapter, "frozen")
    handle.add(adapter, "trained", trainable=True)
    value = {t.data_ptr() for site in adapter.low_rank.values() for t in site.tensors().values()}
    assert {p.data_ptr() for p in handle.parameters("frozen")} == value
    with torch.no_grad():
        for p in handle.parameters("trained"):
            p.zero_()
    assert all(site.A.abs().sum() > 0 for site in adapter.low_rank.values())


def test_an_adapter_of_other_weights_is_refused():
    from lorakit.bases import identify

    first, second = models.llama(), models.llama()
    adapter = attach(first, LoRASpec(rank=2)).snapshot().with_(base=identify(first, "one"))
    with pytest.raises(BaseError, match="sampled weights differ"):
        attach(second, adapter)
    assert handle_of(second) is None
    attach(second, adapter, allow_other_base=True)
    handle_of(first).add(adapter, "same")


def test_an_alpha_of_zero_learns_nothing():
    with pytest.raises(SpecError, match="nothing could be learnt"):
        attach(models.llama(), LoRASpec(rank=2, alpha=0))
