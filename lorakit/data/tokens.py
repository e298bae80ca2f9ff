"""``TokenData``: the examples of a data set, tokenised, checked, and never changed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import byteorder
from typing import Any

import numpy as np

from lorakit.data.encode import Encoded
from lorakit.data.report import DataReport
from lorakit.data.rows import Row, place
from lorakit.data.store import MEMORY_BYTES, Store, spill_folder
from lorakit.errors import DataError

#: column → dtype; one entry an example, but ids and supervised one a token, text one a byte
_DTYPES = {
    "ids": np.int32,
    "supervised": np.bool_,
    "text": np.uint8,
    "lengths": np.int64,
    "text_lengths": np.int64,
    "prompt_lengths": np.int32,
    "numbers": np.int64,
    "lines": np.int64,
    "files": np.int32,
    "keys": np.dtype("S16"),
    "contents": np.uint64,
}


@dataclass(frozen=True)
class Example:
    """One example."""

    ids: np.ndarray
    """[n] int32 token ids."""
    supervised: np.ndarray
    """[n] bool: tokens that are learnt (each predicted from those before it)."""
    index: int
    """Its row in the file, 1-based, as somebody who opens the file counts."""
    file: str
    id: int
    """Its place in the data set, 0-based; keys dropout, and stays the same in every batch."""

    @property
    def size(self) -> int:
        """Its tokens."""
        return len(self.ids)

    @property
    def weight(self) -> int:
        """Its tokens that are predicted with a loss; nothing predicts the first."""
        return int(np.count_nonzero(self.supervised[1:]))


@dataclass(frozen=True)
class Item:
    """One example as text."""

    prompt: str
    """Exactly as the model sees it, template and generation prompt included."""
    prompt_ids: np.ndarray
    """[p] int32."""
    completion: str
    """As written in the data, without end token."""
    fields: dict[str, Any]
    """The whole row: their columns."""


@dataclass(frozen=True)
class PromptItem:
    """Rows that share a prompt: one question with several right answers."""

    prompt: str
    prompt_ids: np.ndarray
    """[p] int32."""
    references: list[str]
    """The completions of its rows, in file order; equal ones are kept once."""
    indices: tuple[int, ...]
    """Its rows: indices into the data set."""
    fields: dict[str, Any]
    """The columns of its first row."""


class TokenData(Sequence[Example]):
    """Tokenised examples, in memory or memory-mapped; made by :func:`load_data`."""

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        places: Sequence[tuple[str, str]],
        report: DataReport,
        digest: str,
        *,
        stop_ids: tuple[int, ...] = (),
        on_disk: bool = False,
    ) -> None:
        self._columns = columns
        self._places = tuple(places)
        self._starts = _starts(columns["lengths"])
        self._text_starts = _starts(columns["text_lengths"])
        self.report = report
        self.digest = digest
        """sha256 (hex) over ids and masks in order: equal for equal training content."""
        self.stop_ids = stop_ids
        """Tokens at which an answer is over."""
        self.on_disk = on_disk
        """Whether the examples are memory-mapped."""

    def __len__(self) -> int:
        return len(self._columns["lengths"])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        i = self._checked(index)
        start, end = self._starts[i], self._starts[i + 1]
        file, _ = self._places[self._columns["files"][i]]
        return Example(
            np.asarray(self._columns["ids"][start:end]),
            np.asarray(self._columns["supervised"][start:end]),
            int(self._columns["numbers"][i]),
            file,
            i,
        )

    @property
    def lengths(self) -> np.ndarray:
        """[len] int64: tokens of each example."""
        return self._columns["lengths"]

    @property
    def supervised_counts(self) -> np.ndarray:
        """[len] int64: supervised tokens of each example."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.add.reduceat(self._columns["supervised"], self._starts[:-1], dtype=np.int64)

    def where(self, index: int) -> str:
        """The row of an example, for messages: ``data.csv row 17 (line 18)``."""
        i = self._checked(index)
        file, unit = self._places[self._columns["files"][i]]
        line = int(self._columns["lines"][i])
        return place(file, unit, int(self._columns["numbers"][i]), line if line >= 0 else None)

    def prompt_key(self, index: int) -> bytes:
        """16 bytes that examples of one prompt share, whatever the base."""
        return bytes(self._columns["keys"][self._checked(index)]).ljust(16, b"\0")

    def item(self, index: int) -> Item:
        """The example as text, for generation and for people."""
        i = self._checked(index)
        raw = self._columns["text"][self._text_starts[i] : self._text_starts[i + 1]]
        prompt, completion, fields = json.loads(raw.tobytes())
        start = self._starts[i]
        ids = self._columns["ids"][start : start + self._columns["prompt_lengths"][i]]
        return Item(prompt, np.asarray(ids), completion, fields)

    def num_duplicates(self) -> int:
        """Examples whose tokens and mask occurred before."""
        return len(self) - len(np.unique(self._columns["contents"]))

    def _checked(self, index: Any) -> int:
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of a data set of {len(self)}")
        return i % len(self)


class Builder:
    """Takes encoded examples one by one and makes a :class:`TokenData` of them."""

    def __init__(self, *, memory_bytes: int = MEMORY_BYTES, folder: Path | None = None) -> None:
        self._store = Store(_DTYPES, memory_bytes=memory_bytes, folder=folder or spill_folder())
        self._digest = hashlib.sha256()
        self._places: dict[tuple[str, str], int] = {}

    def add(self, encoded: Encoded, row: Row, key: bytes, completion: str) -> None:
        """Append one example."""
        text = _json([encoded.prompt, completion, dict(row.values)])
        ids, mask = encoded.ids.tobytes(), encoded.supervised.tobytes()
        content = hashlib.sha256(ids + mask).digest()
        self._digest.update(content)
        spot = self._places.setdefault((row.file, row.unit), len(self._places))
        self._store.append(
            ids=ids,
            supervised=mask,
            text=text,
            lengths=len(encoded.ids).to_bytes(8, byteorder),
            text_lengths=len(text).to_bytes(8, byteorder),
            prompt_lengths=encoded.prompt_length.to_bytes(4, byteorder),
            numbers=row.number.to_bytes(8, byteorder),
            lines=(-1 if row.line is None else row.line).to_bytes(8, byteorder, signed=True),
            files=spot.to_bytes(4, byteorder),
            keys=key,
            contents=content[:8],
        )

    def finish(self, report: DataReport, stop_ids: tuple[int, ...] = ()) -> TokenData:
        """All examples; ``report`` is completed with what only they tell."""
        columns = self._store.finish()
        data = TokenData(
            columns,
            list(self._places),
            report,
            self._digest.hexdigest(),
            stop_ids=stop_ids,
            on_disk=self._store.on_disk,
        )
        data.report = report.with_lengths(
            data.lengths, int(data.supervised_counts.sum()), data.num_duplicates()
        )
        return data


def items(data: TokenData, indices: Iterable[int] | None = None) -> list[PromptItem]:
    """Group examples by what the model is asked with, in the order of first appearance.

    Args:
        indices: which examples; ``None`` means all.

    Raises:
        DataError: the rows are plain text, so that there is nothing to ask.
    """
    if data.report.kind == "text":
        raise DataError(
            f"{', '.join(data.report.files)}: the rows are plain text without prompts, so there "
            "is nothing to generate from. Give prompt and completion, or judge the loss only."
        )
    groups: dict[str, list[int]] = {}
    answers: dict[str, dict[str, None]] = {}
    for i in range(len(data)) if indices is None else indices:
        item = data.item(i)
        groups.setdefault(item.prompt, []).append(int(i))
        answers.setdefault(item.prompt, {})[item.completion] = None
    return list(_prompt_items(data, groups, answers))


def _prompt_items(
    data: TokenData, groups: dict[str, list[int]], answers: dict[str, dict[str, None]]
) -> Iterator[PromptItem]:
    for prompt, indices in groups.items():
        first = data.item(indices[0])
        yield PromptItem(
            prompt, first.prompt_ids, list(answers[prompt]), tuple(indices), first.fields
        )


def _starts(lengths: np.ndarray) -> np.ndarray:
    """[len + 1]: where each example begins, and the end of the last."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _json(value: Any) -> bytes:
    # ensure_ascii: a column that is not trained on may hold halves of surrogate pairs
    return json.dumps(value, ensure_ascii=True, default=str).encode("ascii")
