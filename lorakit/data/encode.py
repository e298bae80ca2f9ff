"""Samples → token ids and the mask of what is supervised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.data.columns import Columns
from lorakit.data.messages import (
    HALVES,
    Message,
    is_trained,
    read_halves,
    read_messages,
    read_tools,
    with_system,
)
from lorakit.data.rendering import Rendering
from lorakit.data.rows import RowError
from lorakit.data.spec import DataSpec, LossOn
from lorakit.data.turns import Piece, chat_pieces


@dataclass(frozen=True)
class Sample:
    """One row's content, checked, before any template."""

    prompt: str
    """As written in the data; empty for plain text and for chats."""
    completion: str
    """What is learnt: the completion, the text, or the last answer of a chat."""
    messages: tuple[Message, ...] = ()
    tools: Any = None

    @property
    def key(self) -> bytes:
        """16 bytes that rows of one prompt share: the prompt, a chat's messages before its
        first answer, or a whole text. Independent of the base."""
        if self.messages:
            first = next(n for n, m in enumerate(self.messages) if m["role"] == "assistant")
            what = json.dumps(self.messages[:first], sort_keys=True, default=str)
        else:
            what = self.prompt or self.completion
        return hashlib.blake2b(what.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it."""

    ids: np.ndarray
    """[n] int32."""
    supervised: np.ndarray
    """[n] bool; the first token never is, for nothing predicts it."""
    prompt_length: int
    """Tokens before the last answer."""
    prompt: str
    """The text of these."""


class Encoder:
    """Rows → samples → ids, with one choice of columns and rendering."""

    def __init__(self, spec: DataSpec, columns: Columns, rendering: Rendering) -> None:
        self.columns = columns
        self.rendering = rendering
        self.system = spec.system
        self.loss_on: LossOn = spec.loss_on or _default_loss(columns.kind)

    def sample(self, values: Mapping[str, Any]) -> Sample:
        """Check one row's values.

        Raises:
            RowError: something is missing or of a wrong type.
        """
        columns = self.columns
        if columns.kind == "text":
            return Sample("", columns.text(values, "text"))
        if columns.kind != "messages":
            return Sample(*columns.prompt_and_completion(values))
        if "messages" in columns.names:
            chat = read_messages(columns.value(values, "messages"), columns.names["messages"])
        else:
            halves = {columns.names[half]: columns.value(values, half) for half in HALVES}
            chat = read_halves(*halves.items())
        messages = with_system(chat, self.system)
        last = [message for message in messages if is_trained(message)][-1]
        return Sample("", last["content"], tuple(messages), read_tools(values.get("tools")))

    def writes_tools(self, sample: Sample) -> bool:
        """Whether the chat template writes the tools of this one."""
        chat = self.rendering.chat
        assert chat is not None
        try:
            given, without = (
                chat.render(sample.messages, tools=tools, generate=False)
                for tools in (sample.tools, None)
            )
        except RowError:  # which is told where the row is written
            return True
        return given != without

    def pieces(self, sample: Sample) -> list[Piece]:
        """The example as text; the last piece is what the model is to answer.

        Raises:
            RowError: the chat template refuses it.
        """
        everything = self.loss_on == "all"
        if sample.messages:
            chat = self.rendering.chat
            assert chat is not None
            every_turn = self.loss_on == "assistant"
            found = chat_pieces(chat, sample.messages, every_turn=every_turn, tools=sample.tools)
            return [(text, everything or supervised) for text, supervised in found]
        if not sample.prompt:
            end = self.rendering.end
            text = sample.completion
            return [(text if end and text.endswith(end) else text + end, True)]
        prompt = self.rendering.prompt_text(sample.prompt)
        return [(prompt, everything), (self.rendering.answer_text(sample.completion), True)]

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | RowError]:
        """Tokenise many at once; a sample that the template refuses comes back as its error."""
        split: list[list[Piece] | RowError] = []
        for sample in samples:
            try:
                split.append(self.pieces(sample))
            except RowError as error:
                split.append(error)
        good = [pieces for pieces in split if not isinstance(pieces, RowError)]
        first = iter(self.rendering.first_ids([pieces[0][0] for pieces in good]))
        rest = iter(self.rendering.ids([text for pieces in good for text, _ in pieces[1:]]))
        return [
            pieces
            if isinstance(pieces, RowError)
            else _join(pieces, [next(first), *(next(rest) for _ in pieces[1:])])
            for pieces in split
        ]


def _join(pieces: Sequence[Piece], ids: Sequence[Sequence[int]]) -> Encoded:
    """Put the pieces' ids behind each other."""
    joined: list[int] = []
    for part in ids:
        joined += part
    mask = np.zeros(len(joined), np.bool_)
    start = 0
    for (_, supervised), part in zip(pieces, ids, strict=True):
        if supervised:
            mask[start : start + len(part)] = True
        start += len(part)
    mask[:1] = False
    return Encoded(
        np.array(joined, np.int32),
        mask,
        len(joined) - len(ids[-1]) if len(pieces) > 1 else 0,
        "".join(text for text, _ in pieces[:-1]),
    )


def _default_loss(kind: str) -> LossOn:
    return {"messages": "assistant", "text": "all"}.get(kind, "completion")  # type: ignore[return-value]
