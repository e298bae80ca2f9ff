"""A merged model beside base + adapters on the same text.

Legend: ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.bases import load_base
from lorakit.core.checkpoint import open_checkpoint
from lorakit.errors import TrainingError
from lorakit.layers import attach
from lorakit.layers.merge_plan import Weighted

#: bytes of logits that are kept from the first model until the second has run
MAX_LOGIT_BYTES = 400_000_000
#: tokens of one text; logits far into a text say no more
MAX_TOKENS = 512
#: of what is read where no data is given
TEXT = """\
The ferry left the harbour a little after six, when the fog was still lying on the water and the
lamps along the quay had not yet been put out. There were nine passengers. Two of them were
engineers on their way to the lighthouse, whose lens had stopped turning in the night; they talked
about gears, about salt, and about a supplier in Bergen who never answered his letters. A girl of
perhaps ten sat beside the window and counted buoys aloud: one, two, three, four. When she came to
seventeen, her grandmother asked her to count in French, and she began again from one.

"How much does a lighthouse weigh?" she asked after a while. Nobody knew. One of the engineers took
a pencil and worked it out on the back of a ticket: the tower is 31 metres high, its wall is about a
metre thick, and granite weighs 2,700 kilograms per cubic metre. He wrote down 1,900 tonnes, looked
at the number, and crossed it out, because he had forgotten the stairs. In the end they agreed that
it weighed more than the ferry, which pleased the girl, and less than the island, which did not.
"""


@dataclass(frozen=True)
class TextCheck:
    """What both said to the same tokens."""

    largest_logit_difference: float
    perplexity_adapter: float
    """Of base + adapters, attached."""
    perplexity_merged: float
    tokens: int
    """Tokens that were predicted."""
    same_choice: float
    """Share of them at which both find the same next token likeliest."""
    dtype: str
    """What both computed in."""


def available_bytes() -> int | None:
    """Memory that can be had without pushing anything out; ``None`` where that is not known."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def fitting_dtype(folder: Path, available: int | None = None) -> tuple[torch.dtype | None, str]:
    """The dtype to compare in, and why; ``None`` if the model does not fit in any.

    float64 where it fits, for then only the merge's own rounding is seen: a forward in float32
    rounds more than a merge in float32 does. Else float32, and else as it is stored.
    """
    entries = open_checkpoint(folder).entries.values()
    available = available_bytes() if available is None else available
    count = sum(math.prod(e.shape) for e in entries)
    stored = sum(e.end - e.begin for e in entries)
    # one model at a time, with its temporaries and the other's logits
    room = math.inf if available is None else available - MAX_LOGIT_BYTES - 300_000_000
    if count * 8 * 1.3 < room:
        return torch.float64, ""
    if any(e.dtype == torch.float64 for e in entries):
        return None, _too_large(stored, available)
    if count * 4 * 1.3 < room:
        return torch.float32, "compared in float32, whose own rounding is part of the difference"
    dtype = max((e.dtype for e in entries), key=[e.dtype for e in entries].count)
    if stored * 1.3 < room and dtype.is_floating_point:
        return dtype, f"compared in {dtype}, for float32 does not fit into the memory"
    return None, _too_large(stored, available)


def _too_large(stored: int, available: int | None) -> str:
    return (
        f"the model ({stored / 1e9:.1f} GB) does not fit into the free memory "
        f"({(available or 0) / 1e9:.1f} GB), so it was not compared on text; its rows were"
    )


def compare_merged(
    base: Any,
    adapters: Sequence[Weighted],
    folder: Path,
    texts: Sequence[Sequence[int]],
    dtype: torch.dtype,
    *,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> TextCheck:
    """Run base + adapters, then the merged model, on the same tokens; one at a time in memory.

    Args:
        base: as :func:`lorakit.load_base` takes it, with ``options``.
        folder: the merged model.
        texts: token ids, one list a text; as many as fit :data:`MAX_LOGIT_BYTES` are used.

    Raises:
        TrainingError: the merged model gives logits that are not finite, and the other does not.
        BaseError: one of them cannot be loaded as a causal language model.
    """
    model = load_base(base, device="cpu", dtype=dtype, say=say, **options).model
    names = {f"adapter {i}": weight for i, (_, weight) in enumerate(adapters)}
    handle = None
    for name, (adapter, _) in zip(names, adapters, strict=True):
        if handle is None:
            handle = attach(model, adapter, name, allow_other_base=True)  # checked by the merge
        else:
            handle.add(adapter, name, allow_other_base=True)
    assert handle is not None
    handle.activate(names)
    chosen = _fitting(texts, model)
    before = [_logits(model, ids) for ids in chosen]
    del model, handle
    gc.collect()
    merged: Any = load_base(folder, device="cpu", dtype=dtype, say=say, **options).model
    largest, same, losses, count = 0.0, 0, [0.0, 0.0], 0
    for ids, first in zip(chosen, before, strict=True):
        second = _logits(merged, ids)
        if bool(torch.isfinite(first).all()) and not bool(torch.isfinite(second).all()):
            raise TrainingError(
                "the merged model gives logits that are NaN or Inf on text, and base + adapter "
                "does not; nothing was left. Pass --dtype float32 or bfloat16"
            )
        largest = max(largest, float((first - second).abs().max()))
        same += int((first.argmax(-1) == second.argmax(-1)).sum())
        following = torch.tensor(ids[1:])
        for k, logits in enumerate((first, second)):
            losses[k] += float(
                nn.functional.cross_entropy(logits[:-1].double(), following, reduction="sum")
            )
        count += len(ids) - 1
    total = sum(map(len, chosen))
    return TextCheck(
        largest,
        math.exp(min(700.0, losses[0] / count)),
        math.exp(min(700.0, losses[1] / count)),
        count,
        same / total,
        str(dtype).removeprefix("torch."),
    )


def _fitting(texts: Sequence[Sequence[int]], model: Any) -> list[list[int]]:
    width = int(getattr(model.config, "vocab_size", None) or 50_000)
    left = max(2, MAX_LOGIT_BYTES // (8 * width))
    longest = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    chosen = []
    for text in texts:
        ids = [int(i) for i in text][: min(left, MAX_TOKENS, longest)]
        if len(ids) > 1:
            chosen.append(ids)
            left -= len(ids)
        if left < 2:
            break
    return chosen


@torch.no_grad()
def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, V], float32 or wider."""
    found = model(torch.tensor([list(ids)])).logits[0]
    kept: Tensor = found.to(torch.promote_types(found.dtype, torch.float32))
    return kept
