"""A base beside its adapters on the same items: loss, answers, and how good these are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorakit.bases import Base
from lorakit.data import PromptItem, TokenData
from lorakit.errors import DataError
from lorakit.evaluate.losses import LossResult, loss
from lorakit.evaluate.metrics import text_metrics
from lorakit.infer import Answer, answers
from lorakit.infer.generation import end_ids
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.tasks.causal import CAUSAL
from lorakit.tasks.task import Task

#: tokens beyond the longest reference that an answer may have: enough to see that it goes on
BEYOND = 16


@dataclass(frozen=True)
class Contestant:
    """Something to be judged."""

    name: str
    mix: MixLike
    """``None`` for the bare base, an adapter's name, or weights."""


@dataclass(frozen=True)
class Judgement:
    """What came out for one contestant."""

    name: str
    loss: LossResult
    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list, repr=False)
    """One an item; empty if none were generated."""
    general: LossResult | None = None
    """The loss on general text, where that was asked; see :mod:`lorakit.evaluate.forgetting`."""


@dataclass(frozen=True)
class Progress:
    """Where a comparison is, for whoever shows it."""

    contestant: str
    stage: str
    """``"loss"``, ``"general text"`` or ``"answers"``."""
    done: int
    total: int


def compare(
    base: Base,
    handle: Handle | None,
    contestants: Sequence[Contestant],
    data: TokenData,
    *,
    items: Sequence[PromptItem] | None = None,
    indices: Sequence[int] | None = None,
    metrics: Sequence[str] = (),
    generate: bool = False,
    general: TokenData | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    token_budget: int | None = None,
    task: Task | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_judged: Callable[[Judgement], None] | None = None,
) -> list[Judgement]:
    """Judge each contestant.

    Args:
        base, handle: the model, and the adapters on it.
        contestants: who is judged, in this order.
        items: what is asked, and the loss is over all their rows.
        indices: rows for the loss where there are no items (plain text); ``None`` is all.
        metrics: names out of ``METRICS``; without any, nothing is generated …
        generate: … unless this asks for it.
        general: general text, of which each one's loss is taken too.
        max_new_tokens: longest answer; ``None`` is :func:`answer_length`.
        on_progress: called often.
        on_judged: called as each contestant is done.

    Raises:
        DataError: answers are wanted without items, or no supervised token.
        InputError: metrics that do not fit the references.
    """
    generate = generate or bool(metrics)
    if generate and not items:
        raise DataError("there is no item to generate an answer for; give prompt and completion")
    if items is not None:
        indices = [index for item in items for index in item.indices]
    if metrics and items:  # what cannot be judged is known before anything is generated
        text_metrics(["" for _ in items], [item.references for item in items], metrics)
    task = task or CAUSAL.on(base.model, handle)
    of = functools.partial(loss, base.model, handle, token_budget=token_budget, task=task)
    judged = []
    for one in contestants:
        tell = _teller(on_progress, one.name)
        result = of(one.mix, data, indices, on_batch=tell("loss"))
        elsewhere = None
        if general is not None:
            elsewhere = of(one.mix, general, on_batch=tell("general text"))
        found: list[Answer] = []
        scores: dict[str, float] = {}
        if generate and items:
            found = _answered(
                base, handle, one, data, items, max_new_tokens, batch_size, tell("answers")
            )
            references = [item.references for item in items]
            if metrics:
                scores = text_metrics([answer.text for answer in found], references, metrics)
        judgement = Judgement(one.name, result, scores, found, elsewhere)
        judged.append(judgement)
        if on_judged is not None:
            on_judged(judgement)
    return judged


def answer_length(data: TokenData, items: Sequence[PromptItem]) -> int:
    """Tokens that an answer may have: the longest reference of these items, and a few."""
    longest = max(
        int(data.lengths[i]) - len(item.prompt_ids) for item in items for i in item.indices
    )
    return longest + BEYOND


def _answered(
    base: Base,
    handle: Handle | None,
    one: Contestant,
    data: TokenData,
    items: Sequence[PromptItem],
    max_new_tokens: int | None,
    batch_size: int | None,
    tell: Callable[[int, int], None],
) -> list[Answer]:
    done = 0

    def on_done(index: int, answer: Answer) -> None:
        nonlocal done
        done += 1
        tell(done, len(items))

    return answers(
        base,
        handle,
        [item.prompt_ids.tolist() for item in items],
        adapter=one.mix,
        max_new_tokens=max_new_tokens or answer_length(data, items),
        batch_size=batch_size,
        stop_ids=[*data.stop_ids, *end_ids(base)],
        on_done=on_done,
    )


def _teller(
    on_progress: Callable[[Progress], None] | None, name: str
) -> Callable[[str], Callable[[int, int], None]]:
    def of(stage: str) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(Progress(name, stage, done, total))

        return tell

    return of
