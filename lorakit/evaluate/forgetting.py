"""Forgetting: what training on one task cost on general text.

A loss on text that has nothing to do with the task, before and after: the bare base, and the base
with an adapter or a fully fine-tuned model. Text is scored as it stands: no chat template, and no
end token, since training on short answers changes above all when a model expects the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.data import DataSpec, TokenData, load_data
from lorakit.data.encode import Encoded
from lorakit.data.rows import Row, plural
from lorakit.data.tokenizer import added_before
from lorakit.data.tokens import Builder
from lorakit.errors import DataError, InputError
from lorakit.evaluate.losses import LossResult

#: passages of everyday knowledge, dialogue, lists and code that were written for lorakit
SHIPPED = Path(__file__).parent / "general.txt"

#: longest piece of a passage, in tokens: a longer one would be judged with a context that others
#: do not have, and needs memory
PIECE = 1024


@dataclass(frozen=True)
class GeneralText:
    """Passages, tokenised; a long one is several examples."""

    name: str
    """The file, or ``"the general text of lorakit"``."""
    data: TokenData
    passage_of: np.ndarray
    """[examples] int64: the passage that each belongs to, from 0."""

    @property
    def passages(self) -> int:
        """How many there are."""
        return int(self.passage_of[-1]) + 1

    def line(self) -> str:
        """What it is, for the screen."""
        tokens = int(self.data.supervised_counts.sum())
        return (
            f"General text: {plural(self.passages, 'passage')}, {plural(tokens, 'token')} "
            f"({self.name})"
        )


@dataclass(frozen=True)
class Forgetting:
    """Loss on general text, before and after."""

    before: float
    """Of the base, in nats a token."""
    loss: float
    """Of what was made of it."""
    difference: float
    """``loss - before``; above 0 something was forgotten."""
    standard_error: float
    """Of the difference, over passages; NaN for a single one."""


def general_text(
    tokenizer: Any,
    path: str | PathLike[str] | None = None,
    *,
    context_length: int | None = None,
) -> GeneralText:
    """Read passages of general text.

    Args:
        path: text (empty lines separate passages) or rows with a ``text`` column; ``None`` is
            the text that ships with lorakit.
        context_length: longest sequence of the base, in tokens.

    Raises:
        DataError: the file cannot be read, or its rows are no plain text.
    """
    spec = DataSpec((str(SHIPPED if path is None else path),))
    read = load_data(spec, tokenizer)
    if read.report.kind != "text":
        raise DataError(
            f"{path}: its rows are {read.report.kind}; general text is a text file, or rows with "
            "a column called text. Such rows are judged with --data."
        )
    builder, owners = Builder(), []
    begin = added_before(tokenizer)
    limit = min(PIECE, context_length or PIECE)
    passages = 0
    for i in range(len(read)):
        pieces = _pieces(read[i].ids.tolist(), begin, tokenizer.eos_token_id, limit)
        for ids, mask in pieces:
            row = Row(read[i].file, "passage", read[i].index, {})
            builder.add(Encoded(ids, mask, 0, ""), row, read.prompt_key(i), "")
            owners.append(passages)
        passages += bool(pieces)
    if not owners:
        raise DataError(f"{spec.path[0]}: no passage has two tokens, so none of them has a loss.")
    name = "it ships with lorakit" if path is None else str(path)
    return GeneralText(name, builder.finish(read.report), np.array(owners, np.int64))


def _pieces(
    ids: list[int], begin: list[int], end: int | None, limit: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A passage without its end token, in pieces that fit: ids and what is supervised.

    Each piece begins as a text does. Its first own token counts only where something stands
    before it.
    """
    own = ids[len(begin) :] if ids[: len(begin)] == begin else ids
    if end is not None and own[-1:] == [end]:
        own = own[:-1]
    size = max(limit - len(begin), 1)
    found = []
    for start in range(0, len(own), size):
        piece = [*begin, *own[start : start + size]]
        mask = np.ones(len(piece), np.bool_)
        mask[: max(len(begin), 1)] = False
        if mask.any():
            found.append((np.array(piece, np.int32), mask))
    return found


def forgetting(before: LossResult, after: LossResult, passage_of: np.ndarray) -> Forgetting:
    """Compare two losses over the same passages.

    With dᵢ the change of passage i's summed loss and nᵢ its tokens, the difference of the means is
    D = Σdᵢ / Σnᵢ, a ratio of sums over m passages, whose standard error is
    √(m / (m - 1) · Σ(dᵢ - D·nᵢ)²) / Σnᵢ (Cochran, Sampling Techniques, 1977, section 2.11; over
    clusters and paired, as Miller, 2024, arXiv 2411.00640, sections 2.2 and 4, asks for). Tokens
    of one passage stand and fall together, so they are not counted as independent.

    Args:
        before, after: of the same examples in the same order.
        passage_of: [examples] which passage each belongs to, from 0.

    Raises:
        InputError: the two losses are over different examples.
    """
    if not np.array_equal(before.counts, after.counts) or len(passage_of) != len(before.counts):
        raise InputError("the losses before and after are over different passages")
    change = np.bincount(passage_of, after.sums - before.sums)
    tokens = np.bincount(passage_of, before.counts)
    total, m = tokens.sum(), len(tokens)
    difference = float(change.sum() / total)
    error = math.nan
    if m > 1:
        left = change - difference * tokens
        error = float(math.sqrt(m / (m - 1) * float(left @ left)) / total)
    return Forgetting(before.loss, after.loss, difference, error)
