"""Commands on models other than causal language models: which task it is, and what is its own.

``train``, ``eval``, ``generate`` and ``preview`` ask :func:`chosen_task` first, and hand over to
this package where the answer is not ``"causal"``.
"""

from lorakit.cli.tasks.answering import generate
from lorakit.cli.tasks.choosing import (
    CAUSAL,
    TASKS,
    UNANSWERED,
    add_task_argument,
    chosen_task,
    refuse,
)
from lorakit.cli.tasks.judging import evaluate
from lorakit.cli.tasks.previewing import preview
from lorakit.cli.tasks.training import trainer_for

__all__ = [
    "CAUSAL",
    "TASKS",
    "UNANSWERED",
    "add_task_argument",
    "chosen_task",
    "evaluate",
    "generate",
    "preview",
    "refuse",
    "trainer_for",
]
