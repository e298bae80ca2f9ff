"""``DataReport``: what was read, what was left out and why, and how long the examples are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit.data.rows import plural


@dataclass(frozen=True)
class DataReport:
    """Counts and choices, for the screen, the run folder and the report."""

    files: tuple[str, ...]
    kind: str
    """``"prompt/completion"``, ``"instruction"``, ``"messages"`` or ``"text"``."""
    columns: Mapping[str, str]
    """Our field → their column."""
    unused_columns: tuple[str, ...]
    format: str
    """``"chat"`` or ``"plain"``."""
    format_reason: str
    loss_on: str
    limit: int | None
    """Longest example allowed, in tokens; ``None``: no limit is known."""
    limit_reason: str
    rows: int
    used: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason → rows that were left out."""
    dropped_rows: tuple[str, ...] = ()
    """The first of them, with what was wrong."""
    cuts: tuple[str, ...] = ()
    """What truncation took away."""
    notes: tuple[str, ...] = ()
    """What readers and template had to decide."""
    tokens: int = 0
    supervised_tokens: int = 0
    duplicates: int = 0
    """Examples that are equal to an earlier one in every token."""
    lengths: Mapping[str, int] = field(default_factory=dict)
    """min, median, p95 and max, in tokens."""
    histogram: tuple[tuple[int, int, int], ...] = ()
    """(from, to, examples): lengths in equal steps, ``to`` excluded."""
    template: str | None = None
    """The prompt's template, where one was given."""
    system: str | None = None
    """The system message before every chat, where one was given."""

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    @property
    def too_long(self) -> int:
        """Rows left out because they are longer than ``limit``."""
        return sum(n for reason, n in self.dropped.items() if reason.startswith("longer than"))

    def with_lengths(
        self, lengths: np.ndarray, supervised_tokens: int, duplicates: int
    ) -> DataReport:
        """The same, completed from the examples.

        Args:
            lengths: [used] tokens of each example.
        """
        middle = {
            "min": int(lengths.min(initial=np.iinfo(np.int64).max)) if len(lengths) else 0,
            "median": int(np.median(lengths)) if len(lengths) else 0,
            "p95": int(np.percentile(lengths, 95)) if len(lengths) else 0,
            "max": int(lengths.max(initial=0)),
        }
        return dataclasses.replace(
            self,
            tokens=int(lengths.sum()),
            supervised_tokens=supervised_tokens,
            duplicates=duplicates,
            lengths=middle,
            histogram=_histogram(lengths),
        )

    def _spoken_loss(self) -> str:
        spoken = _spoken_loss(self.loss_on)
        if self.kind != "messages" or "completion" not in self.columns:
            return spoken
        parted = {"assistant": f"{spoken} of the completion", "completion": "its last turn"}
        return parted.get(self.loss_on, spoken)

    def lines(self) -> list[str]:
        """A few sentences for the screen; every choice and every loss is among them."""
        columns = ", ".join(
            ours if ours == theirs else f"{ours}={theirs}" for ours, theirs in self.columns.items()
        )
        found = [
            f"Data: {plural(self.used, 'example')} from {', '.join(self.files)} "
            f"({self.kind}: {columns})",
            f"Written as {self.format} ({self.format_reason}); the loss is on "
            f"{self._spoken_loss()}",
            f"{plural(self.tokens, 'token')}, {self.supervised_tokens:,} supervised; lengths "
            f"{self.lengths['min']:,} to {self.lengths['max']:,}, median "
            f"{self.lengths['median']:,}, p95 {self.lengths['p95']:,}"
            + (f" (limit {self.limit:,}: {self.limit_reason})" if self.limit is not None else ""),
        ]
        if self.unused_columns:
            found.append(f"Columns not used: {', '.join(self.unused_columns)}")
        if self.dropped:
            why = ", ".join(f"{n} × {reason}" for reason, n in self.dropped.items())
            found.append(f"Left out: {self.num_dropped:,} of {plural(self.rows, 'row')} ({why})")
            found += [f"  {line}" for line in self.dropped_rows]
        found += [f"Truncated: {line}" for line in self.cuts]
        if self.duplicates:
            found.append(f"Duplicates: {plural(self.duplicates, 'example')} equal to earlier ones")
        found += [f"note: {line}" for line in self.notes]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        plain = dataclasses.asdict(self)
        plain["columns"] = dict(self.columns)
        plain["dropped"] = dict(self.dropped)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}


def _histogram(lengths: np.ndarray, bins: int = 10) -> tuple[tuple[int, int, int], ...]:
    if not len(lengths):
        return ()
    low, high = int(lengths.min()), int(lengths.max()) + 1
    step = max(1, -(-(high - low) // bins))
    counts = np.bincount((lengths - low) // step)
    return tuple((low + n * step, low + (n + 1) * step, int(c)) for n, c in enumerate(counts))


def _spoken_loss(loss_on: str) -> str:
    return {
        "completion": "the completion",
        "assistant": "every assistant's turn",
        "all": "all tokens",
    }[loss_on]
