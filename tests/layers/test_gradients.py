"""One flat gradient: in place or through autograd, once or several times, it is the same sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.layers.gradients import (
    FlatGradient,
    gradient_product,
    gradient_products,
    gradient_sum,
    has_place,
    one_below_the_other,
)

M, N, ROWS = 5, 3, 7


@pytest.fixture
def drawn() -> tuple[list[nn.Parameter], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(M, N, dtype=torch.float64)) for _ in range(3)]
    left = torch.randn(ROWS, M, dtype=torch.float64, generator=generator)
    right = torch.randn(ROWS, N, dtype=torch.float64, generator=generator)
    return parameters, left, right


def test_products_are_added_where_the_parameter_has_its_place(drawn):
    parameters, left, right = drawn
    flat = FlatGradient(parameters)
    assert gradient_product(parameters[1], left, right, 0.5) is None
    assert gradient_product(parameters[1], left, right, 2.0) is None  # used twice in one forward
    assert gradient_sum(parameters[2], torch.ones(M, N)) is None  # of another dtype
    parameters[2].grad = torch.full((M, N), 3.0, dtype=torch.float64)  # by autograd, elsewhere
    found = flat.collect()
    expected = torch.cat(
        [torch.zeros(M * N), (2.5 * left.T @ right).reshape(-1), torch.full((M * N,), 4.0)]
    )
    torch.testing.assert_close(found, expected.double(), rtol=1e-12, atol=1e-12)
    assert torch.equal(flat.collect(), found)  # asking again adds nothing
    assert all(p.grad is None for p in parameters)


def test_what_was_there_before_is_forgotten_even_where_it_is_not_finite(drawn):
    parameters, left, right = drawn
    flat = FlatGradient(parameters)
    for parameter in parameters:
        gradient_product(parameter, left * float("nan"), right)
    assert not torch.isfinite(flat.collect()).any()
    flat.clear()
    gradient_product(parameters[0], left, right)
    found = flat.collect()
    torch.testing.assert_close(found[: M * N], (left.T @ right).reshape(-1), rtol=1e-12, atol=0)
    assert not found[M * N :].any()


def test_a_part_without_rows_adds_nothing_and_leaves_nothing_behind(drawn):
    # in the last layer, where an adapter's part of a forward has no supervised token
    parameters, left, right = drawn
    flat = FlatGradient(parameters)
    gradient_product(parameters[0], left * float("nan"), right)
    flat.clear()
    for parameter in parameters:
        assert gradient_product(parameter, left[:0], right[:0]) is None
    gradient_product(parameters[1], left, right)
    found = flat.collect()
    torch.testing.assert_close(
        found[M * N : 2 * M * N], (left.T @ right).reshape(-1), rtol=1e-12, atol=0
    )
    assert not found[: M * N].any()
    assert not found[2 * M * N :].any()


def test_without_a_place_the_gradient_is_given_back(drawn):
    parameters, left, right = drawn
    assert not has_place(parameters[0])
    product = gradient_product(parameters[0], left, right, 0.5)
    assert product is not None
    torch.testing.assert_close(product, 0.5 * left.T @ right, rtol=1e-12, atol=0)
    flat = FlatGradient(parameters)
    assert all(has_place(p) for p in parameters)
    flat.release()
    assert not any(has_place(p) for p in parameters)
    assert gradient_product(parameters[0], left, right) is not None


@pytest.mark.parametrize("known", [(0, 1, 2), (0, 2), ()])
@pytest.mark.parametrize("begun", [False, True])
def test_parameters_that_share_an_input_get_their_products_wherever_they_lie(drawn, known, begun):
    """One product where places are neighbours and hold as much; else one each; or given back."""
    parameters, _, right = drawn
    left = torch.randn(ROWS, 3 * M, dtype=torch.float64)
    flat = FlatGradient([parameters[i] for i in known]) if known else None
    expected = (left.T @ right).reshape(3, M, N)
    if begun and known:
        gradient_product(parameters[known[0]], left[:, :M], right)
        expected[known[0]] += left[:, :M].T @ right
    found = gradient_products(parameters, left, right)
    assert [i for i, one in enumerate(found) if one is None] == list(known)
    for i, one in enumerate(found):
        if one is not None:
            torch.testing.assert_close(one, expected[i], rtol=1e-12, atol=1e-12)
    if flat is not None:
        mine = expected[list(known)].reshape(-1)
        torch.testing.assert_close(flat.collect(), mine, rtol=1e-12, atol=1e-12)


def test_matrices_that_are_one_in_memory():
    memory = torch.arange(24.0)
    first, second, third = memory[:6].view(2, 3), memory[6:9].view(1, 3), memory[9:18].view(3, 3)
    assert torch.equal(one_below_the_other([first, second, third]), memory[:18].view(6, 3))
    assert one_below_the_other([first, second]).data_ptr() == memory.data_ptr()
    assert one_below_the_other([first, third]) is None
    assert one_below_the_other([second, first]) is None
    assert one_below_the_other([first, torch.zeros(1, 3)]) is None
    assert one_below_the_other([memory[:6].view(3, 2).t(), second]) is None
    assert one_below_the_other([memory[:4].view(1, 4), memory[4:6].view(1, 2)]) is None
    rows = [memory[:4].view(4, 1).t(), memory[4:8].view(4, 1).t()]  # contiguous, of stride (1, 1)
    assert torch.equal(one_below_the_other(rows), memory[:8].view(2, 4))
