"""What a command prints: results on stdout; progress, notes and tables on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.optional import require

if TYPE_CHECKING:
    from rich.console import Console


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on stdout; numbers that are not finite become null",
    )


def plural(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def say(text: str) -> None:
    """Print a line for the person at the terminal, on stderr."""
    print(text, file=sys.stderr, flush=True)


def console(*, stdout: bool = False) -> Console:
    """A rich console, on stderr unless a result is to be printed.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    made: Console = require("rich.console", extra="train").Console(stderr=not stdout)
    return made


def printable_stdout() -> None:
    """Let stdout take any text, also where its encoding has no sign for it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def emit_json(value: Any) -> None:
    """Print one JSON object on stdout; floats that are not finite become ``null``.

    Text is escaped where stdout is not UTF-8 or the text is not, such as a path of other bytes.
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    data = plain(value)
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=encoding != "utf8")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2, allow_nan=False)
    print(text, flush=True)


def plain(value: Any) -> Any:
    """The value as JSON data: mappings, lists, text, finite numbers, booleans, ``None``.

    Paths and dtypes become text, sets are sorted, one-element tensors and NumPy scalars become
    numbers, dataclasses become objects.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(one) for one in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return plain(value.tolist())
    return str(value)
