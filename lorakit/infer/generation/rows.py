"""What is asked for, and what became of it so far: a row per prompt.

Everything that can be wrong with prompts and settings is found here, before the first forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from lorakit.bases import context_length, most_positions
from lorakit.errors import InputError, collected
from lorakit.infer.generation.sampling import source
from lorakit.infer.generation.text import GrowingText
from lorakit.layers import Handle
from lorakit.layers.routing import Mix, MixLike, as_mix

Finish = Literal["stop", "length", "context", "not finite"]
Prompt = str | Sequence[int]


class HasModel(Protocol):
    """What is read of a ``lorakit.bases.Base``."""

    model: nn.Module
    tokenizer: Any


@dataclass(frozen=True)
class Answer:
    """What was generated for one prompt."""

    text: str
    """Without special tokens, and without the stop text."""
    num_tokens: int
    """Generated tokens, the one that ended it left out."""
    finish: Finish
    """``stop``: by an end token or a stop text; ``length``: ``max_new_tokens`` were generated;
    ``context``: prompt and answer fill the model's context; ``not finite``: the logits of the next
    token are not finite numbers, so that none can be chosen."""


@dataclass(eq=False)
class Row:
    """One prompt and what became of it so far."""

    index: int
    prompt: list[int]
    mix: MixLike
    limit: int
    """Tokens it may become."""
    limited_by: Finish
    draw: np.random.Generator
    text: GrowingText | None
    """``None`` where the text is only needed at the end."""
    ids: list[int] = field(default_factory=list)


#: a row, its new text, and its answer if that is the last of it
Event = tuple[Row, str, Answer | None]


def rows_of(
    base: HasModel,
    handle: Handle | None,
    prompts: Sequence[Prompt],
    adapter: MixLike,
    mixes: Sequence[MixLike] | None,
    max_new_tokens: int,
    seed: int,
    stop: Sequence[str],
    on_text: Callable[..., None] | None,
    numbers: Sequence[int] | None = None,
) -> list[Row]:
    """Check everything that was asked; collects the problems of all prompts."""
    if isinstance(prompts, str):
        raise InputError("prompts is one text; give a list of them")
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if mixes is not None and (adapter is not None or len(mixes) != len(prompts)):
        problems.append(
            f"mixes has {len(mixes)} entries for {len(prompts)} prompts"
            if adapter is None
            else "adapter and mixes are both given; give one of them"
        )
    if numbers is not None and (len(numbers) != len(prompts) or min(numbers, default=0) < 0):
        problems.append(
            f"numbers are {', '.join(map(str, numbers[:6])) or 'none'}; expected one for each of "
            f"{len(prompts)} prompts, none below 0"
        )
    if any(not text for text in stop):
        problems.append("a stop text is empty")
    each = list(mixes) if mixes is not None else [adapter] * len(prompts)
    if handle is None and any(as_mix(mix) for mix in each):
        problems.append("an adapter is named, but none is attached")
    encoder_decoder = is_encoder_decoder(base.model)
    room = (most_positions if encoder_decoder else context_length)(base.model)
    fronts: dict[Mix, int] = {}
    if handle is not None and not problems:
        # raises for a name that is not attached
        fronts = {as_mix(mix): handle.virtual_tokens(mix) for mix in each}
    rows = []
    for i, prompt in enumerate(prompts):
        ids = _encoded(base, prompt)
        front = fronts.get(as_mix(each[i]), 0) if i < len(each) else 0
        # an answer stands behind its prompt, or in a decoder of as many positions, behind the start
        before = 1 if encoder_decoder else len(ids)
        left = None if room is None else room - front - before
        if not ids:
            problems.append(f"prompt {i + 1} is empty")
        elif encoder_decoder and room is not None and front + len(ids) > room:
            problems.append(
                f"prompt {i + 1} has {len(ids)} tokens, and this model takes {room - front} at "
                "most. Shorten it"
            )
        elif left is not None and left < 1:
            problems.append(
                f"prompt {i + 1} has {len(ids)} tokens; the context of this model is {room}"
                + (f", of which its adapter's prefix takes {front}" if front else "")
                + ", so there is no room for an answer. Shorten it"
            )
        capped = left is not None and left < max_new_tokens
        rows.append(
            Row(
                i,
                ids,
                each[i] if i < len(each) else None,
                left if capped and left is not None else max_new_tokens,
                "context" if capped else "length",
                source(seed, i if numbers is None or problems else numbers[i]),
                GrowingText(base.tokenizer, stop) if stop or on_text is not None else None,
            )
        )
    if problems:
        raise InputError(collected("Text cannot be generated", problems))
    return rows


def _encoded(base: HasModel, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return [int(i) for i in base.tokenizer(prompt)["input_ids"]]
    return [int(i) for i in prompt]


def end_ids(base: HasModel) -> list[int]:
    """The end tokens that tokenizer and generation config name."""
    config = getattr(base.model, "generation_config", None)
    named = [
        getattr(base.tokenizer, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
    ]
    flat = [i for one in named for i in (one if isinstance(one, (list, tuple)) else [one])]
    return [int(i) for i in flat if i is not None]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether prompts are read by one half of the model and answers written by the other."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
