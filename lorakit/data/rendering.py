"""How a prompt is written for the model, the same in training, judging and generation.

========  =======================================  ==========================================
format    what the model is asked with             what it learns to answer
========  =======================================  ==========================================
chat      the tokenizer's chat template, up to     the completion and what closes the turn
          where the assistant begins
plain     BOS if the tokenizer puts one, the       the completion and EOS
          prompt, a line break unless it ends
          in white space
========  =======================================  ==========================================

Prompt and completion are tokenised apart, so that no token spans both and generation starts
from exactly the ids that training saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data.asked import Chat
from lorakit.data.chat import ChatTemplate, study_template
from lorakit.data.messages import Message, with_system
from lorakit.data.rows import RowError
from lorakit.data.spec import Format
from lorakit.data.tokenizer import added_before, token_ids
from lorakit.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """What a model is asked with."""

    text: str
    """Exactly as the model sees it, template and generation prompt included."""
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Rendering:
    """A tokenizer and how its model is asked; made by :func:`make_rendering`."""

    tokenizer: Any
    format: Format
    """``"chat"`` or ``"plain"``, never ``"auto"``."""
    reason: str
    """Why this format."""
    system: str | None
    chat: ChatTemplate | None
    begin: tuple[int, ...]
    """Ids before a plain text; empty for chats, whose template writes them."""
    notes: tuple[str, ...]

    @property
    def end(self) -> str:
        """The text behind a plain completion or a text: EOS, or nothing."""
        return self.tokenizer.eos_token or ""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which an answer is over: what closes a turn, and EOS."""
        found = []
        if self.chat is not None and self.chat.turn_end:
            found.append(token_ids(self.tokenizer, [self.chat.turn_end])[0][-1])
        if self.tokenizer.eos_token_id is not None:
            found.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(found))

    def prompt_text(self, prompt: str | Chat) -> str:
        """What the model is asked with, as text.

        Raises:
            RowError: the chat template refuses it, or it is a chat and prompts are written plain.
        """
        if isinstance(prompt, str):
            if self.chat is None:
                return prompt if prompt[-1:].isspace() else prompt + "\n"
            prompt = Chat(({"role": "user", "content": prompt},))
        elif self.chat is None:
            raise RowError("a chat", f"it is a chat, and prompts are written plain ({self.reason})")
        messages: list[Message] = with_system(list(prompt.messages), self.system)
        return self.chat.render(messages, tools=prompt.tools)

    def answer_text(self, completion: str) -> str:
        """What the model learns to answer, its end included."""
        if self.chat is not None:
            return self.chat.answer(completion)
        return completion if self.end and completion.endswith(self.end) else completion + self.end

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in the middle of a sequence: nothing is added."""
        return token_ids(self.tokenizer, texts)

    def first_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts at the start of a sequence: BOS before them where it belongs, once."""
        begin = list(self.begin)
        found = self.ids(texts)
        if not begin:
            return found
        return [ids if ids[: len(begin)] == begin else begin + ids for ids in found]

    def prompts(self, prompts: Sequence[str | Chat]) -> list[Prompt]:
        """Prompts as somebody types them, or chats → what the model is asked with.

        Raises:
            RowError: as of :meth:`prompt_text`.
        """
        texts = [self.prompt_text(prompt) for prompt in prompts]
        return [Prompt(t, tuple(ids)) for t, ids in zip(texts, self.first_ids(texts), strict=True)]


def make_rendering(
    tokenizer: Any, format: Format = "auto", *, system: str | None = None, kind: str | None = None
) -> Rendering:
    """Decide how prompts are written for this tokenizer's model.

    Args:
        kind: the kind of the rows: ``"messages"`` can only be chats, ``"text"`` never is one;
            anything else leaves the choice to ``format``.

    Raises:
        DataError: the format is impossible for this tokenizer or this kind of rows, or a system
            message could not act.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    notes: list[str] = []
    if kind == "text":
        if format == "chat":
            raise DataError("format: chat given, but the rows are plain text; leave it out.")
        chosen, reason = "plain", "plain text is taken as it is"
    elif kind == "messages":
        if format == "plain":
            raise DataError(
                "format: plain given, but the rows are chats; expected chat or auto. Give prompt "
                "and completion as texts to train without a chat template."
            )
        chosen, reason = "chat", "the rows are chats"
    elif format == "auto":
        chosen = "chat" if has_template else "plain"
        reason = f"the tokenizer has {'a' if has_template else 'no'} chat template"
    else:
        chosen, reason = format, "as asked"
    if chosen == "chat":
        chat = study_template(tokenizer, system, notes)
        return Rendering(tokenizer, "chat", reason, system, chat, (), tuple(notes))
    if system is not None:
        raise DataError(
            f"system: a system message belongs to a chat, but the rows are written plain ({reason})"
            ". Leave it out, or write it into --template."
        )
    begin = tuple(added_before(tokenizer))
    if tokenizer.eos_token is None:
        notes.append("the tokenizer has no end token, so the model is not taught to stop")
    return Rendering(tokenizer, "plain", reason, None, None, begin, tuple(notes))
