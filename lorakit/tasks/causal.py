"""Causal language models: examples packed into one row, and the losses of their tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.bases import Base, context_length, load_base
from lorakit.core.adapter import Adapter
from lorakit.data import DataSpec, Example, TokenData, items, load_data, pack
from lorakit.infer import PackedModel, generate
from lorakit.layers import Handle, Routing, token_keys
from lorakit.layers.routing import MixLike
from lorakit.tasks.mixing import needs_plain_layers, why_not_mixed
from lorakit.tasks.names import Mode, Recompute
from lorakit.tasks.recompute import recomputing
from lorakit.tasks.task import Kind, Measured, Stretch


class CausalTask:
    """A causal language model as a :class:`~lorakit.tasks.task.Task`.

    Args:
        packed: the model, studied already.
    """

    def __init__(self, packed: PackedModel) -> None:
        self.packed = packed

    @property
    def model(self) -> nn.Module:
        return self.packed.model

    @property
    def handle(self) -> Handle | None:
        return self.packed.handle

    @property
    def notes(self) -> list[str]:
        return self.packed.notes

    @property
    def mode(self) -> Mode:
        return self.packed.mode

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def layers(self) -> str | None:
        return None if self.packed.fused is None else self.packed.fused.summary()

    def losses(self, stretches: Sequence[Stretch]) -> Tensor:
        batch = pack([example for stretch in stretches for example in stretch.examples])
        groups = [len(stretch.examples) for stretch in stretches]
        routing = None if self.handle is None else routing_of(stretches)
        return self.packed.group_losses(batch, routing, groups)

    def measured(self, examples: Sequence[Any], adapter: MixLike) -> Measured:
        routing = Routing.uniform(adapter) if self.handle is not None else None
        return Measured(*self.packed.per_example_loss(pack(examples), routing))

    def smaller(self, examples: Sequence[Any], share: float) -> list[Any]:
        return shortened(examples, share)

    def why_apart(self, adapter: Adapter | None) -> str | None:
        return why_not_mixed(self.packed, adapter)

    @property
    def whole(self) -> str | None:
        return None

    def kin(self, adapter: Adapter | None) -> str:
        plain = self.packed.fused is not None and needs_plain_layers(adapter)
        return "plain" if plain else "fused"


def routing_of(stretches: Sequence[Stretch]) -> Routing:
    """Each stretch's adapter for its own tokens of a packed row, with the keys of its dropout."""
    keys = [_dropout_keys(stretch) if stretch.dropout else None for stretch in stretches]
    if len(stretches) == 1:
        routing = Routing.uniform(stretches[0].adapter)
    else:
        routing = Routing.tokens([(stretch.adapter, stretch.size) for stretch in stretches])
    if all(own is None for own in keys):
        return routing
    # nothing asks for the keys of a stretch without dropout
    row = torch.cat(
        [
            torch.zeros(stretch.size, dtype=torch.long) if own is None else own
            for stretch, own in zip(stretches, keys, strict=True)
        ]
    )
    return routing.with_dropout_keys(row[None])


def _dropout_keys(stretch: Stretch) -> Tensor:
    """One key for each token of its examples, [n]."""
    lengths = [len(example.ids) for example in stretch.examples]
    ids = torch.tensor([example.id for example in stretch.examples])
    position = torch.cat([torch.arange(length) for length in lengths])
    example = torch.repeat_interleave(ids, torch.tensor(lengths))
    return token_keys(stretch.seed, stretch.step, example, position)


def shortened(part: Sequence[Example], share: float) -> list[Example]:
    """Each example cut to ``share`` of its tokens, at least two, as many of them supervised."""
    cut = []
    for example in part:
        length = max(min(2, len(example.ids)), round(len(example.ids) * share))
        learnt = max(1, round(float(example.supervised.mean()) * length))
        supervised = np.arange(length) >= length - learnt
        cut.append(dataclasses.replace(example, ids=example.ids[:length], supervised=supervised))
    return cut


class Causal:
    """The :class:`~lorakit.tasks.task.Kind` of causal language models."""

    name = "causal"
    peft_type = "CAUSAL_LM"
    command = "lorakit train"
    memory_advice = "leave it out or cut it with --max-length; --recompute layers; --quantize nf4"

    def on(
        self, model: nn.Module, handle: Handle | None, recompute: Recompute = "none"
    ) -> CausalTask:
        """The task on a model; also one whose layers make their activations again.

        Raises:
            BaseError: an encoder-decoder, or no logits over a vocabulary; a model that can make
                nothing again.
        """
        return CausalTask(recomputing(model, handle, recompute))

    def metrics(
        self, loss: float, examples: Any, indices: Sequence[int], outputs: np.ndarray | None
    ) -> dict[str, float]:
        return {"perplexity": perplexity(loss)}

    def questions(
        self, base: Base, examples: TokenData, indices: Sequence[int], count: int
    ) -> list[dict[str, Any]]:
        if base.tokenizer is None or examples.report.kind == "text":
            return []
        return [
            {"prompt": item.prompt, "reference": item.references}
            for item in items(examples, indices)[:count]
        ]

    def answers(
        self,
        base: Base,
        handle: Handle | None,
        adapter: str | None,
        examples: TokenData,
        indices: Sequence[int],
        count: int,
        max_new_tokens: int,
    ) -> list[str]:
        """Greedy answers."""
        if not count:
            return []
        return generate(
            base,
            handle,
            [item.prompt_ids.tolist() for item in items(examples, indices)[:count]],
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            temperature=0,
            stop_ids=examples.stop_ids or None,
        )

    def settings(self) -> Mapping[str, Any]:
        return {}

    load_base = staticmethod(load_base)

    def data_spec(self, section: Mapping[str, Any]) -> DataSpec:
        return DataSpec(**section)

    def load_data(self, spec: DataSpec, base: Base) -> TokenData:
        tokenizer = base.require_tokenizer()
        return load_data(spec, tokenizer, context_length=context_length(base.model))


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else (math.inf if loss >= 700 else math.nan)


CAUSAL: Kind = Causal()
