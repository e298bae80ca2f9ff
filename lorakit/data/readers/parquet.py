"""Parquet: streamed in record batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.data.rows import Row
from lorakit.errors import DataError
from lorakit.optional import require

_BATCH = 1024

#: what values raise that Python cannot hold: text that is not UTF-8, times out of its range
_NO_VALUE = (ValueError, OverflowError)


def read(path: Path, name: str, notes: list[str]) -> Iterator[Row]:
    """The rows, in order.

    Raises:
        DataError: the file is no Parquet file, cut off, holds no row, or two columns of one name.
    """
    arrow = require("pyarrow", extra="train", purpose="Parquet files")
    parquet = require("pyarrow.parquet", extra="train", purpose="Parquet files")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, name)
            for batch in file.iter_batches(batch_size=_BATCH):
                for values, problem in _rows(batch):
                    number += 1
                    yield Row(name, "row", number, values, problem=problem)
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file.") from None
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{name}: it cannot be read as Parquet after row {number} ({reason}). "
            "It may be cut off; copy or make it again."
        ) from None
    if number == 0:
        raise DataError(f"{name}: it holds no rows; expected at least one.")


def _rows(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The rows of a record batch, or of each what is wrong with it."""
    try:
        rows = batch.to_pylist()
    except _NO_VALUE:  # one value of one row; which it is, only a second reading tells
        yield from map(_row, (batch.slice(index, 1) for index in range(batch.num_rows)))
    else:
        yield from ((row, None) for row in rows)


def _row(batch: Any) -> tuple[dict[str, Any], str | None]:
    """The values of a batch of one row, or what is wrong with them."""
    values = {}
    for column, array in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[column] = array[0].as_py()
        except _NO_VALUE as error:
            return {}, f"column '{column}': {str(error).partition(chr(10))[0]}"
    return values, None


def _check_names(columns: Sequence[str], name: str) -> None:
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(
            f"{name}: two columns are called '{twice[0]}'; columns must have different names. "
            "Rename all but one."
        )
