"""Answers to a few validation items, for the report: the base's, and those of what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.bases import Base
from lorakit.data import TokenData, items
from lorakit.infer import generate
from lorakit.layers import Handle


def samples_of(
    base: Base, data: TokenData, indices: Sequence[int], *, count: int
) -> list[dict[str, Any]]:
    """The first ``count`` different prompts, without answers.

    Args:
        data, indices: the validation part.

    Returns:
        ``{"prompt", "reference"}`` each, ``reference`` a list of texts; empty where there is no
        tokenizer, or the examples have no prompt.
    """
    if base.tokenizer is None or data.report.kind == "text":
        return []
    return [
        {"prompt": item.prompt, "reference": item.references}
        for item in items(data, indices)[:count]
    ]


def answers_of(
    base: Base,
    handle: Handle | None,
    name: str | None,
    data: TokenData,
    indices: Sequence[int],
    *,
    count: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to the first ``count`` different prompts.

    Args:
        name: an adapter on the handle; ``None`` is the bare model.
    """
    if not count:
        return []
    return generate(
        base,
        handle,
        [item.prompt_ids.tolist() for item in items(data, indices)[:count]],
        adapter=name,
        max_new_tokens=max_new_tokens,
        temperature=0,
        stop_ids=data.stop_ids or None,
    )
