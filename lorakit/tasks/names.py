"""Closed sets of names, for who must not import what stands behind them."""

from __future__ import annotations

from typing import Literal

#: what ``--task`` takes
TASKS = ("causal", "seq2seq", "classify", "vision", "speech", "embed", "vision-chat")

#: how examples share a forward: *packed*, one behind the other; *padded*, each as large as the
#: largest of them; *single*, each in a forward of its own
Mode = Literal["packed", "padded", "single"]
#: what is made again in the backward instead of being kept; see ``train.settings``
Recompute = Literal["none", "mlp", "layers", "offload"]
