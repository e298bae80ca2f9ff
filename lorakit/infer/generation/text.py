"""Token ids that arrive one by one → text, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class GrowingText:
    """The text of a growing answer.

    A character may be spread over several tokens, and a stop text over several characters; what
    could still change or be cut off is held back.

    Args:
        tokenizer: decodes ids.
        stop: texts at which the answer ends; they are no part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._start = 0
        """First token of the decoded window; tokens before it are settled."""
        self._read = 0
        """Tokens whose text is in ``_text``."""
        self._text = ""
        self._given = 0
        self.stopped = False
        """Whether a stop text was reached."""

    def push(self, token: int) -> str:
        """Add a token; gives the text that is certain since the last call."""
        self._ids.append(token)
        # a window of a few tokens: decoded alone, a token may lose its leading space
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) > len(before) and not now.endswith("�"):
            self._text += now[len(before) :]
            self._start, self._read = self._read, len(self._ids)
            self._cut()
        return self._give(0 if self.stopped else self._held_back())

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        if not self.stopped:
            before = self._decode(self._ids[self._start : self._read])
            self._text += self._decode(self._ids[self._start :])[len(before) :]
            self._start = self._read = len(self._ids)
            self._cut()
        return self._give(0)

    @property
    def text(self) -> str:
        """Everything so far, what is held back included."""
        return self._text

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _cut(self) -> None:
        """End the text before the first stop text in it."""
        found = [at for stop in self._stop if (at := self._text.find(stop, self._given)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _give(self, held_back: int) -> str:
        end = max(self._given, len(self._text) - held_back)
        piece = self._text[self._given : end]
        self._given = end
        return piece
