"""Examples that are longer than allowed, made to fit (``--truncate``).

The prompt gives way first, from its left, but keeps at least half of the allowed length; chats
lose their oldest turns. What is still too long loses its end, and with it the end token, so that
the model does not learn to stop where a text was cut.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lorakit.data.encode import Encoded, Encoder, Sample
from lorakit.data.messages import is_trained
from lorakit.data.rows import RowError, plural


@dataclass
class Cuts:
    """How much was taken away, for the report."""

    prompts: int = 0
    chats: int = 0
    ends: int = 0
    tokens: int = 0

    def lines(self) -> list[str]:
        """One sentence a kind of cut."""
        found = []
        if self.prompts:
            found.append(f"{plural(self.prompts, 'prompt')} shortened from the left")
        if self.chats:
            found.append(f"{plural(self.chats, 'chat')} without the oldest turns")
        if self.ends:
            found.append(f"{plural(self.ends, 'example')} cut at the end, the end token with it")
        if found:
            found.append(f"{plural(self.tokens, 'token')} cut away in all")
        return found


def shorten(encoder: Encoder, sample: Sample, encoded: Encoded, limit: int, cuts: Cuts) -> Encoded:
    """An encoding of at most ``limit`` tokens.

    Raises:
        RowError: nothing supervised would be left.
    """
    before = len(encoded.ids)
    if sample.messages:
        shorter, encoded = _drop_turns(encoder, sample, encoded, limit)
        cuts.chats += shorter
    elif sample.prompt:
        shorter, encoded = _cut_prompt(encoder, sample, encoded, limit)
        cuts.prompts += shorter
    if len(encoded.ids) > limit:
        encoded = dataclasses.replace(
            encoded,
            ids=encoded.ids[:limit],
            supervised=encoded.supervised[:limit],
            prompt_length=min(encoded.prompt_length, limit),
        )
        cuts.ends += 1
    if not encoded.supervised.any():
        raise RowError(
            "nothing supervised is left",
            f"{before:,} tokens; cut to {limit:,} nothing would be left to learn. "
            "Allow a greater length",
        )
    cuts.tokens += before - len(encoded.ids)
    return encoded


def _cut_prompt(
    encoder: Encoder, sample: Sample, encoded: Encoded, limit: int
) -> tuple[bool, Encoded]:
    """Take text from the prompt's left until it fits; the template around it stays whole."""
    answer = len(encoded.ids) - encoded.prompt_length
    allowed = max(limit - answer, limit // 2)
    text, cut = sample.prompt, False
    while (excess := encoded.prompt_length - allowed) > 0:
        shorter = _without_first(encoder, text, excess)
        if not shorter.strip():
            break  # the template alone is too long
        text, cut = shorter, True
        result = encoder.encode([dataclasses.replace(sample, prompt=text)])[0]
        if isinstance(result, RowError):
            raise result
        encoded = result
    return cut, encoded


def _without_first(encoder: Encoder, text: str, num_tokens: int) -> str:
    """The text without about its first tokens; always shorter by a character at least."""
    tokenizer = encoder.rendering.tokenizer
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        start = offsets[num_tokens][0] if num_tokens < len(offsets) else len(text)
    else:
        length = max(1, len(encoder.rendering.ids([text])[0]))
        start = len(text) * num_tokens // length
    return text[max(1, start) :]


def _drop_turns(
    encoder: Encoder, sample: Sample, encoded: Encoded, limit: int
) -> tuple[bool, Encoded]:
    """Leave out the oldest turns, up to a user's, as long as an answer to learn remains."""
    messages, cut = list(sample.messages), False
    keep = 1 if messages[0]["role"] in ("system", "developer") else 0
    while len(encoded.ids) > limit:
        later = [n for n in range(keep + 1, len(messages)) if messages[n]["role"] == "user"]
        rest = messages[:keep] + messages[later[0] :] if later else []
        if not any(is_trained(message) for message in rest):
            break
        result = encoder.encode([dataclasses.replace(sample, messages=tuple(rest))])[0]
        if isinstance(result, RowError):
            raise result
        messages, encoded, cut = rest, result, True
    return cut, encoded
