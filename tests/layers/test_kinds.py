"""Every layer kind against a float64 formula that is written here, independently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import LoRASpec
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from lorakit.errors import TargetError
from lorakit.layers import attach

from ..models import randomize

LIMIT = 1e-12


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def run(inner: nn.Module, x: torch.Tensor, rank: int, scaling: str = "alpha/r"):
    """(base output, adapted output, A, B, s) as NumPy arrays."""
    model = Holder(inner.double())
    with torch.no_grad():
        before = model(x).clone()
        handle = attach(model, LoRASpec(rank=rank, alpha=6.0, targets="inner", scaling=scaling))
        assert torch.equal(model(x), before), "the first forward must be the base's"
        randomize(handle, 0.5)
        after = model(x)
    site = handle.snapshot().sites["inner"]
    s = 6.0 / rank if scaling == "alpha/r" else 6.0 / math.sqrt(rank)
    return before.numpy(), after.numpy(), site.A.numpy(), site.B.numpy(), s


def difference(first, second) -> float:
    return float(np.abs(first - second).max())


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (1, 12)])
def test_linear(shape, scaling):
    x = torch.randn(shape, dtype=torch.float64)
    before, after, A, B, s = run(nn.Linear(12, 7), x, 3, scaling)
    expected = before + s * np.einsum("...i,ri,or->...o", x.numpy(), A, B)
    assert difference(after, expected) <= LIMIT


def test_linear_formula_on_the_weight():
    """The same through the dense weight: x (W + s·B·A)ᵀ + b."""
    layer = nn.Linear(12, 7)
    x = torch.randn(4, 12, dtype=torch.float64)
    _, after, A, B, s = run(layer, x, 3)
    W = layer.weight.detach().numpy() + s * (B @ A)
    assert difference(after, x.numpy() @ W.T + layer.bias.detach().numpy()) <= LIMIT


def test_transposed_linear_of_gpt2():
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    before, after, A, B, s = run(Conv1D(7, 12), x, 3)
    assert difference(after, before + s * (x.numpy() @ A.T) @ B.T) <= LIMIT


def test_embedding():
    ids = torch.tensor([[0, 5, 5], [9, 1, 0]])
    before, after, A, B, s = run(nn.Embedding(10, 6), ids, 2)
    expected = before.copy()
    for i in range(2):
        for j in range(3):
            expected[i, j] += s * B @ A[:, int(ids[i, j])]
    assert difference(after, expected) <= LIMIT


def test_scaled_embedding():
    """Gemma's and BART's embeddings multiply inside; the change is multiplied too."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    layer = Gemma3TextScaledWordEmbedding(10, 6, padding_idx=0, embed_scale=3.0)
    ids = torch.tensor([[1, 2, 9]])
    before, after, A, B, s = run(layer, ids, 2)
    assert difference(after, before + 3.0 * s * A.T[ids.numpy()] @ B.T) <= LIMIT


class Positions(nn.Embedding):
    """It counts its positions itself, as those of BART, LED and Whisper do."""

    def forward(self, ids, past=0):
        return super().forward(past + torch.arange(ids.shape[1]).expand(ids.shape))


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Grouped(nn.Linear):
    """A linear for each group of its input, as DeepSeek-V4 has it."""

    def forward(self, x):
        weight = self.weight.view(3, -1, x.shape[-1]).transpose(1, 2)
        y = torch.bmm(x.reshape(-1, 3, x.shape[-1]).transpose(0, 1), weight).transpose(0, 1)
        return y.reshape(*x.shape[:-2], 3, -1)


class Own(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize(
    "module",
    [Positions(9, 4), Normed(9, 4), Standardised(2, 4, 3), Grouped(4, 6)],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_something_else_is_refused(module):
    model = nn.ModuleDict({"inner": module, "other": Own(4, 4)})
    for targets in ("inner", r".*inner"):
        with pytest.raises(TargetError):
            attach(model, LoRASpec(rank=1, targets=targets))
    with pytest.raises(TargetError, match=f"{type(module).__name__}.*something else than the prod"):
        attach(model, LoRASpec(rank=1, targets="inner"))
    handle = attach(model, LoRASpec(rank=1))
    assert list(handle.snapshot().sites) == ["other"], "a forward of its own that is the product"


def naive_conv(x, weight, stride, padding, dilation, groups=1):
    """Cross-correlation by its definition; all arguments per spatial dimension."""
    dims = x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    n, c_out, kernel = x.shape[0], weight.shape[0], weight.shape[2:]
    size = [
        (x.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(dims)
    ]
    out = np.zeros((n, c_out, *size))
    per_in, per_out = weight.shape[1], c_out // groups
    for place in np.ndindex(*size):
        for tap in np.ndindex(*kernel):
            where = tuple(place[d] * stride[d] + tap[d] * dilation[d] for d in range(dims))
            values = x[(slice(None), slice(None), *where)]
            for g in range(groups):
                outs = slice(g * per_out, (g + 1) * per_out)
                part = values[:, g * per_in : (g + 1) * per_in]
                out[(slice(None), outs, *place)] += part @ weight[(outs, slice(None), *tap)].T
    return out


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 2, 1), (1, 2, 2)])
def test_convolutions(dims, groups, stride, padding, dilation):
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    kernel = (3, 2, 1)[:dims]
    layer = make(
        4, 6, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
    ).double()
    x = torch.randn(2, 4, *(7, 6, 5)[:dims], dtype=torch.float64)
    before, after, A, B, s = run(layer, x, 4)
    each = [(v,) * dims for v in (stride, padding, dilation)]
    W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    # the naive convolution itself is checked against the base first
    own = naive_conv(x.numpy(), W, *each, groups=groups) + b.reshape(1, -1, *([1] * dims))
    assert difference(before, own) <= LIMIT
    hidden = naive_conv(x.numpy(), A, *each)
    ones = [(v,) * dims for v in (1, 0, 1)]
    assert difference(after, before + s * naive_conv(hidden, B, *ones, groups=groups)) <= LIMIT


def test_convolution_with_circular_padding():
    layer = nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular").double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    before, after, A, B, s = run(layer, x, 2)
    wrapped = np.concatenate([x.numpy()[..., -1:], x.numpy(), x.numpy()[..., :1]], axis=-1)
    hidden = naive_conv(wrapped, A, (1,), (0,), (1,))
    assert difference(after, before + s * np.einsum("nrl,or->nol", hidden, B[..., 0])) <= LIMIT


def test_bias_of_b_is_scaled():
    layer = nn.Linear(5, 4).double()
    model = Holder(layer)
    x = torch.randn(3, 5, dtype=torch.float64)
    A, B, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 5), (4, 2), (4,)))
    adapter = Adapter({"inner": LowRank(A, B, 0.5, bias=bias)})
    before = model(x).detach()
    attach(model, adapter)
    expected = before + 0.5 * (x @ A.T @ B.T + bias)
    assert difference(model(x).detach().numpy(), expected.numpy()) <= LIMIT


def test_quantised_linear_is_a_black_box():
    bnb = pytest.importorskip("bitsandbytes")
    with _quiet():
        model = Holder(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32))
        model = model.to("cpu")
        x = torch.randn(3, 64)
        before = model(x).detach()
        assert model.inner.weight.dtype == torch.uint8, "it must really be quantised"
        handle = attach(model, LoRASpec(rank=4, alpha=8.0, targets="inner"))
        assert torch.equal(model(x), before)
        randomize(handle)
        A, B = (p.detach() for p in handle.parameters())
        expected = before + 2.0 * (x @ A.T) @ B.T
        assert torch.allclose(model(x), expected, atol=1e-4)  # float32, 64-term sums
        model(x).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in handle.parameters())


def _quiet():
    import contextlib
    import warnings

    @contextlib.contextmanager
    def block():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bitsandbytes speaks of kernels it has not
            yield

    return block()


def test_half_precision_base_casts_the_factors():
    model = Holder(nn.Linear(16, 8).bfloat16())
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    before = model(x)
    handle = attach(model, LoRASpec(rank=2, targets="inner"))
    assert torch.equal(model(x), before)
    assert all(p.dtype == torch.float32 for p in handle.parameters())
    randomize(handle)
    assert model(x).dtype == torch.bfloat16
    model(x).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in handle.parameters())
