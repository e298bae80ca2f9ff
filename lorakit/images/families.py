"""What differs between picture models: a small description for each family.

A family says which components of its pipeline there are, how it encodes text, and how its denoiser
is called. The rest (reading pictures, noise, the loop, files, sampling) is the same for all. Text
is encoded by the pipelines themselves, and a picture is made by calling them.

========= ============ ===================================================== =================
family    denoiser     conditioning                                          noise
========= ============ ===================================================== =================
``sd``    unet         text                                                  ε, v or x
``sdxl``  unet         text of two encoders, pooled text, sizes and crop     ε or v
``sd3``   transformer  text of three encoders, pooled text of two            flow
``flux``  transformer  T5's text, CLIP's pooled text, positions              flow
========= ============ ===================================================== =================

``sd`` is Stable Diffusion 1 and 2, and every pipeline of that class: another text encoder is
welcome, and so is ``vae: null`` in ``model_index.json``, which says that the latents are the pixels
themselves, from -1 to 1.

Legend: ``B`` pictures, ``C, H, W`` of a latent, ``L`` tokens of text, ``d`` width of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.images.buckets import Placed

#: one caption's conditioning, by name: ``text`` [L, d], perhaps ``pooled`` [d]
Text = Mapping[str, Tensor]


class Denoise(Protocol):
    """How a family's denoiser is called."""

    def __call__(
        self, pipe: Any, x: Tensor, time: Tensor, text: Text, placed: Sequence[Placed]
    ) -> Tensor:
        """The prediction [B, C, H, W].

        Args:
            x: [B, C, H, W], noised latents.
            time: [B] float32, of 0 to the number of the schedule's steps.
            text: each [B, …].
            placed: where the pictures come from.
        """


class Encode(Protocol):
    """How a family encodes captions."""

    def __call__(self, pipe: Any, captions: Sequence[str], length: int | None) -> dict[str, Tensor]:
        """The conditioning, each [B, …].

        Args:
            captions: an empty one stands for none, as what guidance compares with.
            length: tokens of T5's text; ``None`` where the family has no choice.
        """


@dataclass(frozen=True)
class Family:
    """One family of pipelines."""

    name: str
    pipelines: tuple[str, ...]
    """diffusers' classes."""
    denoiser: str
    """The component whose name stands before the paths of its modules."""
    text_encoders: tuple[str, ...]
    trained_text: tuple[str, ...]
    """Those that can be trained: the CLIP ones, which adapter files have names for."""
    encode: Encode
    denoise: Denoise
    text_length: int | None = None
    """Tokens of T5's text, by default."""
    resolution: int = 512
    """Where the pipeline does not tell."""
    guidance: float = 7.5
    """Of sampling, by default; the pipelines' own."""
    tiles: bool = True
    """Whether guidance doubles a forward's rows."""


# --- Stable Diffusion 1 and 2 --------------------------------------------------------------------


def _encode_sd(pipe: Any, captions: Sequence[str], length: int | None) -> dict[str, Tensor]:
    text, _ = pipe.encode_prompt(list(captions), _device(pipe), 1, False)
    return {"text": text}


def _denoise_sd(pipe: Any, x: Tensor, time: Tensor, text: Text, placed: Sequence[Placed]) -> Tensor:
    found: Tensor = pipe.unet(x, time, encoder_hidden_states=text["text"], return_dict=False)[0]
    return found[:, : x.shape[1]]  # what may be behind it is a learnt variance


# --- SDXL ----------------------------------------------------------------------------------------


def _encode_sdxl(pipe: Any, captions: Sequence[str], length: int | None) -> dict[str, Tensor]:
    text, _, pooled, _ = pipe.encode_prompt(
        list(captions), device=_device(pipe), do_classifier_free_guidance=False
    )
    if pipe.config.get("force_zeros_for_empty_prompt"):  # what its guidance compares with
        told = torch.tensor([bool(caption) for caption in captions], device=text.device)
        text, pooled = text * told[:, None, None], pooled * told[:, None]
    return {"text": text, "pooled": pooled}


def _denoise_sdxl(
    pipe: Any, x: Tensor, time: Tensor, text: Text, placed: Sequence[Placed]
) -> Tensor:
    # Podell et al., arXiv 2307.01952, section 2.2: original size, crop, and size as it is seen
    sizes = [
        pipe._get_add_time_ids(
            one.original,
            (one.top, one.left),
            (one.height, one.width),
            x.dtype,
            text["pooled"].shape[-1],
        )
        for one in placed
    ]
    added = {"text_embeds": text["pooled"], "time_ids": torch.cat(sizes).to(x.device)}
    found: Tensor = pipe.unet(
        x,
        time,
        encoder_hidden_states=text["text"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return found


# --- Stable Diffusion 3 --------------------------------------------------------------------------


def _encode_sd3(pipe: Any, captions: Sequence[str], length: int | None) -> dict[str, Tensor]:
    text, _, pooled, _ = pipe.encode_prompt(
        list(captions),
        None,
        None,
        device=_device(pipe),
        do_classifier_free_guidance=False,
        max_sequence_length=length,
    )
    return {"text": text, "pooled": pooled}


def _denoise_sd3(
    pipe: Any, x: Tensor, time: Tensor, text: Text, placed: Sequence[Placed]
) -> Tensor:
    found: Tensor = pipe.transformer(
        hidden_states=x,
        timestep=time,
        encoder_hidden_states=text["text"],
        pooled_projections=text["pooled"],
        return_dict=False,
    )[0]
    return found


# --- Flux ----------------------------------------------------------------------------------------


def _encode_flux(pipe: Any, captions: Sequence[str], length: int | None) -> dict[str, Tensor]:
    text, pooled, _ = pipe.encode_prompt(
        list(captions), None, device=_device(pipe), max_sequence_length=length
    )
    return {"text": text, "pooled": pooled}


def _denoise_flux(
    pipe: Any, x: Tensor, time: Tensor, text: Text, placed: Sequence[Placed]
) -> Tensor:
    batch, channels, height, width = x.shape
    guidance = None
    if pipe.transformer.config.guidance_embeds:
        # the strength whose distilled model is the undistilled one
        guidance = torch.ones(batch, device=x.device)
    found: Tensor = pipe.transformer(
        hidden_states=pipe._pack_latents(x, batch, channels, height, width),
        timestep=time / 1000,
        guidance=guidance,
        pooled_projections=text["pooled"],
        encoder_hidden_states=text["text"],
        txt_ids=torch.zeros(text["text"].shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype),
        return_dict=False,
    )[0]
    unpacked = found.view(batch, height // 2, width // 2, channels, 2, 2)
    return unpacked.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def _device(pipe: Any) -> torch.device:
    return next(denoiser_of(pipe).parameters()).device


FAMILIES = (
    Family(
        name="sd",
        pipelines=("StableDiffusionPipeline",),
        denoiser="unet",
        text_encoders=("text_encoder",),
        trained_text=("text_encoder",),
        encode=_encode_sd,
        denoise=_denoise_sd,
    ),
    Family(
        name="sdxl",
        pipelines=("StableDiffusionXLPipeline",),
        denoiser="unet",
        text_encoders=("text_encoder", "text_encoder_2"),
        trained_text=("text_encoder", "text_encoder_2"),
        encode=_encode_sdxl,
        denoise=_denoise_sdxl,
        resolution=1024,
        guidance=5.0,
    ),
    Family(
        name="sd3",
        pipelines=("StableDiffusion3Pipeline",),
        denoiser="transformer",
        text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        trained_text=("text_encoder", "text_encoder_2"),
        encode=_encode_sd3,
        denoise=_denoise_sd3,
        text_length=256,
        resolution=1024,
        guidance=7.0,
    ),
    Family(
        name="flux",
        pipelines=("FluxPipeline",),
        denoiser="transformer",
        text_encoders=("text_encoder", "text_encoder_2"),
        trained_text=("text_encoder",),
        encode=_encode_flux,
        denoise=_denoise_flux,
        text_length=512,
        resolution=1024,
        guidance=3.5,
        tiles=False,
    ),
)
#: diffusers' class → its family
BY_PIPELINE = {name: family for family in FAMILIES for name in family.pipelines}


def denoiser_of(pipe: Any) -> nn.Module:
    """The component that predicts noise."""
    found: nn.Module = getattr(pipe, BY_PIPELINE[type(pipe).__name__].denoiser)
    return found


# --- facts that all families share ---------------------------------------------------------------


def latent_scale(pipe: Any) -> int:
    """Pixels of a latent's side: 8 of most, 1 where the latents are the pixels."""
    return 1 if getattr(pipe, "vae", None) is None else int(pipe.vae_scale_factor)


def latent_range(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and scale, each [1 or C, 1, 1]: the denoiser knows ``(latent - offset) * scale``.

    Args:
        like: a tensor of the device and dtype that they get.
    """
    config = vae.config
    offset = like.new_tensor([config.get("shift_factor") or 0.0]).view(-1, 1, 1)
    scale = like.new_tensor([config.scaling_factor]).view(-1, 1, 1)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        offset = offset + like.new_tensor(mean).view(-1, 1, 1)
        scale = scale / like.new_tensor(std).view(-1, 1, 1)
    return offset, scale


def size_step(pipe: Any) -> int:
    """What a picture's sides are multiples of, so that no block of the denoiser has to round."""
    denoiser: Any = denoiser_of(pipe)
    config = denoiser.config
    if "block_out_channels" in config:
        halvings = len(config["block_out_channels"]) - 1
        return latent_scale(pipe) * int(2**halvings)
    if type(pipe).__name__ == "FluxPipeline":
        return latent_scale(pipe) * 2
    return latent_scale(pipe) * int(config["patch_size"])


def resolution_of(pipe: Any) -> int:
    """Side of the squares that the pipeline makes, unasked."""
    family = BY_PIPELINE[type(pipe).__name__]
    denoiser: Any = denoiser_of(pipe)
    sample = denoiser.config.get("sample_size")
    if isinstance(sample, int) and sample > 0:
        return sample * latent_scale(pipe)
    return family.resolution
