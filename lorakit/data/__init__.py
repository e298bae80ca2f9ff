"""Rows → tokens and what is supervised → packed batches.

::

    spec = DataSpec("mine.csv", map={"prompt": "question", "completion": "answer"})
    data = load_data(spec, tokenizer, context_length=2048)   # every row is checked here
    print(*data.report.lines(), sep="\\n")
    training, validation = split(data, 0.05, seed=0)
    batch = pack([data[training[i]] for i in indices_at(len(training), 0, consumed=0, count=8)])

Read in this order: ``load`` (the way of a row), ``readers`` (files), ``columns`` (kinds),
``rendering`` (how a prompt is written), ``turns`` (chats), ``tokens`` (the result), ``batch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Batch": "batch",
    "Chat": "asked",
    "DataReport": "report",
    "DataSpec": "spec",
    "Example": "tokens",
    "Item": "tokens",
    "Prompt": "rendering",
    "PromptItem": "tokens",
    "Rendering": "rendering",
    "TokenData": "tokens",
    "indices_at": "ordering",
    "items": "tokens",
    "load_data": "load",
    "make_rendering": "rendering",
    "order": "ordering",
    "pack": "batch",
    "split": "splitting",
}

__all__ = [
    "Batch",
    "Chat",
    "DataReport",
    "DataSpec",
    "Example",
    "Item",
    "Prompt",
    "PromptItem",
    "Rendering",
    "TokenData",
    "indices_at",
    "items",
    "load_data",
    "make_rendering",
    "order",
    "pack",
    "split",
]

if TYPE_CHECKING:
    from lorakit.data.asked import Chat
    from lorakit.data.batch import Batch, pack
    from lorakit.data.load import load_data
    from lorakit.data.ordering import indices_at, order
    from lorakit.data.rendering import Prompt, Rendering, make_rendering
    from lorakit.data.report import DataReport
    from lorakit.data.spec import DataSpec
    from lorakit.data.splitting import split
    from lorakit.data.tokens import Example, Item, PromptItem, TokenData, items


def __getattr__(name: str) -> Any:
    # loaded on use: a preview needs no torch, which only batches do
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
