"""What a row asks a model: a text, or a chat up to where the assistant goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.data.columns import CHATS, Columns, checked_text, holds_messages
from lorakit.data.messages import Message, listed, read_tools
from lorakit.data.rows import RowError


@dataclass(frozen=True)
class Chat:
    """A chat whose next turn is the assistant's."""

    messages: tuple[Message, ...]
    tools: Any = None

    def __str__(self) -> str:
        """What was said last."""
        return str(self.messages[-1]["content"])


def asked_in(values: Mapping[str, Any]) -> str | Chat:
    """The column ``prompt`` of a row, a text or messages; else its chat without the last answer.

    Raises:
        RowError: neither is there, or it is not what it should be.
    """
    column = next((name for name in ("prompt", *CHATS) if values.get(name) is not None), "prompt")
    value = Columns("prompt/completion", {"prompt": column}, ()).value(values, "prompt")
    if column == "prompt" and not holds_messages(value):
        return checked_text(value, "column 'prompt'", "prompt")
    messages = listed(value, column)
    if column != "prompt" and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise RowError(
            "nothing before the answer",
            f"column '{column}' has nothing before the assistant's turn; expected what it answers",
        )
    return Chat(tuple(messages), read_tools(values.get("tools")))
