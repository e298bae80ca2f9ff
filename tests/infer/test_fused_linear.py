"""The products of frozen linears with adapters, where base and adapter have different dtypes."""

import pytest
import torch
from torch import nn

from lorakit.infer.fused.linear import Group, Linear, Part
from lorakit.layers.attention import fused as attention


def _drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_cpu_adapters_are_not_rounded_to_the_dtype_of_the_base(dtype):
    torch.manual_seed(0)
    weight, x, dy = (_drawn(*s, dtype=dtype) for s in ((24, 16), (10, 16), (10, 24)))
    A, B = (nn.Parameter(_drawn(*s, dtype=torch.float32)) for s in ((3, 16), (24, 3)))
    part = Part("a", 2, 9, A, B, None, 0.5, 0.0)
    group = Group([Linear(lambda: weight, None, 0, (part,))])
    with torch.no_grad():
        (y,), hidden = group.forward(x)
        dx, (dA, dB) = group.backward([dy], x, hidden, need_input=True)

    W, X, G = weight.double(), x.double(), dy.double()
    read, given = X[2:9], G[2:9]
    a, b = A.detach().double(), B.detach().double()
    # float32's own precision: nothing between was rounded to the base's
    assert dA.dtype == dB.dtype == torch.float32
    torch.testing.assert_close(dB.double(), 0.5 * given.T @ read @ a.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dA.double(), 0.5 * (given @ b).T @ read, rtol=1e-5, atol=1e-5)
    # outputs are rounded twice: the base's product, and the sum
    change = torch.zeros_like(G)
    change[2:9] = 0.5 * read @ a.T @ b.T
    back = torch.zeros_like(X)
    back[2:9] = 0.5 * given @ b @ a
    for found, base, lora in ((y, X @ W.T, change), (dx, G @ W, back)):
        assert found.dtype == dtype
        bound = torch.finfo(dtype).eps * (base.abs() + (base + lora).abs())
        assert ((found.double() - base - lora).abs() <= bound).all()


def test_attention_in_half_precision_gives_the_gradients_of_float32_rounded():
    torch.manual_seed(0)
    q, k, v = (_drawn(1, heads, 7, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    d_out = _drawn(1, 4, 7, 8, dtype=torch.bfloat16)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        heads = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*heads, None, 0.0, None)
        assert out.dtype == dtype
        return list(torch.autograd.grad(out, heads, d_out.to(dtype)))

    for found, wanted in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, wanted.bfloat16(), rtol=0, atol=0)
