"""Which columns hold what: the kind of the rows, recognised or mapped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.data.dialects import (
    OTHER_ROLES,
    ROLES,
    decoded,
    holds_messages,
    looks_like_messages,
    roles_in,
)
from lorakit.data.rows import RowError, shown
from lorakit.data.spec import DataSpec, map_flag, turned
from lorakit.data.template import Template, closest, parse_template
from lorakit.errors import DataError, collected

Kind = Literal["prompt/completion", "instruction", "messages", "text"]

#: kind → the fields that it needs, and those that it may have
_NEEDS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "prompt/completion": (("prompt", "completion"), ()),
    "instruction": (("instruction", "output"), ("input",)),
    "text": (("text",), ()),
}

#: what a column of whole chats is called
CHATS = "messages", "conversations", "conversation"

#: names that are recognised without ``map``, the first that fits
_KNOWN: tuple[tuple[Kind, dict[str, str]], ...] = (
    *(("messages", {"messages": name}) for name in CHATS),
    ("prompt/completion", {"prompt": "prompt", "completion": "completion"}),
    ("instruction", {"instruction": "instruction", "output": "output"}),
    ("prompt/completion", {"prompt": "prompt", "completion": "response"}),
    ("prompt/completion", {"prompt": "instruction", "completion": "response"}),
    ("prompt/completion", {"prompt": "question", "completion": "answer"}),
    ("prompt/completion", {"prompt": "query", "completion": "response"}),
    ("prompt/completion", {"prompt": "input", "completion": "output"}),
    ("prompt/completion", {"prompt": "source", "completion": "target"}),
    ("text", {"text": "text"}),
)

#: the fields that a model is asked with
_ASKING = "messages", "prompt", "instruction"

_COMPLETIONS = ("completion", "output", "response", "answer", "target")

_EXAMPLE = {"prompt": "COLUMN", "completion": "COLUMN"}


@dataclass(frozen=True)
class Columns:
    """What the rows are, and where each field stands."""

    kind: Kind
    names: Mapping[str, str]
    """Our field → their column; a chat is in ``messages``, or parted in ``prompt`` and
    ``completion``."""
    unused: tuple[str, ...]
    """Columns of the first row that nothing reads."""
    template: Template | None = None

    def prompt_and_completion(self, values: Mapping[str, Any]) -> tuple[str, str]:
        """Both texts of a row of kind prompt/completion or instruction.

        Raises:
            RowError: one is missing, empty or no text.
        """
        if self.template is not None:
            prompt = self.template.fill(values)
            if not prompt.strip():
                raise RowError("empty prompt", "the filled template is empty")
            return prompt, self.text(values, "completion")
        answer = "completion" if self.kind == "prompt/completion" else "output"
        prompt = checked_prompt(self.asked(values), self, self._as_text(values, answer))
        return prompt, self.text(values, answer)

    def asked(self, values: Mapping[str, Any]) -> str:
        """The text that a row of kind prompt/completion or instruction asks, without a template.

        Raises:
            RowError: it is missing, empty or no text.
        """
        if self.kind == "prompt/completion":
            return self.text(values, "prompt")
        prompt = self.text(values, "instruction")
        column = self.names.get("input")
        more = values.get(column) if column is not None else None
        if more is not None and not (isinstance(more, str) and not more.strip()):
            prompt = f"{prompt}\n\n{self.text(values, 'input')}"
        return prompt

    def _as_text(self, values: Mapping[str, Any], answer: str) -> str:
        """How to learn a prompt as it stands."""
        asking = [
            self.names[one] for one in ("prompt", "instruction", "input") if one in self.names
        ]
        fields = " ".join(f"{{{column}}}" for column in asking if values.get(column))
        given = f"to learn it as text give --template {shlex.quote(fields)}"
        column = self.names[answer]
        return given if column == "completion" else f"{given} {map_flag({'completion': column})}"

    def value(self, values: Mapping[str, Any], field: str) -> Any:
        """What a row holds for a field.

        Raises:
            RowError: the column is missing in this row.
        """
        column = self.names[field]
        if column not in values:
            has = ", ".join(map(str, values)) or "nothing"
            raise RowError(
                f"no column '{column}'",
                f"it has no column '{column}' (the {field}); it has {has}."
                f"{closest(column, values)}",
            )
        return values[column]

    def text(self, values: Mapping[str, Any], field: str) -> str:
        """The text of a field.

        Raises:
            RowError: the column is missing in this row, is empty, or holds something else.
        """
        return checked_text(self.value(values, field), f"column '{self.names[field]}'", field)


def checked_text(value: Any, where: str, field: str) -> str:
    """``value`` if it is text that can be tokenised.

    Args:
        where: the start of a message: ``"column 'ref'"``.
        field: what it is meant to be: ``"completion"``.

    Raises:
        RowError: it is not text, empty, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        hint = " (write it in quotes)" if isinstance(value, (int, float)) else ""
        raise RowError(
            f"{field} is null" if value is None else f"{field} is no text",
            f"{where} is {shown(value)}; expected text as the {field}{hint}",
        )
    if not value.strip():
        raise RowError(f"empty {field}", f"{where} is empty; expected text as the {field}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                "broken characters",
                f"{where} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}) at "
                f"character {error.start + 1}; expected whole characters",
            ) from None
    return value


def checked_prompt(text: str, columns: Columns, as_text: str) -> str:
    """A prompt that is meant as text, if it does not look like messages.

    Args:
        as_text: what to do where it is meant so.

    Raises:
        RowError: it does, and is none or stands among texts.
    """
    if looks_like_messages(text) or roles_in(text):
        column = columns.names.get("prompt") or columns.names["instruction"]
        raise RowError(
            "a chat among texts",
            f"column '{column}' looks like messages, and {_not_taken(text, columns)}; {as_text}",
        )
    return text


def _not_taken(text: str, columns: Columns) -> str:
    if columns.kind == "instruction":
        return "an instruction is a text (chats belong into a column prompt or messages)"
    if holds_messages(text):
        return "the first row has a text there; write all rows in one form"
    unknown = [role for role in roles_in(text) if role not in {*ROLES, *OTHER_ROLES}]
    if unknown:
        return f"the role {shown(unknown[0])} is unknown; expected one of {', '.join(ROLES)}"
    return f"is no JSON list of them ({shown(text)}); write it with json.dumps"


def asking_columns(values: Mapping[str, Any]) -> Columns:
    """The columns of a row that ask: those that training would learn from, or others that are
    recognised; an answer need not be there.

    Raises:
        RowError: there is none.
    """
    there = {column for column, value in values.items() if value is not None}
    chats = {column for column in there & {*CHATS} if _holds_a_list(values[column])}
    # what is no chat asks only where nothing else does: an error says what it is
    for usable in (there - {*CHATS} | chats, there):
        for whole in (True, False):
            found = _asking(values, usable, whole=whole)
            if found is not None:
                return found
    has = ", ".join(map(str, values)) or "nothing"
    names = dict.fromkeys(
        known[field] for _, known in _KNOWN for field in _ASKING if field in known
    )
    raise RowError(
        "nothing that asks",
        f"it has no column that asks; it has {has}. Expected one of {', '.join(names)}",
    )


def _asking(values: Mapping[str, Any], usable: set[str], *, whole: bool) -> Columns | None:
    """The first columns that are recognised.

    Args:
        usable: those that may ask.
        whole: only where all columns of their kind are there, as in training.
    """
    for kind, known in _KNOWN:
        asking = {field: known[field] for field in _ASKING if field in known}
        needed = known.values() if whole else ()
        if asking and usable.issuperset(asking.values()) and all(one in values for one in needed):
            if kind == "instruction" and "input" in values:
                asking["input"] = "input"
            return Columns(kind, asking, ())
    return None


def _holds_a_list(value: Any) -> bool:
    found = decoded(value)
    return isinstance(found, list) and bool(found)


def find_columns(spec: DataSpec, first: Mapping[str, Any], where: str, notes: list[str]) -> Columns:
    """Recognise the kind from ``map``, the template, or the columns' names.

    Args:
        first: the first readable row; of its values only whether a prompt is a list of messages,
            or JSON of one.
        where: that row, for messages.

    Raises:
        DataError: a mapped column does not exist, kinds are mixed, or nothing is recognised;
            the message lists the columns that there are.
    """
    present = list(map(str, first))
    template = parse_template(spec.template, notes) if spec.template is not None else None
    wanted = dict(spec.map)
    asked = list(wanted.values()) + list(template.columns if template else ())
    missing = [
        f"there is no column '{column}'.{closest(column, present)}"
        for column in dict.fromkeys(asked)
        if column not in present
    ]
    if missing:
        other = turned(wanted)
        raise DataError(
            collected(f"{where} has the columns {_listed(present)}", missing)
            + "\nOn the left of = in --map stands our name, on the right your column"
            + (f": {map_flag(other)}" if other and set(other.values()) <= set(present) else ".")
        )
    if template is not None:
        return _with_template(template, wanted, present, where)
    if wanted:
        kind, names = _mapped(wanted, present, where)
    else:
        kind, names = _recognised(present, where)
    for optional in _NEEDS[kind][1]:
        if optional not in names and optional in present:
            names[optional] = optional
    if kind == "prompt/completion" and holds_messages(first.get(names["prompt"])):
        kind = "messages"
    used = set(names.values()) | ({"tools"} if kind == "messages" else set())
    return Columns(kind, names, tuple(c for c in present if c not in used))


def _with_template(
    template: Template, wanted: dict[str, str], present: Sequence[str], where: str
) -> Columns:
    known = [c for c in _COMPLETIONS if c in present]
    known.sort(key=lambda column: column in template.columns)
    free = [c for c in present if c not in template.columns] or ["COLUMN"]
    column = wanted.get("completion") or (known[0] if known else None)
    if column is None:
        raise DataError(
            f"{where}: the template writes the prompt, but no column is known as the completion "
            f"(there are {_listed(present)}). Give {map_flag({'completion': free[0]})}."
        )
    if column in template.columns:
        raise DataError(
            f"template: it names {{{column}}}, which is the completion, so every prompt would "
            "hold its own answer. Take it out, or map another column as the completion."
        )
    used = {column, *template.columns}
    unused = tuple(c for c in present if c not in used)
    return Columns("prompt/completion", {"completion": column}, unused, template)


def _mapped(
    wanted: dict[str, str], present: Sequence[str], where: str
) -> tuple[Kind, dict[str, str]]:
    fits = [k for k, (need, may) in _NEEDS.items() if set(wanted) <= {*need, *may}]
    if not fits:
        raise DataError(
            f"map: {', '.join(wanted)} belong to different kinds of rows; expected prompt and "
            "completion, or instruction, input and output, or messages, or text."
        )
    kind = fits[0]
    names = {
        field: wanted.get(field, field)
        for field in _NEEDS[kind][0]
        if field in wanted or field in present
    }
    names |= {field: wanted[field] for field in _NEEDS[kind][1] if field in wanted}
    absent = [field for field in _NEEDS[kind][0] if field not in names]
    if absent:
        free = [c for c in present if c not in wanted.values()] + ["COLUMN"] * len(absent)
        whole = {**wanted, **dict(zip(absent, free, strict=False))}
        raise DataError(
            f"map: {', '.join(wanted)} is mapped, but {' and '.join(absent)} is not, and there "
            f"is no column of that name; {where} has {_listed(present)}. Give all of them, such as "
            f"{map_flag(whole)}."
        )
    twice = [c for c in names.values() if list(names.values()).count(c) > 1]
    if twice:
        raise DataError(f"map: the column '{twice[0]}' is given for two fields; expected one each.")
    return kind, names


def _recognised(present: Sequence[str], where: str) -> tuple[Kind, dict[str, str]]:
    for kind, names in _KNOWN:
        if all(column in present for column in names.values()):
            return kind, dict(names)
    if {"chosen", "rejected"} <= set(present):
        raise DataError(
            f"{where} has the columns {_listed(present)}: pairs of preferences. lorakit learns "
            "from one answer each; give --map prompt=prompt,completion=chosen."
        )
    others = [column for column in present if column.lower().strip() != "prompt"]
    if present and not others:
        raise DataError(
            f"{where} has the column {present[0]} alone: prompts without answers. Training and "
            "judging need the right answers, as a column completion; lorakit generate --prompts "
            "answers prompts that have none."
        )
    hint = closest("completion", others) if len(others) < len(present) else ""
    raise DataError(
        f"{where} has the columns {_listed(present)}, which is no kind of rows known here; "
        "expected prompt and completion, instruction and output, messages, or text.{} Say "
        "which column is which: {}.{}".format(
            hint,
            _example(present),
            " (The first line of a CSV names its columns.)" if " row " in where else "",
        )
    )


def _example(present: Sequence[str]) -> str:
    """A ``--map`` with columns that there are, one of them as the completion."""
    # the flag parts its fields at commas and strips them
    usable = [c for c in present if c.strip() == c != "" and "," not in c and len(c) <= 60]
    if len(usable) < 2:
        return map_flag(_EXAMPLE)
    known = [c for c in usable if c.lower() in _COMPLETIONS]
    completion = known[0] if known else usable[1]
    prompt = next(column for column in usable if column != completion)
    return f"such as {map_flag({'prompt': prompt, 'completion': completion})}"


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(str(c)[:60] for c in columns[:20]) or "(none)"
