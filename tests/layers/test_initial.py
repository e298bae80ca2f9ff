"""Adapters that begin inside of the base's weight: the papers' training on an untouched base."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakit.core.adapter import Adapter
from lorakit.core.spec import LoRASpec
from lorakit.data import Example, pack
from lorakit.errors import SpecError, TargetError
from lorakit.infer import PackedModel
from lorakit.inits import lora_ga
from lorakit.layers import Routing, attach
from lorakit.layers.initial import Initial, initial, since_start
from tests import models

TARGETS = ("q_proj", "o_proj", "down_proj", "gate_proj")


class Reference(nn.Module):
    """The papers' layer: what is left of W is frozen, and s·B A is trained beside it."""

    def __init__(self, linear: nn.Linear, A, B, scaling: float) -> None:
        super().__init__()
        self.left = linear.weight.detach() - scaling * B @ A
        self.bias, self.scaling = linear.bias, scaling
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x):
        return F.linear(x, self.left + self.scaling * self.B @ self.A, self.bias)


def begin(model: nn.Module, init: str, **changes) -> Initial:
    """Where an adapter of rank 3 begins, with made-up gradients where they are needed."""
    spec = LoRASpec(rank=3, alpha=6, targets=TARGETS, init=init, **changes)
    if init != "lora-ga":
        return initial(model, spec, 0)
    generator = torch.Generator().manual_seed(3)
    given = {
        path: lora_ga(torch.randn(m.weight.shape, generator=generator, dtype=torch.float64), 3)
        for path, m in model.named_modules()
        if path.endswith(TARGETS)
    }
    return initial(model, spec, 0, given)


def referenced(model: nn.Module, start: Adapter) -> tuple[nn.Module, dict[str, Reference]]:
    model = copy.deepcopy(model).requires_grad_(False)
    made = {}
    for path, site in start.low_rank.items():
        parent, _, own = path.rpartition(".")
        made[path] = Reference(model.get_submodule(path), site.A, site.B, site.scaling)
        setattr(model.get_submodule(parent), own, made[path])
    return model, made


def batch():
    ids = torch.randint(0, 100, (14,), generator=torch.Generator().manual_seed(5)).numpy()
    return pack([Example(ids, ids >= 0, 1, "file", 0)])


def loss_of(model: nn.Module, one) -> torch.Tensor:
    logits = model(input_ids=one.input_ids).logits[0]
    return F.cross_entropy(logits[one.supervised], one.labels, reduction="sum")


def moved(model: nn.Module, start: Adapter):
    """The papers' base, with the adapter on it as any other; its layers run fused too.

    The stock model casts its norms and rotations to float32, so the modules of
    :class:`Reference` agree with the fused layers to 1e-9 only.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    for path, site in start.low_rank.items():
        model.get_submodule(path).weight -= site.scaling * site.B @ site.A
    handle = attach(model, start, trainable=True)
    return PackedModel(model, handle), handle


@pytest.mark.parametrize("path", ["plain", "fused", "recomputed"])
@pytest.mark.parametrize("init", ["pissa", "olora", "lora-ga"])
def test_training_is_the_papers(init, path):
    """Gradients and five AdamW steps, against W − s·B₀A₀ in the base's place."""
    torch.manual_seed(0)
    model = models.llama().double()
    before = copy.deepcopy(model.state_dict())
    start, one = begin(model, init), batch()
    if path == "plain":
        reference, made = referenced(model, start.adapter)
        their_parameters = [p for m in made.values() for p in (m.A, m.B)]
    else:
        reference, their_handle = moved(model, start.adapter)
        their_parameters = their_handle.parameters()
    theirs = torch.optim.AdamW(their_parameters, lr=1e-2)
    handle = attach(model, start)
    packed = PackedModel(model, handle, fused=path != "plain")
    if path != "plain":
        packed.fused.recompute = path == "recomputed"
    flat = handle.flat()
    ours = torch.optim.AdamW([flat], lr=1e-2, fused=True)
    losses = []
    for _ in range(6):
        flat.grad.zero_()
        theirs.zero_grad()
        loss, _ = packed.supervised_loss(one, Routing.uniform("default"))
        loss.backward()
        if path == "plain":
            expected = loss_of(reference, one)
        else:
            expected, _ = reference.supervised_loss(one, Routing.uniform("default"))
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        for mine, other in zip(handle.parameters(), their_parameters, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(mine.data, other.data, rtol=1e-10, atol=1e-10)
        losses.append(loss.item())
        ours.step()
        theirs.step()
    assert losses[-1] < losses[0] - 0.5, "it learns"
    if path != "plain":
        assert set(packed.fused.counts) == {"fused"}
    handle.detach()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("init", ["pissa", "olora", "lora-ga"])
def test_it_begins_at_the_base_and_its_file_fits_the_base(init):
    torch.manual_seed(1)
    model = models.llama()
    ids = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        base = model(input_ids=ids).logits
    handle = attach(model, begin(model, init, scaling="alpha/sqrt(r)"))
    with torch.no_grad():
        # two sums of the size of W x that cancel: some float32 roundings of the logits
        torch.testing.assert_close(model(input_ids=ids).logits, base, rtol=0, atol=2e-6)
    assert {site.rank for site in handle.snapshot().low_rank.values()} == {6}
    models.randomize(handle, 0.05)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert (expected - base).abs().max() > 1e-3
    adapter = handle.snapshot()
    assert (adapter.spec.rank, adapter.spec.init) == (6, "kaiming")
    assert adapter.provenance["init"] == {"method": init, "rank": 3}
    site = adapter.low_rank["model.layers.0.self_attn.q_proj"]
    assert adapter.spec.scaling_of(6, adapter.spec.alpha) == pytest.approx(site.scaling)
    handle.detach()
    attach(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=2e-6)


def test_frozen_from_the_start_it_is_its_change_of_zero():
    model = models.llama()
    handle = attach(model, begin(model, "pissa"), trainable=False)
    assert {p.shape[0] for p in handle.parameters()[::2]} == {6}
    site = next(iter(handle.snapshot().low_rank.values()))
    assert not (site.B.double() @ site.A.double()).abs().max() > 1e-7


def small(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(2)
    if kind == "embedding":
        return nn.Sequential(nn.Embedding(11, 7)), torch.randint(0, 11, (3, 4))
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), torch.randn(2, 4, 5, 5)
    if kind == "grouped":
        return nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), torch.randn(2, 4, 5)
    return nn.Sequential(nn.Linear(9, 7)), torch.randn(3, 9)


def adapted_weight(weight, kind, A, B, A0, B0, s):
    change = s * (B.flatten(1) @ A.flatten(1) - B0.flatten(1) @ A0.flatten(1))
    return weight + (change.T if kind == "embedding" else change.view(weight.shape))


@pytest.mark.parametrize(
    ("kind", "variant", "compiled"),
    [(k, v, False) for k in ("linear", "conv", "embedding") for v in ("lora", "dora")]
    + [("linear", "lora", True)],
)
def test_every_kind_and_variant_against_its_formula(kind, variant, compiled):
    model, x = small(kind)
    model.double()
    x = x.double() if x.is_floating_point() else x
    weight = model[0].weight.detach().clone()
    start = initial(model, LoRASpec(rank=2, alpha=3, targets="0", init="pissa", variant=variant), 0)
    first = start.adapter.low_rank["0"]
    handle = attach(model, start)
    models.randomize(handle)
    parameters = handle.parameters()
    A, B = (p.detach() for p in parameters[:2])
    full = adapted_weight(weight, kind, A, B, first.A, first.B, first.scaling)
    if variant == "dora":
        length = full.norm(dim=0) if kind == "embedding" else full.flatten(1).norm(dim=1)
        m = parameters[2].detach()
        ratio = m / length
        full = full * (ratio if kind == "embedding" else ratio.view(-1, *(1,) * (full.dim() - 1)))
    run = torch.compile(model, backend="eager", fullgraph=False) if compiled else model
    found = run(x)
    model_of = {"linear": F.linear, "embedding": lambda i, w, b=None: F.embedding(i, w)}
    bias = getattr(model[0], "bias", None)
    if kind == "conv":
        expected = F.conv2d(x, full, bias, padding=1)
    else:
        expected = model_of[kind](x, full, bias)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    adapter = handle.snapshot()
    handle.detach()
    attach(model, adapter)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()


def test_rows_and_weights_reach_the_start_too():
    model, x = small("linear")
    model.double()
    x = x.double()
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    start = initial(model, LoRASpec(rank=2, alpha=3, targets="0", init="olora"), 0)
    handle = attach(model, start)
    models.randomize(handle)
    A, B = handle.parameters()
    first = start.adapter.low_rank["0"]
    full = adapted_weight(weight, "linear", A, B, first.A, first.B, first.scaling)
    rows = ["default", None, {"default": 0.25}]
    with handle.use(rows=rows):
        found = model(x)
    for row, share in enumerate((1.0, 0.0, 0.25)):
        expected = F.linear(x[row], weight + share * (full - weight), bias)
        torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)


def test_dropout_acts_on_what_is_trained_alone():
    model, x = small("linear")
    handle = attach(model, LoRASpec(rank=2, alpha=3, targets="0", init="pissa", dropout=0.5))
    A, B = (p.detach() for p in handle.parameters())
    model.train()
    torch.manual_seed(7)
    found = model(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    expected = F.linear(x, model[0].weight, model[0].bias) + 1.5 * (dropped - x) @ A.T @ B.T
    torch.testing.assert_close(found, expected)


def test_a_copied_model_keeps_its_own_start():
    model, x = small("linear")
    handle = attach(model, LoRASpec(rank=2, alpha=3, targets="0", init="pissa"))
    models.randomize(handle)
    expected = model(x)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(again(x), expected)
    buffer = io.BytesIO()
    torch.save(again, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), expected)
    assert again.double()(x.double()).dtype == torch.float64


def test_what_cannot_begin_so_is_refused():
    model, _ = small("grouped")
    with pytest.raises(TargetError, match="0: a convolution with groups"):
        attach(model, LoRASpec(rank=2, targets="0", init="pissa"))
    model, _ = small("embedding")
    with pytest.raises(TargetError, match="0: no linear"):
        attach(model, LoRASpec(rank=2, targets="0", init="eva"))
    model, _ = small("linear")
    with pytest.raises(TargetError, match="alpha is -2"):
        attach(model, LoRASpec(rank=2, alpha=-2, targets="0", init="pissa"))
    with pytest.raises(TargetError, match=r"needs 2·4 directions of 7"):
        attach(model, LoRASpec(rank=4, targets="0", init="lora-ga"))
    for init, what in (("eva", "batches of data"), ("loftq", "before they were quantised")):
        with pytest.raises(SpecError, match=what):
            attach(model, LoRASpec(rank=2, targets="0", init=init))
    assert not hasattr(model, "lorakit_adapters")


def test_what_a_layer_uses_together_lies_together_whoever_made_the_adapter():
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2, targets="all-linear"))
    shapes = [p.shape for p in handle.parameters()]
    sites = dict(sorted(handle.snapshot().sites.items()))  # as files have them
    by_name = dataclasses.replace(handle.snapshot(), sites=sites)
    handle.detach()
    handle = attach(model, by_name, trainable=True)
    assert [p.shape for p in handle.parameters()] == shapes
    handle.arrange("default", lambda name: 0)
    layer = "model.layers.1.self_attn."
    factors = [handle.snapshot().sites[f"{layer}{name}_proj"].A for name in "qkv"]
    flat, together = handle.flat(), torch.cat(factors).flatten()
    begin = int((flat == together[0]).nonzero()[0])
    assert torch.equal(flat[begin : begin + len(together)], together)


def test_groups_are_stretches_of_the_flat_buffer():
    torch.manual_seed(0)
    model = models.llama()
    handle = attach(model, LoRASpec(rank=2, targets=TARGETS))
    models.randomize(handle)
    before = handle.snapshot()
    ids = torch.randint(0, 100, (1, 6))
    expected = model(input_ids=ids).logits
    same = handle.arrange("default", lambda name: 0)
    assert same == {0: (0, handle.flat().numel())}
    factors = torch.cat([site.A.flatten() for site in before.low_rank.values()])
    assert torch.equal(handle.flat()[: len(factors)], factors), "A's lie together"
    ranges = handle.arrange("default", lambda name: name.endswith("lora_B"))
    flat = handle.flat()
    sites = handle.snapshot().low_rank.values()
    A = torch.cat([site.A.flatten() for site in sites])
    B = torch.cat([site.B.flatten() for site in sites])
    assert torch.equal(flat[slice(*ranges[False])], A)
    assert torch.equal(flat[slice(*ranges[True])], B)
    model(input_ids=ids).logits.sum().backward()
    assert torch.equal(model(input_ids=ids).logits, expected)
    for path, site in before.low_rank.items():
        assert torch.equal(handle.snapshot().low_rank[path].A, site.A)
    assert all(p.grad.data_ptr() >= flat.grad.data_ptr() for p in handle.parameters())
    assert float(flat.grad.abs().sum()) > 0


def test_the_rank_doubles_in_patterns_too():
    model = models.llama()
    spec = LoRASpec(
        rank=3,
        targets=TARGETS,
        init="olora",
        rank_pattern={"o_proj": 2},
        alpha_pattern={"o_proj": 5},
    )
    start = initial(model, spec, 0).adapter
    doubled = since_start(start, start)
    assert doubled.spec.rank_pattern == {"o_proj": 4}
    assert doubled.spec.alpha_pattern == {"o_proj": 10}
    assert doubled.low_rank["model.layers.0.self_attn.o_proj"].rank == 4
