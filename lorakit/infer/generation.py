"""Text from a base and its adapters: prompts in, answers out, each by its own adapter.

Rows share their forwards. A row that is done leaves at once and the next prompt takes its place
(``slots``), so that a batch is never kept alive by its longest answer. A model whose cache cannot
be taken apart like that (an encoder-decoder, a state space) goes through transformers' own
``generate`` in batches of equal length; which way was taken is logged with its reason.

Legend: ``R`` rows, ``T`` tokens of the longest prompt, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.bases import context_length
from lorakit.core.products import exact_products
from lorakit.errors import InputError, collected
from lorakit.infer.mode import accepted, evaluating
from lorakit.infer.probing import close, probe_sequences
from lorakit.infer.sampling import Sampling, source
from lorakit.infer.text import GrowingText
from lorakit.layers import Handle
from lorakit.layers.routing import Mix, MixLike, as_mix

log = logging.getLogger(__name__)

Finish = Literal["stop", "length", "context"]
Prompt = str | Sequence[int]

#: rows that are continued together where the caller does not say. On a CPU, with an adapter, 32
#: gave 2.2 times the tokens of 8 in the same time, and 64 no more than 32
_ROWS = {"cpu": 32}
_ROWS_ACCELERATOR = 256

#: bytes of keys and values on a CPU; on an accelerator half of what is free
_CACHE_BYTES = 1 << 30

#: tokens, padding included, of one forward over prompts; bounds its activations
_PREFILL_TOKENS = {"cpu": 4096}
_PREFILL_TOKENS_ACCELERATOR = 32768

#: layers whose keys and values are one per token and need no other state
_SIMPLE_LAYERS = {"full_attention", "sliding_attention"}

#: model → why its cache cannot be made of slots, or ``None``; tried once for each
_tried: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


class HasModel(Protocol):
    """What is read of a ``lorakit.bases.Base``."""

    model: nn.Module
    tokenizer: Any


@dataclass(frozen=True)
class Answer:
    """What was generated for one prompt."""

    text: str
    """Without special tokens, and without the stop text."""
    num_tokens: int
    """Generated tokens, the one that ended it left out."""
    finish: Finish
    """``stop``: by an end token or a stop text; ``length``: ``max_new_tokens`` were generated;
    ``context``: prompt and answer fill the model's context."""


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
        seed: a prompt's draws depend on it and on the prompt's place in the list, not on what
            runs beside it.
        batch_size: rows at a time; ``None`` chooses for the device and the memory.
        stop: texts at which an answer ends.
        stop_ids: tokens at which an answer ends; ``None`` means the end tokens of the tokenizer
            and of the model's generation config. Nothing else of that config acts.
        on_text: called with a prompt's place and each new piece of its answer.
        on_done: called with a prompt's place and its finished answer.

    Returns:
        One answer per prompt, in their order.

    Raises:
        InputError: a prompt is empty or leaves no room in the context, or a setting is
            impossible.
        RoutingError: an adapter that is not attached.
    """
    rows = _rows(base, handle, prompts, adapter, mixes, max_new_tokens, seed, stop, on_text)
    running = _Run(
        base,
        handle,
        rows,
        Sampling(temperature, top_p, seed),
        frozenset(end_ids(base) if stop_ids is None else stop_ids),
        batch_size,
    )
    found: dict[int, Answer] = {}
    for row, piece, answer in running.events():
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
    rows = _rows(base, handle, [prompt], adapter, None, max_new_tokens, seed, stop, print)
    running = _Run(
        base,
        handle,
        rows,
        Sampling(temperature, top_p, seed),
        frozenset(end_ids(base) if stop_ids is None else stop_ids),
        1,
    )
    for _, piece, _ in running.events():
        if piece:
            yield piece


# --- what is asked ---------------------------------------------------------------------------


@dataclass(eq=False)
class _Row:
    """One prompt and what became of it so far."""

    index: int
    prompt: list[int]
    mix: MixLike
    limit: int
    """Tokens it may become."""
    limited_by: Finish
    draw: np.random.Generator
    text: GrowingText | None
    """``None`` where the text is only needed at the end."""
    ids: list[int] = field(default_factory=list)


_Event = tuple[_Row, str, Answer | None]


def _rows(
    base: HasModel,
    handle: Handle | None,
    prompts: Sequence[Prompt],
    adapter: MixLike,
    mixes: Sequence[MixLike] | None,
    max_new_tokens: int,
    seed: int,
    stop: Sequence[str],
    on_text: Callable[..., None] | None,
) -> list[_Row]:
    """Check everything that was asked; collects the problems of all prompts."""
    if isinstance(prompts, str):
        raise InputError("prompts is one text; give a list of them")
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if mixes is not None and (adapter is not None or len(mixes) != len(prompts)):
        problems.append(
            f"mixes has {len(mixes)} entries for {len(prompts)} prompts"
            if adapter is None
            else "adapter and mixes are both given; give one of them"
        )
    if any(not text for text in stop):
        problems.append("a stop text is empty")
    each = list(mixes) if mixes is not None else [adapter] * len(prompts)
    if handle is None and any(as_mix(mix) for mix in each):
        problems.append("an adapter is named, but none is attached")
    room = context_length(base.model)
    encoder_decoder = _is_encoder_decoder(base.model)
    fronts: dict[Mix, int] = {}
    if handle is not None and not problems:
        # raises for a name that is not attached
        fronts = {as_mix(mix): handle.virtual_tokens(mix) for mix in each}
    rows = []
    for i, prompt in enumerate(prompts):
        ids = _encoded(base, prompt)
        front = fronts.get(as_mix(each[i]), 0) if i < len(each) else 0
        left = None if room is None or encoder_decoder else room - front - len(ids)
        if not ids:
            problems.append(f"prompt {i + 1} is empty")
        elif left is not None and left < 1:
            problems.append(
                f"prompt {i + 1} has {len(ids)} tokens; the context of this model is {room}"
                + (f", of which its adapter's prefix takes {front}" if front else "")
                + ", so there is no room for an answer. Shorten it"
            )
        capped = left is not None and left < max_new_tokens
        rows.append(
            _Row(
                i,
                ids,
                each[i] if i < len(each) else None,
                left if capped and left is not None else max_new_tokens,
                "context" if capped else "length",
                source(seed, i),
                GrowingText(base.tokenizer, stop) if stop or on_text is not None else None,
            )
        )
    if problems:
        raise InputError(collected("Text cannot be generated", problems))
    return rows


def _encoded(base: HasModel, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return [int(i) for i in base.tokenizer(prompt)["input_ids"]]
    return [int(i) for i in prompt]


def end_ids(base: HasModel) -> list[int]:
    """The end tokens that tokenizer and generation config name."""
    config = getattr(base.model, "generation_config", None)
    named = [
        getattr(base.tokenizer, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
    ]
    flat = [i for one in named for i in (one if isinstance(one, (list, tuple)) else [one])]
    return [int(i) for i in flat if i is not None]


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


# --- running ---------------------------------------------------------------------------------


class _Run:
    """The rows of one call, in the better of the two ways."""

    def __init__(
        self,
        base: HasModel,
        handle: Handle | None,
        rows: Sequence[_Row],
        sampling: Sampling,
        stop_ids: frozenset[int],
        batch_size: int | None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1")
        self.model: Any = base.model
        self.tokenizer = base.tokenizer
        self.handle = handle
        self.sampling = sampling
        self.stop_ids = stop_ids
        self.batch_size = batch_size
        self.device = next(base.model.parameters()).device
        # rows of one adapter together, which is the fastest routing; the longest first, so that
        # a prompt that comes later fits before the columns in use
        self.waiting = sorted(rows, key=lambda r: (str(as_mix(r.mix)), -len(r.prompt)))

    def events(self) -> Iterator[_Event]:
        """New pieces of text and finished answers, as they come."""
        if not self.waiting:
            return
        with evaluating(self.model):
            reason = self._why_not_slots()
            if reason is None:
                yield from self._with_slots()
            else:
                log.info("generating in whole batches: %s", reason)
                yield from self._in_whole_batches()

    # --- slots -----------------------------------------------------------------------------

    def _with_slots(self) -> Iterator[_Event]:
        from lorakit.infer.slots import SlotCache

        cache = SlotCache()
        rows: list[_Row] = []
        most = self._most_rows()
        while self.waiting or rows:
            free = most - len(rows)
            # a forward over one short prompt costs little more than its share of a larger one,
            # so places are filled as soon as a few are free
            if self.waiting and (free >= max(1, most // 8) or not rows):
                new, logits = self._prefill(cache, free)
                rows += new
                chosen = self.sampling.choose(logits, [row.draw for row in new])
                first = len(rows) - len(new)
            else:
                chosen, first = self._decode(cache, rows), 0
            done = []
            for place, token in enumerate(chosen, start=first):
                piece, answer = self._take(rows[place], token)
                if answer is not None:
                    done.append(place)
                if piece or answer is not None:
                    yield rows[place], piece, answer
            for source_, target in cache.remove(done):
                rows[target] = rows[source_]
            del rows[len(rows) - len(done) :]

    def _prefill(self, cache: Any, free: int) -> tuple[list[_Row], Tensor]:
        """Run the next prompts and put them into slots; gives them and their logits [R, V]."""
        from transformers import DynamicCache

        tokens = _PREFILL_TOKENS.get(self.device.type, _PREFILL_TOKENS_ACCELERATOR)
        taken: list[_Row] = []
        while self.waiting and len(taken) < free:
            width = max(len(row.prompt) for row in [*taken, self.waiting[0]])
            if taken and width * (len(taken) + 1) > tokens:
                break
            taken.append(self.waiting.pop(0))
        own = DynamicCache()
        inputs = _left_padded([row.prompt for row in taken])
        logits = self._forward(taken, own, **inputs)
        cache.admit(own, [len(row.prompt) for row in taken])
        return taken, logits

    def _decode(self, cache: Any, rows: list[_Row]) -> list[int]:
        """One token more for every row."""
        inputs = {
            "input_ids": torch.tensor([[row.ids[-1]] for row in rows]),
            "position_ids": torch.tensor([[len(r.prompt) + len(r.ids) - 1] for r in rows]),
            "attention_mask": cache.mask(),
        }
        logits = self._forward(rows, cache, **inputs)
        cache.advance()
        return self.sampling.choose(logits, [row.draw for row in rows])

    def _forward(self, rows: Sequence[_Row], cache: Any, **inputs: Tensor | None) -> Tensor:
        """Logits of the last position, [R, V]."""
        options = accepted(
            self.model,
            position_ids=inputs.pop("position_ids"),
            logits_to_keep=1,
            past_key_values=cache,
            use_cache=True,
        )
        tensors = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in {**inputs, **options}.items()
        }
        with torch.no_grad(), self._using([row.mix for row in rows]):
            logits: Tensor = self.model(**tensors).logits[:, -1]
        return logits

    def _using(self, mixes: Sequence[MixLike]) -> AbstractContextManager[Any]:
        if self.handle is None:
            return contextlib.nullcontext()
        if len({as_mix(mix) for mix in mixes}) == 1:
            return self.handle.use(mixes[0])
        return self.handle.use(rows=mixes)

    def _take(self, row: _Row, token: int) -> tuple[str, Answer | None]:
        """Add a token to a row; gives its new text, and its answer if that ended it."""
        if token in self.stop_ids:
            return self._end(row, "stop")
        row.ids.append(token)
        piece = row.text.push(token) if row.text is not None else ""
        if row.text is not None and row.text.stopped:
            rest, answer = self._end(row, "stop")
            return piece + rest, answer
        if len(row.ids) >= row.limit:
            rest, answer = self._end(row, row.limited_by)
            return piece + rest, answer
        return piece, None

    def _end(self, row: _Row, finish: Finish) -> tuple[str, Answer]:
        if row.text is None:
            text = self.tokenizer.decode(
                row.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return "", Answer(text, len(row.ids), finish)
        rest = row.text.finish()
        finish = "stop" if row.text.stopped else finish
        return rest, Answer(row.text.text, len(row.ids), finish)

    def _most_rows(self) -> int:
        """Rows whose keys and values fit, at most what was asked."""
        wanted = self.batch_size or _ROWS.get(self.device.type, _ROWS_ACCELERATOR)
        per_token = _cache_bytes_per_token(self.model)
        if per_token is None:
            return wanted
        longest = max(len(row.prompt) + row.limit for row in self.waiting)
        fitting = max(1, _cache_bytes(self.device) // (per_token * longest))
        if self.batch_size is not None and fitting < wanted:
            log.info("%d rows at a time instead of %d: their keys and values fit", fitting, wanted)
        return min(wanted, fitting)

    def _why_not_slots(self) -> str | None:
        """Why the cache cannot be made of slots; ``None`` if it can."""
        if self.model not in _tried:
            _tried[self.model] = self._try_slots()
        return _tried[self.model]

    def _try_slots(self) -> str | None:
        name = type(self.model).__name__
        if _is_encoder_decoder(self.model):
            return f"{name} is an encoder-decoder"
        text = _text_config(self.model)
        kinds = set(getattr(text, "layer_types", None) or ()) - _SIMPLE_LAYERS
        if kinds or getattr(self.model, "_is_stateful", False):
            return f"{name} keeps a state that is not one entry a token {sorted(kinds) or ''}"
        try:
            with exact_products([self.device.type]):
                with self._using([None]):
                    expected = torch.cat(
                        [
                            self.model(ids[None]).logits[0, -3:]
                            for ids in probe_sequences(self.model, self.device)
                        ]
                    )
                found = self._probe_slots()
        except Exception as error:  # whatever a model's own code raises on a foreign cache
            return f"{name} does not take a cache of slots ({type(error).__name__}: {error})"
        if not close(found, expected):
            return f"{name} computes something else with a cache of slots"
        return None

    def _probe_slots(self) -> Tensor:
        """Logits of the last three tokens of the two probe sequences, run as rows; [6, V]."""
        from transformers import DynamicCache

        from lorakit.infer.slots import SlotCache

        sequences = [ids.tolist() for ids in probe_sequences(self.model, self.device)]
        rows = [_probe_row(ids[:-2]) for ids in sequences]
        cache, own = SlotCache(), DynamicCache()
        steps = [self._forward(rows, own, **_left_padded([row.prompt for row in rows]))]
        cache.admit(own, [len(row.prompt) for row in rows])
        for place in (-2, -1):
            for row, ids in zip(rows, sequences, strict=True):
                row.ids.append(ids[place])
            positions = [[len(row.prompt) + len(row.ids) - 1] for row in rows]
            steps.append(
                self._forward(
                    rows,
                    cache,
                    input_ids=torch.tensor([[row.ids[-1]] for row in rows]),
                    position_ids=torch.tensor(positions),
                    attention_mask=cache.mask(),
                )
            )
            cache.advance()
        return torch.stack(steps, dim=1).flatten(0, 1)

    # --- whole batches ---------------------------------------------------------------------

    def _in_whole_batches(self) -> Iterator[_Event]:
        """transformers' own generate, over prompts of similar length."""
        size = self.batch_size or _ROWS.get(self.device.type, _ROWS_ACCELERATOR)
        while self.waiting:
            rows, self.waiting = self.waiting[:size], self.waiting[size:]
            for row, ids in zip(rows, self._generated(rows), strict=True):
                pieces = []
                for token in ids:
                    piece, answer = self._take(row, token)
                    pieces.append(piece)
                    if answer is not None:
                        break
                else:
                    piece, answer = self._end(row, "length")
                    pieces.append(piece)
                yield row, "".join(pieces), answer

    def _generated(self, rows: Sequence[_Row]) -> list[list[int]]:
        """New ids of each row, which may go on behind its end."""
        config = copy.deepcopy(self.model.generation_config)
        drawn = self.sampling.temperature > 0
        pad = getattr(self.tokenizer, "pad_token_id", None)
        config.update(
            max_new_tokens=max(row.limit for row in rows),
            max_length=None,
            min_length=0,
            num_beams=1,
            do_sample=drawn,
            temperature=self.sampling.temperature if drawn else 1.0,
            top_p=self.sampling.top_p,
            top_k=0 if drawn else None,
            eos_token_id=sorted(self.stop_ids) or None,
            pad_token_id=pad if pad is not None else next(iter(sorted(self.stop_ids)), 0),
        )
        inputs = _left_padded([row.prompt for row in rows])
        del inputs["position_ids"]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._using([row.mix for row in rows]):
            torch.manual_seed(self.sampling.seed)
            out = self.model.generate(
                **{name: value.to(self.device) for name, value in inputs.items()},
                generation_config=config,
            )
        # a decoder's output begins with its prompt, an encoder-decoder's with its start token
        start = 1 if _is_encoder_decoder(self.model) else inputs["input_ids"].shape[1]
        return [[int(i) for i in ids] for ids in out[:, start:].tolist()]


def _left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Prompts as a batch, [R, T], that ends at one column."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _probe_row(prompt: Sequence[int]) -> _Row:
    return _Row(0, list(prompt), None, 2, "length", source(0, 0), None)


def _cache_bytes_per_token(model: Any) -> int | None:
    """Bytes of one token's keys and values; ``None`` where the config does not tell."""
    text = _text_config(model)
    layers = getattr(text, "num_hidden_layers", None)
    heads = getattr(text, "num_attention_heads", None)
    hidden = getattr(text, "hidden_size", None)
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return None
    size = getattr(text, "head_dim", None) or hidden // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * layers * key_heads * size * next(model.parameters()).element_size())


def _text_config(model: Any) -> Any:
    """The part of the config that is about text; the whole, where there are no parts."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 2)
    return _CACHE_BYTES
