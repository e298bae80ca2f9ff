"""The products of frozen linears with adapters, where base and adapter have different dtypes."""

import pytest
import torch
from torch import nn

from lorakit.infer.fused.linear import Group, Linear, Part
from lorakit.infer.segments import Segments, segment_attention
from lorakit.layers.gradients import FlatGradient


def _drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


class Case:
    """Two linears of one input and an adapter on some rows; numbers as they should be, float64."""

    rows = slice(2, 9)

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.x, self.onto = (_drawn(10, 16, dtype=dtype) for _ in range(2))
        self.weights = [_drawn(d, 16, dtype=dtype) for d in (16, 24)]
        self.bias = _drawn(16, dtype=dtype)
        self.douts = [_drawn(10, d, dtype=dtype) for d in (16, 24)]
        self.parts, linears = [], []
        for number, weight in enumerate(self.weights):
            shapes = ((3, 16), (len(weight), 3), (len(weight),))
            A, B, bias = (nn.Parameter(_drawn(*s, dtype=torch.float32)) for s in shapes)
            part = Part("a", 2, 9, A, B, bias, 0.5, 0.0)
            self.parts.append(part)
            frozen = None if number else self.bias
            linears.append(Linear(lambda weight=weight: weight, frozen, number, (part,)))
        self.group = Group(linears)

    def run(self) -> tuple[list[torch.Tensor], torch.Tensor, dict[nn.Parameter, torch.Tensor]]:
        """Outputs, the input's gradient, and the parameters'."""
        with torch.no_grad():
            ys, hidden = self.group.forward(self.x)
            dx, found = self.group.backward(self.douts, self.x, hidden, need_input=True)
        return ys, dx, dict(zip(self.group.parameters(), found, strict=True))


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_cpu_adapters_are_not_rounded_to_the_dtype_of_the_base(dtype, placed):
    case = Case(dtype)
    parameters = [p for part in case.parts for p in (part.A, part.B, part.bias)]
    if placed:
        flat = FlatGradient(parameters)
        case.group = Group(case.group.linears)
        ys, dx, found = case.run()
        assert not found
        pieces = flat.collect().split([p.numel() for p in parameters])
        found = {p: g.view_as(p) for p, g in zip(parameters, pieces, strict=True)}
    else:
        ys, dx, found = case.run()
    x, read = case.x.double(), case.x[case.rows].double()
    eps = torch.finfo(dtype).eps
    back, whole = torch.zeros_like(x), torch.zeros_like(x)
    for number, (part, weight, dy, y) in enumerate(
        zip(case.parts, case.weights, case.douts, ys, strict=True)
    ):
        A, B, bias = (p.detach().double() for p in (part.A, part.B, part.bias))
        given = dy[case.rows].double()
        # float32's own precision: nothing between was rounded to the base's
        for parameter, wanted in (
            (part.A, 0.5 * (given @ B).T @ read),
            (part.B, 0.5 * given.T @ read @ A.T),
            (part.bias, 0.5 * given.sum(0)),
        ):
            assert found[parameter].dtype == torch.float32
            torch.testing.assert_close(found[parameter].double(), wanted, rtol=1e-5, atol=1e-5)
        base = x @ weight.double().T + (0 if number else case.bias.double())
        change = torch.zeros_like(base)
        change[case.rows] = 0.5 * (read @ A.T @ B.T + bias)
        assert y.dtype == dtype  # rounded twice: the base's product, and the sum
        assert (
            (y.double() - base - change).abs() <= eps * (base.abs() + (base + change).abs())
        ).all()
        whole += dy.double() @ weight.double()
        back[case.rows] += 0.5 * given @ B @ A
    assert dx.dtype == dtype
    assert (
        (dx.double() - whole - back).abs() <= 3 * eps * (whole.abs().max() + back.abs().max())
    ).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_onto_a_residual_an_adapter_without_effect_changes_no_bit(dtype):
    case = Case(dtype)
    for part in case.parts:
        part.B.data.zero_()
        part.bias.data.zero_()
    first = case.group.linears[0]
    with torch.no_grad():
        (alone,), _ = Group([Linear(first.weight, first.bias, 0)]).forward(case.x, case.onto)
        (adapted,), _ = Group([first]).forward(case.x, case.onto)
        wanted = case.onto.double() + case.x.double() @ case.weights[0].double().T + case.bias
    assert torch.equal(adapted, alone)
    torch.testing.assert_close(alone.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=0.1)


def test_attention_of_packed_rows_gives_the_gradients_of_float32_rounded():
    torch.manual_seed(0)
    q, k, v = (_drawn(1, heads, 7, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    d_out = _drawn(1, 7, 4, 8, dtype=torch.bfloat16)
    segments = Segments((4, 3), (None, torch.ones(3, 3, dtype=torch.bool)))

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        heads = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out, _ = segment_attention(nn.Module(), *heads, segments, fronts=(None, None))
        assert out.dtype == dtype
        return list(torch.autograd.grad(out, heads, d_out.to(dtype)))

    for found, wanted in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted.bfloat16())
