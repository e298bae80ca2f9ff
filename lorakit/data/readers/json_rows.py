"""JSON Lines (one object a line, streamed) and JSON (a list of objects, read whole).

Files often carry the other one's ending, so each reader hands over to the other where the
content says so, and notes it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.data.readers.textfile import bad_byte, open_text
from lorakit.data.rows import Row, shown
from lorakit.errors import DataError

_EXPECTED = 'expected an object such as {"prompt": …}'


def read_lines(path: Path, name: str, notes: list[str]) -> Iterator[Row]:
    """JSON Lines; empty lines are passed over but counted, so the numbers are an editor's."""
    with open_text(path, name) as lines:
        first = True
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text:
                continue
            if first and text.startswith("[") and not _is_plain_value(text):
                notes.append(f"{name}: read as one JSON list, although it ends like JSON Lines")
                yield from read_list(path, name, notes)
                return
            first = False
            yield _line(name, number, line)


def read_list(path: Path, name: str, notes: list[str]) -> Iterator[Row]:
    """The objects of a JSON list, or of the one list inside an object.

    Raises:
        DataError: the file is broken JSON, or holds no list of objects.
    """
    with open_text(path, name) as file:
        text = file.read()
    # JSON writes half a surrogate pair only as an escape, so one in the text is a bad byte
    if bad_byte(text) is not None:
        bad = next(
            f"line {n}: {problem}"
            for n, line in enumerate(text.split("\n"), start=1)
            if (problem := bad_byte(line)) is not None
        )
        raise DataError(f"{name} {bad}.")
    try:
        value, repeats = _parse(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            notes.append(f"{name}: read as JSON Lines, although it ends like JSON")
            yield from read_lines(path, name, notes)
            return
        raise DataError(f"{name} line {error.lineno}: {_broken(error)}. Mend the file.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: {_broken(error)}. Mend the file.") from None
    for number, item in enumerate(_items(value, name, notes), start=1):
        yield _row(name, "item", number, item, _repeated(item) if repeats else None)


def _line(name: str, number: int, line: str) -> Row:
    problem = bad_byte(line)
    if problem is None:
        try:
            value, repeats = _parse(line)
        except (ValueError, RecursionError) as error:
            problem = _broken(error)
        else:
            return _row(name, "line", number, value, next(iter(repeats), None))
    return Row(name, "line", number, {}, problem=problem)


def _row(name: str, unit: str, number: int, value: Any, repeated: str | None) -> Row:
    if not isinstance(value, dict):
        problem = f"{shown(value)}; {_EXPECTED}"
    elif repeated is not None:
        problem = f"the key '{repeated}' stands twice in one object; expected each once"
    else:
        return Row(name, unit, number, value)
    return Row(name, unit, number, {}, problem=problem)


class _Repeating(dict[str, Any]):
    """An object in which ``key`` stood twice; JSON's reader keeps the last and says nothing."""

    key: str


def _parse(text: str) -> tuple[Any, list[str]]:
    """The value, in which an object with a key twice is a ``_Repeating``, and all such keys.

    Raises:
        ValueError: broken JSON, or a number of thousands of digits.
        RecursionError: nested too deeply.
    """
    repeats: list[str] = []

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            found = _Repeating(found)
            found.key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            repeats.append(found.key)
        return found

    return json.loads(text, object_pairs_hook=made), repeats


def _repeated(value: Any) -> str | None:
    """The first key that stands twice in an object anywhere in ``value``."""
    if isinstance(value, _Repeating):
        return value.key
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for one in inner if (key := _repeated(one)) is not None), None)


def _broken(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "broken JSON: a number has more digits than can be read"
    before = error.doc[max(0, error.pos - 20) : error.pos].rpartition("\n")[2]
    after = error.doc[error.pos : error.pos + 15].partition("\n")[0]
    near = f"{before}▸{after}" if after.strip() else f"{before}▸ (the end)"
    return f"broken JSON at column {error.colno}: {error.msg}, at ▸ in {near}"


def _is_plain_value(text: str) -> bool:
    """Whether a line is a whole value that is no list of objects: a bad row, not a bad file."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return not (isinstance(value, list) and _is_row(value[:1]))


def _is_row(first: list[Any]) -> bool:
    return bool(first) and isinstance(first[0], dict)


def _items(value: Any, name: str, notes: list[str]) -> list[Any]:
    if isinstance(value, list):
        if not value:
            raise DataError(f"{name}: the list is empty; expected at least one row.")
        return value
    if isinstance(value, dict):
        lists = [k for k, held in value.items() if isinstance(held, list) and _is_row(held[:1])]
        chosen = "data" if "data" in lists else lists[0] if len(lists) == 1 else None
        if chosen not in (None, "messages", "conversations"):  # those are one row's
            notes.append(f'{name}: the rows are the list under "{chosen}"')
            return list(value[chosen])
    raise DataError(
        f'{name}: {shown(value)}; expected a list of objects, or one under the key "data". '
        "Write one object a line (JSON Lines) or a list of objects."
    )
