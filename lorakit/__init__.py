"""lorakit: the whole life of LoRA adapters on a frozen base model.

The public names are loaded on first use, so that ``import lorakit`` costs nothing::

    handle = lorakit.attach(model, lorakit.LoRASpec(rank=16, alpha=32), name="a")
    with handle.use("a"):
        ...
    adapter = handle.snapshot("a")
    lorakit.save_adapter(adapter, "out")          # a PEFT folder
    again = lorakit.load_adapter("out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Adapter": "lorakit.core.adapter",
    "LoRASpec": "lorakit.core.spec",
    "LorakitError": "lorakit.errors",
    "attach": "lorakit.layers",
    "combine": "lorakit.algebra.combine",
    "compress": "lorakit.algebra.compress",
    "extract": "lorakit.workflows.extract",
    "load_adapter": "lorakit.formats",
    "load_base": "lorakit.bases",
    "merge": "lorakit.layers",
    "push_adapter": "lorakit.formats",
    "save_adapter": "lorakit.formats",
    "tune": "lorakit.workflows.tune",
}

__all__ = [
    "Adapter",
    "LoRASpec",
    "LorakitError",
    "attach",
    "combine",
    "compress",
    "extract",
    "load_adapter",
    "load_base",
    "merge",
    "push_adapter",
    "save_adapter",
    "tune",
]

if TYPE_CHECKING:
    from lorakit.algebra.combine import combine
    from lorakit.algebra.compress import compress
    from lorakit.bases import load_base
    from lorakit.core.adapter import Adapter
    from lorakit.core.spec import LoRASpec
    from lorakit.errors import LorakitError
    from lorakit.formats import load_adapter, push_adapter, save_adapter
    from lorakit.layers import attach, merge
    from lorakit.workflows.extract import extract
    from lorakit.workflows.tune import tune


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
