"""Files → rows: JSONL, JSON, CSV, TSV, Parquet, text, ``datasets`` folders and hub ids.

Each reader is one module with one function ``read(path, name, notes) -> Iterator[Row]``; it
streams where the format allows. A row that cannot be read comes back as a
:class:`~lorakit.data.rows.Row` with its ``problem``; a file that cannot be read raises
``DataError``. What a reader had to decide goes into ``notes``.
"""

from lorakit.data.readers.source import holds_rows, open_all, open_rows

__all__ = ["holds_rows", "open_all", "open_rows"]
