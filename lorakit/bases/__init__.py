"""Frozen base models: found, loaded, placed on a device, and recognised again.

::

    base = load_base("smollm2")                 # an alias, a hub id, a folder or a .gguf file
    base.model, base.tokenizer                  # a transformers model and its tokenizer
    base.placement.reason                       # why this device and this dtype
    notes = check_base(adapter, base.identity)  # raises if the adapter belongs to another base

Read in this order: ``source`` (what a reference means), ``gguf_cache`` (a GGUF becomes a folder,
once), ``placement`` (device and dtype), ``load`` (the model), ``identity`` (which base it is).
"""

from lorakit.bases.identity import check_base, identify
from lorakit.bases.length import context_length, most_positions
from lorakit.bases.load import Base, load_base
from lorakit.bases.placement import Placement, choose_placement
from lorakit.bases.preview import base_config, load_tokenizer, resolve_base

__all__ = [
    "Base",
    "Placement",
    "base_config",
    "check_base",
    "choose_placement",
    "context_length",
    "identify",
    "load_base",
    "load_tokenizer",
    "most_positions",
    "resolve_base",
]
