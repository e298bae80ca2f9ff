"""How good a base and its adapters are.

``losses`` (mean loss and perplexity over examples), ``metrics`` (generated texts against
references), ``forgetting`` (loss on general text, before and after), ``comparison`` (all of it, for
a base beside its adapters).
"""

from __future__ import annotations

from lorakit.evaluate.comparison import Contestant, Judgement, answer_length, compare
from lorakit.evaluate.forgetting import Forgetting, GeneralText, forgetting, general_text
from lorakit.evaluate.losses import LossResult, example_losses, loss, mean_loss, perplexity
from lorakit.evaluate.metrics import METRICS, text_metrics

__all__ = [
    "METRICS",
    "Contestant",
    "Forgetting",
    "GeneralText",
    "Judgement",
    "LossResult",
    "answer_length",
    "compare",
    "example_losses",
    "forgetting",
    "general_text",
    "loss",
    "mean_loss",
    "perplexity",
    "text_metrics",
]
