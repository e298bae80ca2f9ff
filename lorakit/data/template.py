"""``--template``: a prompt with ``{column}`` fields."""

from __future__ import annotations

import difflib
import os
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.rows import RowError, shown
from lorakit.errors import DataError, collected


@dataclass(frozen=True)
class Template:
    """Text with fields; ``{{`` and ``}}`` stand for braces."""

    parts: tuple[tuple[str, str | None], ...]
    """(text, column behind it or ``None``), in order."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, each once."""
        return tuple(dict.fromkeys(column for _, column in self.parts if column is not None))

    def fill(self, values: Mapping[str, Any]) -> str:
        """The prompt of one row; numbers are written out, ``null`` is a problem of the row.

        Raises:
            RowError: a column is missing there, or holds no text.
        """
        pieces = []
        for text, column in self.parts:
            pieces.append(text)
            if column is None:
                continue
            value = values.get(column)
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                found = shown(value) if column in values else "missing"
                raise RowError(
                    "a template column without text",
                    f"column '{column}' is {found}; the template expects text",
                )
            pieces.append(str(value))
        return "".join(pieces)


def parse_template(text: str, notes: list[str]) -> Template:
    """Read a template, from the text itself or from the file that it names.

    Raises:
        DataError: the braces do not match, or hold something other than a column's name.
    """
    if os.sep in text or text.endswith((".txt", ".md", ".template")):
        path = Path(text)
        is_file = os.path.isfile(path)  # also where a text is too long for a name
        if "{" not in text and not is_file:
            raise DataError(
                f"template: there is no file {text}, and as a text it has no {{column}}."
            )
        if is_file:
            notes.append(f"template: read from {text}")
            try:
                text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
            except UnicodeDecodeError as error:
                raise DataError(f"template: {text} is not UTF-8 text: {error}.") from None
    if "\\n" in text and "\n" not in text:
        notes.append(
            "template: it holds a backslash and an n, not a line break; in bash write "
            "$'first line\\nsecond line', or put the template into a file"
        )
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(
            f"template: {error}. Write {{column}} for a column, and {{{{ or }}}} for a brace."
        ) from None
    problems = []
    parts: list[tuple[str, str | None]] = []
    for literal, name, style, conversion in pieces:
        if name is not None and (style or conversion or not name.strip()):
            mark = (
                f"{{{name}{'!' + conversion if conversion else ''}{':' + style if style else ''}}}"
            )
            problems.append(
                f"{mark}: expected a column's name alone; for a brace write {{{{ or }}}}"
            )
        parts.append((literal, name.strip() if name is not None else None))
    if problems:
        raise DataError(collected("The template cannot be used", problems))
    template = Template(tuple(parts))
    if not template.columns:
        raise DataError(
            f"template: it names no column, so every prompt would be the same ({shown(text)}). "
            "Write {column} where a row's text belongs."
        )
    return template


def closest(name: str, names: Collection[str]) -> str:
    """`` Did you mean 'ref'?``, or nothing."""
    lower = {one.lower(): one for one in names}
    found = difflib.get_close_matches(name.lower(), list(lower), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(lower[one]) for one in found)}?" if found else ""
