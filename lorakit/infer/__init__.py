"""Forwards of a base with adapters: losses of packed batches, and generated text.

``packed`` computes losses and their gradients (training and evaluation both stand on it), of
``inputs`` and in the way that ``probing`` found right; ``generation`` continues prompts, each with
its own adapter.
"""

from lorakit.infer.generation import Answer, answers, generate, stream
from lorakit.infer.packed import PackedModel

__all__ = ["Answer", "PackedModel", "answers", "generate", "stream"]
