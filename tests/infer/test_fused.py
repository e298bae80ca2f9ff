"""Fused layers against the model's own code and autograd, float64 throughout."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lorakit import LoRASpec, attach
from lorakit.errors import BaseError, LorakitError
from lorakit.infer.fused.family import DoesNotFit
from lorakit.infer.fused.norm import norm_of
from lorakit.infer.fused.rope import rotate_, rotate_back_
from lorakit.infer.fused.running import FusedBody
from lorakit.infer.packed import PackedModel
from lorakit.layers import Routing, token_keys
from lorakit.layers.gradients import FlatGradient

from .test_packed import batch_of, stock_losses

FAMILIES = [
    "llama",
    "qwen3",
    "qwen2-biases",
    "mistral-window",
    "gemma2-window-softcap",
    "gemma3-window",
    "phi3-joined",
]
LENGTHS = (9, 2, 13, 5)


def adapted(model, *specs: LoRASpec):
    """The model with adapters "a", "b", … whose B is not zero."""
    handle = None
    for name, spec in zip("abcdef", specs, strict=False):
        if handle is None:
            handle = attach(model, spec, name)
        else:
            handle.add(spec, name)
    assert handle is not None
    generator = torch.Generator().manual_seed(3)
    for name in handle.names:
        for parameter in handle.parameters(name):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(0.2 * noise)
    return handle


def gradient(handle, loss) -> torch.Tensor:
    """Of all adapters' parameters, one behind the other."""
    parameters = [p for name in handle.names for p in handle.parameters(name)]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


def assert_same(handle, loss, expected, *, bar: float = 1e-9) -> None:
    """Loss to 1e-10; each parameter's gradient to ``bar`` of its own size."""
    assert abs(float((loss - expected).detach())) <= 1e-10 * max(1.0, abs(float(expected.detach())))
    mine, theirs = gradient(handle, loss), gradient(handle, expected)
    total = float(theirs.norm())
    assert total > 1e-3
    start = 0
    for name in handle.names:
        for parameter in handle.parameters(name):
            part = slice(start, start + parameter.numel())
            start += parameter.numel()
            size = max(float(theirs[part].norm()), 1e-4 * total)
            assert float((mine[part] - theirs[part]).norm()) <= bar * size


def fused(model, handle, **options) -> PackedModel:
    packed = PackedModel(model, handle, chunk=4, **options)
    assert packed.fused is not None, packed.notes
    packed.fused.counts.clear()
    return packed


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_padded_forward(family, tiny, all_double):
    model = tiny(family).double()
    handle = adapted(model, LoRASpec(rank=3, alpha=8, targets="all-linear"))
    packed = fused(model, handle)
    batch = batch_of(LENGTHS)
    loss, _ = packed.supervised_loss(batch, Routing.uniform("a"))
    with handle.use("a"):
        expected = stock_losses(model, batch).sum()
    assert_same(handle, loss, expected)
    assert dict(packed.fused.counts) == {"fused": len(packed.fused.layers)}


@pytest.mark.parametrize("family", ["llama", "gemma3-window", "phi3-joined"])
@pytest.mark.parametrize(
    "spec",
    [
        LoRASpec(rank=2, targets=r".*1\.mlp\.down_proj"),
        LoRASpec(rank=2, targets=r".*1\.mlp\.(gate|up|gate_up)_proj"),
        LoRASpec(rank=2, targets=r".*0\.self_attn\.o_proj"),
        LoRASpec(rank=2, targets=r".*1\.self_attn\.(v|qkv)_proj"),
        LoRASpec(rank=2, targets="attention", layers="0"),
        LoRASpec(rank=4, targets="mlp", scaling="alpha/sqrt(r)"),
        LoRASpec(rank=2, targets=r".*(q_proj|qkv_proj|embed_tokens|lm_head)"),
    ],
    ids=["down", "gate-up", "o", "v", "first-layer", "rs", "embedding-and-head"],
)
def test_some_of_its_linears(family, spec, tiny, all_double):
    """What lies below the first adapter gets no gradient, and the rest is the same."""
    model = tiny(family, tie_word_embeddings=False).double()
    handle = adapted(model, spec)
    batch = batch_of(LENGTHS)
    loss, _ = fused(model, handle).supervised_loss(batch, Routing.uniform("a"))
    with handle.use("a"):
        expected = stock_losses(model, batch).sum()
    assert_same(handle, loss, expected)


@pytest.mark.parametrize("placed", ["none", "some", "all"])
def test_gradients_with_and_without_a_place_and_biases_of_adapters(placed, tiny, all_double):
    """Those with a place are added there, in stacks or alone; the others come through autograd."""
    model = tiny("llama").double()
    drawn = adapted(model, LoRASpec(rank=3, targets="all-linear"))
    adapter, generator = drawn.snapshot("a"), torch.Generator().manual_seed(4)
    drawn.detach()
    sites = {
        path: dataclasses.replace(
            site, bias=torch.randn(len(site.B), dtype=torch.float64, generator=generator)
        )
        for path, site in adapter.sites.items()
    }
    handle = attach(model, dataclasses.replace(adapter, sites=sites), "a", trainable=True)
    handle.arrange("a", lambda name: 0)
    batch = batch_of(LENGTHS)
    with handle.use("a"):
        expected = gradient(handle, stock_losses(model, batch).sum())
    parameters = handle.parameters("a")
    among = {"none": [], "some": parameters[::3], "all": parameters}[placed]
    flat = FlatGradient(among) if among else None
    for p in parameters:
        p.grad = None
    packed = fused(model, handle)
    for _ in range(2):  # the second is added to the first
        packed.supervised_loss(batch, Routing.uniform("a"))[0].backward()
    own = {id(p): p.grad for p in parameters}
    if flat is not None:
        parts = torch.split(flat.collect(), [p.numel() for p in among])
        own |= {id(p): part.view(p.shape) for p, part in zip(among, parts, strict=True)}
    found = torch.cat([own[id(p)].flatten() for p in parameters])
    torch.testing.assert_close(found, 2 * expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3-window", "phi3-joined"])
def test_rows_of_several_adapters_and_dropout(family, tiny, all_double):
    """Segments of three adapters, a blend and the bare base, with dropout by fixed masks."""
    model = tiny(family).double().train()
    handle = adapted(
        model,
        LoRASpec(rank=3, dropout=0.3),
        LoRASpec(rank=1, targets="attention"),
        LoRASpec(rank=4, targets="mlp", dropout=0.5),
    )
    batch = batch_of(LENGTHS)
    keys = token_keys(1, 2, torch.arange(29) // 10, batch.position_ids[0])[None]
    routing = Routing.tokens([("a", 9), ({"b": 0.7, "c": -0.4}, 2), (None, 13), ("c", 5)])
    routing = routing.with_dropout_keys(keys)
    loss, _ = fused(model, handle).supervised_loss(batch, routing)
    plain = PackedModel(model, handle, chunk=4, fused=False)
    expected, _ = plain.supervised_loss(batch, routing)
    assert_same(handle, loss, expected)


def test_one_adapters_rows_do_not_depend_on_the_others(tiny, all_double):
    model = tiny("llama").double()
    handle = adapted(model, LoRASpec(rank=3), LoRASpec(rank=2))
    packed, batch = fused(model, handle), batch_of(LENGTHS)
    together, _ = packed.per_example_loss(
        batch, Routing.tokens([("a", 9), ("b", 2), ("a", 13), (None, 5)])
    )
    for i, name in enumerate(["a", "b", "a", None]):
        alone, _ = packed.per_example_loss(batch, Routing.uniform(name))
        assert float((together[i] - alone[i]).abs()) <= 1e-12


@pytest.mark.parametrize("how", ["mlp", "layers"])
@pytest.mark.parametrize("family", ["llama", "gemma2-window-softcap", "phi3-joined"])
def test_layers_run_again_in_the_backward(family, how, tiny, all_double):
    model = tiny(family).double()
    handle = adapted(model, LoRASpec(rank=3))
    packed, batch = fused(model, handle), batch_of(LENGTHS)
    expected, _ = packed.supervised_loss(batch, Routing.uniform("a"))
    packed.fused.recompute = how
    loss, _ = packed.supervised_loss(batch, Routing.uniform("a"))
    assert_same(handle, loss, expected, bar=1e-14)


@pytest.mark.parametrize("how", ["mlp", "layers"])
def test_less_is_kept(how, tiny):
    """Counted in the values that wait for the backward."""
    model = tiny("llama")
    handle = adapted(model, LoRASpec(rank=3))
    packed, batch = fused(model, handle), batch_of(LENGTHS)

    def kept(recompute) -> int:
        packed.fused.recompute = recompute
        loss, _ = packed.supervised_loss(batch, Routing.uniform("a"))
        nodes, total, pending = set(), 0, [loss.grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in nodes:
                continue
            nodes.add(node)
            pending += [following for following, _ in node.next_functions]
            layer = getattr(node, "kept", None)
            if layer is not None:
                total += sum(t.numel() for t in layer.gate_up or ()) + layer.x2.numel()
        return total

    everything, less = kept("none"), kept(how)
    width, middle = model.config.hidden_size, model.config.intermediate_size
    rows = len(batch.labels)  # of the last layer's x2
    assert everything == (29 + rows) * (width + 2 * middle)
    assert less == ((29 + rows) * width if how == "mlp" else 0)


def test_what_does_not_run_fused_is_made_again_too(tiny, all_double):
    """DoRA's layers, in a packed row, under the routing of their forward and with dropout."""
    model = tiny("gemma3-window").double().train()
    handle = adapted(
        model, LoRASpec(rank=2, variant="dora", dropout=0.3), LoRASpec(rank=3, layers="0")
    )
    batch = batch_of(LENGTHS)
    keys = token_keys(1, 2, torch.arange(29) // 10, batch.position_ids[0])[None]
    routing = Routing.tokens([("a", 9), ("b", 2), (None, 13), ("a", 5)]).with_dropout_keys(keys)
    packed = fused(model, handle)
    expected, _ = packed.supervised_loss(batch, routing)
    packed.fused.recompute = "layers"
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, _ = packed.supervised_loss(batch, routing)
    assert_same(handle, loss, expected, bar=1e-13)
    assert len(calls) == 2


def test_offloading_needs_a_gpu(tiny):
    with pytest.raises(BaseError, match="is on cpu"):
        PackedModel(tiny("llama"), recompute="layers", offload=True)


def test_without_a_gradient_it_gives_the_same(tiny, all_double):
    model = tiny("qwen3").double()
    handle = adapted(model, LoRASpec(rank=3))
    packed, batch = fused(model, handle), batch_of(LENGTHS)
    loss, _ = packed.supervised_loss(batch, Routing.uniform("a"))
    with torch.no_grad():
        assert float(packed.position_losses(batch, Routing.uniform("a")).sum()) == pytest.approx(
            float(loss.detach()), abs=1e-10
        )


def test_smaller_dtypes_stay_close(tiny):
    model = tiny("llama")
    handle = adapted(model, LoRASpec(rank=3))
    batch = batch_of(LENGTHS)
    exact, _ = fused(model, handle).supervised_loss(batch, Routing.uniform("a"))
    handle.detach()
    model.bfloat16()
    handle = adapted(model, LoRASpec(rank=3))
    rough, _ = fused(model, handle).supervised_loss(batch, Routing.uniform("a"))
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=3e-2)
    assert all(p.dtype == torch.float32 for p in handle.parameters("a"))
    assert gradient(handle, rough).dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "qwen2-biases", "gemma2-window-softcap"])
def test_in_half_precision_layers_made_again_and_new_adapters_change_no_bit(family, tiny):
    model = tiny(family).bfloat16()
    packed = fused(model, handle := adapted(model, LoRASpec(rank=3)))
    batch = batch_of(LENGTHS)
    found = []
    for how in ("none", "mlp", "layers"):
        packed.fused.recompute = how
        loss, _ = packed.supervised_loss(batch, Routing.uniform("a"))
        found.append(torch.cat([loss.detach()[None], gradient(handle, loss)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    handle.add(LoRASpec(rank=2), "new")
    base = packed.position_losses(batch, Routing.uniform(None))
    assert torch.equal(packed.position_losses(batch, Routing.uniform("new")), base)
    with torch.no_grad():
        assert torch.equal(packed.position_losses(batch, Routing.uniform("new")), base)


def test_a_second_backward_says_what_to_do(tiny):
    model = tiny("llama")
    handle = adapted(model, LoRASpec(rank=2))
    loss, _ = fused(model, handle).supervised_loss(batch_of(LENGTHS), Routing.uniform("a"))
    loss.backward(retain_graph=True)
    with pytest.raises(LorakitError, match="ran twice"):
        loss.backward()


def test_nothing_is_left_on_the_layers(tiny):
    model = tiny("llama")
    handle = adapted(model, LoRASpec(rank=2))
    fused(model, handle).supervised_loss(batch_of(LENGTHS), Routing.uniform("a"))
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_what_does_not_fit_runs_as_it_is_and_says_why(tiny, all_double):
    batch = batch_of(LENGTHS)

    def check(model, handle, reason):
        packed = fused(model, handle)
        loss, _ = packed.supervised_loss(batch, Routing.uniform("a"))
        with handle.use("a"):
            expected = stock_losses(model, batch).sum()
        assert_same(handle, loss, expected)
        assert any(reason in said for said in packed.fused.reasons)

    model = tiny("llama").double()
    check(model, adapted(model, LoRASpec(rank=2, variant="dora")), "DoRA")
    model = tiny("qwen2-biases").double()
    check(model, adapted(model, LoRASpec(rank=2, bias="lora")), "whole")


def test_the_models_own_weights_are_trained_in_the_plain_path(tiny, all_double):
    model = tiny("llama").double()
    packed, batch = fused(model, None), batch_of(LENGTHS)
    loss, _ = packed.supervised_loss(batch)
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0].norm() > 0
    assert packed.fused.reasons == ("its own weights are trained",)


@pytest.mark.parametrize("family", ["gpt2", "opt", "cohere-scaled"])
def test_other_families_are_not_fused(family, tiny):
    packed = PackedModel(tiny(family))
    assert packed.fused is None
    assert any("layers are not fused: " in note for note in packed.notes)


def test_a_layer_that_computes_something_else_is_found_out(tiny):
    """The parts fit, but a forward gives other logits: the model is believed."""
    packed = PackedModel(tiny("granite-scaled", residual_multiplier=0.5))
    assert packed.fused is None
    assert any("not fused: logits differ" in note for note in packed.notes)


def test_a_body_without_layers(tiny):
    with pytest.raises(DoesNotFit, match="no list of layers"):
        FusedBody(nn.Linear(2, 2))


def test_norms_are_recognised_by_what_they_compute():
    assert norm_of(nn.LayerNorm(4)) is None
    norm = norm_of(nn.RMSNorm(4, eps=1e-5))
    assert norm is not None
    assert norm.eps == 1e-5


def test_rotations_are_undone_by_their_transpose():
    x, y = torch.randn(2, 5, 3, 8, dtype=torch.float64).unbind()
    angles = torch.rand(5, 3, dtype=torch.float64)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    forward = rotate_(x.clone(), cos, sin)
    assert float((forward * y).sum()) == pytest.approx(
        float((x * rotate_back_(y.clone(), cos, sin)).sum()), abs=1e-12
    )
    assert torch.allclose(rotate_back_(forward.clone(), cos, sin), x)
