"""``load_data``: read, check every row, tokenise; all problems come in one error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.columns import Columns, Kind, find_columns
from lorakit.data.encode import Encoded, Encoder, Sample
from lorakit.data.readers import open_all
from lorakit.data.rendering import make_rendering
from lorakit.data.report import DataReport
from lorakit.data.rows import Problems, Row, RowError, plural
from lorakit.data.shorten import Cuts, shorten
from lorakit.data.spec import DataSpec
from lorakit.data.store import MEMORY_BYTES
from lorakit.data.tokenizer import special_pattern
from lorakit.data.tokens import Builder, TokenData
from lorakit.errors import DataError

_BATCH = 1024

Progress = Callable[[int], None]


def load_data(
    spec: DataSpec,
    tokenizer: Any,
    *,
    context_length: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> TokenData:
    """Read all rows once and tokenise them.

    Args:
        context_length: longest sequence of the base, in tokens; ``None`` if unknown.
        memory_bytes: examples that take more are kept in memory-mapped files.
        progress: called with the number of rows done, now and then.

    Raises:
        DataError: a file cannot be read, its columns are not understood, rows cannot be used
            (all are counted and the first are named; with ``bad_rows="skip"`` they are left out
            instead), or no row is left.
    """
    limit, limit_reason = _limit(spec, context_length)
    notes: list[str] = []
    problems = Problems()
    rows, first = _first_good(open_all(spec.path, notes), problems)
    columns = find_columns(spec, first.values, first.where, notes)
    rendering = make_rendering(tokenizer, spec.format, system=spec.system, kind=columns.kind)
    work = _Work(spec, Encoder(spec, columns, rendering), limit, problems)
    _check_loss(spec, columns)
    builder = Builder(memory_bytes=memory_bytes)
    num_rows = 0
    for batch in _batches(rows):
        num_rows += len(batch)
        work.add(batch, builder)
        if progress is not None:
            progress(num_rows)
    if problems.total and spec.bad_rows == "error":
        raise problems.error(num_rows, _advice(problems, spec))
    if problems.total == num_rows:
        raise problems.error(num_rows, "No row is left to learn from; look at the first ones.")
    return builder.finish(
        DataReport(
            files=spec.path,
            kind=columns.kind,
            columns=_shown_columns(columns),
            unused_columns=columns.unused,
            format=rendering.format,
            format_reason=rendering.reason,
            loss_on=work.encoder.loss_on,
            limit=limit,
            limit_reason=limit_reason,
            rows=num_rows,
            used=num_rows - problems.total,
            dropped=dict(problems.counts),
            dropped_rows=tuple(problems.named),
            cuts=tuple(work.cuts.lines()),
            notes=(*notes, *rendering.notes, *work.notes()),
            template=spec.template,
            system=spec.system,
        ),
        rendering.stop_ids,
    )


def kind_of_rows(spec: DataSpec) -> Kind:
    """What the rows are, by the first that can be read.

    Raises:
        DataError: a file cannot be read, or its columns are not understood.
    """
    _, first = _first_good(open_all(spec.path, []), Problems())
    return find_columns(spec, first.values, first.where, []).kind


@dataclass
class _Work:
    """Takes rows to examples, batch by batch."""

    spec: DataSpec
    encoder: Encoder
    limit: int | None
    problems: Problems
    cuts: Cuts = field(default_factory=Cuts)
    own_system: int = 0
    tools_written: bool | None = None
    special_rows: int = 0
    special_first: str = ""

    def __post_init__(self) -> None:
        self._special = special_pattern(self.encoder.rendering.tokenizer)

    def add(self, batch: Sequence[Row], builder: Builder) -> None:
        good: list[tuple[Row, Sample]] = []
        for row in batch:
            if row.problem is not None:
                self.problems.add(row.where, row.reason, row.problem)
                continue
            try:
                good.append((row, self.encoder.sample(row.values)))
            except RowError as error:
                self.problems.add(row.where, error.reason, str(error))
        encoded = self.encoder.encode([sample for _, sample in good])
        for (row, sample), result in zip(good, encoded, strict=True):
            try:
                if isinstance(result, RowError):
                    raise result
                result = self._fitted(sample, result)
            except RowError as error:
                self.problems.add(row.where, error.reason, str(error))
                continue
            self._look(row, sample)
            builder.add(result, row, sample.key, sample.completion)

    def _fitted(self, sample: Sample, encoded: Encoded) -> Encoded:
        if not encoded.supervised.any():
            raise RowError(
                "nothing supervised",
                f"none of its {plural(len(encoded.ids), 'token')} would be learnt (the first "
                "token of an example never is)",
            )
        if self.limit is None or len(encoded.ids) <= self.limit:
            return encoded
        if self.spec.truncate:
            return shorten(self.encoder, sample, encoded, self.limit, self.cuts)
        answer = len(encoded.ids) - encoded.prompt_length
        split = f" ({encoded.prompt_length:,} before the answer)" if encoded.prompt_length else ""
        raise RowError(
            f"longer than {self.limit:,} tokens",
            f"{encoded.prompt_length + answer:,} tokens{split}; at most {self.limit:,} fit",
        )

    def _look(self, row: Row, sample: Sample) -> None:
        """Count what is allowed but may surprise."""
        if sample.messages and self.spec.system is not None:
            own = any(m["content"] != self.spec.system for m in sample.messages[:1])
            self.own_system += own
        if sample.tools and self.tools_written is None:
            self.tools_written = self.encoder.writes_tools(sample)
        if self.encoder.columns.kind == "text":
            return  # text that was rendered elsewhere holds its special tokens on purpose
        parts = [m["content"] for m in sample.messages] or [sample.prompt, sample.completion]
        found = next(filter(None, map(self._special.search, parts)), None)
        if found is not None:
            self.special_rows += 1
            self.special_first = self.special_first or f"{found[0]!r} in {row.where}"

    def notes(self) -> Iterator[str]:
        if self.tools_written is False:
            yield "the chat template writes no tools, so what the column 'tools' holds does not act"
        if self.own_system:
            yield (
                f"{plural(self.own_system, 'chat')} with a system message of their own, which "
                "stays in place of the given one"
            )
        if self.special_rows:
            yield (
                f"{plural(self.special_rows, 'row')} whose text holds a special token of the "
                f"tokenizer, which is read as that token (first: {self.special_first})"
            )


def _first_good(rows: Iterator[Row], problems: Problems) -> tuple[Iterator[Row], Row]:
    """Look ahead to the first row that could be read; it tells the columns."""
    ahead = []
    for row in rows:
        ahead.append(row)
        if row.problem is None:
            return itertools.chain(ahead, rows), row
    for row in ahead:
        problems.add(row.where, row.reason, row.problem or "")
    if not ahead:
        raise DataError("The data holds no rows; expected at least one.")
    raise problems.error(len(ahead), "No row could be read; mend the first ones.")


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch


def _limit(spec: DataSpec, context_length: int | None) -> tuple[int | None, str]:
    if spec.max_length is None:
        return context_length, "the base's context"
    if context_length is not None and spec.max_length > context_length:
        raise DataError(
            f"max_length: {spec.max_length:,} given, but the base's context holds "
            f"{context_length:,} tokens. Give at most that, or leave it out."
        )
    return spec.max_length, "max_length"


def _check_loss(spec: DataSpec, columns: Columns) -> None:
    if columns.kind == "text" and spec.loss_on not in (None, "all"):
        raise DataError(
            f"loss_on: {spec.loss_on} given, but the rows are plain text, which has no such part. "
            "Leave it out, or give prompt and completion."
        )


def _advice(problems: Problems, spec: DataSpec) -> str:
    ways = ["Mend these rows", "leave them out with --bad-rows skip"]
    if any(reason.startswith("longer than") for reason in problems.counts):
        ways.append("shorten the long ones with --truncate")
    return f"{', or '.join(ways)}."


def _shown_columns(columns: Columns) -> dict[str, str]:
    if columns.template is None:
        return dict(columns.names)
    written = " + ".join(f"{{{column}}}" for column in columns.template.columns)
    return {"prompt": f"template of {written}", **columns.names}
