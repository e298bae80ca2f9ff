"""What a row asks a model: a text, or a chat up to where the assistant goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.columns import asking_columns, checked_prompt
from lorakit.data.dialects import decoded, holds_messages, role_of
from lorakit.data.messages import Message, listed, read_tools
from lorakit.data.rows import RowError


@dataclass(frozen=True)
class Chat:
    """A chat that the assistant is to go on with.

    Raises:
        RowError: there is no message, or one is broken.
    """

    messages: Sequence[Message]
    tools: Any = None
    where: str = field(default="", compare=False)
    """Its row, for errors."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(listed(list(self.messages), "messages")))

    def __str__(self) -> str:
        """What was said last."""
        return str(self.messages[-1]["content"])


def asked_in(values: Mapping[str, Any], where: str = "") -> str | Chat:
    """What a row asks, by the columns that training recognises.

    Of a chat that is what comes before its last answer, of a prompt that is a chat all.

    Raises:
        RowError: no such column is there, or it does not hold what it should.
    """
    columns = asking_columns(values)
    if columns.kind == "messages":
        column = columns.names["messages"]
        value = decoded(values[column])
        if isinstance(value, list) and value and _is_answer(value[-1]):
            value = value[:-1]
            if not value:
                raise RowError(
                    "nothing before the answer",
                    f"column '{column}' has nothing before the assistant's turn; expected what it "
                    "answers",
                )
    elif columns.kind == "prompt/completion" and holds_messages(columns.value(values, "prompt")):
        column = columns.names["prompt"]
        value = values[column]
    else:
        return checked_prompt(columns.asked(values), columns, "to ask it as text give --prompt")
    return Chat(listed(value, column), read_tools(values.get("tools")), where)


def _is_answer(message: Any) -> bool:
    return isinstance(message, Mapping) and role_of(message) == "assistant"
