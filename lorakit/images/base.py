"""``load_pipeline``: a diffusers pipeline as a frozen base.

What is adapted is a thin module with the pipeline's own components as children, ``unet`` or
``transformer`` and the text encoders, so that one handle and one routing serve all of them, and the
paths of an adapter begin with a component, as in diffusers' and kohya's files.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.bases.failures import explained
from lorakit.bases.fetch import is_reachable
from lorakit.bases.identity import identify
from lorakit.bases.load import Base
from lorakit.bases.placement import Placement, choose_placement
from lorakit.bases.quantize import check_quantised, keep_bytes_in_order_
from lorakit.bases.quiet import quiet_transformers
from lorakit.errors import BaseError, clipped
from lorakit.images.families import (
    BY_PIPELINE,
    Family,
    latent_scale,
    resolution_of,
    size_step,
)
from lorakit.optional import require

_log = logging.getLogger(__name__)

#: tokens of T5's text that a pipeline takes at most
MOST_TEXT = 512
#: linears of fewer inputs are worth nothing in four bits, and their kernels do not take all widths
_BLOCK = 64


class Parts(nn.Module):
    """A pipeline's components under their names; it is never called itself."""

    base: PictureBase

    @property
    def identified_by(self) -> nn.Module:
        """See :func:`lorakit.bases.identify`: text encoders come and go, and are shared."""
        return self.base.denoiser

    def __init__(self, components: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, component in components.items():
            self.add_module(name, component)


@dataclass(kw_only=True)
class PictureBase(Base):
    """A loaded pipeline."""

    pipe: Any
    """The diffusers pipeline; its components are those of ``model``."""
    family: Family
    text_length: int | None = None
    """Tokens of T5's text; ``None`` where there is no choice."""

    @property
    def denoiser(self) -> nn.Module:
        """What predicts the noise."""
        found: nn.Module = getattr(self.pipe, self.family.denoiser)
        return found

    @property
    def doubles(self) -> bool:
        """Whether guidance doubles a forward's rows; models that were distilled take its strength
        as an input instead (Flux, LCM)."""
        config = getattr(self.denoiser, "config", {})
        return self.family.tiles and config.get("time_cond_proj_dim") is None

    @property
    def scale(self) -> int:
        """Pixels of a latent's side."""
        return latent_scale(self.pipe)

    @property
    def step(self) -> int:
        """What the sides of a picture are multiples of."""
        return size_step(self.pipe)

    @property
    def resolution(self) -> int:
        """Side of the squares that it makes, unasked."""
        return resolution_of(self.pipe)

    def cut_captions(self, captions: Sequence[str]) -> list[str]:
        """A sentence for each text encoder that does not read some of these to their end."""
        found = []
        for name in self.family.text_encoders:
            tokenizer = getattr(self.pipe, name.replace("text_encoder", "tokenizer"), None)
            if tokenizer is None or not captions:
                continue
            limit = tokenizer.model_max_length
            if _is_t5(getattr(self.pipe, name)) and self.text_length is not None:
                limit = self.text_length
            ids = tokenizer(list(captions), verbose=False).input_ids
            long = [text for text, one in zip(captions, ids, strict=True) if len(one) > limit]
            if long:
                found.append(
                    f"{name} reads {limit} tokens, and {len(long)} of {len(captions)} captions are "
                    f"longer, such as {clipped(long[0], 80)!r}; it does not see their ends"
                )
        return found


def load_pipeline(
    ref: str | PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    text_length: int | None = None,
    say: Callable[[str], None] | None = None,
) -> PictureBase:
    """Load a pipeline, frozen and in evaluation mode.

    Args:
        ref: a folder with a ``model_index.json``, or a hub id.
        device, dtype: as of ``lorakit.bases.load_base``; the VAE stays float32.
        quantize: ``"nf4"`` stores the linears of transformers (SD3's, Flux's, T5) in 4 bits.
        revision: branch, tag or commit on the hub.
        text_length: tokens of T5's text, up to 512; ``None``: what the family is used with.
        say: called with what takes long; the default logs it.

    Raises:
        BaseError: it cannot be found, read or placed, or is of a family that is not known.
        MissingDependencyError: diffusers is not installed.
    """
    diffusers = require("diffusers", extra="images", purpose="picture models")
    require("transformers", extra="images", purpose="picture models")
    check_text_length(text_length)
    placement = choose_placement(device, dtype)
    location = fspath(ref)
    _check_place(location)
    (say or _log.info)(f"Reading the pipeline {location}")
    with quiet_transformers(), explained(location, "the pipeline"), quiet_diffusers():
        options: dict[str, Any] = {"revision": revision} if revision else {}
        if not Path(location).expanduser().is_dir() and not is_reachable(location, revision):
            options["local_files_only"] = True
        # a pipeline's model_index.json
        told = dict(diffusers.DiffusionPipeline.load_config(location, **options))
        named = str(told.get("_class_name"))
        family = BY_PIPELINE.get(named)
        if family is None:
            raise BaseError(
                f"{location} is a {named}; pictures are trained with "
                f"{', '.join(sorted(BY_PIPELINE))}"
            )
        if named == "StableDiffusionPipeline":
            options |= {"safety_checker": None, "requires_safety_checker": False}
            if (told.get("vae") or [None])[0] is None:
                options["vae"] = None  # it says nothing of a component that it does not have
        pipe = getattr(diffusers, named).from_pretrained(
            location, torch_dtype=placement.dtype, **options
        )
    return base_of(
        pipe,
        location,
        family=family,
        placement=placement,
        quantize=quantize,
        text_length=text_length,
    )


def base_of(
    pipe: Any,
    ref: str = "pipeline",
    *,
    family: Family | None = None,
    placement: Placement | None = None,
    quantize: str | None = None,
    text_length: int | None = None,
) -> PictureBase:
    """A pipeline that is in memory, as a base; it is moved and frozen where it lies.

    Raises:
        BaseError: of a family that is not known, or lacks a component.
    """
    family = family or BY_PIPELINE.get(type(pipe).__name__)
    if family is None:
        raise BaseError(
            f"a {type(pipe).__name__} is given; pictures are trained with "
            f"{', '.join(sorted(BY_PIPELINE))}"
        )
    placement = placement or choose_placement("cpu", "float32")
    notes = []
    check_text_length(text_length)
    if text_length is not None and family.text_length is None:
        raise BaseError(
            f"a text length of {text_length} is given; {type(pipe).__name__} has no choice there"
        )
    components: dict[str, nn.Module] = {}
    for name in (family.denoiser, *family.text_encoders):
        component = getattr(pipe, name, None)
        if component is None and name in (family.denoiser, "text_encoder"):
            raise BaseError(f"{ref} has no {name}, without which it makes no pictures")
        if component is not None:
            components[name] = component
    if getattr(pipe, "vae", None) is None and family.name != "sd":
        raise BaseError(f"{ref} has no vae; only pipelines of Stable Diffusion work on pixels")
    if quantize is not None:
        notes.append(_quantised_(components, quantize, placement))
    for component in components.values():
        _moved_(component, placement.device, placement.dtype)
        component.requires_grad_(False).eval()
    if pipe.vae is not None:
        # in float16 and bfloat16 SDXL's loses pictures, and it runs once for each
        _moved_(pipe.vae, placement.device, torch.float32)
        pipe.vae.requires_grad_(False).eval()
    else:
        notes.append("the pipeline has no VAE: it works on the pixels themselves")
    pipe.set_progress_bar_config(disable=True)
    if pipe.config.get("requires_safety_checker") is False:
        notes.append("the pipeline is used without a safety checker")
    parts = Parts(components)
    name = Path(ref).name if Path(ref).exists() else ref
    parts.base = PictureBase(
        model=parts,
        tokenizer=None,
        ref=ref,
        identity=identify(components[family.denoiser], name),
        placement=placement,
        notes=notes,
        pipe=pipe,
        family=family,
        text_length=text_length or family.text_length,
    )
    return parts.base


def check_text_length(length: int | None) -> None:
    """Refuse a text that no pipeline takes.

    Raises:
        BaseError: says which are possible.
    """
    if length is not None and not 1 <= length <= MOST_TEXT:
        raise BaseError(
            f"a text length of {length} is given; T5 reads 1 to {MOST_TEXT} tokens here "
            "(--text-tokens)"
        )


def _check_place(location: str) -> None:
    path = Path(location).expanduser()
    if path.is_file():
        raise BaseError(
            f"{location} is a file. Give a folder of diffusers (with model_index.json): "
            "StableDiffusionPipeline.from_single_file(…).save_pretrained(…) makes one of it"
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise BaseError(
            f"{location} is no pipeline of diffusers: it has no model_index.json; it holds {held}"
        )
    if not path.exists() and (location.startswith((".", "/", "~")) or location.count("/") > 1):
        raise BaseError(f"{location} does not exist; give a folder of diffusers, or a hub id")


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """diffusers' log at errors only, and no bars, for a while: what it says is in our notes."""
    logs = require("diffusers", extra="images").utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


# --- four bits -----------------------------------------------------------------------------------


def _quantised_(components: dict[str, nn.Module], quantize: str, placement: Placement) -> str:
    """Store the linears of transformers in 4 bits, in place; says what was done.

    Raises:
        BaseError: another way is asked for, or nothing here is a transformer.
        MissingDependencyError: bitsandbytes is not installed.
    """
    if quantize != "nf4":
        raise BaseError(f"quantize is {quantize!r}; pictures' transformers are stored as nf4")
    chosen = [n for n in components if n == "transformer" or _is_t5(components[n])]
    if "transformer" not in chosen:
        raise BaseError(
            "quantize='nf4' is for transformers (SD3, Flux), and this pipeline has a UNet, most "
            "of whose weights are convolutions. Leave it out"
        )
    with quiet_transformers():
        bnb = require("bitsandbytes", extra="quant", purpose="quantize='nf4'")
    count = 0
    for name in chosen:
        component = components[name].to(placement.dtype)
        for path, module in list(component.named_modules()):
            if type(module) is not nn.Linear or module.in_features % _BLOCK:
                continue
            parent = component.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], _packed(bnb, module, placement))
            count += 1
        component.to(placement.device)
        keep_bytes_in_order_(component)
        check_quantised(component)
    return f"{count} linears of {', '.join(chosen)} are stored as nf4"


def _packed(bnb: Any, linear: nn.Linear, placement: Placement) -> nn.Module:
    made: nn.Module = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=placement.dtype,
        quant_type="nf4",
        compress_statistics=True,
    )
    values: Any = bnb.nn.Params4bit(
        linear.weight.detach().contiguous(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
        module=made,
    )
    made.weight = values.to(placement.device)  # by which it is packed
    if linear.bias is not None:
        made.bias = linear.bias
    return made


def _is_t5(component: nn.Module) -> bool:
    return "T5" in type(component).__name__


def _moved_(component: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a component, unless it is there; one in four bits lies where it should."""
    parameter = next(component.parameters())
    if not _is_packed(component) and (parameter.device, parameter.dtype) != (device, dtype):
        component.to(device, dtype)


def _is_packed(component: nn.Module) -> bool:
    return any(type(module).__name__ == "Linear4bit" for module in component.modules())
