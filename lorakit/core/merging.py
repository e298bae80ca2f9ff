"""What merging does to one stored weight, as a value: the same sums for a model and for a file.

Legend: a stored weight is read as a matrix ``[m, n]``, its first dimension by all others. A linear
or a convolution stores its outputs in rows; an embedding and GPT-2's Conv1D in columns. Fused
experts are ``E`` matrices ``[m, n]``, read as one, ``[E·m, n]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: bytes of the accumulator that a CPU works on at a time, so that it stays in the outer cache while
#: it is cast, added to, checked and cast back; smaller ones cost more in calls than they save. It
#: also fixes the order of the sums, so a file and a model merged from the same values are equal bit
#: for bit.
BLOCK_BYTES = 1 << 22


class Scratch:
    """One piece of memory for all blocks: fresh pages for each would cost more than its sums."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def take(self, like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns of ``like``], on its device, in ``dtype``; valid until the next call."""
        size = rows * like.shape[1]
        flat = self._flat
        if flat is None or flat.numel() < size or (flat.dtype, flat.device) != (dtype, like.device):
            self._flat = flat = like.new_empty(size, dtype=dtype)
        return flat[:size].view(rows, like.shape[1])


@dataclass(frozen=True, eq=False)
class Term:
    """``factor · left @ right``: one adapter's change of one weight."""

    left: Tensor
    """[m, r]; of experts [E, m, r]"""
    right: Tensor
    """[r, n]; of experts [E, r, n]"""
    factor: float
    """The adapter's weight times the site's scaling."""

    def bound(self) -> float:
        """No element of the change is larger in size (Cauchy–Schwarz)."""
        rows = torch.linalg.vector_norm(self.left.detach().float(), dim=-1).max()
        columns = torch.linalg.vector_norm(self.right.detach().float(), dim=-2).max()
        return abs(self.factor) * float(rows) * float(columns)


@dataclass(frozen=True, eq=False)
class Recipe:
    """The merged weight: ``W + Σ terms``, or with DoRA that, brought to a length by output."""

    terms: tuple[Term, ...] = ()
    value: Tensor | None = None
    """What stands in W's place, where the parameter was trained whole; of W's shape."""
    magnitude: Tensor | None = None
    """DoRA (Liu et al., arXiv 2402.09353, eq. 5): ``magnitude · V / ‖V‖`` by output."""
    outputs_in_rows: bool = True

    @property
    def of_experts(self) -> bool:
        """Whether the weight is a matrix for each expert."""
        return any(term.left.dim() == 3 for term in self.terms)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, contiguous, as the matrix whose rows are merged; a view."""
        if weight.dim() == 0:
            return weight.view(1, 1)
        columns = weight.shape[-1] if self.of_experts else math.prod(weight.shape[1:])
        return weight.view(-1, columns)

    @property
    def by_rows(self) -> bool:
        """Whether a row of the result needs that row of W alone."""
        return self.magnitude is None or self.outputs_in_rows

    def to(self, device: torch.device, dtype: torch.dtype) -> Recipe:
        """The same numbers where and as they are added."""
        tensors = [t for term in self.terms for t in (term.left, term.right)]
        plain = self.magnitude is None and self.value is None
        if plain and all(t.dtype == dtype and t.device == device for t in tensors):
            return self

        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype)

        return Recipe(
            tuple(Term(moved(t.left), moved(t.right), t.factor) for t in self.terms),
            None if self.value is None else self.value.detach().to(device),
            None if self.magnitude is None else moved(self.magnitude),
            self.outputs_in_rows,
        )

    def cannot_overflow(self, dtype: torch.dtype) -> bool:
        """Whether no finite weight of ``dtype`` can become infinite, known without looking at it.

        A change of less than half the distance of the two largest numbers is rounded away there;
        a quarter of that leaves room for the roundings of the sum.
        """
        if self.magnitude is not None or self.value is not None:
            return False
        return sum(term.bound() for term in self.terms) < _room(dtype)


def doubtful(recipes: Sequence[Recipe], dtypes: Sequence[torch.dtype]) -> list[bool]:
    """Which merged weights may hold infinities although W and the factors are finite.

    First by ``‖left‖ · ‖right‖``, which is one call for all factors and settles nearly all, then by
    :meth:`Recipe.cannot_overflow`.
    """
    factors = [t.detach() for r in recipes for term in r.terms for t in (term.left, term.right)]
    norms = iter(torch.stack([n.float() for n in torch._foreach_norm(factors)]).tolist())
    found = []
    for recipe, dtype in zip(recipes, dtypes, strict=True):
        size = sum(abs(term.factor) * next(norms) * next(norms) for term in recipe.terms)
        plain = recipe.magnitude is None and recipe.value is None
        found.append(not (plain and size < _room(dtype)) and not recipe.cannot_overflow(dtype))
    return found


def _room(dtype: torch.dtype) -> float:
    """What may be added to the largest number of a dtype without a doubt."""
    return torch.finfo(dtype).max * torch.finfo(dtype).eps / 8


def compute_dtype_for(weight: torch.dtype, asked: torch.dtype) -> torch.dtype:
    """The dtype to add in: what was asked, and never less than the weight's own."""
    return torch.promote_types(weight, asked)


def merge_(
    weight: Tensor,
    recipe: Recipe,
    asked: torch.dtype,
    *,
    write: bool = True,
    check: bool = True,
    scratch: Scratch | None = None,
) -> Tensor:
    """Merge into a dense weight, in place: one pass, added in one dtype, cast once.

    Args:
        weight: of any shape, dtype and strides.
        asked: the dtype to add in.
        write: ``False`` computes, checks and leaves the weight alone.
        check: ``False`` does not look, where a bound has proven it already.
        scratch: shared by merges that follow one another.

    Returns:
        A boolean scalar on the weight's device: whether every value is finite after the cast.
    """
    dtype = compute_dtype_for(weight.dtype, asked)
    recipe = recipe.to(weight.device, dtype)
    if not weight.is_contiguous() or weight.dim() == 0:  # the memory is no matrix of rows
        result = _merged(weight, recipe, dtype).to(weight.dtype)
        if write:
            weight.copy_(result)
        return torch.isfinite(result).all()
    matrix = recipe.matrix(weight)
    start = matrix if recipe.value is None else recipe.value.reshape(matrix.shape)
    rows = rows_of_a_block(matrix, dtype) if recipe.by_rows else len(matrix)
    buffer = None
    if not write or dtype != weight.dtype:
        buffer = (scratch or Scratch()).take(matrix, min(rows, len(matrix)), dtype)
    fine = []
    for begin in range(0, len(matrix), rows):
        block, source = matrix[begin : begin + rows], start[begin : begin + rows]
        target = block if buffer is None else buffer[: len(block)]
        if target is not source:
            target.copy_(source)
        finish_(target, recipe, begin)
        if check:
            fine.append(_is_safe(target, weight.dtype))
        if write and target is not block:
            block.copy_(target)
    if not fine:
        return torch.ones((), dtype=torch.bool, device=weight.device)
    return fine[0] if len(fine) == 1 else torch.stack(fine).all()


def rows_of_a_block(matrix: Tensor, dtype: torch.dtype) -> int:
    """Rows that are merged at a time: all on an accelerator, a cache's worth on a CPU."""
    if matrix.device.type != "cpu":
        return max(1, len(matrix))
    return max(1, BLOCK_BYTES // max(1, matrix.shape[1] * dtype.itemsize))


def finish_(rows: Tensor, recipe: Recipe, begin: int) -> None:
    """Turn rows of W, ``begin`` and following, into those of the merged weight.

    Args:
        rows: [b, n] in the dtype and on the device of the recipe.
    """
    for term in recipe.terms:
        if term.left.dim() == 3:
            _add_experts_(rows, term, begin)
        else:
            rows.addmm_(term.left[begin : begin + len(rows)], term.right, alpha=term.factor)
    if recipe.magnitude is None:
        return
    if recipe.outputs_in_rows:
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows.mul_(stretch(recipe.magnitude[begin : begin + len(rows), None], length))
    else:
        rows.mul_(stretch(recipe.magnitude, torch.linalg.vector_norm(rows, dim=0)))


def stretch(magnitude: Tensor, length: Tensor) -> Tensor:
    """What brings a DoRA's weights to their trained length: ``magnitude / length``, of one dtype.

    An output whose weights are all zero has no direction and stays as it is: its factor is 1.
    """
    some = length > 0
    return torch.where(some, magnitude / torch.where(some, length, 1.0), 1.0)


def _add_experts_(rows: Tensor, term: Term, begin: int) -> None:
    """Add to the rows of each expert that begin there its own product."""
    height, end = term.left.shape[1], begin + len(rows)
    for expert in range(begin // height, -(-end // height)):
        first, last = max(begin, expert * height), min(end, (expert + 1) * height)
        left = term.left[expert, first - expert * height : last - expert * height]
        rows[first - begin : last - begin].addmm_(left, term.right[expert], alpha=term.factor)


def check_rows(
    before: Tensor,
    written: Tensor,
    rows: list[int],
    recipe: Recipe,
    asked: torch.dtype,
) -> float:
    """How far rows of a merged weight are from float64 arithmetic, as a share of rounding's bound.

    The bound of the sum's own rounding is ``(k + 2) · eps`` of the sum of the products' sizes
    (Higham, Accuracy and Stability, section 3.1), k products; that of the cast is half the
    distance of two numbers of the stored dtype.

    Args:
        before: rows of the weight before, [len(rows), n] in its stored dtype; of experts, whole
            experts, [len(rows), m·n].
        written: those rows of the merged weight, [len(rows), n].
        rows: which; all of them where the recipe is not :attr:`Recipe.by_rows`.
        asked: the dtype that was added in.

    Returns:
        The largest ratio of difference to bound; above 1 the weight is not W + ΔW.
    """
    value = recipe.value
    start = (before if value is None else value.reshape(len(value), -1)[rows]).double()
    exact, size, num_products = start.clone(), start.abs(), 1
    for term in recipe.terms:
        left, right = term.left.detach()[rows].double(), term.right.detach().double()
        right = right[rows] if left.dim() == 3 else right
        exact += term.factor * (left @ right).view(exact.shape)
        size += abs(term.factor) * (left.abs() @ right.abs()).view(exact.shape)
        num_products += left.shape[-1] + 1
    if recipe.magnitude is not None:
        magnitude, dim = recipe.magnitude.detach().double(), 1 if recipe.outputs_in_rows else 0
        magnitude = magnitude[rows, None] if dim else magnitude
        scale = stretch(magnitude, exact.norm(dim=dim, keepdim=True))
        exact, size = exact * scale, size * scale.abs()
        num_products += exact.shape[dim] + 3  # the norm is a sum over these
    compute = compute_dtype_for(before.dtype, asked)
    info = torch.finfo(written.dtype)
    allowed = (
        (num_products + 2) * torch.finfo(compute).eps * size
        + info.eps / 2 * exact.abs()
        + info.smallest_normal * info.eps
    )
    difference = (written.double() - exact).abs()
    ratio = float((difference / allowed).max()) if difference.numel() else 0.0
    return ratio if math.isfinite(ratio) else math.inf


def _merged(weight: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """The merged weight in ``dtype``, as one block."""
    start = weight if recipe.value is None else recipe.value
    matrix = recipe.matrix(start.to(weight.device, dtype, copy=True).contiguous())
    finish_(matrix, recipe, 0)
    return matrix.view(weight.shape)


def _is_safe(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether ``rows`` are finite after a cast to ``dtype``; a boolean scalar.

    Where the sum of squares is at most the square of the largest number, no element is above it:
    one product in the cache instead of two reductions. Only what fails that is looked at closely.
    """
    flat = rows.reshape(-1)
    largest = torch.finfo(dtype).max
    limit = min(largest * largest, torch.finfo(rows.dtype).max)
    fine = torch.dot(flat, flat) <= limit
    if flat.device.type != "cpu" or bool(fine):
        if flat.device.type == "cpu":
            return fine
        return fine | torch.isfinite(flat.to(dtype)).all()
    return torch.isfinite(flat.to(dtype)).all()
