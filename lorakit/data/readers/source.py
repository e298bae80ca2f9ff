"""From what was given — a file, a folder, a hub id — to the reader that fits."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lorakit.data.readers import hub, json_rows, parquet, table, text
from lorakit.data.rows import Row
from lorakit.errors import DataError, collected

Reader = Callable[[Path, str, list[str]], Iterator[Row]]

READERS: dict[str, Reader] = {
    ".jsonl": json_rows.read_lines,
    ".ndjson": json_rows.read_lines,
    ".json": json_rows.read_list,
    ".csv": table.read,
    ".tsv": table.read,
    ".tab": table.read,
    ".parquet": parquet.read,
    ".txt": text.read,
    ".md": text.read,
}

#: names of files that are rather judged on than trained on
_HELD_OUT = re.compile(r"(^|[^a-z])(test|val|valid|validation|dev|eval)([^a-z]|$)")


#: files of a folder that an error names
_SHOWN = 12


def holds_rows(ref: str) -> bool:
    """Whether a file's name says that it has columns, as CSV has and plain text has not."""
    return READERS.get(suffix_of(Path(ref)), text.read) is not text.read


def open_all(refs: Iterable[str], notes: list[str]) -> Iterator[Row]:
    """Rows of several, one behind the other; whatever is missing is said before any is read.

    Args:
        notes: as of :func:`open_rows`.

    Raises:
        DataError: some cannot be opened; all are listed.
    """
    opened, problems = [], []
    for ref in refs:
        try:
            opened.append(open_rows(ref, notes))
        except DataError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError(collected("These files cannot be read", map(str, problems)))
    return itertools.chain.from_iterable(opened)


def open_rows(ref: str, notes: list[str]) -> Iterator[Row]:
    """Rows of one file, folder or hub id, in order.

    Args:
        notes: what had to be decided is appended here, once reading has begun.

    Raises:
        DataError: nothing is there, or it is of an unknown kind; raised at the call for what
            can be known without reading.
    """
    # the functions of os.path answer for any text; a Path raises where a name is too long
    path = Path(os.path.expanduser(ref))
    if os.path.isdir(path):
        return _open_folder(path, ref, notes)
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise DataError(f"{ref}: it is a pipe or a device; write it to a file first.")
        return _reader(path, ref)(path, ref, notes)
    if hub.looks_like_id(ref) and suffix_of(path) not in READERS:
        return hub.read_hub(ref, notes)
    raise DataError(f"{ref}: there is no such file.{_close(path)}")


def _open_folder(folder: Path, ref: str, notes: list[str]) -> Iterator[Row]:
    if hub.is_saved(folder):
        return hub.read_saved(folder, ref, notes)
    files = sorted(p for p in folder.iterdir() if p.is_file() and suffix_of(p) in READERS)
    readable = [p for p in files if suffix_of(p) not in (".md", ".txt")] or files
    if not readable:
        raise DataError(
            f"{ref}: the folder holds no data; expected a folder of save_to_disk, or files that "
            f"end in {', '.join(READERS)}."
        )
    kinds = {suffix_of(p) for p in readable}
    held_out = [p.name for p in readable if _HELD_OUT.search(p.stem.lower())]
    if len(kinds) > 1 or (held_out and len(readable) > 1):
        why = (
            f"files of several kinds ({', '.join(sorted(kinds))})"
            if len(kinds) > 1
            else f"files that seem to be held out ({', '.join(held_out[:3])})"
        )
        raise DataError(
            f"{ref}: the folder holds {why}; name the files to read, such as "
            f"{folder / readable[0].name}."
        )
    names = ", ".join(p.name for p in readable[:5]) + (" …" if len(readable) > 5 else "")
    notes.append(f"{ref}: the folder's files are read in this order: {names}")
    return (row for p in readable for row in READERS[suffix_of(p)](p, str(p), notes))


def _reader(path: Path, ref: str) -> Reader:
    reader = READERS.get(suffix_of(path))
    if reader is None:
        ending = f"ends in {path.suffix}" if path.suffix else "has no ending"
        raise DataError(
            f"{ref}: it {ending}; expected {', '.join(READERS)}, or one of them with .gz behind "
            "it (not Parquet). Rename or convert the file."
        )
    return reader


def suffix_of(path: Path) -> str:
    """``.csv`` of ``a.csv`` and of ``A.CSV.gz``: what chooses the reader."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        inner = Path(path.stem).suffix.lower()
        return inner if inner != ".parquet" else ".gz"
    return suffix


def stem_of(path: Path) -> str:
    """``a`` of ``a.csv`` and of ``a.csv.gz``."""
    packed = path.suffix.lower() == ".gz" and suffix_of(path) in READERS
    return Path(path.stem).stem if packed else path.stem


def _close(path: Path) -> str:
    """The files in the same folder that could be read, those of nearly this name first."""
    parent = path.parent
    if not os.path.isdir(parent):
        return f" Nor is there a folder {parent}." if len(str(parent)) < 200 else " Nor its folder."
    there = sorted(p for p in parent.iterdir() if p.is_file() and suffix_of(p) in READERS)
    names = [p.name for p in there]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    names = [*close, *(name for name in names if name not in close)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" In its folder are: {', '.join(names[:_SHOWN])}{more}." if names else ""
