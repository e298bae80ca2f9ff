"""Rows of a data set for kinds other than text: columns found, every row checked, one error.

A kind says which fields it needs and makes an example of a row's values; reading, naming of rows,
counting of what is wrong, and the report are here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit.data.readers import open_all
from lorakit.data.rows import Problems, Row, RowError, plural
from lorakit.data.template import closest
from lorakit.errors import DataError, collected


@dataclass(frozen=True)
class RowSpec:
    """Which rows to read, and how; section ``data`` of run.yaml.

    Raises:
        DataError: a value is impossible.
    """

    path: tuple[str, ...]
    """Files, folders or hub ids, in this order."""
    map: Mapping[str, str] = field(default_factory=dict)
    """Our field → their column."""
    template: str | None = None
    """The input text, with ``{column}`` fields, where the kind has one."""
    max_length: int | None = None
    """Longest text, in tokens; ``None`` is what the base can take."""
    truncate: bool = False
    """Cut longer texts at their end."""
    bad_rows: str = "error"
    """``"error"`` stops with all of them named; ``"skip"`` leaves them out and counts them."""

    def __post_init__(self) -> None:
        given: Any = self.path
        paths = [given] if isinstance(given, (str, os.PathLike)) else list(given)
        object.__setattr__(self, "path", tuple(os.fspath(path) for path in paths))
        object.__setattr__(self, "map", dict(self.map))
        problems = []
        if not self.path:
            problems.append("path: no file was given; name at least one")
        if self.bad_rows not in ("error", "skip"):
            problems.append(f"bad_rows: {self.bad_rows!r} given; expected error or skip")
        length = self.max_length
        if length is not None and (not isinstance(length, int) or length < 2):
            problems.append(f"max_length: {length!r} given; expected at least 2 tokens, or None")
        if problems:
            raise DataError(collected("These data settings cannot be used", problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which ``RowSpec(**values)`` makes an equal one."""
        return {**dataclasses.asdict(self), "path": list(self.path)}


@dataclass(frozen=True)
class Fields:
    """The columns of a kind: field → names that are recognised, the first that is there."""

    needs: Mapping[str, tuple[str, ...]]
    may: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    templated: str | None = None
    """The field that ``--template`` writes, if any."""
    lengths: tuple[str, ...] = ("max_length", "truncate")
    """The settings about long texts that act."""

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether these columns have all that is needed, by names that are recognised."""
        there = set(columns)
        return all(there.intersection(names) for names in self.needs.values())


@dataclass(frozen=True)
class RowExample:
    """One row of a kind other than text, ready for the model."""

    id: int
    """Its place in the data set, 0-based."""
    index: int
    """Its row in the file, 1-based."""
    file: str
    size: int
    """What a forward's budget counts: tokens, patches, frames."""
    weight: int
    """What the mean divides by: labels, tokens, pairs."""
    inputs: Mapping[str, Any]
    """What the kind makes a batch of."""


@dataclass(frozen=True)
class Made:
    """What a kind makes of a row."""

    inputs: Mapping[str, Any]
    size: int
    weight: int
    content: bytes
    """What is learnt from it; equal content is one digest."""
    key: bytes
    """What it is asked with; rows that share it stay on one side of a split."""


@dataclass(frozen=True)
class RowReport:
    """Counts and choices, for the screen, the run folder and the report."""

    files: tuple[str, ...]
    kind: str
    """The task."""
    columns: Mapping[str, str]
    """Our field → their column."""
    unused_columns: tuple[str, ...]
    rows: int
    used: int
    unit: str
    """What sizes are counted in."""
    size: int
    """Of all examples together."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_rows: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    classes: Mapping[str, int] = field(default_factory=dict)
    """Label → examples, where there are labels."""
    duplicates: int = 0
    template: str | None = None

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    def lines(self) -> list[str]:
        """A few sentences for the screen."""
        columns = ", ".join(a if a == b else f"{a}={b}" for a, b in self.columns.items())
        found = [
            f"Data: {plural(self.used, 'example')} from {', '.join(self.files)} ({columns}), "
            f"{self.size:,} {self.unit}"
        ]
        if self.classes:
            shown = [f"{label} {count:,}" for label, count in list(self.classes.items())[:12]]
            more = f", and {len(self.classes) - 12} more" if len(self.classes) > 12 else ""
            found.append(f"Labels: {', '.join(shown)}{more}")
        if self.unused_columns:
            found.append(f"Columns not used: {', '.join(self.unused_columns)}")
        if self.dropped:
            why = ", ".join(f"{n} × {reason}" for reason, n in self.dropped.items())
            found.append(f"Left out: {self.num_dropped:,} of {plural(self.rows, 'row')} ({why})")
            found += [f"  {line}" for line in self.dropped_rows]
        if self.duplicates:
            found.append(f"Duplicates: {plural(self.duplicates, 'example')} equal to earlier ones")
        return found + [f"note: {line}" for line in self.notes]

    def facts(self) -> dict[str, Any]:
        """What the adapter's file says of the data."""
        # a local path says where somebody keeps files; a hub id says what the data is
        names = [os.path.basename(f.rstrip("/")) if os.path.exists(f) else f for f in self.files]
        found = {"files": names, "kind": self.kind, "columns": dict(self.columns)}
        return found if self.template is None else {**found, "template": self.template}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        plain = dataclasses.asdict(self)
        for name in ("columns", "dropped", "classes"):
            plain[name] = dict(getattr(self, name))
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}


class RowData(Sequence[RowExample]):
    """Examples of a kind other than text, in memory; what is large, such as pixels, is read when
    a batch needs it."""

    def __init__(
        self,
        examples: Sequence[RowExample],
        rows: Sequence[Row],
        keys: Sequence[bytes],
        report: RowReport,
        digest: str,
        spec: RowSpec,
    ) -> None:
        self._examples, self._rows, self._keys = list(examples), list(rows), list(keys)
        self.report, self.digest, self.spec = report, digest, spec

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]

    @property
    def lengths(self) -> np.ndarray:
        """[len] int64: the size of each example."""
        return np.array([example.size for example in self._examples], np.int64)

    def where(self, index: int) -> str:
        """The row of an example, for messages."""
        return self._rows[int(index)].where

    def prompt_key(self, index: int) -> bytes:
        """16 bytes that rows which ask the same share."""
        return self._keys[int(index)]

    def values(self, index: int) -> Mapping[str, Any]:
        """The whole row: their columns."""
        return self._rows[int(index)].values


#: of a row's fields → what the kind makes of it; raises RowError
Make = Callable[[Row, Mapping[str, Any]], Made]


def load_rows(
    spec: RowSpec,
    fields: Fields,
    make: Make,
    *,
    task: str,
    unit: str,
    rows: Iterator[Row] | None = None,
    label: Callable[[Made], str] | None = None,
    notes: Sequence[str] = (),
) -> RowData:
    """Read all rows once and make examples of them.

    Args:
        make: of a row and its fields; raises ``RowError`` where it cannot be used.
        task: name of the kind, for the report and for messages.
        unit: what sizes are counted in.
        rows: where they do not come from files of rows.
        label: the label of an example, to be counted.

    Raises:
        DataError: a file cannot be read, columns are missing, rows cannot be used, or none is
            left.
    """
    said = list(notes)
    stream = open_all(spec.path, said) if rows is None else rows
    problems, found = Problems(), []
    columns: dict[str, str] = {}
    unused: tuple[str, ...] = ()
    digest, seen, duplicates, number = hashlib.sha256(), set[bytes](), 0, 0
    classes: Counter[str] = Counter()
    for row in stream:
        number += 1
        if row.problem is not None:
            problems.add(row.where, row.reason, row.problem)
            continue
        if not columns:
            columns = find_fields(spec, fields, list(map(str, row.values)), row.where, task)
            unused = tuple(c for c in map(str, row.values) if c not in columns.values())
        try:
            refuse_more(row, fields, columns)
            made = make(row, values_of(row, columns))
        except RowError as error:
            problems.add(row.where, error.reason, str(error))
            continue
        content = hashlib.sha256(made.content).digest()
        digest.update(content)
        duplicates += content in seen
        seen.add(content)
        if label is not None:
            classes[label(made)] += 1
        found.append((row, made))
    if number == 0:
        raise DataError("The data holds no rows; expected at least one.")
    if problems.total and spec.bad_rows == "error":
        ways = "Mend these rows, or leave them out with --bad-rows skip"
        # a recording that is longer than so many seconds is not cut
        too_long = any(re.fullmatch(r"longer than \S+ tokens", why) for why in problems.counts)
        if too_long and "truncate" in fields.lengths:
            ways += ", or shorten the long ones with --truncate"
        raise problems.error(number, f"{ways}.")
    if not found:
        raise problems.error(number, "No row is left to learn from; look at the first ones.")
    examples = [
        RowExample(i, row.number, row.file, made.size, made.weight, made.inputs)
        for i, (row, made) in enumerate(found)
    ]
    report = RowReport(
        files=spec.path,
        kind=task,
        columns=columns,
        unused_columns=unused,
        rows=number,
        used=len(found),
        unit=unit,
        size=sum(example.size for example in examples),
        dropped=dict(problems.counts),
        dropped_rows=tuple(problems.named),
        notes=tuple(said),
        classes=dict(sorted(classes.items())),
        duplicates=duplicates,
        template=spec.template,
    )
    keys = [hashlib.blake2b(made.key, digest_size=16).digest() for _, made in found]
    return RowData(examples, [row for row, _ in found], keys, report, digest.hexdigest(), spec)


def first_columns(path: Sequence[str]) -> list[str]:
    """The columns of the first row that can be read; none where there is no such row.

    Raises:
        DataError: a file cannot be read.
    """
    rows = open_all(path, [])
    for row in itertools.islice(rows, 1000):
        if row.problem is None:
            return list(map(str, row.values))
    return []


def find_fields(
    spec: RowSpec, fields: Fields, present: Sequence[str], where: str, task: str
) -> dict[str, str]:
    """Our field → their column.

    Raises:
        DataError: a mapped column does not exist, or a field that is needed is not found; the
            message lists the columns that there are.
    """
    known = {**fields.needs, **fields.may}
    problems = [
        f"--map {ours}: {task} has no such field; it has {', '.join(known)}"
        for ours in spec.map
        if ours not in known
    ]
    problems += [
        f"there is no column '{column}'.{closest(column, present)}"
        for column in dict.fromkeys(spec.map.values())
        if column not in present
    ]
    found = {ours: column for ours, column in spec.map.items() if column in present}
    for ours, names in known.items():
        if spec.template is not None and ours == fields.templated:
            continue
        free = next((n for n in names if n in present and n not in found.values()), None)
        if ours not in spec.map and free is not None:
            found[ours] = free
    if spec.template is not None and fields.templated is None:
        problems.append(f"--template: {task} has no text that it could write; leave it out")
    problems += [
        f"--{name.replace('_', '-')}: it cannot act on {task}; leave it out"
        for name in ("max_length", "truncate")
        if getattr(spec, name) and name not in fields.lengths
    ]
    templated = fields.templated if spec.template is not None else None
    needed = [ours for ours in fields.needs if ours not in spec.map and ours != templated]
    problems += [
        f"no column is known as the {ours} (recognised: {', '.join(fields.needs[ours])}); give "
        f"--map {ours}=COLUMN"
        for ours in needed
        if ours not in found
    ]
    if problems:
        columns = ", ".join(str(c)[:60] for c in present[:20]) or "(none)"
        raise DataError(collected(f"{where} has the columns {columns}", problems))
    return {ours: found[ours] for ours in known if ours in found}


def refuse_more(row: Row, fields: Fields, columns: Mapping[str, str]) -> None:
    """Refuse a row with more than what is read of all of them; ``null`` is nothing.

    Args:
        columns: our field → their column, as the first row has them.

    Raises:
        RowError: it has a column that the first row lacks, of a field that rows may have.
    """
    for ours, names in fields.may.items():
        free = [name for name in names if name not in columns.values()]
        more = next((name for name in free if row.values.get(name) is not None), None)
        if ours not in columns and more is not None:
            raise RowError(
                f"a column '{more}' that the first row lacks",
                f"it has a column '{more}' (the {ours}), and the first row has none; give it to "
                "every row, or to none",
            )


def values_of(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Our field → the row's value.

    Raises:
        RowError: a column is missing in this row.
    """
    for ours, column in columns.items():
        if column not in row.values:
            has = ", ".join(map(str, row.values)) or "nothing"
            raise RowError(
                f"no column '{column}'",
                f"it has no column '{column}' (the {ours}); it has {has}."
                f"{closest(column, row.values)}",
            )
    return {ours: row.values[column] for ours, column in columns.items()}
