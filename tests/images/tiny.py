"""Tiny pipelines from configs, saved as diffusers folders, and small folders of pictures."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.formats.pictures import clip, sdxl_unet, t5, unet

FAMILIES = ("sd", "sdxl", "sd3", "flux")
WORDS = ("red", "blue", "green", "square", "round", "a", "of", "thing", "style", "dark")


def tokenizer(length: int = 8) -> Any:
    """Words of the captions here; ids below 32, as the text encoders have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=length,
    )  # fmt: skip


def vae(shift: float | None = None) -> Any:
    """Two pixels a latent's side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16, scaling_factor=0.5, shift_factor=shift,
    ).eval()  # fmt: skip


def sd3_transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
        pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    ).eval()  # fmt: skip


def flux_transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip


def make(family: str, prediction: str = "epsilon") -> Any:
    """A whole pipeline of random weights."""
    import diffusers

    torch.manual_seed(0)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = diffusers.DDIMScheduler(
        prediction_type=prediction, clip_sample=False, steps_offset=1, set_alpha_to_one=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family in ("sd", "pixels"):
            pixels = family == "pixels"
            inner = unet(in_channels=3, out_channels=3) if pixels else unet()
            return diffusers.StableDiffusionPipeline(
                vae=None if pixels else vae(), text_encoder=clip(), tokenizer=tokenizer(),
                unet=inner, scheduler=plain, safety_checker=None, feature_extractor=None,
                requires_safety_checker=False,
            )  # fmt: skip
        if family == "sdxl":
            return diffusers.StableDiffusionXLPipeline(
                vae=vae(), text_encoder=clip(), text_encoder_2=clip(projected=True),
                tokenizer=tokenizer(), tokenizer_2=tokenizer(), unet=sdxl_unet(),
                scheduler=plain, add_watermarker=False,
            )  # fmt: skip
        if family == "sd3":
            return diffusers.StableDiffusion3Pipeline(
                transformer=sd3_transformer(), scheduler=flow, vae=vae(0.1),
                text_encoder=clip(projected=True), tokenizer=tokenizer(),
                text_encoder_2=clip(projected=True), tokenizer_2=tokenizer(),
                text_encoder_3=_wide_t5(), tokenizer_3=tokenizer(),
            )  # fmt: skip
        return diffusers.FluxPipeline(
            scheduler=flow, vae=vae(0.1), text_encoder=clip(), tokenizer=tokenizer(),
            text_encoder_2=t5(), tokenizer_2=tokenizer(), transformer=flux_transformer(),
        )  # fmt: skip


def _wide_t5() -> Any:
    import transformers

    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32, d_model=32, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip


@functools.cache
def folder(family: str, prediction: str = "epsilon") -> Path:
    """A saved pipeline; made once for all tests of a process."""
    above = tempfile.mkdtemp(prefix="lorakit-tiny-")
    atexit.register(shutil.rmtree, above, ignore_errors=True)
    path = Path(above) / family
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(family, prediction).save_pretrained(path)
    return path


def pictures(path: Path, count: int = 6, size: int = 24) -> Path:
    """A folder of coloured squares and their captions."""
    path.mkdir(parents=True, exist_ok=True)
    colours = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 160, 40)}
    generator = np.random.default_rng(0)
    for number in range(count):
        name = list(colours)[number % 3]
        wide = size * 3 // 2 if number % 4 == 3 else size
        array = np.full((size, wide, 3), 240, np.uint8)
        array[4 : size - 4, 4 : wide - 4] = colours[name]
        noisy = array.astype(int) + generator.integers(-9, 9, array.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path / f"{number:02}.png")
        (path / f"{number:02}.txt").write_text(f"a {name} thing\n")
    return path
