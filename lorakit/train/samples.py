"""Answers of base and adapter to the same few validation items, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.bases import Base
from lorakit.data import TokenData, items
from lorakit.infer import generate
from lorakit.layers import Handle


def answer_samples(
    base: Base,
    handle: Handle,
    name: str,
    data: TokenData,
    indices: Sequence[int],
    *,
    count: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Greedy answers to the first ``count`` different prompts.

    Args:
        name: the adapter's name on the handle.
        data, indices: the validation part.

    Returns:
        ``{"prompt", "reference", "base", "adapter"}`` each, ``reference`` a list of texts; empty
        where there is no tokenizer, or the examples have no prompt.
    """
    if base.tokenizer is None or data.report.kind == "text":
        return []
    asked = items(data, indices)[:count]
    answers = {
        adapter: generate(
            base,
            handle,
            [item.prompt_ids.tolist() for item in asked],
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=0,
            stop_ids=data.stop_ids or None,
        )
        for adapter in (None, name)
    }
    return [
        {"prompt": item.prompt, "reference": item.references, "base": plain, "adapter": adapted}
        for item, plain, adapted in zip(asked, answers[None], answers[name], strict=True)
    ]
