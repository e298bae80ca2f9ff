"""``DataSpec``: where the rows are and how they become examples; the home of these defaults."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lorakit.errors import DataError, collected

LossOn = Literal["completion", "assistant", "all"]
Format = Literal["auto", "chat", "plain"]
BadRows = Literal["error", "skip"]

#: what ``map`` may name: the fields of the four kinds of rows
FIELDS = ("prompt", "completion", "messages", "text", "instruction", "input", "output")


def map_flag(mapped: Mapping[str, str]) -> str:
    """``--map`` as a shell takes it: quoted where a column's name needs that."""
    return "--map " + shlex.quote(",".join(f"{field}={one}" for field, one in mapped.items()))


def turned(mapped: Mapping[str, str]) -> dict[str, str] | None:
    """The map with both sides exchanged, if our fields stand on the right; else ``None``."""
    found = {field: column for column, field in mapped.items()}
    return found if len(found) == len(mapped) and set(found) <= set(FIELDS) else None


@dataclass(frozen=True)
class DataSpec:
    """Which rows to read, and how each becomes tokens.

    Raises:
        DataError: a value is impossible, or two of them contradict each other.
    """

    path: tuple[str, ...]
    """Files, folders or hub ids (``owner/name[:config][@revision][/split]``), in this order;
    one path, or a list of them, becomes a tuple of texts."""
    map: Mapping[str, str] = field(default_factory=dict)
    """Our field → their column, such as ``{"prompt": "question"}``."""
    template: str | None = None
    """The prompt, with ``{column}`` fields; or the name of a file that holds it."""
    system: str | None = None
    """System message before every chat that has none of its own; ``""`` is an empty one."""
    format: Format = "auto"
    """How a prompt and its completion are written: ``"chat"`` as a user's turn and the
    assistant's, through the tokenizer's chat template; ``"plain"`` one after the other;
    ``"auto"`` as a chat where the tokenizer has a template."""
    loss_on: LossOn | None = None
    """Which tokens are supervised; ``None``: the completion, in chats every assistant turn, in
    plain text everything."""
    max_length: int | None = None
    """Longest example, in tokens; ``None`` is the context of the base."""
    truncate: bool = False
    """Shorten examples that are longer: first the prompt from its left, then the end."""
    bad_rows: BadRows = "error"
    """``"error"`` stops with all of them named; ``"skip"`` leaves them out and counts them."""

    def __post_init__(self) -> None:
        given: Any = self.path
        paths = [given] if isinstance(given, (str, os.PathLike)) else list(given)
        object.__setattr__(self, "path", tuple(os.fspath(path) for path in paths))
        object.__setattr__(self, "map", dict(self.map))
        problems = list(self._problems())
        if problems:
            raise DataError(collected("These data settings cannot be used", problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which ``DataSpec(**values)`` makes an equal one."""
        return {**asdict(self), "path": list(self.path)}

    def _problems(self) -> Iterator[str]:
        if not self.path:
            yield "path: no file was given; name at least one"
        for name, allowed in (
            ("format", ("auto", "chat", "plain")),
            ("loss_on", (None, "completion", "assistant", "all")),
            ("bad_rows", ("error", "skip")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                yield f"{name}: {value!r} given; expected one of {', '.join(map(str, allowed))}"
        length = self.max_length
        if length is not None and (not isinstance(length, int) or length < 2):
            yield f"max_length: {length!r} given; expected at least 2 tokens, or None"
        unknown = [name for name in self.map if name not in FIELDS]
        if unknown:
            other = turned(self.map)
            yield (
                f"map: {', '.join(unknown)} is no field of lorakit; on the left of = stands one "
                f"of {', '.join(FIELDS)}, on the right your column"
                + (f": {map_flag(other)}" if other else "")
            )
        if self.template is not None and not self.template.strip():
            yield "template: it is empty; leave it out, or write the prompt with {columns}"
        if self.template is not None:
            clash = [name for name in self.map if name != "completion"]
            if clash:
                yield (
                    f"template: it writes the prompt, so map={clash[0]}=… cannot act; "
                    "use {columns} in the template and map only completion"
                )
