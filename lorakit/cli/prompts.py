"""What is asked, of the flags ``--prompt`` and ``--prompts``: texts, and chats in files of rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli.flags import check_text
from lorakit.cli.output import say
from lorakit.errors import InputError, collected

if TYPE_CHECKING:
    from lorakit.data.asked import Chat


def read_prompts(given: Sequence[str] | None, file: str | None) -> list[str | Chat]:
    """What is asked.

    Args:
        given: of ``--prompt``.
        file: of ``--prompts``; ``-`` is stdin, a prompt a line. Without both all of stdin is one.

    Raises:
        InputError: the file cannot be read, or holds no prompt.
    """
    if given:
        return list(given)
    if file not in (None, "-"):
        return _prompts_of_file(file)
    text = _stdin()
    found = _lines(text) if file == "-" else [text.rstrip("\n")]
    if not any(found):
        raise InputError("stdin holds no prompt; give --prompt, --prompts FILE, or write to stdin")
    return [*found]


def texts_of(
    prompts: Sequence[str | Chat], why: str, way_out: str = "give texts as prompts"
) -> list[str]:
    """The prompts, where only texts can be asked.

    Args:
        why: that, for the message.
        way_out: what to do.

    Raises:
        InputError: one is a chat.
    """
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise InputError(
                f"{why}, and {prompt.where or f'prompt {number}'} is a chat, which needs a chat "
                f"template; {way_out}"
            )
    return [str(prompt) for prompt in prompts]


def as_json(prompt: str | Chat) -> Any:
    """The prompt for JSON: a text, or messages with our names for roles."""
    return prompt if isinstance(prompt, str) else list(prompt.messages)


def _stdin() -> str:
    if sys.stdin is None:  # closed
        return ""
    if sys.stdin.isatty():
        say("Type the prompt; end it with Ctrl-D")
    try:
        text = sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 text: {error}") from error
    check_text(text, "stdin")
    return text


def _prompts_of_file(path: str) -> list[str | Chat]:
    from lorakit.data.readers import holds_rows

    found: list[str | Chat]
    found = _prompts_of_rows(path) if holds_rows(path) else [*_lines(_text_of(path))]
    if not found:
        raise InputError(f"--prompts {path} holds no prompt; write one on each line")
    return found


def _text_of(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"--prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {path} is not UTF-8 text: {error}") from error
    check_text(text, f"--prompts {path}")
    return text


def _prompts_of_rows(path: str) -> list[str | Chat]:
    """What the rows of a file ask.

    Raises:
        InputError: the file or some of its rows cannot be read; each is named.
    """
    from lorakit.data.asked import asked_in
    from lorakit.data.readers import open_rows
    from lorakit.data.rows import RowError

    notes: list[str] = []
    found, problems = [], []
    for row in open_rows(path, notes):
        try:
            if row.problem is not None:
                raise RowError(row.reason, row.problem)
            found.append(asked_in(row.values, row.where))
        except RowError as error:
            problems.append(f"{row.where}: {error}")
    if problems:
        raise InputError(
            collected(f"--prompts {path} has rows that cannot be asked; mend them", problems)
        )
    for note in notes:
        say(note)
    return found


def _lines(text: str) -> list[str]:
    # not splitlines, which also parts a line at signs that JSON and editors take as text
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]
