"""Random states: one seed at the start of a run, and everything back where it was after it.

The order of the data and the dropout of adapters are pure functions of the seed and need none of
this; it is for models that draw numbers of their own.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PREFIX = "random."


def random_tensors() -> dict[str, Tensor]:
    """The states of Python, NumPy, torch and every GPU, as tensors with names."""
    _, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    state = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([legacy["state"]["pos"], legacy["has_gauss"]]),
        "numpy_gauss": torch.tensor([legacy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for i in range(torch.cuda.device_count()):
            state[f"cuda{i}"] = torch.cuda.get_rng_state(i)
    return {_PREFIX + name: tensor for name, tensor in state.items()}


def set_random_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`random_tensors` gave; other names are ignored.

    States of GPUs that are not there any more are ignored too.
    """
    state = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(_PREFIX)
    }
    gauss = state["python_gauss"]
    random.setstate((3, tuple(state["python"].tolist()), gauss.item() if gauss.numel() else None))
    position, has_gauss = state["numpy_position"].tolist()
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator; after the block they are as they were before it."""
    before = random_tensors()
    seed_all(seed)
    try:
        yield
    finally:
        set_random_tensors(before)


def seed_all(seed: int) -> None:
    """Seed every generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # GPUs too


def _optional(value: float | None) -> Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)


class Generators:
    """The generators that several runs use in turn, each as if it were alone."""

    def __init__(self) -> None:
        self._holder: object = None
        self._states: dict[int, dict[str, Tensor]] = {}

    def hold(self, who: object) -> None:
        """From now on they give the numbers of ``who``, from where it was."""
        if self._holder is who:
            return
        if self._holder is not None:
            self._states[id(self._holder)] = random_tensors()
        self._holder = who
        if id(who) in self._states:
            set_random_tensors(self._states.pop(id(who)))

    def forget(self, who: object) -> None:
        """``who`` has ended."""
        self._states.pop(id(who), None)
        if self._holder is who:
            self._holder = None
