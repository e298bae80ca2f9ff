"""Whole batches through transformers' own ``generate``, for models whose cache has no slots."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from lorakit.infer.generation.rows import Event, Row, is_encoder_decoder
from lorakit.infer.generation.run import Run, left_padded


def events(run: Run) -> Iterator[Event]:
    """New pieces of text and finished answers, over prompts of similar length."""
    size = run.wanted
    while run.waiting:
        rows, run.waiting = run.waiting[:size], run.waiting[size:]
        for row, ids in zip(rows, _generated(run, rows), strict=True):
            pieces = []
            for token in ids:
                piece, answer = run.take(row, token)
                pieces.append(piece)
                if answer is not None:
                    break
            else:
                piece, answer = run.end(row, "length")
                pieces.append(piece)
            yield row, "".join(pieces), answer


def _generated(run: Run, rows: Sequence[Row]) -> list[list[int]]:
    """New ids of each row, which may go on behind its end."""
    config = copy.deepcopy(run.model.generation_config)
    drawn = run.sampling.temperature > 0
    pad = getattr(run.tokenizer, "pad_token_id", None)
    config.update(
        max_new_tokens=max(row.limit for row in rows),
        max_length=None,
        min_length=0,
        num_beams=1,
        do_sample=drawn,
        temperature=run.sampling.temperature if drawn else 1.0,
        top_p=run.sampling.top_p,
        top_k=0 if drawn else None,
        eos_token_id=sorted(run.stop_ids) or None,
        pad_token_id=pad if pad is not None else next(iter(sorted(run.stop_ids)), 0),
    )
    inputs = left_padded([row.prompt for row in rows])
    del inputs["position_ids"]
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), run.using([row.mix for row in rows]):
        torch.manual_seed(run.sampling.seed)
        out = run.model.generate(
            **{name: value.to(run.device) for name, value in inputs.items()},
            generation_config=config,
        )
    # a decoder's output begins with its prompt, an encoder-decoder's with its start token
    start = 1 if is_encoder_decoder(run.model) else inputs["input_ids"].shape[1]
    return [[int(i) for i in ids] for ids in out[:, start:].tolist()]
