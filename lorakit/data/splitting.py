"""Validation rows taken from the training data, whole prompts at a time."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np


class Prompted(Protocol):
    """Rows, of which some may share a prompt."""

    def __len__(self) -> int: ...

    def prompt_key(self, index: int) -> bytes:
        """What rows of one prompt share; empty: this one is never held out."""


def split(
    data: Prompted, fraction: float, seed: int, *, max_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide into training and validation; rows that share a prompt stay together.

    Which prompts are held out depends only on the prompts and the seed, not on the order of the
    rows, so that a data set that grows keeps nearly the same ones.

    Args:
        fraction: share to hold out of the rows that may be, in [0, 1); at least one prompt is, if
            there are two.
        max_rows: hold out no more rows than this, where the prompts allow it.

    Returns:
        (training, validation): ascending indices, int64. With a single prompt, or fraction 0,
        validation is empty.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: {fraction} given; expected at least 0 and below 1")
    groups: dict[bytes, list[int]] = {}
    for i in range(len(data)):
        if key := data.prompt_key(i):
            groups.setdefault(key, []).append(i)
    chosen: list[bytes] = []
    if fraction > 0 and len(groups) > 1:
        room = max(1, round(sum(map(len, groups.values())) * fraction))
        room = room if max_rows is None else min(room, max_rows)
        drawn = sorted(groups, key=lambda key: _rank(key, seed))
        for key in drawn:
            if len(groups[key]) <= room and len(chosen) < len(groups) - 1:
                chosen.append(key)
                room -= len(groups[key])
        if not chosen:  # every prompt has more rows than wanted: the one with the fewest
            chosen = [min(drawn, key=lambda key: len(groups[key]))]
    held_out = np.array(sorted(i for key in chosen for i in groups[key]), np.int64)
    return np.setdiff1d(np.arange(len(data), dtype=np.int64), held_out), held_out


def _rank(key: bytes, seed: int) -> bytes:
    return hashlib.blake2b(key, digest_size=16, salt=(seed % 2**64).to_bytes(8, "little")).digest()
