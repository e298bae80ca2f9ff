"""Pictures as a task: examples with their noise, in forwards of one size, and their losses.

A picture's loss is the mean squared error over its latent, and each picture counts once. What is
random of it (noise, time, the VAE's draw, an empty caption, its sides) is a function of the run's
seed, the step and the example, so that neither the cut of a batch, nor who shares a forward, nor a
resume changes it. An evaluation looks at the same noise at the same four times, always.

Legend: ``B`` pictures of a forward, ``C, h, w`` of a latent, ``G`` stretches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.core.adapter import Adapter
from lorakit.errors import BaseError
from lorakit.images.base import Parts, PictureBase, load_pipeline
from lorakit.images.data import (
    PictureData,
    PictureExample,
    PictureSettings,
    PicturesPlan,
    load_pictures,
)
from lorakit.images.noise import Noised, NoiseModel, generator_of
from lorakit.layers import Handle, Routing
from lorakit.layers.routing import MixLike
from lorakit.tasks.names import Mode, Recompute
from lorakit.tasks.task import Measured, Stretch

#: times at which an evaluation looks at each picture, evenly over the schedule
NUM_TIMES = 4


@dataclass(frozen=True)
class _Row:
    """One row of a forward."""

    example: PictureExample
    adapter: MixLike
    caption: str
    noised: Noised
    mask: Tensor | None
    """[1, h, w]."""
    key: int | None = None
    """What dropout of the adapter is a function of, if it has some."""


class PictureTask:
    """A pipeline as a :class:`~lorakit.tasks.task.Task`.

    Args:
        base: the pipeline; its parts are the model that ``handle`` is on.
        handle: the adapters.
    """

    mode: Mode = "packed"  # nothing is padded: a forward holds pictures of one size
    layers: str | None = None
    whole: str | None = None

    def __init__(self, base: PictureBase, handle: Handle | None) -> None:
        self.base = base
        self.model: nn.Module = base.model
        self.handle = handle
        self.notes: list[str] = []
        self._noise: dict[tuple[float | None, float], NoiseModel] = {}

    @property
    def device(self) -> torch.device:
        return next(self.base.denoiser.parameters()).device

    # --- losses ----------------------------------------------------------------------------

    def losses(self, stretches: Sequence[Stretch]) -> Tensor:
        """See :meth:`lorakit.tasks.task.Task.losses`."""
        rows: list[_Row] = []
        groups: list[int] = []
        for number, stretch in enumerate(stretches):
            keys = stretch.keys().tolist()
            for example, key in zip(stretch.examples, keys, strict=True):
                row = self._drawn(example, stretch.adapter, key)
                rows.append(replace(row, key=key) if stretch.dropout else row)
                groups.append(number)
        found: list[Tensor] = []
        for places in _by_shape(rows):
            each = self._forward([rows[place] for place in places])
            weights = [_weight(rows[place]) for place in places]
            each = each * torch.tensor(weights, dtype=each.dtype, device=each.device)
            where = torch.tensor([groups[place] for place in places], device=each.device)
            found.append(each.new_zeros(len(stretches)).index_add(0, where, each))
        return torch.stack(found).sum(0)

    @torch.no_grad()
    def measured(self, examples: Sequence[Any], adapter: MixLike) -> Measured:
        """See :meth:`lorakit.tasks.task.Task.measured`; unweighted, with the whole caption."""
        rows = [row for example in examples for row in self._fixed(example, adapter)]
        each = torch.zeros(len(rows), dtype=torch.float64)
        for places in _by_shape(rows):
            found = self._forward([rows[place] for place in places])
            each[torch.tensor(places)] = found.double().cpu()
        sums = each.view(len(examples), NUM_TIMES).mean(1)
        return Measured(sums, torch.ones(len(examples), dtype=torch.int64))

    def smaller(self, examples: Sequence[Any], share: float) -> list[Any]:
        """Fewer pictures, at least one: a picture cannot be cut."""
        return list(examples[: max(1, round(len(examples) * share))])

    def why_apart(self, adapter: Adapter | None) -> str | None:
        """No row of a forward reaches another: norms are of each picture, attention inside it."""
        return "it trains the base itself" if adapter is None else None

    def kin(self, adapter: Adapter | None) -> str:
        """Captions are encoded in the forward where text encoders are adapted, else before."""
        paths = () if adapter is None else adapter.sites
        return "text" if any(path.startswith("text_encoder") for path in paths) else "no text"

    # --- rows ------------------------------------------------------------------------------

    def _drawn(self, example: PictureExample, adapter: MixLike, key: int) -> _Row:
        """A training row; all that is random of it comes from ``key``."""
        generator = generator_of("train", key)
        settings = example.settings
        # always drawn, so that nothing else depends on whether there is such a setting
        dropped = float(torch.rand(1, generator=generator)) < settings.caption_dropout
        if settings.flip and float(torch.rand(1, generator=generator_of("flip", key))) < 0.5:
            example = example.mirrored()
        stored = example.latent()
        latent = stored["mean"]
        draw = torch.randn(latent.shape, generator=generator)
        if "std" in stored:
            latent = latent + stored["std"] * draw
        noised = self._noise_of(settings).apply(latent, generator)
        caption = "" if dropped else example.picture.caption
        return _Row(example, adapter, caption, noised, stored.get("mask"))

    def _fixed(self, example: PictureExample, adapter: MixLike) -> Iterator[_Row]:
        """Rows of an evaluation: always the same for the same picture."""
        stored = example.latent()
        noise = self._noise_of(PictureSettings())
        for number in range(NUM_TIMES):
            generator = generator_of("evaluate", example.picture.digest, number)
            noised = noise.apply(stored["mean"], generator, (number + 0.5) / NUM_TIMES)
            yield _Row(example, adapter, example.picture.caption, noised, stored.get("mask"))

    def _noise_of(self, settings: PictureSettings) -> NoiseModel:
        key = settings.min_snr, settings.noise_offset
        if key not in self._noise:
            self._noise[key] = NoiseModel(self.base.pipe.scheduler, min_snr=key[0], offset=key[1])
        return self._noise[key]

    # --- a forward -------------------------------------------------------------------------

    def _forward(self, rows: Sequence[_Row]) -> Tensor:
        """Each row's mean squared error, [B] float32; all are of one size."""
        dtype = self.base.placement.dtype
        x = torch.stack([row.noised.input for row in rows]).to(self.device, dtype)
        time = torch.tensor([row.noised.time for row in rows], device=self.device)
        target = torch.stack([row.noised.target for row in rows]).to(self.device)
        with self._routed(rows):
            text = self._text(rows)
            placed = [row.example.placed for row in rows]
            found = self.base.family.denoise(self.base.pipe, x, time, text, placed)
        wide = torch.promote_types(found.dtype, torch.float32)
        error = (found.to(wide) - target.to(wide)) ** 2
        masks = [row.mask for row in rows]
        if all(mask is None for mask in masks):
            return error.mean((1, 2, 3))
        ones = torch.ones(1, *error.shape[2:])
        mask = torch.stack([ones if one is None else one for one in masks]).to(error)
        # a mean over what is shown, so that a picture counts alike whatever its mask's size
        area = mask.mean((1, 2, 3)).clamp(min=1e-6)
        return (error * mask).mean((1, 2, 3)) / area

    def _text(self, rows: Sequence[_Row]) -> Mapping[str, Tensor]:
        """The rows' conditioning, each [B, …]."""
        dtype = self.base.placement.dtype
        if any(row.example.settings.train_text for row in rows):
            captions = [row.caption for row in rows]
            return self.base.family.encode(self.base.pipe, captions, self.base.text_length)
        each = [row.example.text(row.caption) for row in rows]
        return {
            name: torch.stack([one[name] for one in each]).to(self.device, dtype)
            for name in each[0]
        }

    def _routed(self, rows: Sequence[_Row]) -> contextlib.AbstractContextManager[Any]:
        """Each row's adapter, and a key for its dropout."""
        if self.handle is None:
            return contextlib.nullcontext()
        adapters = [row.adapter for row in rows]
        if all(adapter == adapters[0] for adapter in adapters):
            routing = Routing.uniform(adapters[0])
        else:
            routing = Routing.rows(adapters)
        if any(row.key is not None for row in rows):
            # nothing asks for the keys of a row without dropout
            keys = torch.tensor([row.key or 0 for row in rows], device=self.device)
            routing = routing.with_dropout_keys(keys)
        return self.handle.forward_scope(routing)


def _by_shape(rows: Sequence[_Row]) -> list[list[int]]:
    """Places of the rows that can share a forward, in the order of their first."""
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.example.shape, []).append(place)
    return list(groups.values())


def _weight(row: _Row) -> float:
    settings = row.example.settings
    return row.noised.weight * (settings.prior_weight if row.example.is_prior else 1.0)


class PictureKind:
    """The :class:`~lorakit.tasks.task.Kind` of pipelines; what a run sets is with its examples."""

    name = "pictures"
    peft_type: str | None = None
    command = "lorakit images train"
    memory_advice = "a lower --resolution; --recompute; of transformers --quantize nf4"

    def on(
        self, model: nn.Module, handle: Handle | None, recompute: Recompute = "none"
    ) -> PictureTask:
        """The task; with ``recompute="layers"`` the denoiser's blocks run again in the backward.

        Raises:
            BaseError: the model is no pipeline's, or something else is to be made again.
        """
        if not isinstance(model, Parts):
            raise BaseError(
                f"a {type(model).__name__} is no pipeline; load it with "
                "lorakit.images.base.load_pipeline"
            )
        task = PictureTask(model.base, handle)
        if recompute not in ("none", "layers"):
            raise BaseError(
                f"recompute is {recompute!r}; a picture model can make whole blocks again: layers"
            )
        if recompute == "layers":
            denoiser: Any = model.base.denoiser
            denoiser.enable_gradient_checkpointing()
            task.notes.append("the denoiser's blocks are made again in the backward")
        return task

    def metrics(
        self, loss: float, examples: Any, indices: Sequence[int], outputs: np.ndarray | None
    ) -> dict[str, float]:
        """None: what a picture is worth, people see on the sheets."""
        return {}

    def questions(
        self, base: Any, examples: Any, indices: Sequence[int], count: int
    ) -> list[dict[str, Any]]:
        """None: sheets of pictures are made instead."""
        return []

    def answers(
        self,
        base: Any,
        handle: Handle | None,
        adapter: str | None,
        examples: Any,
        indices: Sequence[int],
        count: int,
        max_new_tokens: int,
    ) -> list[str]:
        """None, as there are no questions."""
        return []

    def settings(self) -> Mapping[str, Any]:
        """None: a run's are with its examples."""
        return {}

    @property
    def load_base(self) -> Callable[..., PictureBase]:
        """See :func:`~lorakit.images.base.load_pipeline`."""
        return load_pipeline

    def data_spec(self, section: Mapping[str, Any]) -> PicturesPlan:
        """See :meth:`PicturesPlan.from_dict`."""
        return PicturesPlan.from_dict(section)

    def load_data(self, spec: PicturesPlan, base: PictureBase) -> PictureData:
        """See :func:`~lorakit.images.data.load_pictures`; encoded when it is asked for."""
        return load_pictures(spec, base)


PICTURES = PictureKind()
