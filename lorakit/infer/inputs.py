"""The examples of a forward, laid out one behind the other or a row each.

Legend: ``N`` tokens of a batch, ``E`` examples, ``S`` supervised positions, ``T`` tokens of the
longest example.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class PackedBatch(Protocol):
    """What is read of a ``lorakit.data.Batch``."""

    @property
    def input_ids(self) -> Tensor:
        """[1, N], the examples one behind the other."""

    @property
    def position_ids(self) -> Tensor:
        """[1, N], from 0 in each example."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each example, [E]."""

    @property
    def supervised(self) -> Tensor:
        """[S], positions in the row whose next token is supervised, ascending."""

    @property
    def labels(self) -> Tensor:
        """[S], those next tokens."""


@dataclass(frozen=True, eq=False)
class Input:
    """A packed row on the model's device, or a stretch of one; see :class:`PackedBatch`."""

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    supervised: Tensor
    labels: Tensor
    first: int = 0
    """Where the stretch begins in the batch."""
    example: int = 0
    """Its first example, counted in the batch."""

    @classmethod
    def of(cls, sequences: Sequence[Tensor]) -> Input:
        """Sequences [n] of ids, with every position supervised."""
        ids = torch.cat(list(sequences))
        positions = torch.cat([torch.arange(len(s), device=s.device) for s in sequences])
        everywhere = torch.arange(len(ids), device=ids.device)
        lengths = tuple(len(s) for s in sequences)
        return cls(ids[None], positions[None], lengths, everywhere, ids)

    def spans(self) -> list[tuple[int, int]]:
        """First token, counted in the whole batch, and length of each example."""
        starts = itertools.accumulate(self.lengths, initial=self.first)
        return list(zip(starts, self.lengths, strict=False))

    def examples(self) -> list[Input]:
        """Each example as an input of its own."""
        parts = []
        for number, (begin, length) in enumerate(self.spans()):
            start, end = begin - self.first, begin - self.first + length
            mine = (self.supervised >= start) & (self.supervised < end)
            parts.append(
                Input(
                    self.ids[:, start:end],
                    self.positions[:, start:end],
                    (length,),
                    self.supervised[mine] - start,
                    self.labels[mine],
                    begin,
                    self.example + number,
                )
            )
        return parts

    def _real(self) -> Tensor:
        """Which places of the padded batch hold a token, bool [E, T]."""
        lengths = torch.tensor(self.lengths, device=self.ids.device)
        return torch.arange(max(self.lengths), device=self.ids.device) < lengths[:, None]

    def spread(self, values: Tensor) -> Tensor:
        """One value a token, [N], laid out as the padded batch, [E, T], with zeros between."""
        real = self._real()
        out = values.new_zeros(real.shape)
        out[real] = values
        return out

    def padded(self) -> tuple[dict[str, Tensor], Tensor]:
        """One example a row, padded on the right where no token can see it.

        Returns:
            The model's inputs, [E, T] each, and the supervised positions in [E·T].
        """
        real = self._real()
        inputs = {
            "input_ids": self.spread(self.ids[0]),
            "attention_mask": real.long(),
            "position_ids": self.spread(self.positions[0]),
        }
        return inputs, real.flatten().nonzero()[:, 0][self.supervised]


def example_of(batch: PackedBatch | Input) -> Tensor:
    """The example, counted from 0, that each supervised position belongs to; [S]."""
    ends = torch.tensor(batch.lengths).cumsum(0)
    return torch.bucketize(batch.supervised.cpu(), ends, right=True)
