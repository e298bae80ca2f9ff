"""A chat as pieces of text, supervised or not, exact without help from the template.

Where an assistant's turn stands is found by rendering the chat up to it: what the model is
asked with at generation must be the beginning of the whole, then its text follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.data.chat import ChatTemplate
from lorakit.data.messages import Message, is_trained
from lorakit.data.rows import RowError

#: (text, supervised)
Piece = tuple[str, bool]


def chat_pieces(
    template: ChatTemplate, messages: Sequence[Message], *, every_turn: bool, tools: Any = None
) -> list[Piece]:
    """Split a chat; what follows the last trained turn is left out, for nothing learns from it.

    Args:
        every_turn: whether all trained turns are supervised, or only the last.

    Returns:
        Pieces in turn; joined they are the chat, and the last one is the last answer.

    Raises:
        RowError: the template refuses the chat, or rewrites an earlier turn.
    """
    last = max(n for n, message in enumerate(messages) if is_trained(message))
    prompt = template.render(messages[:last], tools=tools)
    pieces: list[Piece] = []
    done = 0
    for n in range(last if every_turn else 0):
        if not is_trained(messages[n]):
            continue
        start, end = _turn(template, messages, n, prompt, tools)
        pieces += [(prompt[done:start], False), (prompt[start:end], True)]
        done = end
    pieces.append((prompt[done:], False))
    pieces.append((_last_answer(template, messages[: last + 1], prompt, tools), True))
    return [piece for piece in pieces if piece[0]]


def _turn(
    template: ChatTemplate, messages: Sequence[Message], n: int, whole: str, tools: Any
) -> tuple[int, int]:
    """Where the text of turn ``n`` stands in ``whole``, its end included."""
    before = template.render(messages[:n], tools=tools)
    if whole.startswith(before):
        start = len(before)
        if _is_plain(messages[n]):
            end_mark = template.turn_end if template.ends_inside else ""
            content = messages[n]["content"]
            # some templates put white space before an answer once it is past
            gap = len(whole[start:]) - len(whole[start:].lstrip())
            for begin in (start, start + gap):
                for text in (content, content.strip()):
                    if whole.startswith(text + end_mark, begin):
                        return begin, begin + len(text) + len(end_mark)
        else:
            written = _finished(template, messages[: n + 1], before, tools)
            if written is not None and whole.startswith(written, start):
                return start, start + len(written)
    raise RowError(
        "a turn that the chat template rewrites",
        f"message {n + 1}: the chat template writes this assistant's turn otherwise once others "
        "follow (it may strip thinking), so it cannot be learnt in place. Supervise only the "
        "last turn (--loss-on completion)",
    )


def _last_answer(
    template: ChatTemplate, messages: Sequence[Message], prompt: str, tools: Any
) -> str:
    message = messages[-1]
    if _is_plain(message):
        return template.answer(message["content"])
    written = _finished(template, messages, prompt, tools)
    if written is None:
        raise RowError(
            "a turn that the chat template rewrites",
            f"message {len(messages)}: the chat template does not put this answer (with "
            f"{', '.join(k for k in message if k not in ('role', 'content', 'weight'))}) behind "
            "what it asks with at generation",
        )
    return written if template.ends_inside else written + template.turn_end


def _finished(
    template: ChatTemplate, messages: Sequence[Message], before: str, tools: Any
) -> str | None:
    """What the template writes for the last message, up to the end of the turn.

    Raises:
        RowError: it leaves out the message's tool calls.
    """
    full = template.render(messages, tools=tools, generate=False)
    if not full.startswith(before):
        return None
    written = full[len(before) :]
    if messages[-1].get("tool_calls") and full == _without_calls(template, messages, tools):
        raise RowError(
            "tool calls that the chat template does not write",
            f"message {len(messages)}: the chat template does not write its tool_calls, so they "
            "cannot be learnt. Use a base whose template does, or write them into the content",
        )
    if template.ends_inside:
        cut = written.rfind(template.turn_end)
        if cut < 0:
            return None
        written = written[: cut + len(template.turn_end)]
    return written


def _without_calls(template: ChatTemplate, messages: Sequence[Message], tools: Any) -> str | None:
    """The chat as if the last message called no tools; ``None`` where the template refuses that."""
    silent = {key: value for key, value in messages[-1].items() if key != "tool_calls"}
    try:
        return template.render([*messages[:-1], silent], tools=tools, generate=False)
    except RowError:
        return None


def _is_plain(message: Message) -> bool:
    """Whether its text is all that a template can write of it."""
    return set(message) <= {"role", "content", "weight"}
