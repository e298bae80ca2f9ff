"""CSV and TSV: the first line names the columns."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lorakit.data.readers.textfile import bad_byte, open_text
from lorakit.data.rows import Row, plural
from lorakit.errors import DataError, collected

#: longest cell, in characters; Python's own limit of 131,072 is below one long document
_MAX_CELL = 2**31 - 1


def read(path: Path, name: str, notes: list[str]) -> Iterator[Row]:
    """Stream the records; a record's number counts data rows, and its line is known too.

    Raises:
        DataError: no header, or names that occur twice.
    """
    csv.field_size_limit(_MAX_CELL)
    with open_text(path, name, newline="") as file:
        delimiter = "\t" if _plain_suffix(path) in (".tsv", ".tab") else _delimiter(file)
        if delimiter != "," and _plain_suffix(path) == ".csv":
            notes.append(f"{name}: the columns are separated by {_spoken(delimiter)}")
        records = csv.reader(file, delimiter=delimiter, strict=True)
        header = _header(records, name)
        number = 0
        while True:
            line = records.line_num + 1
            try:
                cells = next(records, None)
            except csv.Error as error:
                number += 1
                yield Row(name, "row", number, {}, line, _quotes(error, line))
                continue
            if cells is None:
                break
            if not cells:  # an empty line
                continue
            number += 1
            yield _row(name, number, line, header, cells)
    if number == 0:
        raise DataError(
            f"{name}: it has a header ({', '.join(header)}) and no rows; expected at least one."
        )


def _row(name: str, number: int, line: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        cause = "an unquoted separator?" if len(cells) > len(header) else "a quote left open?"
        problem = (
            f"{plural(len(cells), 'value')} for the {len(header)} columns {', '.join(header)} "
            f"({cause}); the first is {cells[0][:30]!r}"
        )
        return Row(name, "row", number, {}, line, problem)
    for column, cell in zip(header, cells, strict=True):
        if (bad := bad_byte(cell)) is not None:
            return Row(name, "row", number, {}, line, f"column '{column}': {bad}")
    return Row(name, "row", number, dict(zip(header, cells, strict=True)), line)


def _header(records: Iterator[list[str]], name: str) -> list[str]:
    try:
        cells = next((cells for cells in records if cells), [])
    except csv.Error as error:
        raise DataError(f"{name} line 1: {_quotes(error, 1)}.") from None
    header = [cell.strip() for cell in cells]
    if not any(header):
        raise DataError(f"{name} line 1: expected the names of the columns; they are empty.")
    for cell in header:
        if (problem := bad_byte(cell)) is not None:
            raise DataError(f"{name} line 1: {problem}.")
    twice = [column for column, count in Counter(header).items() if count > 1 and column]
    if twice:
        raise DataError(
            collected(
                f"{name} line 1: columns must have different names",
                (f"'{column}' occurs {header.count(column)} times" for column in twice),
            )
            + "\nRename all but one of each."
        )
    # a column without a name is usually a spreadsheet's index; it cannot be mapped, so it is
    # called by its place
    return [cell or f"column {place}" for place, cell in enumerate(header, start=1)]


def _delimiter(file: TextIO) -> str:
    """The separator that the header has most of, quoted parts left out; a comma if none."""
    first = file.readline()
    file.seek(0)
    outside = "".join(first.split('"')[::2])
    return max(",;\t|", key=lambda mark: outside.count(mark))


def _quotes(error: csv.Error, line: int) -> str:
    if "unexpected end of data" in str(error):
        return f'a quote (") opened in the record of line {line} is never closed'
    return f'the quotes (") of this record do not match: {error}'


def _plain_suffix(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _spoken(delimiter: str) -> str:
    return {";": "semicolons", "\t": "tabs", "|": "bars"}[delimiter]
