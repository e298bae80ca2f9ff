"""A key/value cache of slots: rows finish, leave and are replaced while the others go on.

Rows end at the same column and begin at their own; what lies before a row's first column is
masked. So a finished row's place is free at once, and a new prompt is written into it so that it
ends at the present column. Buffers are written in place (a cache that grows by concatenation
copies itself at every token: 18 % of a decode step on a 2-core CPU).

Legend: ``R`` rows in use, ``C`` columns allocated, ``H`` key/value heads, ``d`` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

#: columns are allocated in multiples of this, and given back when as many are useless
_BLOCK = 64


class SlotCache(Cache):
    """The cache of the rows that are being continued."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers: list[Any] = self.layers
        self.num_rows = 0
        self.length = 0
        """Columns in use; every row's newest token is in the last of them."""
        self.starts: list[int] = []
        """First column of each row."""

    def mask(self) -> Tensor | None:
        """Which columns each row sees at the next token, int64 [R, length + 1]; ``None`` if
        all."""
        if not any(self.starts):
            return None
        columns = torch.arange(self.length + 1)
        return (columns >= torch.tensor(self.starts)[:, None]).long()

    def admit(self, prefilled: DynamicCache, lengths: Sequence[int]) -> None:
        """Append rows whose prompts have been run.

        Args:
            prefilled: their cache, padded on the left.
            lengths: tokens of each prompt.
        """
        width = max(lengths)
        if not self.num_rows:
            self.length = 0
        if width > self.length:
            self._move(width - self.length)
        total = self.num_rows + len(lengths)
        sources: list[Any] = prefilled.layers
        for i, source in enumerate(sources):
            if i == len(self.layers):
                self.layers.append(SlotLayer(self))
            self.layers[i].write(source.keys, source.values, self.num_rows, total)
        self.starts += [self.length - length for length in lengths]
        self.num_rows = total

    def remove(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Free rows; the last ones take their places.

        Returns:
            The moves, ``(from, to)`` in order, for whatever else is kept by row.
        """
        moves = []
        for row in sorted(rows, reverse=True):
            last = self.num_rows - 1
            if row != last:
                for layer in self.layers:
                    layer.copy_row(last, row)
                self.starts[row] = self.starts[last]
                moves.append((last, row))
            self.starts.pop()
            self.num_rows = last
        useless = min(self.starts, default=0)
        if useless >= _BLOCK:
            self._move(-useless)
        return moves

    def advance(self) -> None:
        """Count the column that a forward has just filled."""
        self.length += 1

    def _move(self, columns: int) -> None:
        """Shift every row to the right (more room before it), or to the left."""
        if self.num_rows:
            for layer in self.layers:
                layer.move(columns)
            self.starts = [start + columns for start in self.starts]
        self.length += columns


class SlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values, [rows, H, C, d]; the first R rows are in use."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token a row; gives views of everything so far, [R, H, length + 1, d]."""
        assert self.keys is not None
        assert self.values is not None
        rows, column = self.owner.num_rows, self.owner.length
        self._reserve(rows, column + 1)
        self.keys[:rows, :, column] = key_states[:, :, 0]
        self.values[:rows, :, column] = value_states[:, :, 0]
        return self.keys[:rows, :, : column + 1], self.values[:rows, :, : column + 1]

    def get_seq_length(self) -> int:
        return self.owner.length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # an int; versions of transformers before 5.20 give the positions of the query
        tokens = query_length if isinstance(query_length, int) else len(query_length)
        return self.owner.length + tokens, 0

    def write(self, keys: Tensor, values: Tensor, first: int, end: int) -> None:
        """Rows ``first`` to ``end``, [end - first, H, width, d], up to the present column."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(keys, values)
            self.keys = keys.new_zeros(0, keys.shape[1], 0, keys.shape[3])
            self.values = values.new_zeros(0, values.shape[1], 0, values.shape[3])
        width, column = keys.shape[2], self.owner.length
        self._reserve(end, column)
        for mine, given in ((self.keys, keys), (self.values, values)):
            # what a row that was here left behind may be no number, which no mask hides
            mine[first:end, :, : column - width] = 0
            mine[first:end, :, column - width : column] = given

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite one row by another."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    def move(self, columns: int) -> None:
        """Shift all rows by columns; see :class:`SlotCache`."""
        rows, length = self.owner.num_rows, self.owner.length
        for name in ("keys", "values"):
            old = getattr(self, name)
            new_length = length + columns
            new = old.new_zeros(old.shape[0], old.shape[1], _rounded(new_length + 1), old.shape[3])
            if columns > 0:
                new[:rows, :, columns:new_length] = old[:rows, :, :length]
            else:
                new[:rows, :, :new_length] = old[:rows, :, -columns:length]
            setattr(self, name, new)

    def _reserve(self, rows: int, columns: int) -> None:
        """Make room. What is not written is zero: a masked column of NaN would still spoil
        the sum."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            if rows <= old.shape[0] and columns <= old.shape[2]:
                continue
            new = old.new_zeros(
                max(rows, old.shape[0]),
                old.shape[1],
                max(_rounded(columns), old.shape[2]),
                old.shape[3],
            )
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)


def _rounded(columns: int) -> int:
    return -(-columns // _BLOCK) * _BLOCK
