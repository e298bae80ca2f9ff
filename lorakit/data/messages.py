"""Chats: from the dialects of ``messages`` to one form, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorakit.data.columns import checked_text
from lorakit.data.dialects import (
    OTHER_ROLES,
    ROLES,
    decoded,
    holds_messages,
    looks_like_messages,
)
from lorakit.data.rows import RowError, shown

Message = dict[str, Any]

#: the fields of a chat that is parted into what is asked and what is to be learnt
HALVES = "prompt", "completion"


def read_messages(value: Any, column: str) -> list[Message]:
    """The messages of one row, each with ``role`` and ``content``.

    A message keeps its further keys (``tool_calls``, ``name``, ``weight``, …). A column of text
    is taken as JSON, as CSV files hold it.

    Raises:
        RowError: it is no list of messages, a role is unknown, a content is missing, or there
            is no assistant's turn to learn from.
    """
    messages = listed(value, column)
    _check_trained(messages, column)
    return messages


def read_halves(asked: tuple[str, Any], answered: tuple[str, Any]) -> list[Message]:
    """The messages of one row that parts them, as TRL's conversational prompts and completions do.

    No turn of the prompt is one to learn, an earlier one of the assistant neither. A completion
    that is text is one turn of the assistant, unless it is messages in JSON.

    Args:
        asked: the column, and what it holds.
        answered: alike.

    Raises:
        RowError: as of :func:`read_messages`.
    """
    column, value = answered
    before = [{**one, "weight": 0} for one in listed(asked[1], asked[0])]
    if isinstance(value, str) and not holds_messages(value):
        if looks_like_messages(value):
            raise RowError(
                "a broken list of messages",
                f"column '{column}' looks like messages, and is no JSON list of them "
                f"({shown(value)}); write it with json.dumps",
            )
        content = checked_text(value, f"column '{column}'", "completion")
        return [*before, {"role": "assistant", "content": content}]
    messages = listed(value, column)
    _check_trained(messages, column)
    return [*before, *messages]


def listed(value: Any, column: str) -> list[Message]:
    """The messages in a column, whoever speaks last.

    Raises:
        RowError: it is no list of messages, a role is unknown, or a content is missing.
    """
    value = decoded(value)
    if not isinstance(value, list) or not value:
        raise RowError(
            "no list of messages",
            f"column '{column}' is {shown(value)}; expected a list of messages such as "
            '{"role": "user", "content": "…"}',
        )
    return [_message(one, f"column '{column}' message {n}") for n, one in enumerate(value, 1)]


def read_tools(value: Any) -> Any:
    """What a row says of tools, for the chat template; text is taken as JSON.

    Raises:
        RowError: it is no JSON.
    """
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("broken tools", "column 'tools' is no JSON; expected a list") from None
    return value or None


def _check_trained(messages: list[Message], column: str) -> None:
    if not any(is_trained(one) for one in messages):
        roles = ", ".join(one["role"] for one in messages[:6])
        raise RowError(
            "no assistant turn",
            f"column '{column}' has no assistant's turn to learn from (roles: {roles})",
        )


def is_trained(message: Message) -> bool:
    """Whether this is an assistant's turn that is not left out by ``"weight": 0``."""
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The chat with this system message before it, unless it has one of its own."""
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def for_template(message: Message) -> Message:
    """The message as a chat template expects it: without what only training reads."""
    return {key: value for key, value in message.items() if key != "weight"}


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(
            "broken message",
            f'{where} is {shown(value)}; expected an object such as {{"role": …, "content": …}}',
        )
    found = {key: one for key, one in value.items() if one is not None}
    if "role" not in found and "from" in found:
        found["role"] = found.pop("from")
        if "content" not in found and "value" in found:
            found["content"] = found.pop("value")
    role = found.get("role")
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        what = shown(role) if "role" in found else f"missing (it has {', '.join(found)})"
        raise RowError(
            "unknown role", f"{where}: the role is {what}; expected one of {', '.join(ROLES)}"
        )
    found["role"] = role
    if found.get("weight", 1) not in (0, 1):
        raise RowError(
            "broken weight", f"{where}: the weight is {shown(found['weight'])}; expected 0 or 1"
        )
    found["content"] = _content(found, where)
    return found


def _content(message: Message, where: str) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    calls = "tool_calls" in message
    if (content == "" and (calls or message["role"] != "assistant")) or (content is None and calls):
        return ""
    return checked_text(content, f"{where} (role {message['role']})", "content")


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        return checked_text(part.get("text"), f"{where}, a part of it", "content")
    found = part.get("type") if isinstance(part, Mapping) else part
    raise RowError(
        "a part that is no text",
        f"{where}: a part of its content is {shown(found)}; only parts of type text can be learnt",
    )
