"""Text from a base and its adapters: prompts in, answers out, each by its own adapter.

Rows share their forwards. A row that is done leaves at once and the next prompt takes its place
(``slotted``), so that a batch is never kept alive by its longest answer. A model whose cache cannot
be taken apart like that (an encoder-decoder, a state space) goes through transformers' own
``generate``, in batches of prompts of one length (``batched``); which way was taken is logged with
its reason.

Legend: ``R`` rows, ``T`` tokens of the longest prompt, ``V`` vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from lorakit.infer.generation.rows import Answer, Event, HasModel, Prompt, end_ids, rows_of
from lorakit.infer.generation.run import Run
from lorakit.infer.generation.sampling import Sampling
from lorakit.infer.mode import evaluating
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike

__all__ = ["Answer", "answers", "end_ids", "generate", "stream"]

log = logging.getLogger(__name__)


def generate(
    base: HasModel,
    handle: Handle | None,
    prompts: Sequence[Prompt],
    *,
    adapter: MixLike = None,
    mixes: Sequence[MixLike] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_done: Callable[[int, Answer], None] | None = None,
) -> list[str]:
    """Continue prompts; see :func:`answers`, which tells more about each answer."""
    found = answers(
        base,
        handle,
        prompts,
        adapter=adapter,
        mixes=mixes,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        numbers=numbers,
        batch_size=batch_size,
        stop=stop,
        stop_ids=stop_ids,
        on_text=on_text,
        on_done=on_done,
    )
    return [answer.text for answer in found]


def answers(
    base: HasModel,
    handle: Handle | None,
    prompts: Sequence[Prompt],
    *,
    adapter: MixLike = None,
    mixes: Sequence[MixLike] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_done: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Continue prompts, many at a time.

    Args:
        base: a loaded base; its ``model`` and ``tokenizer`` are used.
        handle: the adapters attached to the model, or ``None``.
        prompts: token ids, or texts, which are encoded as the tokenizer encodes any text. Where
            a chat template belongs, apply it first (``lorakit.data.make_rendering``).
        adapter: what every prompt uses: a name, ``None`` for the bare base, or weights.
        mixes: one such entry per prompt instead.
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_p: draw from the most likely tokens that together have this probability.
        seed: a prompt's draws depend on it and on the prompt's number, not on what runs beside it.
        numbers: of the prompts, one each; by default their places in the list.
        batch_size: rows at a time; ``None`` chooses for the device and the memory.
        stop: texts at which an answer ends.
        stop_ids: tokens at which an answer ends; ``None`` means the end tokens of the tokenizer
            and of the model's generation config. Nothing else of that config acts, but for an
            encoder-decoder's forced first token and its forbidden ones.
        on_text: called with a prompt's place and each new piece of its answer.
        on_done: called with a prompt's place and its finished answer.

    Returns:
        One answer per prompt, in their order. Where a row's logits are not finite numbers its
        answer ends (``finish``), which is logged as a warning, and the others go on.

    Raises:
        InputError: a prompt is empty or leaves no room in the context, or a setting is
            impossible.
        RoutingError: an adapter that is not attached.
    """
    rows = rows_of(
        base, handle, prompts, adapter, mixes, max_new_tokens, seed, stop, on_text, numbers
    )
    running = Run(
        base,
        handle,
        rows,
        Sampling(temperature, top_p, seed),
        frozenset(end_ids(base) if stop_ids is None else stop_ids),
        batch_size,
    )
    found: dict[int, Answer] = {}
    for row, piece, answer in _events(running):
        if on_text is not None and piece:
            on_text(row.index, piece)
        if answer is not None:
            found[row.index] = answer
            if on_done is not None:
                on_done(row.index, answer)
    return [found[i] for i in range(len(rows))]


def stream(
    base: HasModel,
    handle: Handle | None,
    prompt: Prompt,
    *,
    adapter: MixLike = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
) -> Iterator[str]:
    """Continue one prompt; yields the answer piece by piece as it grows.

    No thread is started: Ctrl-C, or leaving the loop, ends it between two tokens, and between
    two pieces the model is free for other forwards. Arguments as :func:`answers`.
    """
    rows = rows_of(base, handle, [prompt], adapter, None, max_new_tokens, seed, stop, print)
    running = Run(
        base,
        handle,
        rows,
        Sampling(temperature, top_p, seed),
        frozenset(end_ids(base) if stop_ids is None else stop_ids),
        1,
    )
    for _, piece, _ in _events(running):
        if piece:
            yield piece


def _events(run: Run) -> Iterator[Event]:
    """New pieces of text and finished answers, in the better of the two ways."""
    from lorakit.infer.generation import batched, slotted

    if not run.waiting:
        return
    with evaluating(run.model):
        reason = slotted.why_not(run)
        if reason is None:
            yield from slotted.events(run)
        else:
            log.info("generating in whole batches: %s", reason)
            yield from batched.events(run)
