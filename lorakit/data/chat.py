"""What a chat template does, found by trying it: where a turn ends, what it trims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data.messages import Message, for_template
from lorakit.data.rows import RowError
from lorakit.data.tokenizer import added_before, special_pattern, token_ids
from lorakit.errors import DataError

_USER, _ASSISTANT = "lorakit-user-probe", "lorakit-assistant-probe"


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, and what was found out about it."""

    tokenizer: Any
    turn_end: str
    """What closes an assistant's turn, up to its special token: ``"<|im_end|>"``."""
    header: str
    """What stands before the assistant's text and a template without a generation prompt
    leaves out there; usually empty."""
    trims: bool
    """Whether it strips the white space around a message."""
    ends_inside: bool
    """Whether ``turn_end`` is the template's own; else it is only put at an example's end."""

    def render(
        self, messages: Sequence[Message], *, tools: Any = None, generate: bool = True
    ) -> str:
        """The chat as text; with ``generate`` up to where the assistant would go on.

        Raises:
            RowError: the template refuses this chat; the message holds its words.
        """
        text = _apply(self.tokenizer, messages, tools, generate)
        return text + self.header if generate else text

    def answer(self, content: str) -> str:
        """What the assistant writes for this content, its end included."""
        return (content.strip() if self.trims else content) + self.turn_end


def study_template(tokenizer: Any, system: str | None, notes: list[str]) -> ChatTemplate:
    """Try the tokenizer's template on a small chat.

    Raises:
        DataError: there is no template, or it does not write what it is given.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "The tokenizer has no chat template, and what is given are chats, or texts to be "
            "written as such (by --format, or as an adapter learnt). Use an instruct base, or "
            "texts with --format plain."
        )
    chat: list[Message] = [{"role": "user", "content": _USER}]
    if system is not None:
        chat.insert(0, {"role": "system", "content": system})
    try:
        head = _apply(tokenizer, chat, None, True)
        bare = _apply(tokenizer, chat, None, False)
        full = _apply(tokenizer, [*chat, _assistant(_ASSISTANT)], None, False)
        padded = _apply(tokenizer, [*chat, _assistant(f" {_ASSISTANT} ")], None, False)
    except RowError as error:
        cause = " The system message may be what it refuses." if system is not None else ""
        raise DataError(
            f"The base's chat template fails on a small chat: {error}.{cause}"
        ) from None
    if _ASSISTANT not in full or _USER not in head:
        raise DataError(
            "The base's chat template leaves out the user's or the assistant's text of a small "
            "chat, so it cannot be learnt from. Use another base, or --format plain."
        )
    start = full.rfind(_ASSISTANT)
    header = _header(head, bare, full[:start], notes)
    tail = full[start + len(_ASSISTANT) :]
    special = special_pattern(tokenizer).search(tail)
    turn_end = tail[: special.end()] if special else (tokenizer.eos_token or "")
    if special is None:
        notes.append(
            f"chat template: it closes a turn with no special token; {turn_end!r} is added"
            if turn_end
            else "chat template: nothing closes a turn, so the model is not taught to stop"
        )
    _note_begin(tokenizer, head, notes)
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append("chat template: it may write today's date into every example")
    trims = f" {_ASSISTANT} " not in padded
    return ChatTemplate(tokenizer, turn_end, header, trims, special is not None)


def _header(head: str, bare: str, before: str, notes: list[str]) -> str:
    """What to add to a generation prompt so that the assistant's text may follow."""
    if not before.startswith(head):
        notes.append(
            "chat template: it writes a past turn otherwise than it asks for a new one; examples "
            "follow what the model is asked at generation"
        )
        return ""
    lead = before[len(head) :]
    if not lead.strip():
        return ""
    if head == bare:
        notes.append(
            f"chat template: it has no generation prompt; {lead!r} is put at the end of a prompt"
        )
        return lead
    notes.append(
        f"chat template: it writes {lead!r} before a finished answer and not at generation; "
        "examples leave it out, as at generation"
    )
    return ""


def _note_begin(tokenizer: Any, head: str, notes: list[str]) -> None:
    begin = added_before(tokenizer)
    if begin and token_ids(tokenizer, [head])[0][: len(begin)] != begin:
        token = tokenizer.convert_ids_to_tokens(begin)
        notes.append(
            f"chat template: it does not begin with {' '.join(token)}, which the tokenizer puts "
            "before other texts; the template is followed"
        )


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _apply(tokenizer: Any, messages: Sequence[Message], tools: Any, generate: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [for_template(message) for message in messages],
            tools=tools,
            tokenize=False,
            add_generation_prompt=generate,
        )
    except Exception as error:  # a template is a program: Jinja's errors, type errors, its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RowError(
            "refused by the chat template", f"the chat template refuses it: {reason}"
        ) from None
    assert isinstance(text, str)
    return text
