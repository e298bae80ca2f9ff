"""Kinds of models and data, each as a small module: what is minimised, and how it is batched.

Read ``task`` first: the protocol that ``train`` and ``evaluate`` stand on. ``causal`` is that of
language models (packed rows, losses of tokens).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "CAUSAL": "causal",
    "CausalTask": "causal",
    "Example": "task",
    "Examples": "task",
    "Kind": "task",
    "Measured": "task",
    "Mode": "names",
    "Recompute": "names",
    "Stretch": "task",
    "Task": "task",
}

__all__ = [
    "CAUSAL",
    "CausalTask",
    "Example",
    "Examples",
    "Kind",
    "Measured",
    "Mode",
    "Recompute",
    "Stretch",
    "Task",
]

if TYPE_CHECKING:
    from lorakit.tasks.causal import CAUSAL, CausalTask
    from lorakit.tasks.names import Mode, Recompute
    from lorakit.tasks.task import Example, Examples, Kind, Measured, Stretch, Task


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"lorakit.tasks.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lorakit.tasks' has no attribute {name!r}")
