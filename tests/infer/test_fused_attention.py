"""The attention of fused layers: many short segments together, and one by one."""

import pytest
import torch
from torch import nn

from lorakit.infer.fused import attention
from lorakit.infer.fused.attention import attend
from lorakit.infer.segments import Segments

SCALE = 0.3


def plain(*lengths: int) -> Segments:
    return Segments(lengths, (None,) * len(lengths))


def drawn(segments: Segments, heads=4, kv_heads=2, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    count = sum(segments.lengths)
    return [
        torch.randn(count, n, size, generator=generator, dtype=dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def attended(segments: Segments, heads, *, keep=True, softcap=None):
    return attend(
        nn.Module(),
        heads,
        segments,
        scaling=SCALE,
        softcap=softcap,
        prefixes=None,
        fronts=[],
        keep=keep,
    )


def by_formula(segments: Segments, q, k, v):
    """Each segment alone, every step written out."""
    outputs = []
    for a, b, c in zip(*(t.split(segments.lengths) for t in (q, k, v)), strict=True):
        b, c = (t.repeat_interleave(a.shape[1] // t.shape[1], dim=1) for t in (b, c))
        scores = SCALE * torch.einsum("ihd,jhd->hij", a, b)
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, c))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", [(5, 5), (6, 4, 5, 6), (2, 1, 2), (1, 1), (3, 16)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_outputs_and_gradients_are_those_of_the_formula(lengths, heads, kv_heads):
    segments = plain(*lengths)
    *given, d_out = drawn(segments, heads, kv_heads)
    found = attended(segments, given)
    together = lengths != (3, 16)  # it would be 13 tokens of padding for 19
    assert isinstance(found, attention._Together) == together
    gradients, in_front = found.backward(d_out)
    leaves = [t.clone().requires_grad_() for t in given]
    wanted = by_formula(segments, *leaves)
    torch.testing.assert_close(found.output, wanted.detach(), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, leaves, d_out), strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    assert in_front == []


def test_what_is_long_or_unlike_or_masked_or_bounded_goes_one_by_one():
    def together(segments: Segments, **more) -> bool:
        return isinstance(
            attended(segments, drawn(segments)[:3], **more), attention._Together
        )  # heads of 8: up to 16 tokens

    assert together(plain(16, 16))
    assert not together(plain(17, 17))
    assert not together(plain(16))
    assert not together(plain(16, 2))
    assert not together(Segments((3, 3), (None, torch.ones(3, 3, dtype=torch.bool))))
    assert not together(plain(16, 16), softcap=30.0)


def test_nothing_of_an_example_that_is_not_finite_reaches_another():
    segments = plain(4, 6, 5)
    *given, d_out = drawn(segments)
    alone = attended(segments, given)
    wanted = [alone.output, *alone.backward(d_out)[0]]
    for tensor in (*given, d_out):
        tensor[4:10] = float("nan")
    found = attended(segments, given)
    assert isinstance(found, attention._Together)
    for mine, theirs in zip([found.output, *found.backward(d_out)[0]], wanted, strict=True):
        others = [*range(4), *range(10, 15)]
        assert torch.equal(mine[others], theirs[others])
        assert mine[4:10].isnan().all()


def test_half_precision_is_computed_in_float32():
    segments = plain(4, 4)
    *given, _ = (t.bfloat16() for t in drawn(segments))
    found = attended(segments, given)
    assert found.output.dtype == torch.float32
    exact = attended(segments, [t.float() for t in given])
    assert torch.equal(found.output, exact.output)


def test_a_forward_without_gradients_leaves_nothing_that_the_next_cannot_use():
    segments = plain(7, 7, 6)  # of no other test: the layout is made here
    *given, d_out = drawn(segments)
    with torch.inference_mode():
        first = attended(segments, given, keep=False).output
    found = attended(segments, given)
    assert torch.equal(found.output, first)
    found.backward(d_out)
