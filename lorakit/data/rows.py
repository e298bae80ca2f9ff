"""A row on its way in, where it stands in its file, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import DataError, collected

#: how many bad rows an error names one by one
NAMED = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One row, or, where ``problem`` is set, the place of one that could not be read."""

    file: str
    unit: str
    """How this file's rows are called: ``"line"``, ``"row"``, ``"item"``, ``"paragraph"``."""
    number: int
    """1-based, as somebody who opens the file counts."""
    values: Mapping[str, Any]
    line: int | None = None
    """Line on which it starts, where rows and lines differ."""
    problem: str | None = None
    reason: str = "cannot be read"
    """The class of ``problem``, for counting."""

    @property
    def where(self) -> str:
        """``data.csv row 17 (line 21)``."""
        return place(self.file, self.unit, self.number, self.line)


def place(file: str, unit: str, number: int, line: int | None = None) -> str:
    """Name a row: ``data.csv row 17 (line 21)``."""
    return f"{file} {unit} {number}" + (f" (line {line})" if line is not None else "")


class RowError(DataError):
    """One row that cannot be used; caught and collected by :class:`Problems`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Problems:
    """Rows that cannot be used: counted by reason, the first ones named."""

    counts: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str, message: str) -> None:
        self.counts[reason] += 1
        if len(self.named) < NAMED:
            self.named.append(f"{where}: {message}")

    @property
    def total(self) -> int:
        return self.counts.total()

    def summary(self) -> str:
        """``3 × empty completion, 1 × longer than 512 tokens``."""
        return ", ".join(f"{n} × {reason}" for reason, n in self.counts.most_common())

    def error(self, num_rows: int, advice: str) -> DataError:
        """All of them in one message.

        Args:
            num_rows: rows that were read, the bad ones included.
            advice: the next step, a sentence.
        """
        lines = [*self.named]
        if self.total > len(lines):
            lines.append(f"… and {self.total - len(lines)} more")
        title = f"{self.total} of {num_rows} rows cannot be used ({self.summary()})"
        return DataError(collected(title, lines) + f"\n{advice}")


def shown(value: Any, limit: int = 40) -> str:
    """A value as it appears in a message: its type in words, and its beginning."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (true/false)"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f'text "{value[:limit]}…"' if len(value) > limit else f'text "{value}"'
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, list(value)[:5])) or 'nothing in it'}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"a value of type {type(value).__name__}"


def plural(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
