"""Plain text: a paragraph is an example; where no line is empty, a line is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorakit.data.readers.textfile import bad_byte, open_text
from lorakit.data.rows import Row


def read(path: Path, name: str, notes: list[str]) -> Iterator[Row]:
    """Stream paragraphs (empty lines separate them) or, without empty lines, lines."""
    paragraphs = _has_paragraphs(path, name)
    unit = "paragraph" if paragraphs else "line"
    why = "empty lines separate them" if paragraphs else "it has no empty line"
    notes.append(f"{name}: one example per {unit} ({why})")
    with open_text(path, name) as lines:
        number, start, held = 0, 1, list[str]()
        for line_number, line in enumerate(lines, start=1):
            if not paragraphs:
                yield _row(name, unit, line_number, None, line.rstrip("\n"))
            elif line.strip():
                start = start if held else line_number
                held.append(line)
            elif held:
                number += 1
                yield _row(name, unit, number, start, "".join(held).rstrip("\n"))
                held = []
        if held:
            yield _row(name, unit, number + 1, start, "".join(held).rstrip("\n"))


def _row(name: str, unit: str, number: int, line: int | None, text: str) -> Row:
    return Row(name, unit, number, {"text": text}, line, bad_byte(text))


def _has_paragraphs(path: Path, name: str) -> bool:
    """Whether an empty line stands between two that are not."""
    with open_text(path, name) as lines:
        seen, gap = False, False
        for line in lines:
            if not line.strip():
                gap = seen
            elif gap:
                return True
            else:
                seen = True
    return False
