"""Text files as they come: gzip, byte-order marks, bytes that are not UTF-8."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO, cast

from lorakit.errors import DataError

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)

#: first bytes of what is often given by mistake → what it is, and what to do
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or an Excel file; unpack it, or export the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel file; export the sheet as CSV",
    b"PAR1": "a Parquet file; give it the ending .parquet",
    b"\x1f\x8b": "compressed with gzip; give it the ending .gz",
    b"ARROW1": "an Arrow file; give the datasets folder that it lies in",
    b"%PDF": "a PDF; extract its text first",
    b"SQLite": "an SQLite database; export the table as CSV",
}


@contextlib.contextmanager
def open_text(path: Path, name: str, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open for reading; bytes that are not UTF-8 become lone surrogates (see ``bad_byte``).

    Raises:
        DataError: the file is absent, empty, unreadable, cut off, or no text.
    """
    try:
        with _open_bytes(path) as raw:
            head = raw.read(4096)
            encoding = _encoding(head, name)
            raw.seek(0)
            # a UTF-16 file has no single bad bytes to name, so it fails as a whole
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            with io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline=newline) as text:
                yield text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: it starts like a {error.encoding.upper()} file but is not one throughout "
            f"({error.reason}). Save it as UTF-8."
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{name}: the compressed file is damaged or cut off ({error}). Make it again."
        ) from None
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file.") from None
    except IsADirectoryError:
        raise DataError(f"{name}: a folder; expected a file.") from None
    except OSError as error:
        raise DataError(f"{name}: it cannot be read: {error.strerror or error}.") from None


def bad_byte(text: str) -> str | None:
    """Say where a text that ``open_text`` gave was not UTF-8; ``None`` if it was."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        near = text[max(0, error.start - 15) : error.start]
        return (
            f"byte 0x{code - 0xDC00:02x} at column {error.start + 1}, after {near!r}, is not "
            "UTF-8. Save the file as UTF-8 (it may be Windows-1252 or Latin-1)"
        )
    return None


def _open_bytes(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return path.open("rb")


def _encoding(head: bytes, name: str) -> str:
    if not head.strip(b"\xef\xbb\xbf\xff\xfe \t\r\n"):
        if len(head) < 4096:
            raise DataError(f"{name}: it is empty; expected at least one row.")
        return "utf-8"
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    for start, what in _FOREIGN.items():
        if head.startswith(start):
            raise DataError(f"{name}: it is {what}.")
    if b"\x00" in head:
        raise DataError(
            f"{name}: it holds zero bytes, so it is not UTF-8 text (a binary file, or UTF-16 "
            "without its mark). Save it as UTF-8."
        )
    return "utf-8"
