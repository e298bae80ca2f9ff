"""``RowTask``: a model of rows, each row of a batch an example.

What kinds other than causal language models share: rows are padded to the longest (or all of one
size), a forward's routing is by row, and an example's loss is a sum over its own row. Whether
padding is seen by the model is tried once; where it is, examples go through one at a time.

Legend: ``E`` examples of a forward, ``G`` stretches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.adapter import Adapter
from lorakit.errors import BaseError
from lorakit.infer.mode import evaluating
from lorakit.layers import Handle, Routing
from lorakit.layers.routing import MixLike
from lorakit.tasks.mixing import has_int8, lone_expert
from lorakit.tasks.names import Mode, Recompute
from lorakit.tasks.recompute import checkpoint_layers_
from lorakit.tasks.task import Measured, Stretch

#: largest difference of an example's loss, alone and beside a longer one, that rounding explains
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDING_HALF = 5e-2

#: examples → the model's inputs, on any device
Batch = Callable[[Sequence[Any]], Mapping[str, Tensor]]
#: the model's output, the inputs → each example's summed loss [E], and what metrics are made of
Sums = Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, Tensor | None]]


class RowTask:
    """A :class:`~lorakit.tasks.task.Task` whose examples are rows of a batch.

    Args:
        batch: of examples: the model's inputs, the first of which has a row an example. Those
            whose name begins with ``_`` are kept from the model.
        sums: of the model's output and the batch.
        probe: two examples of different size, to try whether padding is seen; ``None`` where all
            examples have one size.
        single: why examples go one at a time, where that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        handle: Handle | None,
        batch: Batch,
        sums: Sums,
        *,
        recompute: Recompute = "none",
        probe: Sequence[Any] | None = None,
        single: str | None = None,
    ) -> None:
        self.model, self.handle = model, handle
        self.device = next(model.parameters()).device
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.notes: list[str] = []
        self.mode: Mode = "single" if single else "padded"
        self.layers: str | None = None
        self.whole: str | None = None
        self._batch, self._sums = batch, sums
        if single:
            self.notes.append(f"examples go through one at a time: {single}")
        if recompute != "none":
            self._checkpoint(recompute)
        if probe is not None and self.mode == "padded":
            self._choose_mode(probe)

    def losses(self, stretches: Sequence[Stretch]) -> Tensor:
        examples = [example for stretch in stretches for example in stretch.examples]
        keys = self._keys(stretches)
        adapters = [stretch.adapter for stretch in stretches for _ in stretch.examples]
        parts = [
            self._forward(examples[i:j], adapters[i:j], None if keys is None else keys[i:j])[0]
            for i, j in self._parts(len(examples))
        ]
        each = torch.cat(parts)
        sizes = [len(stretch.examples) for stretch in stretches]
        return torch.stack([part.sum() for part in torch.split(each, sizes)])

    @torch.no_grad()
    def measured(self, examples: Sequence[Any], adapter: MixLike) -> Measured:
        found = [
            self._forward(examples[i:j], [adapter] * (j - i), None)
            for i, j in self._parts(len(examples))
        ]
        outputs = None
        if found[0][1] is not None:
            outputs = torch.cat([made for _, made in found if made is not None])
        weights = torch.tensor([example.weight for example in examples])
        return Measured(torch.cat([sums for sums, _ in found]).double(), weights, outputs)

    def smaller(self, examples: Sequence[Any], share: float) -> list[Any]:
        return list(examples[: max(1, round(len(examples) * share))])

    def why_apart(self, adapter: Adapter | None) -> str | None:
        if adapter is None:
            return "it trains the base itself"
        if has_int8(self.model):
            return "its base is int8, whose kernel treats all rows of a forward alike"
        expert = lone_expert(adapter)
        return None if expert is None else f"{expert} is an expert, which sees routed tokens"

    def kin(self, adapter: Adapter | None) -> str:
        return "rows"

    def rows(self, examples: Sequence[Any], adapter: MixLike, keys: Tensor | None) -> Tensor:
        """What ``sums`` makes of examples, in their order, with a gradient.

        Args:
            keys: int64 [E], of their dropout; ``None`` without.
        """
        found = [
            self._forward(examples[i:j], [adapter] * (j - i), None if keys is None else keys[i:j])
            for i, j in self._parts(len(examples))
        ]
        return torch.cat([made for made, _ in found])

    # --- one forward -----------------------------------------------------------------------

    def _parts(self, count: int) -> Iterator[tuple[int, int]]:
        step = 1 if self.mode == "single" else max(1, count)
        return ((i, min(i + step, count)) for i in range(0, count, step))

    def _keys(self, stretches: Sequence[Stretch]) -> Tensor | None:
        if not any(stretch.dropout for stretch in stretches):
            return None
        return torch.cat(
            [
                stretch.keys() if stretch.dropout else torch.zeros(len(stretch.examples)).long()
                for stretch in stretches
            ]
        )

    def _forward(
        self, examples: Sequence[Any], adapters: Sequence[MixLike], keys: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch = {name: self._placed(tensor) for name, tensor in self._batch(examples).items()}
        inputs = {name: tensor for name, tensor in batch.items() if not name.startswith("_")}
        with self._using(adapters, keys):
            output = self.model(**inputs)
        return self._sums(output, batch)

    def _placed(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _using(
        self, adapters: Sequence[MixLike], keys: Tensor | None
    ) -> contextlib.AbstractContextManager[Any]:
        if self.handle is None:
            return contextlib.nullcontext()
        alike = all(adapter == adapters[0] for adapter in adapters)
        routing = Routing.uniform(adapters[0]) if alike else Routing.rows(list(adapters))
        if keys is not None:
            routing = routing.with_dropout_keys(keys.to(self.device))
        return self.handle.use(routing)

    # --- what was decided ------------------------------------------------------------------

    def _checkpoint(self, recompute: Recompute) -> None:
        if recompute == "offload":
            raise BaseError(
                "offloading needs fused layers, which are those of causal language models; give "
                "--recompute layers"
            )
        checkpoint_layers_(self.model, "fused layers are those of causal language models")
        self.notes.append(
            "the model's own gradient checkpointing is on, for all of each layer"
            + (f": {recompute!r} needs fused layers" if recompute != "layers" else "")
        )

    def _choose_mode(self, probe: Sequence[Any]) -> None:
        """Compare two examples alone with both in one forward."""
        with evaluating(self.model), torch.no_grad():
            alone = torch.cat([self._forward([one], [None], None)[0] for one in probe])
            try:
                both = self._forward(probe, [None, None], None)[0]
            except Exception as error:  # whatever a model raises on what it cannot do
                problem = f"the model does not take padding ({type(error).__name__}: {error})"
            else:
                limit = _ROUNDING.get(self.dtype, _ROUNDING_HALF) * float(alone.abs().max())
                if float((both - alone).abs().max()) <= limit:
                    return
                problem = "its losses differ where a longer example is beside it"
        self.mode = "single"
        self.notes.append(f"examples go through one at a time: {problem}")


def padded(arrays: Sequence[Any], value: int) -> Tensor:
    """Rows of numbers as one tensor, padded on the right: int64 [E, T]."""
    width = max(len(array) for array in arrays)
    out = torch.full((len(arrays), width), value, dtype=torch.long)
    for row, array in enumerate(arrays):
        out[row, : len(array)] = torch.as_tensor(array, dtype=torch.long)
    return out


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood of each row's labels, [E]; labels of -100 are left out.

    Args:
        logits: [E, T, V].
        labels: int64 [E, T].
    """
    wide = torch.promote_types(torch.float32, logits.dtype)
    each = nn.functional.cross_entropy(
        logits.flatten(0, 1).to(wide), labels.flatten(), reduction="none", ignore_index=-100
    )
    return each.view(labels.shape).sum(1)
