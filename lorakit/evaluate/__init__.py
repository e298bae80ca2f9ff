"""How good a base and its adapters are.

``losses`` (mean loss and perplexity over examples), ``metrics`` (generated texts against
references), ``comparison`` (both, for a base beside its adapters).
"""

from __future__ import annotations

from lorakit.evaluate.comparison import Contestant, Judgement, answer_length, compare
from lorakit.evaluate.losses import LossResult, example_losses, loss, mean_loss, perplexity
from lorakit.evaluate.metrics import METRICS, text_metrics

__all__ = [
    "METRICS",
    "Contestant",
    "Judgement",
    "LossResult",
    "answer_length",
    "compare",
    "example_losses",
    "loss",
    "mean_loss",
    "perplexity",
    "text_metrics",
]
