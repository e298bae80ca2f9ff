"""Examples → tensors, packed without padding.

Legend: N tokens of all examples of a batch, S supervised positions, B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorakit.data.tokens import Example


@dataclass(frozen=True)
class Batch:
    """Examples behind each other in one row; each attends only to itself."""

    input_ids: torch.Tensor
    """[1, N] int64."""
    position_ids: torch.Tensor
    """[1, N] int64; starts at 0 in every example."""
    lengths: tuple[int, ...]
    """Tokens of each example; they sum to N."""
    supervised: torch.Tensor
    """[S] int64, ascending: places in the row whose next token is supervised."""
    labels: torch.Tensor
    """[S] int64: these next tokens."""
    example_ids: torch.Tensor
    """[B] int64: place of each example in the data set; keys dropout."""
    rows: tuple[tuple[str, int], ...]
    """(file, row number) of each example."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_supervised(self) -> int:
        return self.labels.shape[0]


def pack(examples: Sequence[Example]) -> Batch:
    """Put examples behind each other, without padding."""
    if not examples:
        raise ValueError("a batch needs at least one example")
    lengths = tuple(len(one.ids) for one in examples)
    starts = np.cumsum((0, *lengths[:-1]))
    positions = np.concatenate([np.arange(n) for n in lengths])
    places, labels = _supervised(examples, starts)
    return Batch(
        _tensor(np.concatenate([one.ids for one in examples]))[None],
        _tensor(positions)[None],
        lengths,
        places,
        labels,
        _tensor(np.array([one.id for one in examples])),
        tuple((one.file, one.index) for one in examples),
    )


def _supervised(
    examples: Sequence[Example], starts: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """([S], [S]): where a supervised token is predicted, and that token.

    The first token of an example is never a label: what stands before it in the row belongs to
    another example.
    """
    found = [np.flatnonzero(one.supervised[1:]) for one in examples]
    places = [start + local for start, local in zip(starts, found, strict=True)]
    labels = [one.ids[1:][local] for one, local in zip(examples, found, strict=True)]
    return _tensor(np.concatenate(places)), _tensor(np.concatenate(labels))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.int64))
