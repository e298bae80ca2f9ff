"""``embed``: vectors of texts, near where texts belong together (in-batch contrast).

Each anchor is to be nearer to its own positive than to the other positives of its batch, and to
the given negatives (the multiple-negatives loss of Henderson et al., arXiv 1705.00652; InfoNCE,
arXiv 1807.03748): the negative log of ``softmax(scale · cos(anchor, candidate))`` at its own one.
So an example's loss depends on its batch, which is why a batch is one forward of one run. An
evaluation contrasts each anchor with all candidates of the validation part, so that it does not
depend on how that is cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.bases import Base
from lorakit.bases.config import read_config
from lorakit.bases.load import Task as BaseTask
from lorakit.core.adapter import Adapter
from lorakit.core.spec import LoRASpec
from lorakit.data.columns import checked_text
from lorakit.data.rows import Row
from lorakit.errors import BaseError, DataError, InputError
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.layers.targets import resolve_targets
from lorakit.tasks.forwards import RowTask, padded
from lorakit.tasks.kinds import RowKind, Texts, pad_id, random_ids
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import Fields, Made, RowData, RowSpec, load_rows
from lorakit.tasks.task import Measured, Stretch

Pooling = Literal["mean", "cls", "last"]

#: what sentence-transformers calls them, behind "pooling_mode_" or as "pooling_mode"
_POOLINGS: Mapping[str, Pooling] = {
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last",
    "mean": "mean",
    "mean_tokens": "mean",
}

_WHY = (
    "the loss of a pair contrasts it with the other pairs of its batch (in-batch negatives), which "
    "couples them"
)
#: rows of similarities that an evaluation has at a time
_CHUNK = 1024


@dataclass(frozen=True)
class Embed(RowKind):
    """Sentence embeddings.

    Args:
        pooling: what the vector is: the mean over the tokens, the first token's, or the last's.
        scale: factor on the cosines; 20 is a temperature of 0.05.
    """

    pooling: Pooling = "mean"
    scale: float = 20.0

    name: ClassVar[str] = "embed"
    peft_type: ClassVar[str | None] = "FEATURE_EXTRACTION"
    base_task: ClassVar[BaseTask] = "features"
    beside_config: ClassVar[str | None] = "1_Pooling/config.json"
    without_it: ClassVar[str] = "the vector is taken to be the mean over the tokens"
    fields: ClassVar[Fields] = Fields(
        {
            "anchor": ("anchor", "query", "question", "sentence1", "premise"),
            "positive": ("positive", "answer", "document", "passage", "sentence2"),
        },
        {"negative": ("negative",)},
    )
    no_prompts: ClassVar[str | None] = (
        "the task embed makes vectors, not text, so there is nothing to generate. lorakit eval "
        "tells how well the right text is found"
    )

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls", "last"):
            raise DataError(f"pooling is {self.pooling!r}; expected mean, cls or last")
        if not self.scale > 0:
            raise DataError(f"scale is {self.scale!r}; expected a number above 0")

    def fitted(self, spec: RowSpec, config: Mapping[str, Any]) -> Self:
        found = _pooling_of(str(config.get("_folder", "")))
        return self if found is None else replace(self, pooling=found)

    def from_base(self, config: Mapping[str, Any], name: str) -> Self:
        return self.fitted(RowSpec((name,)), config)

    def load_data(self, spec: RowSpec, base: Base) -> RowData:
        texts = Texts(spec, base, "anchor")

        def make(row: Row, values: Mapping[str, Any]) -> Made:
            parts = [checked_text(values[name], f"the {name}", name) for name in values]
            ids = [texts.ids(part, what=name) for name, part in zip(values, parts, strict=True)]
            inputs = {
                "ids": [np.array(one, np.int32) for one in ids],
                "same": _number(parts[1]),
                "asked": parts[0],
                "expected": parts[1],
            }
            size = sum(map(len, ids))
            return Made(inputs, size, 1, "\0".join(parts).encode(), parts[0].encode())

        data = load_rows(spec, self.fields, make, task=self.name, unit=self.unit)
        if len(data) < 2:
            raise DataError(
                f"{', '.join(spec.path)}: there is one pair, and nothing to contrast it with; give "
                "at least two"
            )
        others = {example.inputs["same"] for example in data}
        if len(others) < 2 and "negative" not in data.report.columns:
            raise DataError(
                f"{', '.join(spec.path)}: every pair has the same positive, and nothing to "
                "contrast it with; give pairs of different positives, or negatives"
            )
        return data

    def adapter_spec(self, spec: LoRASpec, base: Base) -> tuple[LoRASpec, list[str]]:
        """Without the pooler, which stands behind the hidden states that a vector is made of."""
        idle = [
            target.path
            for target in resolve_targets(base.model, spec)
            if target.path.split(".")[0] == "pooler"
        ]
        if not idle:
            return spec, []
        return replace(spec, exclude=(*spec.exclude, *idle)), [
            f"{', '.join(idle)} is not adapted: the vectors are made of what stands before it"
        ]

    def on(
        self, model: nn.Module, handle: Handle | None, recompute: Recompute = "none"
    ) -> EmbedTask:
        return EmbedTask(model, handle, self.pooling, self.scale, recompute)

    def metrics(
        self, loss: float, examples: Any, indices: Sequence[int], outputs: np.ndarray | None
    ) -> dict[str, float]:
        """How often an anchor's own positive is the nearest of all candidates, and the mean of
        1/rank."""
        assert outputs is not None
        anchors, candidates, same = _apart(outputs)
        first, reciprocal = [], []
        for rows in torch.split(torch.arange(len(anchors)), _CHUNK):
            near = anchors[rows] @ candidates.T
            own = near[torch.arange(len(rows)), rows]
            near[:, : len(same)].masked_fill_(same[rows, None] == same[None], -torch.inf)
            rank = 1 + (near >= own[:, None]).sum(1).double()
            first.append(rank == 1)
            reciprocal.append(1 / rank)
        return {
            "accuracy": float(torch.cat(first).double().mean()),
            "mrr": float(torch.cat(reciprocal).mean()),
        }

    def questions(
        self, base: Base, examples: RowData, indices: Sequence[int], count: int
    ) -> list[dict[str, Any]]:
        return []  # a vector is nothing to read

    def predict(
        self,
        base: Base,
        handle: Handle | None,
        adapter: MixLike,
        inputs: Sequence[Any],
        max_new_tokens: int,
    ) -> list[str]:
        raise InputError(str(self.no_prompts))


class EmbedTask:
    """A model as a :class:`~lorakit.tasks.task.Task` of sentence vectors.

    Legend: ``E`` pairs, ``C`` candidates (positives, then negatives), ``d`` width.
    """

    def __init__(
        self,
        model: nn.Module,
        handle: Handle | None,
        pooling: Pooling,
        scale: float,
        recompute: Recompute = "none",
    ) -> None:
        self._pooling, self._scale = pooling, scale
        pad = pad_id(model)

        def batch(texts: Sequence[Any]) -> dict[str, Tensor]:
            return {
                "input_ids": padded(texts, pad),
                "attention_mask": padded([np.ones(len(one), np.int64) for one in texts], 0),
            }

        def vectors(output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            return pooled(output[0], batch["attention_mask"], pooling), None

        probe = [np.array(random_ids(model, n)) for n in (7, 4)]
        self._rows = RowTask(model, handle, batch, vectors, recompute=recompute, probe=probe)
        self.model, self.handle, self.device = model, handle, self._rows.device
        self.notes, self.mode = self._rows.notes, self._rows.mode
        self.layers: str | None = None
        self.whole: str | None = _WHY

    def losses(self, stretches: Sequence[Stretch]) -> Tensor:
        (stretch,) = stretches
        anchors, candidates = self._vectors(stretch.examples, stretch.adapter, stretch)
        same = torch.tensor([example.inputs["same"] for example in stretch.examples])
        return contrast(anchors, candidates, same.to(anchors.device), self._scale).sum()[None]

    @torch.no_grad()
    def measured(self, examples: Sequence[Any], adapter: MixLike) -> Measured:
        anchors, candidates = self._vectors(examples, adapter, None)
        weights = torch.ones(len(examples), dtype=torch.int64)
        columns = torch.cat([anchors, candidates]).view(-1, *anchors.shape)  # [1 + C/E, E, d]
        same = torch.tensor([example.inputs["same"] for example in examples])
        # whose loss is known once all are: the positive's number rides along in 48 bits
        marks = same.double().to(columns.device)[:, None, None].expand(-1, len(columns), 1)
        outputs = torch.cat([columns.transpose(0, 1).double(), marks], 2)
        return Measured(torch.zeros(len(examples)).double(), weights, outputs)

    def contrasted(self, outputs: np.ndarray) -> np.ndarray:
        anchors, candidates, same = _apart(outputs)
        parts = [
            contrast(anchors[rows], candidates, same, self._scale, own=rows)
            for rows in torch.split(torch.arange(len(anchors)), _CHUNK)
        ]
        each: np.ndarray = torch.cat(parts).numpy()
        return each

    def lonely(self, example: Any) -> bool:
        return len(example.inputs["ids"]) == 2  # an anchor and its positive

    def smaller(self, examples: Sequence[Any], share: float) -> list[Any]:
        return list(examples[: max(1, round(len(examples) * share))])

    def why_apart(self, adapter: Adapter | None) -> str | None:
        return _WHY

    def kin(self, adapter: Adapter | None) -> str:
        return "embed"

    def _vectors(
        self, examples: Sequence[Any], adapter: MixLike, stretch: Stretch | None
    ) -> tuple[Tensor, Tensor]:
        """Anchors [E, d] and candidates [C, d], each of length 1."""
        columns = list(zip(*[example.inputs["ids"] for example in examples], strict=True))
        texts = [one for column in columns for one in column]
        keys = None
        if stretch is not None and stretch.dropout:
            # each text of a pair has keys of its own
            keys = torch.cat([stretch.keys() + (i << 32) for i in range(len(columns))])
        found = self._rows.rows(texts, adapter, keys)
        return found[: len(examples)], found[len(examples) :]


def _apart(outputs: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors [E, d], candidates [C, d] and the positives' numbers [E], float64, of what was
    measured, [E, 1 + C/E, d + 1]."""
    found = torch.from_numpy(outputs)
    candidates = found[:, 1:, :-1].transpose(0, 1).flatten(0, 1)
    return found[:, 0, :-1], candidates, found[:, 0, -1]


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, of length 1, float32 or wider: [E, d].

    Args:
        hidden: [E, T, d].
        mask: [E, T], 1 where there is a token; padding is on the right.
    """
    hidden = hidden.to(torch.promote_types(torch.float32, hidden.dtype))
    if pooling == "mean":
        weights = mask[:, :, None].to(hidden.dtype)
        found = (hidden * weights).sum(1) / weights.sum(1)
    else:
        place = torch.zeros_like(mask[:, 0]) if pooling == "cls" else mask.sum(1) - 1
        found = hidden[torch.arange(len(hidden), device=hidden.device), place]
    return F.normalize(found, dim=1)


def contrast(
    anchors: Tensor, candidates: Tensor, same: Tensor, scale: float, own: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of each anchor's own candidate, [E].

    Args:
        anchors: [E, d], of length 1.
        candidates: [C, d], of length 1, the positives first.
        same: [P], the same number for equal positives, which are no negatives of each other.
        own: [E], the place of each anchor's positive; by default its own.
    """
    place = torch.arange(len(anchors), device=anchors.device) if own is None else own
    logits = scale * anchors @ candidates.T
    equal = same[place][:, None] == same[None]
    equal[torch.arange(len(place)), place] = False
    logits = torch.cat(
        [logits[:, : len(same)].masked_fill(equal, -torch.inf), logits[:, len(same) :]], 1
    )
    return F.cross_entropy(logits, place, reduction="none")


def _number(text: str) -> int:
    """48 bits of a text, which a float64 holds."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _pooling_of(folder: str) -> Pooling | None:
    """What a folder of sentence-transformers says of itself; ``None`` where it says nothing.

    Raises:
        BaseError: its pooling is none of ours.
    """
    path = Path(folder) / "1_Pooling" / "config.json"
    if not folder or not path.is_file():
        return None
    config = read_config(path)
    asked = {
        key.removeprefix("pooling_mode_")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value is True
    }
    if "pooling_mode" in config:  # as newer ones write it
        asked.add(str(config["pooling_mode"]))
    found = {_POOLINGS.get(name) for name in asked}
    if len(found) > 1 or None in found:
        raise BaseError(
            f"{path} asks for the pooling {' and '.join(sorted(asked))}; embed knows mean, cls and "
            "lasttoken, one of them. Take another base, or write one of them into that file as "
            "its pooling_mode"
        )
    return next(iter(found), None)
