"""Whole batches through transformers' own ``generate``, for models whose cache has no slots.

Prompts of a batch are of one length. Where a model of this kind hides padding at all, each does so
in its own way: positions that count it, a state that has read it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from lorakit.core.products import unrounded_products
from lorakit.infer.generation.config import plain_generation
from lorakit.infer.generation.rows import Answer, Event, Row
from lorakit.infer.generation.run import Run
from lorakit.infer.probing import close, probe_sequences

log = logging.getLogger(__name__)

#: model → why its prompts go one at a time, or ``None``; tried once for each
_tried: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def events(run: Run) -> Iterator[Event]:
    """New pieces of text and finished answers, batch by batch."""
    run.waiting.sort(key=_shape)  # keeps rows of one adapter together
    while run.waiting:
        rows = run.waiting[: _together(run)]
        del run.waiting[: len(rows)]
        for row, tokens in zip(rows, _generated(run, rows), strict=True):
            pieces: list[str] = []
            answer: Answer | None = None
            for token in tokens:
                piece, answer = run.take(row, token)
                pieces.append(piece)
                if answer is not None:
                    break
            else:
                piece, answer = run.end(row, row.limited_by)
                pieces.append(piece)
            yield row, "".join(pieces), answer


def _shape(row: Row) -> tuple[int, int]:
    """What rows of a batch have in common: no row is padded, and none outgrows its context."""
    return -len(row.prompt), -row.limit


def _together(run: Run) -> int:
    """Rows of the next batch."""
    most = run.wanted
    alike = [_shape(row) == _shape(run.waiting[0]) for row in run.waiting[:most]]
    found = (*alike, False).index(False)
    return found if found > 1 and _why_single(run) is None else 1


def _generated(run: Run, rows: Sequence[Row]) -> list[tuple[int | None, ...]]:
    """New tokens of each row, which may go on behind its end."""
    steps: list[list[int | None]] = []
    draws = [row.draw for row in rows]

    def choose(logits: Tensor) -> list[int]:
        steps.append(run.sampling.choose(logits, draws))
        return [0 if token is None else token for token in steps[-1]]

    with run.using([row.mix for row in rows]):
        _generate(run, [row.prompt for row in rows], rows[0].limit, choose, run.stop_ids)
    return list(zip(*steps, strict=True))


def _generate(
    run: Run,
    prompts: Sequence[Sequence[int]],
    most: int,
    choose: Callable[[Tensor], Sequence[int]],
    ends: frozenset[int] = frozenset(),
) -> None:
    """Continue prompts of one length by the tokens that are chosen from logits, [R, V]."""
    ids = torch.tensor(prompts, device=run.device)
    pad = getattr(run.tokenizer, "pad_token_id", None)
    settings = {
        "max_new_tokens": most,
        "eos_token_id": sorted(ends) or None,
        "pad_token_id": pad if pad is not None else next(iter(sorted(ends)), 0),
    }
    with plain_generation(run.model, **settings):
        run.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList([_Chosen(choose)]),
        )


class _Chosen(LogitsProcessor):
    """Leaves of each row's logits the token alone that is chosen from them."""

    def __init__(self, choose: Callable[[Tensor], Sequence[int]]) -> None:
        self._choose = choose

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        tokens = torch.tensor(self._choose(scores), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _why_single(run: Run) -> str | None:
    """Why prompts go one at a time even where they are of one length; ``None`` if they need not."""
    if run.model not in _tried:
        found = _tried[run.model] = _try(run)
        if found is not None:
            log.info("one prompt at a time: %s", found)
    return _tried[run.model]


def _try(run: Run) -> str | None:
    name = type(run.model).__name__
    first, second = (ids.tolist() for ids in probe_sequences(run.model, run.device))
    prompts = [first[: len(second)], second]
    try:
        with unrounded_products(), run.using([None]):
            alone = torch.cat([_probe(run, [prompt], first) for prompt in prompts])
            found = _probe(run, prompts, first)
    except Exception as error:  # whatever a model's own code raises on a batch
        return f"{name} does not take a batch ({type(error).__name__}: {error})"
    if not close(found, alone):
        return f"{name} computes something else in a batch"
    return None


def _probe(run: Run, prompts: Sequence[Sequence[int]], answer: Sequence[int]) -> Tensor:
    """Logits of three steps over which prompts are continued by the same tokens, [R, 3, V]."""
    steps: list[Tensor] = []

    def choose(logits: Tensor) -> list[int]:
        steps.append(logits.to(next(run.model.parameters()).dtype))
        return [answer[len(steps)]] * len(prompts)

    _generate(run, prompts, 3, choose)
    return torch.stack(steps, 1)
