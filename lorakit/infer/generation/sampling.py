"""The next token of each row from its logits: the most likely one, or a drawn one.

Legend: ``R`` rows, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorakit.errors import InputError, collected


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Raises:
        InputError: a value is impossible, or cannot act.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability are drawn from."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature is {self.temperature!r}; expected a number of at least 0")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p!r}; expected above 0 and at most 1")
        if self.temperature == 0 and self.top_p < 1:
            problems.append(
                f"top_p={self.top_p!r} cannot act: at temperature 0 the most likely token is "
                "taken; give a temperature too"
            )
        if problems:
            raise InputError(collected("Text cannot be generated like this", problems))

    def choose(self, logits: Tensor, draws: Sequence[np.random.Generator]) -> list[int | None]:
        """One token a row; ``None`` where the largest logit is not a finite number.

        Args:
            logits: [R, V].
            draws: each row's own source of randomness, so that a row's tokens do not depend on
                its neighbours.
        """
        if self.temperature == 0:
            return _where(*logits.max(-1))
        # float64 on the CPU: the same draw picks the same token wherever the model ran
        wide = logits.detach().to("cpu", torch.float64)
        largest = wide.amax(-1)
        # their differences, which a temperature near 0 cannot make infinitely likely
        scaled = (wide - largest[:, None]) / self.temperature
        probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
        cumulative = probabilities.cumsum(-1)
        # a token is kept while those before it have less than top_p together
        kept = (cumulative - probabilities) < self.top_p
        cumulative = (probabilities * kept).cumsum(-1)
        points = torch.tensor([draw.random() for draw in draws], dtype=torch.float64)
        places = torch.searchsorted(cumulative, (points * cumulative[:, -1])[:, None], right=True)
        places = places.minimum((kept.sum(-1, keepdim=True) - 1).clamp_min(0))
        return _where(largest, tokens.gather(-1, places)[:, 0])


def _where(largest: Tensor, tokens: Tensor) -> list[int | None]:
    """The tokens of rows whose largest logit is a finite number."""
    finite = largest.isfinite().tolist()
    return [int(t) if good else None for t, good in zip(tokens.tolist(), finite, strict=True)]


def source(seed: int, row: int) -> np.random.Generator:
    """The randomness of one prompt: a function of the seed and the prompt's place alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, row])))
