"""Pictures from a base and its adapters.

A :class:`Cell` says all that decides a picture. Cells that differ in their adapters, weights,
prompts or seeds share forwards: the routing gives each row its adapters, also where guidance
doubles the rows. A picture's noise comes from its own seed, so that it is the same whoever is drawn
beside it, up to rounding.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.errors import SpecError, collected
from lorakit.images.base import PictureBase
from lorakit.images.families import latent_range
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike, as_mix

#: denoising steps where nobody said
STEPS = 30
#: pictures that are drawn at a time
BATCH = 4


@dataclass(frozen=True)
class Cell:
    """One picture to be."""

    prompt: str
    negative: str | None = None
    """What it should not show; ``None``: as the pipeline has it."""
    seed: int = 0
    mix: MixLike = None
    """Adapters by name; ``None`` is the bare base."""
    steps: int = STEPS
    """Denoising steps."""
    guidance: float | None = None
    """``None``: what the family is used with."""
    width: int | None = None
    """Pixels; ``None``: the side that the base makes unasked."""
    height: int | None = None
    against: float = 1.0
    """What the adapters' weights are multiplied by in the picture that guidance pushes away from.
    1: the style is on both sides, and guidance sharpens the caption alone, as everywhere. 0: the
    bare base draws it, and guidance sharpens the style too, so that adapters can act at lower
    weights. Below 0: more so. (Guiding by a worse model: Karras et al., arXiv 2406.02507.)"""
    start: float = 0.0
    """Share of the steps that the bare denoiser makes before the adapters act on it, in [0, 1).
    What is where comes about in the first steps, how it is drawn in later ones (Choi et al., arXiv
    2204.00227), so that a style that starts late leaves more of what the prompt says. Adapters of
    text encoders read the prompt throughout."""


def check_cells(base: PictureBase, cells: Sequence[Cell]) -> None:
    """Refuse what this base cannot draw.

    Raises:
        SpecError: lists it.
    """
    problems = []
    for name in ("width", "height"):
        sizes = {getattr(cell, name) for cell in cells} - {None}
        problems += [
            f"{name} is {size}; of this base it must be a multiple of {base.step}"
            for size in sorted(sizes)
            if size < base.step or size % base.step
        ]
    for what, these in (
        ("a negative prompt", [cell for cell in cells if cell.negative]),
        ("a weight to push away from (against)", [cell for cell in cells if cell.against != 1]),
    ):
        low = [one.guidance for one in these if one.guidance is not None and one.guidance <= 1]
        if these and not base.doubles:
            problems.append(
                f"{what} is given, and this base was distilled to need none; it cannot act"
            )
        elif low:
            problems.append(
                f"guidance is {min(low):g}, at which {what} cannot act; give more than 1"
            )
    if any(cell.start for cell in cells) and _runge_kutta(base.pipe.scheduler):
        problems.append(
            "start is given, and this base's scheduler takes Runge-Kutta steps first, of four "
            "forwards each; leave it out, or set skip_prk_steps in its scheduler_config.json"
        )
    for start, steps in dict.fromkeys((cell.start, cell.steps) for cell in cells):
        if not 0 <= start < 1:
            problems.append(f"start is {start:g}; it is a share of the steps, from 0 to below 1")
        elif bare_steps(start, steps) >= steps:
            problems.append(
                f"start is {start:g}, after the last of {steps} steps: no adapter would act; give "
                "less, or more steps"
            )
    if problems:
        raise SpecError(collected("These pictures cannot be drawn", problems))


def draw(
    base: PictureBase, handle: Handle | None, cells: Sequence[Cell], *, batch: int = BATCH
) -> list[np.ndarray]:
    """The pictures of these cells, in their order; see :func:`drawn`."""
    found = dict(drawn(base, handle, cells, batch=batch))
    return [found[place] for place in range(len(cells))]


def drawn(
    base: PictureBase, handle: Handle | None, cells: Sequence[Cell], *, batch: int = BATCH
) -> Iterator[tuple[int, np.ndarray]]:
    """Each cell's place and its picture, [H, W, 3] float32 in [0, 1], as soon as it is there.

    Args:
        handle: of the adapters that the cells name; ``None`` if they name none.
        batch: pictures of one forward at most.

    Raises:
        SpecError: what this base cannot draw, or a start of adapters that the denoiser has not.
        RoutingError: an adapter that is not attached.
    """
    check_cells(base, cells)
    _check_starts(base, handle, cells)
    groups: dict[Any, list[int]] = {}
    for place, cell in enumerate(cells):
        size = cell.width, cell.height
        alike = cell.steps, cell.guidance, cell.against, cell.start, *size, cell.negative is None
        groups.setdefault(alike, []).append(place)
    for places in groups.values():
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            yield from zip(some, _forward(base, handle, [cells[p] for p in some]), strict=True)


@torch.no_grad()
def _forward(base: PictureBase, handle: Handle | None, cells: Sequence[Cell]) -> list[np.ndarray]:
    """Pictures that share everything but prompt, seed and adapters."""
    first, pipe = cells[0], base.pipe
    guidance = base.family.guidance if first.guidance is None else first.guidance
    width = first.width or base.resolution
    height = first.height or base.resolution
    factor = pipe.vae_scale_factor if pipe.vae is None else 1  # it takes 8 where it has no VAE
    options: dict[str, Any] = {
        "prompt": [cell.prompt for cell in cells],
        "num_inference_steps": first.steps,
        "guidance_scale": guidance,
        "width": width * factor,
        "height": height * factor,
        "generator": [torch.Generator("cpu").manual_seed(cell.seed) for cell in cells],
        "output_type": "latent",
        "return_dict": False,
    }
    if base.family.tiles and first.negative is not None:
        options["negative_prompt"] = [str(cell.negative) for cell in cells]
    if base.text_length is not None:
        options["max_sequence_length"] = base.text_length
    mixes = [cell.mix for cell in cells]
    tiles = base.doubles and guidance > 1
    if first.against != 1 and tiles:
        others: list[MixLike] = [_scaled(mix, first.against) for mix in mixes]
        options.update(_encoded(base, handle, mixes, others, options))
        mixes, tiles = others + mixes, False  # as the pipelines order them
    begin = bare_steps(first.start, first.steps)
    with _routed(handle, mixes, tiled=tiles), _bare_until(base, handle, begin, first.steps):
        latents = pipe(**options)[0]
    if base.family.name == "flux":
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    # one by one, as the decoder takes more memory for a picture than the denoiser
    each = [decoded(base, latent[None])[0] for latent in latents]
    return [pixels.permute(1, 2, 0).cpu().numpy() for pixels in each]


def _check_starts(base: PictureBase, handle: Handle | None, cells: Sequence[Cell]) -> None:
    """Refuse a start that could not act. A cell without adapters may have one: it is the picture
    that others are compared with."""
    prefix = f"{base.family.denoiser}."
    late = {frozenset(name for name, w in as_mix(cell.mix) if w) for cell in cells if cell.start}
    for names in late:
        assert handle is not None or not names
        paths = (path for name in names for path in handle.paths(name)) if handle else ()
        if names and not any(path.startswith(prefix) for path in paths):
            raise SpecError(
                f"start is given, and {', '.join(sorted(names))} change nothing in the denoiser, "
                "on which adapters may start late; leave it out"
            )


def _runge_kutta(scheduler: Any) -> bool:
    """Whether PNDM's first steps take more forwards than its later ones."""
    return getattr(scheduler.config, "skip_prk_steps", True) is False


def bare_steps(start: float, steps: int) -> int:
    """Steps before the first one that adapters act on, of a cell that starts late."""
    return math.ceil(start * steps - 1e-9)  # 0.55 · 20 is 11, and a bit


@contextlib.contextmanager
def _bare_until(base: PictureBase, handle: Handle | None, begin: int, steps: int) -> Iterator[None]:
    """The denoiser without adapters before this step of a pipeline's; all else with them."""
    if handle is None or not begin:
        yield
        return
    done = 0
    with contextlib.ExitStack() as bare:

        def before(*_: Any) -> None:
            nonlocal done
            # of some schedulers a step takes several forwards, each a time of theirs
            if done < math.ceil(begin * len(base.pipe.scheduler.timesteps) / steps):
                bare.enter_context(handle.use(None))
            done += 1

        hooks = [
            base.denoiser.register_forward_pre_hook(before),
            base.denoiser.register_forward_hook(lambda *_: bare.close(), always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _scaled(mix: MixLike, factor: float) -> MixLike:
    return {name: weight * factor for name, weight in as_mix(mix) if weight * factor}


def _encoded(
    base: PictureBase,
    handle: Handle | None,
    mixes: Sequence[MixLike],
    others: Sequence[MixLike],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Texts as the pipeline takes them, each read by the adapters of its side of guidance.

    Args:
        mixes: of what guidance pulls to, row by row.
        others: of what it pushes away from.
        options: of the pipeline; those that make a text are taken out.
    """
    names = ("prompt", "negative_prompt", "max_sequence_length")
    told = {name: options.pop(name) for name in names if name in options}
    takes = inspect.signature(base.pipe.encode_prompt).parameters
    told |= {name: None for name in ("prompt_2", "prompt_3") if name in takes}
    found = []
    for who in (mixes, others):
        with _routed(handle, who, tiled=False):
            found.append(
                base.pipe.encode_prompt(
                    **told,
                    device=base.placement.device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=True,
                )
            )
    kinds = (
        *("prompt_embeds", "negative_prompt_embeds"),
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    )
    return {
        kind: theirs if kind.startswith("negative") else ours
        for kind, ours, theirs in zip(kinds, *found, strict=False)
    }


def _routed(
    handle: Handle | None, mixes: Sequence[MixLike], *, tiled: bool
) -> contextlib.AbstractContextManager[Any]:
    if handle is None:
        assert all(as_mix(mix) == () for mix in mixes)
        return contextlib.nullcontext()
    if all(as_mix(mix) == as_mix(mixes[0]) for mix in mixes):
        return handle.use(mixes[0])
    return handle.use(rows=mixes, expand=2 if tiled else 1, order="tile")


def decoded(base: PictureBase, latents: Tensor) -> Tensor:
    """[B, 3, H, W] float32 in [0, 1] of latents as the denoiser knows them."""
    vae = base.pipe.vae
    if vae is None:
        return (latents.float() / 2 + 0.5).clamp(0, 1)
    latents = latents.to(next(vae.parameters()).device, vae.dtype)
    offset, scale = latent_range(vae, latents)
    found: Tensor = vae.decode(latents / scale + offset, return_dict=False)[0]
    return (found.float() / 2 + 0.5).clamp(0, 1)
