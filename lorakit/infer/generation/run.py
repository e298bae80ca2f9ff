"""The rows of one call on their way: the model, who uses which adapter, what ends a row."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import InputError
from lorakit.infer.generation.rows import Answer, Finish, HasModel, Row
from lorakit.infer.generation.sampling import Sampling
from lorakit.layers import Handle
from lorakit.layers.routing import Mix, MixLike, as_mix

log = logging.getLogger(__name__)

#: rows that are continued together where the caller does not say. On a CPU, with an adapter, 32
#: gave 2.2 times the tokens of 8 in the same time, and 64 no more than 32
_ROWS = {"cpu": 32}
_ROWS_ACCELERATOR = 256


class Run:
    """The rows of one call: those that wait, and what all of them share."""

    def __init__(
        self,
        base: HasModel,
        handle: Handle | None,
        rows: Sequence[Row],
        sampling: Sampling,
        stop_ids: frozenset[int],
        batch_size: int | None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1")
        self.model: Any = base.model
        self.tokenizer = base.tokenizer
        self.handle = handle
        self.sampling = sampling
        self.stop_ids = stop_ids
        self.batch_size = batch_size
        self.device = next(base.model.parameters()).device
        # rows of one adapter together, which is the fastest routing; the longest first, so that
        # a prompt that comes later fits before the columns in use
        self.waiting = sorted(rows, key=lambda r: (str(as_mix(r.mix)), -len(r.prompt)))
        self._broken: set[Mix] = set()
        """Whose logits were not finite."""

    @property
    def wanted(self) -> int:
        """Rows that are to be continued together."""
        return self.batch_size or _ROWS.get(self.device.type, _ROWS_ACCELERATOR)

    def using(self, mixes: Sequence[MixLike]) -> AbstractContextManager[Any]:
        """Each row by its own adapters until the block ends."""
        if self.handle is None:
            return contextlib.nullcontext()
        if len({as_mix(mix) for mix in mixes}) == 1:
            return self.handle.use(mixes[0])
        return self.handle.use(rows=mixes)

    def take(self, row: Row, token: int | None) -> tuple[str, Answer | None]:
        """Add a token to a row; gives its new text, and its answer if that ended it."""
        if token is None:
            self._tell_broken(row)
            return self.end(row, "not finite")
        if token in self.stop_ids:
            return self.end(row, "stop")
        row.ids.append(token)
        piece = row.text.push(token) if row.text is not None else ""
        if row.text is not None and row.text.stopped:
            rest, answer = self.end(row, "stop")
            return piece + rest, answer
        if len(row.ids) >= row.limit:
            rest, answer = self.end(row, row.limited_by)
            return piece + rest, answer
        return piece, None

    def end(self, row: Row, finish: Finish) -> tuple[str, Answer]:
        """What was held back of a row's text, and its answer."""
        if row.text is None:
            text = self.tokenizer.decode(
                row.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return "", Answer(text, len(row.ids), finish)
        rest = row.text.finish()
        finish = "stop" if row.text.stopped else finish
        return rest, Answer(row.text.text, len(row.ids), finish)

    def _tell_broken(self, row: Row) -> None:
        """Name the first row of each adapter whose logits are not finite."""
        mix = as_mix(row.mix)
        if mix not in self._broken:
            self._broken.add(mix)
            log.warning(
                "%s: after %d tokens of the answer to %r … the logits are not finite numbers, so "
                "no token can follow. Look for weights that are too large, or for what overflows "
                "in half precision and not in float32",
                " + ".join(name for name, _ in mix) or "the base",
                len(row.ids),
                self.tokenizer.decode(row.prompt)[:40],
            )


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Prompts as a batch, [R, T], that ends at one column."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
