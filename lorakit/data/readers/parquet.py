"""Parquet: streamed in record batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorakit.data.rows import Row
from lorakit.errors import DataError
from lorakit.optional import require

_BATCH = 1024


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
                for values in batch.to_pylist():
                    number += 1
                    yield Row(name, "row", number, values)
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


def _check_names(columns: Sequence[str], name: str) -> None:
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(
            f"{name}: two columns are called '{twice[0]}'; columns must have different names. "
            "Rename all but one."
        )
