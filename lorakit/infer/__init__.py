"""Forwards of a base with adapters: losses of packed batches, and generated text.

``packed`` computes losses and their gradients (training and evaluation both stand on it);
``generation`` continues prompts.
"""

from lorakit.infer.packed import PackedModel

__all__ = ["PackedModel"]
