"""Training: adapters on one frozen base, one or many at once, from settings to run folders; or all
weights of the base, to compare.

::

    base = load_base("smollm2")
    data = load_data(DataSpec(path="mine.jsonl"), base.tokenizer, context_length=2048)
    result = Trainer(base, LoRASpec(rank=16), data, TrainSettings(steps=200), "runs/mine").run()
    result.adapter                              # runs/mine/adapter, the best, in PEFT's format
    Trainer.resume("runs/mine")                 # after a kill: goes on exactly
    train_together([Trainer(…), Trainer(…)])    # each as if alone, in shared forwards
    Trainer(base, Full(), data, settings, "runs/full").run()    # the base itself

Read in this order: ``settings`` (how a run trains), ``beginning`` and ``choices`` (what is decided
before the first step), ``trained`` (what learns: an adapter, or with ``full`` the base itself),
``job`` (all else that belongs to one training), ``run`` (a job with its folder), ``loop`` (forwards
of the runs on one model), ``trainer`` (from the first check to the result), ``together`` (who
joins, who leaves, and when all are saved); then ``checkpoint`` and ``folder`` (what is on disk),
``result`` and ``samples`` (what is left at the end), ``callbacks`` (who is told).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Callback": "callbacks",
    "EvalMetrics": "callbacks",
    "Full": "full",
    "Origin": "origin",
    "RunInfo": "callbacks",
    "RunResult": "callbacks",
    "StepMetrics": "callbacks",
    "TrainSettings": "settings",
    "Trainer": "trainer",
    "finished_run": "result",
    "train_together": "together",
    "write_report": "report",
}

__all__ = [
    "Callback",
    "EvalMetrics",
    "Full",
    "Origin",
    "RunInfo",
    "RunResult",
    "StepMetrics",
    "TrainSettings",
    "Trainer",
    "finished_run",
    "train_together",
    "write_report",
]

if TYPE_CHECKING:
    from lorakit.train.callbacks import Callback, EvalMetrics, RunInfo, RunResult, StepMetrics
    from lorakit.train.full import Full
    from lorakit.train.origin import Origin
    from lorakit.train.report import write_report
    from lorakit.train.result import finished_run
    from lorakit.train.settings import TrainSettings
    from lorakit.train.together import train_together
    from lorakit.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"lorakit.train.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lorakit.train' has no attribute {name!r}")
