"""Rows that share their forwards and leave them one by one.

A row that is done gives its slot to the next prompt, so that no batch is kept alive by its longest
answer. Whether a model's cache can be taken apart like that is tried once for each model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.products import unrounded_products
from lorakit.infer.generation.rows import Event, Row, is_encoder_decoder
from lorakit.infer.generation.run import Run, left_padded
from lorakit.infer.generation.sampling import source
from lorakit.infer.mode import accepted
from lorakit.infer.probing import close, probe_sequences

log = logging.getLogger(__name__)

#: bytes of keys and values on a CPU; on an accelerator half of what is free
_CACHE_BYTES = 1 << 30

#: tokens, padding included, of one forward over prompts; bounds its activations
_PREFILL_TOKENS = {"cpu": 4096}
_PREFILL_TOKENS_ACCELERATOR = 32768

#: layers whose keys and values are one per token and need no other state
_SIMPLE_LAYERS = {"full_attention", "sliding_attention"}

#: model → why its cache cannot be made of slots, or ``None``; tried once for each
_tried: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def events(run: Run) -> Iterator[Event]:
    """New pieces of text and finished answers, as they come."""
    from lorakit.infer.generation.slots import SlotCache

    cache = SlotCache()
    rows: list[Row] = []
    most = _most_rows(run)
    while run.waiting or rows:
        free = most - len(rows)
        # a forward over one short prompt costs little more than its share of a larger one,
        # so places are filled as soon as a few are free
        if run.waiting and (free >= max(1, most // 8) or not rows):
            new, logits = _prefill(run, cache, free)
            rows += new
            chosen = run.sampling.choose(logits, [row.draw for row in new])
            first = len(rows) - len(new)
        else:
            chosen, first = _decode(run, cache, rows), 0
        done = []
        for place, token in enumerate(chosen, start=first):
            piece, answer = run.take(rows[place], token)
            if answer is not None:
                done.append(place)
            if piece or answer is not None:
                yield rows[place], piece, answer
        for source_, target in cache.remove(done):
            rows[target] = rows[source_]
        del rows[len(rows) - len(done) :]


def _prefill(run: Run, cache: Any, free: int) -> tuple[list[Row], Tensor]:
    """Run the next prompts and put them into slots; gives them and their logits [R, V]."""
    from transformers import DynamicCache

    tokens = _PREFILL_TOKENS.get(run.device.type, _PREFILL_TOKENS_ACCELERATOR)
    taken: list[Row] = []
    while run.waiting and len(taken) < free:
        width = max(len(row.prompt) for row in [*taken, run.waiting[0]])
        if taken and width * (len(taken) + 1) > tokens:
            break
        taken.append(run.waiting.pop(0))
    own = DynamicCache()
    inputs = left_padded([row.prompt for row in taken])
    logits = _forward(run, taken, own, **inputs)
    cache.admit(own, [len(row.prompt) for row in taken])
    return taken, logits


def _decode(run: Run, cache: Any, rows: list[Row]) -> list[int | None]:
    """One token more for every row."""
    inputs = {
        "input_ids": torch.tensor([[row.ids[-1]] for row in rows]),
        "position_ids": torch.tensor([[len(r.prompt) + len(r.ids) - 1] for r in rows]),
        "attention_mask": cache.mask(),
    }
    logits = _forward(run, rows, cache, **inputs)
    cache.advance()
    return run.sampling.choose(logits, [row.draw for row in rows])


def _forward(run: Run, rows: Sequence[Row], cache: Any, **inputs: Tensor | None) -> Tensor:
    """Logits of the last position, [R, V]."""
    options = accepted(
        run.model,
        position_ids=inputs.pop("position_ids"),
        logits_to_keep=1,
        past_key_values=cache,
        use_cache=True,
    )
    tensors = {
        name: value.to(run.device) if isinstance(value, Tensor) else value
        for name, value in {**inputs, **options}.items()
    }
    with torch.no_grad(), run.using([row.mix for row in rows]):
        logits: Tensor = run.model(**tensors).logits[:, -1]
    return logits


def _most_rows(run: Run) -> int:
    """Rows whose keys and values fit, at most what was asked."""
    wanted = run.wanted
    per_token = _cache_bytes_per_token(run.model)
    if per_token is None:
        return wanted
    longest = max(len(row.prompt) + row.limit for row in run.waiting)
    fitting = max(1, _cache_bytes(run.device) // (per_token * longest))
    if run.batch_size is not None and fitting < wanted:
        log.info("%d rows at a time instead of %d: their keys and values fit", fitting, wanted)
    return min(wanted, fitting)


def why_not(run: Run) -> str | None:
    """Why the cache cannot be made of slots; ``None`` if it can."""
    if run.model not in _tried:
        _tried[run.model] = _try(run)
    return _tried[run.model]


def _try(run: Run) -> str | None:
    name = type(run.model).__name__
    if is_encoder_decoder(run.model):
        return f"{name} is an encoder-decoder"
    text = _text_config(run.model)
    kinds = set(getattr(text, "layer_types", None) or ()) - _SIMPLE_LAYERS
    if kinds or getattr(run.model, "_is_stateful", False):
        return f"{name} keeps a state that is not one entry a token {sorted(kinds) or ''}"
    try:
        with unrounded_products():
            with torch.no_grad(), run.using([None]):
                expected = torch.cat(
                    [
                        run.model(ids[None]).logits[0, -3:]
                        for ids in probe_sequences(run.model, run.device)
                    ]
                )
            found = _probe(run)
    except Exception as error:  # whatever a model's own code raises on a foreign cache
        return f"{name} does not take a cache of slots ({type(error).__name__}: {error})"
    if not close(found, expected):
        return f"{name} computes something else with a cache of slots"
    return None


def _probe(run: Run) -> Tensor:
    """Logits of the last three tokens of the two probe sequences, run as rows; [6, V]."""
    from transformers import DynamicCache

    from lorakit.infer.generation.slots import SlotCache

    sequences = [ids.tolist() for ids in probe_sequences(run.model, run.device)]
    rows = [_probe_row(ids[:-2]) for ids in sequences]
    cache, own = SlotCache(), DynamicCache()
    steps = [_forward(run, rows, own, **left_padded([row.prompt for row in rows]))]
    cache.admit(own, [len(row.prompt) for row in rows])
    for place in (-2, -1):
        for row, ids in zip(rows, sequences, strict=True):
            row.ids.append(ids[place])
        positions = [[len(row.prompt) + len(row.ids) - 1] for row in rows]
        steps.append(
            _forward(
                run,
                rows,
                cache,
                input_ids=torch.tensor([[row.ids[-1]] for row in rows]),
                position_ids=torch.tensor(positions),
                attention_mask=cache.mask(),
            )
        )
        cache.advance()
    return torch.stack(steps, dim=1).flatten(0, 1)


def _probe_row(prompt: Sequence[int]) -> Row:
    return Row(0, list(prompt), None, 2, "length", source(0, 0), None)


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
