"""Reading a merged GGUF again: rows of it against float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lorakit.bases.gguf_base import BaseTensor, GgufBase, from_gguf
from lorakit.core.gguf_names import norm_offset, row_order
from lorakit.core.merging import stretch
from lorakit.errors import TrainingError, collected
from lorakit.workflows.merge.gguf_plan import Change

#: rows of each changed tensor that are compared: the ends, and some between
_NUM_ROWS = 6
_BLOCK = 32


@dataclass(frozen=True)
class Checked:
    """What the comparison of rows showed."""

    num_tensors: int
    num_rows: int
    worst: float
    """Largest difference from the float64 value, in steps of the type there; at most 1."""


def check_rows(
    path: Path,
    base: GgufBase,
    changes: Mapping[str, Sequence[Change]],
    origins: Mapping[str, str],
) -> Checked:
    """Compare sampled rows of each changed tensor with ``W + ΔW`` in float64.

    Each row is computed from the adapter as it is, not from what the writer made of it.

    Args:
        path: the file that was written.
        base: what it was made of.
        changes: name of a tensor → what changes it.
        origins: name of a tensor → name of the base's tensor that it was made of.

    Raises:
        TrainingError: a row is further off than its type explains.
    """
    written = from_gguf(path, path.name).tensors
    worst, num_rows = 0.0, 0
    problems = []
    for name, found_changes in changes.items():
        tensor, origin = written[name], base.tensors[origins[name]]
        order = row_order(origin.num_rows, base.heads(name) if len(origin.shape) > 1 else 0)
        for row in _sampled(origin.num_rows):
            expected = _row(base, name, origin, found_changes, row, int(order[row]))
            found = torch.from_numpy(tensor.rows(row, row + 1)).reshape(-1).double()
            steps = float(((found - expected).abs() / step_of(expected, tensor.kind)).max())
            worst, num_rows = max(worst, steps), num_rows + 1
            if not steps <= 1.0:
                problems.append(f"{name}, row {row}: {steps:.3g} steps of {tensor.kind} off")
    if problems:
        raise TrainingError(
            collected("What was written is not base + adapter", problems, limit=6)
            + "\nNothing was left. Please report this, with the base's and the adapter's names."
        )
    return Checked(len(changes), num_rows, worst)


def _sampled(num_rows: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, num_rows - 1, min(_NUM_ROWS, num_rows))})


def _row(
    base: GgufBase,
    name: str,
    origin: BaseTensor,
    changes: Sequence[Change],
    row: int,
    there: int,
) -> Tensor:
    """A row of the merged weight, float64; ``there`` is its number in transformers' order."""
    total = torch.from_numpy(origin.rows(row, row + 1)).reshape(-1).double()
    for change in changes:
        site = change.low_rank
        if site is None:
            total = _whole(base, name, change, total, there)
            continue
        A, B = site.A.double(), site.B.double()
        product = B @ A[:, there] if site.kind == "embedding" else B[there] @ A
        total = total + change.weight * site.scaling * product
        if site.magnitude is not None:
            total = total * stretch(site.magnitude[there].double(), total.norm())
    return total


def _whole(base: GgufBase, name: str, change: Change, total: Tensor, there: int) -> Tensor:
    if change.value is not None and change.value.dim() > 1:
        return change.value[there].double()
    vector = change.added if change.added is not None else change.value
    assert vector is not None
    vector = vector.double()[row_order(len(vector), base.heads(name))]
    if change.added is not None:
        return total + change.weight * vector
    return vector + norm_offset(base.architecture, name)


def step_of(row: Tensor, kind: str) -> Tensor:
    """The largest error of storing each value of a row, float64, as the row [d].

    Blocks of 32 share a scale, kept in float16 (11 bits). With m the largest size in a block:
    Q8_0 rounds to m/127; Q4_0 and Q5_0 put the largest at −8 or −16, so one of the other sign may
    be cut by a whole step; Q4_1 and Q5_1 divide the range by 15 or 31.
    """
    size = row.abs()
    tiny = torch.full_like(row, 1e-7) + 2.0**-20 * size  # float32 sums before
    if kind in ("F32", "F16", "BF16"):
        bits = {"F32": 2.0**-20, "F16": 2.0**-11, "BF16": 2.0**-8}[kind]
        return size * bits + tiny
    blocks = row.reshape(-1, _BLOCK)
    largest = blocks.abs().amax(1)
    span = blocks.amax(1) - blocks.amin(1)
    step = {
        "Q8_0": largest / 127 / 2,
        "Q4_0": largest / 8,
        "Q5_0": largest / 16,
        "Q4_1": span / 15 / 2,
        "Q5_1": span / 31 / 2,
    }[kind]
    # the scale and the offset are rounded themselves; by float32 sums a value may tip over
    step = step + (largest + span) * 2.0**-11 + 1e-6 * largest
    return step[:, None].expand(-1, _BLOCK).reshape(-1) + tiny
