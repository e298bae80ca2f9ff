"""DoRA on every kind of layer against float64 formulas on the dense weight, written here."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import LoRASpec
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Replace
from lorakit.errors import FormatError, TargetError
from lorakit.layers import Routing, attach, token_keys

from .. import models
from .test_handle import ALL, inputs, output

#: sums of at most a hundred products of order 1 in float64
LIMIT = 1e-12
IDS = torch.tensor([[0, 5, 5], [9, 1, 0]])
IMAGE = (2, 4, 7, 6)


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


#: kind → (module, input)
KINDS = {
    "linear": (lambda: nn.Linear(12, 7), lambda: torch.randn(2, 3, 12)),
    "linear without bias": (lambda: nn.Linear(12, 7, bias=False), lambda: torch.randn(5, 12)),
    "Conv1D of GPT-2": (lambda: Conv1D(7, 12), lambda: torch.randn(2, 3, 12)),
    "embedding": (lambda: nn.Embedding(10, 6), lambda: IDS),
    "conv 1": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv 2": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2), lambda: torch.randn(*IMAGE)),
    "conv 2, unbatched": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(*IMAGE[1:])),
    "conv 3": (lambda: nn.Conv3d(4, 6, (1, 2, 3), bias=False), lambda: torch.randn(2, 4, 3, 4, 5)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), lambda: torch.randn(*IMAGE)),
}


def dense(kind: str, layer: nn.Module) -> torch.Tensor:
    """The weight with its outputs first and all of its inputs, also where groups leave some out."""
    W = layer.weight
    if kind in ("Conv1D of GPT-2", "embedding"):
        return W.T
    if kind == "grouped conv":
        full = W.new_zeros(6, 4, *W.shape[2:])
        full[:3, :2], full[3:, 2:] = W[:3], W[3:]
        return full
    return W


def product(kind: str, A: torch.Tensor, B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """B A in the shape of the dense weight."""
    if kind == "grouped conv":
        half = len(A) // 2
        parts = [B[:3].flatten(1) @ A[:half].flatten(1), B[3:].flatten(1) @ A[half:].flatten(1)]
        return torch.cat(parts).view(like.shape)
    return (B.flatten(1) @ A.flatten(1)).view(like.shape)


def adapted_weight(kind, layer, A, B, magnitude, s):
    """magnitude · (W + s·B A) / ‖W + s·B A‖, the length being a constant for the gradient."""
    V = dense(kind, layer)
    V = V + s * product(kind, A, B, V)
    column = (-1, *(1 for _ in V.shape[1:]))
    lengths = V.detach().flatten(1).square().sum(1).sqrt().view(column)
    return magnitude.view(column) * V / lengths


def apply(kind: str, layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if kind == "embedding":
        return F.embedding(x, weight.T)
    if "conv" in kind:
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
        return conv(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    return F.linear(x, weight, layer.bias)


def made(kind: str, rank: int = 4, **settings):
    """(layer, input, model, handle) with random values in the adapter, all in float64."""
    build, draw = KINDS[kind]
    layer, x = build().double(), draw()
    x = x.double() if x.is_floating_point() else x
    model = Holder(layer)
    before = model(x).detach()
    spec = LoRASpec(rank=rank, alpha=6.0, targets="inner", variant="dora", **settings)
    handle = attach(model, spec)
    assert torch.equal(model(x).detach(), before), "the first forward must be the base's"
    models.randomize(handle, 0.5)
    return layer, x, model, handle


def values(handle, name="default"):
    site = handle.snapshot(name).sites["inner"]
    return site.A, site.B, site.magnitude


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_formula(kind):
    layer, x, model, handle = made(kind)
    expected = apply(kind, layer, adapted_weight(kind, layer, *values(handle), 1.5), x)
    assert (model(x) - expected).abs().max() <= LIMIT
    plain = apply(kind, layer, dense(kind, layer), x)
    assert (model(x) - plain).abs().max() > 0.1, "the adapter does something"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    layer, x, model, handle = made(kind)
    own = [v.clone().requires_grad_() for v in values(handle)]
    y = apply(kind, layer, adapted_weight(kind, layer, *own, 1.5), x)
    weights = torch.randn(y.shape, dtype=torch.float64)
    (y * weights).sum().backward()
    (model(x) * weights).sum().backward()
    for mine, expected in zip(handle.parameters(), own, strict=True):
        assert expected.grad.abs().max() > 1e-3
        assert (mine.grad - expected.grad).abs().max() <= 1e-12 * expected.grad.abs().max() + 1e-12


def test_a_length_in_the_graph_would_be_seen():
    """The gradient of A with the length inside of the graph is another one."""
    layer, x, _, handle = made("linear")
    found = []
    for inside in (True, False):
        A, B, m = (v.clone().requires_grad_() for v in values(handle))
        V = layer.weight + 1.5 * B @ A
        lengths = V.norm(dim=1, keepdim=True)
        F.linear(x, m[:, None] * V / (lengths if inside else lengths.detach())).sum().backward()
        found.append(A.grad)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("weight", [0.3, -1.5, 0.0])
def test_a_weight_scales_the_change(weight):
    layer, x, model, handle = made("linear")
    expected = apply("linear", layer, adapted_weight("linear", layer, *values(handle), 1.5), x)
    base = F.linear(x, layer.weight, layer.bias)
    with handle.use({"default": weight}):
        assert (model(x) - (base + weight * (expected - base))).abs().max() <= LIMIT


@pytest.mark.parametrize("kind", ["linear", "conv 2", "embedding", "grouped conv"])
def test_rows_and_blends_with_plain_lora(kind):
    """Each delta is taken from the base's output, whatever else acts on the row."""
    layer, x, model, handle = made(kind)
    handle.add(LoRASpec(rank=2, alpha=2.0, targets="inner"), "plain")
    handle.add(LoRASpec(rank=2, alpha=1.0, targets="inner", variant="dora"), "other")
    models.randomize(handle, 0.3)
    alone = {}
    for name in (None, "default", "plain", "other"):
        with handle.use(name):
            alone[name] = model(x).detach()
    scale = handle.snapshot().sites["inner"].scaling
    expected = apply(kind, layer, adapted_weight(kind, layer, *values(handle), scale), x)
    assert (alone["default"] - expected).abs().max() <= LIMIT
    mixes = [{"default": 0.3, "plain": 2.0, "other": -0.5}, "default"]
    with handle.use(rows=mixes):
        joint = model(x)
    blend = alone[None][0].clone()
    for name, weight in mixes[0].items():
        blend += weight * (alone[name] - alone[None])[0]
    assert (joint[0] - blend).abs().max() <= LIMIT
    assert (joint[1] - alone["default"][1]).abs().max() <= LIMIT
    with handle.use(mixes[0]):
        assert (model(x)[0] - blend).abs().max() <= LIMIT


def test_tokens_of_a_packed_batch():
    _, _, model, handle = made("linear")
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    with handle.use("default"):
        adapted = model(x).detach()
    with handle.use(None):
        bare = model(x).detach()
    with handle.use(Routing.tokens([(None, 2), ("default", 3), ({"default": 0.5}, 1)])):
        found = model(x)
    expected = torch.cat([bare[:, :2], adapted[:, 2:5], (bare + adapted)[:, 5:] / 2], dim=1)
    assert (found - expected).abs().max() <= LIMIT


def test_dropout_acts_on_both_parts():
    """As in PEFT and the authors' code: y0 + (g − 1)·W·drop(x) + g·s·B A·drop(x)."""
    layer, x, model, handle = made("linear", dropout=0.5)
    model.train()
    keys = token_keys(0, 0, torch.arange(6).view(2, 3), torch.zeros(2, 3, dtype=torch.long))
    with handle.use(Routing.uniform("default").with_dropout_keys(keys)):
        found = model(x).detach()
    from lorakit.layers.dropout import keyed_dropout, site_number

    dropped = keyed_dropout(x, keys, site_number("inner"), 0.5)
    assert not torch.equal(dropped, x)
    changed = adapted_weight("linear", layer, *values(handle), 1.5) - layer.weight
    expected = F.linear(x, layer.weight, layer.bias) + F.linear(dropped, changed)
    assert (found - expected).abs().max() <= LIMIT
    model.eval()
    full = apply("linear", layer, adapted_weight("linear", layer, *values(handle), 1.5), x)
    assert (model(x) - full).abs().max() <= LIMIT


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_beside_a_trained_bias(weight):
    """The bias is not rescaled, whichever it is."""
    layer, x, model, handle = made("linear", bias="lora")
    bias = handle.snapshot().sites["inner.bias"].tensors_by_name[""]
    assert not torch.equal(bias, layer.bias)
    changed = F.linear(x, adapted_weight("linear", layer, *values(handle), 1.5), bias)
    base = F.linear(x, layer.weight, layer.bias)
    with handle.use({"default": weight}):
        assert (model(x) - (base + weight * (changed - base))).abs().max() <= LIMIT
    with handle.use(rows=[{"default": weight}, None]):
        found = model(x)
    assert (found[0] - (base + weight * (changed - base))[0]).abs().max() <= LIMIT
    assert (found[1] - base[1]).abs().max() <= LIMIT


def test_beside_a_replaced_weight():
    """The lengths are those of the weight that the adapter brings along."""
    layer = nn.Embedding(10, 6).double()
    own, A, B = (torch.randn(*s, dtype=torch.float64) for s in ((10, 6), (2, 10), (6, 2)))
    m = torch.rand(6, dtype=torch.float64)
    sites = {"inner": LowRank(A, B, 0.5, "embedding", magnitude=m)}
    model = Holder(layer)
    attach(model, Adapter({**sites, "inner.weight": Replace({"": own})}))
    V = own.T + 0.5 * B @ A
    expected = F.embedding(IDS, (m[:, None] * V / V.norm(dim=1, keepdim=True)).T)
    assert (model(IDS) - expected).abs().max() <= LIMIT


def test_scaled_embedding():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    layer = Gemma3TextScaledWordEmbedding(10, 6, padding_idx=0, embed_scale=3.0).double()
    model = Holder(layer)
    handle = attach(model, LoRASpec(rank=4, alpha=6.0, targets="inner", variant="dora"))
    models.randomize(handle)
    expected = adapted_weight("embedding", layer, *values(handle), 1.5)
    assert (model(IDS) - 3.0 * F.embedding(IDS, expected.T)).abs().max() <= LIMIT


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(1, 6), st.floats(-3, 3), st.integers(0, 99)
)
def test_lengths_from_the_factors(rank, d_in, d_out, scaling, seed):
    generator = torch.Generator().manual_seed(seed)
    W, A, B = (
        torch.randn(*s, generator=generator, dtype=torch.float64)
        for s in ((d_out, d_in), (rank, d_in), (d_out, rank))
    )
    layer = nn.Linear(d_in, d_out, bias=False).double()
    layer.weight.data = W
    model = Holder(layer)
    magnitude = torch.rand(d_out, generator=generator, dtype=torch.float64)
    attach(model, Adapter({"inner": LowRank(A, B, scaling, magnitude=magnitude)}))
    V = W.numpy() + scaling * B.numpy() @ A.numpy()
    lengths = np.sqrt((V**2).sum(1, keepdims=True))
    found = model(torch.eye(d_in, dtype=torch.float64)).T.numpy()
    # a sum of squares that cancel loses digits as its result is smaller than its parts
    parts = (W.numpy() ** 2).sum(1) + ((V - W.numpy()) ** 2).sum(1)
    lost = (parts / lengths[:, 0] ** 2)[:, None]
    assert (np.abs(found - magnitude.numpy()[:, None] * V / lengths) <= 1e-12 * lost).all()


def test_weights_in_blocks(monkeypatch):
    """A half-precision weight is cast in blocks of rows, to the same lengths."""
    from lorakit.layers import dora

    layer = nn.Linear(8, 10).bfloat16()
    whole = dora.weight_lengths(layer, torch.float32)
    monkeypatch.setattr(dora, "BLOCK_NUMBERS", 24)
    assert torch.equal(dora.weight_lengths(layer, torch.float32), whole)
    assert torch.allclose(whole, layer.weight.float().norm(dim=1))


def test_an_output_without_weights():
    """Zero has no direction: there it begins as plain LoRA, and nothing becomes NaN."""
    layer = nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.weight[1] = 0.0
    model, x = Holder(layer), torch.randn(5, 4, dtype=torch.float64)
    before = model(x).detach()
    handle = attach(model, LoRASpec(rank=2, targets="inner", variant="dora"))
    assert torch.equal(model(x).detach(), before)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1.0).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in handle.parameters())
    assert not torch.equal(model(x)[:, 1], before[:, 1])


def test_half_precision_base():
    """The factor is float32; bfloat16 would round 1.002 to 1."""
    model = Holder(nn.Linear(64, 16).bfloat16())
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    before = model(x)
    handle = attach(model, LoRASpec(rank=2, targets="inner", variant="dora"))
    assert torch.equal(model(x), before)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    bias = model.inner.bias.detach()
    with torch.no_grad():
        handle.parameters()[2].mul_(1.002)
    # the weight makes of the small change one that the output's own 8 bits can show
    with handle.use({"default": 100.0}):
        change = (model(x) - before).float().detach()
    expected = 0.2 * (before - bias).float().detach()
    assert (change - expected).abs().max() <= 2**-7 * before.abs().max()
    model(x).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in handle.parameters())


def test_under_autocast():
    _, _, model, _ = made("linear")
    model.float()
    x = torch.randn(4, 12)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_bases(kind):
    """The lengths are those of the dequantised weight: the same as on a dense layer of it."""
    bnb = pytest.importorskip("bitsandbytes")
    from lorakit.bases.quantize import keep_bytes_in_order_

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes speaks of kernels it has not
        options = {"quant_type": "nf4", "compute_dtype": torch.float32}
        options = options if kind == "Linear4bit" else {"has_fp16_weights": False}
        model = Holder(getattr(bnb.nn, kind)(64, 32, **options)).to("cpu")
        keep_bytes_in_order_(model)
        x = torch.randn(3, 64)
        before = model(x).detach()
        with torch.no_grad():
            eye = model(torch.eye(64)) - model(torch.zeros(1, 64))
        handle = attach(model, LoRASpec(rank=4, alpha=8.0, targets="inner", variant="dora"))
        assert torch.equal(model(x), before)
        models.randomize(handle)
        A, B, m = values(handle)
        bias = model.inner.bias.detach().float()
        V = eye.T.float() + 2.0 * B @ A
        expected = x @ (m[:, None] * V / V.norm(dim=1, keepdim=True)).T + bias
        found = model(x)
        # int8 also rounds the activations, by row, of both
        limit = 1e-4 if kind == "Linear4bit" else 0.02 * float(expected.abs().max())
        assert (found - expected).abs().max() <= limit
        found.sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in handle.parameters())


class Strange(nn.Module):
    """A linear by its features, whose weight nobody can read."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.register_buffer("weight", torch.zeros(4, 6, dtype=torch.int16))

    def forward(self, x):
        return x[..., :4]


@pytest.mark.parametrize("given", [False, True])
def test_a_weight_that_cannot_be_read_is_refused(given):
    model = Holder(Strange())
    site = LowRank(torch.ones(2, 6), torch.ones(4, 2), 1.0, magnitude=torch.ones(4))
    what = Adapter({"inner": site}) if given else LoRASpec(rank=2, targets="inner", variant="dora")
    with pytest.raises(
        TargetError, match=r"(?s)DoRA needs the lengths.*inner: its weight is stored"
    ):
        attach(model, what)
    attach(model, LoRASpec(rank=2, targets="inner"))  # plain LoRA takes it as it is


def test_an_offloaded_weight_is_refused():
    model = Holder(nn.Linear(6, 4, device="meta"))
    with pytest.raises(TargetError, match="offloaded"):
        attach(model, LoRASpec(rank=2, targets="inner", variant="dora"))


def test_a_bias_of_b_beside_a_magnitude_is_no_adapter():
    site = LowRank(torch.ones(2, 6), torch.ones(4, 2), 1.0, bias=torch.ones(4),
                   magnitude=torch.ones(4))  # fmt: skip
    with pytest.raises(FormatError, match="a bias of B and a magnitude"):
        Adapter({"inner": site})


def counted(monkeypatch):
    """How often a length is computed."""
    from lorakit.layers import dora

    calls = []
    real = dora._overlap_and_squares
    monkeypatch.setattr(
        dora, "_overlap_and_squares", lambda *args: (calls.append(1), real(*args))[1]
    )
    return calls


def test_a_frozen_adapters_factor_is_kept_until_something_changes(monkeypatch):
    layer, x, model, handle = made("linear")
    adapter = handle.snapshot()
    handle.detach()
    handle = attach(model, adapter)
    calls = counted(monkeypatch)
    with torch.inference_mode():
        first = model(x)
        model(x)
    assert len(calls) == 1
    with torch.no_grad():
        layer.weight.mul_(2.0)
    expected = apply("linear", layer, adapted_weight("linear", layer, *values(handle), 1.5), x)
    assert (model(x) - expected).abs().max() <= LIMIT
    assert (model(x) - first).abs().max() > 0.01
    with torch.no_grad():
        handle.parameters()[1].mul_(2.0)
    expected = apply("linear", layer, adapted_weight("linear", layer, *values(handle), 1.5), x)
    assert (model(x) - expected).abs().max() <= LIMIT
    assert len(calls) == 3
    # what inference mode has kept may take part in a later backward
    handle.add(LoRASpec(rank=2, targets="inner"), "plain")
    with torch.no_grad():
        handle.parameters("default")[1].mul_(1.5)
    with torch.inference_mode():
        model(x)
    with handle.use({"default": 1.0, "plain": 1.0}):
        model(x).sum().backward()
    assert handle.parameters("plain")[1].grad.abs().sum() > 0


def test_a_trained_adapters_factor_is_new_each_time(monkeypatch):
    _, x, model, handle = made("linear")
    calls = counted(monkeypatch)
    flat = handle.flat()
    before = model(x).detach()
    with torch.no_grad():
        flat.add_(0.1)
    assert (model(x) - before).abs().max() > 0.01
    assert len(calls) == 2


def test_a_copied_model_computes_its_own():
    layer, x, model, _ = made("linear")
    expected = model(x).detach()
    other = copy.deepcopy(model)
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("kind", ALL)
def test_models(kind):
    """Attaching is a no-op bit for bit; what is trained comes back as a value; detach is clean."""
    make, targets = ALL[kind]
    model = make()
    expected = output(model, kind)
    handle = attach(model, LoRASpec(rank=2, targets=targets, variant="dora"))
    assert torch.equal(output(model, kind), expected)
    models.randomize(handle, 0.05)
    changed = output(model, kind)
    assert not torch.equal(changed, expected)
    adapter = handle.snapshot()
    assert adapter.spec.variant == "dora"
    assert all(site.magnitude is not None for site in adapter.low_rank.values())
    flat = handle.flat()
    assert flat.numel() == adapter.num_parameters
    handle.detach()
    assert torch.equal(output(model, kind), expected)
    attach(model, adapter)
    assert (output(model, kind) - changed).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "embedding"])
def test_the_base_is_bitwise_unchanged_after_training(kind):
    make, targets = ALL[kind]
    model = make()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = attach(model, LoRASpec(rank=2, targets=targets, variant="dora", dropout=0.1)).flat()
    start = handle.detach().clone()
    model.train()
    optimizer = torch.optim.AdamW([handle], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**inputs(kind)).logits.square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        handle.grad.zero_()
    assert losses[-1] < losses[0]
    assert not torch.equal(handle, start)
    for name, p in model.named_parameters():
        if name in base:
            assert p.grad is None
            assert torch.equal(p, base[name]), name


def test_compiled_code_takes_every_routing():
    import torch._dynamo.testing

    model = nn.Sequential(nn.Linear(6, 8), nn.Conv1d(3, 5, 3, groups=1)).double()
    handle = attach(model, LoRASpec(rank=2, targets=("0", "1"), variant="dora"), "a")
    handle.add(LoRASpec(rank=2, targets=("0", "1")), "b")
    models.randomize(handle, 0.1)
    frozen = dataclasses.replace(handle.snapshot("a"))
    handle.add(frozen, "c")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        for routing in ({"mix": "a"}, {"rows": ["c", {"a": 0.5, "b": 2.0}]}, {"mix": None}):
            with handle.use(**routing):
                assert (compiled(x) - model(x)).abs().max() <= LIMIT
    assert counter.frame_count == 1


def test_recomputed_under_activation_checkpointing():
    model = models.llama().double()
    handle = attach(model, LoRASpec(rank=2, variant="dora"))
    models.randomize(handle, 0.1)
    model.train()
    ids = inputs("llama")["input_ids"]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        handle.flat().grad.zero_()
        model(ids).logits.square().mean().backward()
        found.append(handle.flat().grad.clone())
    assert (found[0] - found[1]).abs().max() <= LIMIT
    assert found[0].abs().max() > 0
