# requires: diffusers==0.42.1
# requires: transformers==5.23.0
# requires: torch
# requires: numpy
# requires: einops==0.8.2
# without: torchvision
"""sd-scripts' network on its own UNet of SDXL, whose modules have Stability's names.

diffusers' UNet has the same weights, through diffusers' own converter of checkpoints: a name of
ours that stood for another module would show in the outputs.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # our own code, in this environment

import torch
from diffusers.loaders.single_file_utils import LDM_UNET_KEY, convert_ldm_unet_checkpoint

from tests.formats.pictures import clip, outputs, sdxl_unet
from tests.interop.runtimes.cases import Work
from tests.interop.runtimes.check_sd_scripts import (
    BAR,
    LORA,
    Base,
    both_ways,
    imported,
    largest,
    stub_library,
    the_file,
)

UNET = "library/sdxl_original_unet.py"

#: of the first level; twice and four times as many follow, in heads of 64
CHANNELS = 32


def tiny_unet(code, ours: torch.nn.Module) -> torch.nn.Module:
    """Its UNet at random in few channels, called as diffusers calls its own."""
    settings = ours.config
    code.MODEL_CHANNELS = CHANNELS
    code.TIME_EMBED_DIM = 4 * CHANNELS
    code.ADM_IN_CHANNELS = settings.projection_class_embeddings_input_dim
    # one of its versions spaces the frequencies of a time otherwise than SDXL was trained with
    waves = functools.partial(code.get_timestep_embedding, downscale_freq_shift=0)
    code.get_timestep_embedding = waves

    class Unet(code.SdxlUNet2DConditionModel):
        config = settings

        def forward(self, sample, timestep, context, added_cond_kwargs):
            texts, sizes = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            sizes = waves(sizes.flatten(), settings.addition_time_embed_dim)
            y = torch.cat([texts, sizes.reshape(len(texts), -1)], dim=1)
            found = super().forward(sample, torch.tensor([timestep]), context, y)
            return types.SimpleNamespace(sample=found)

    return Unet().eval()


def base_of(code) -> Base:
    torch.manual_seed(0)
    ours = sdxl_unet(
        block_out_channels=(CHANNELS, 2 * CHANNELS, 4 * CHANNELS),
        attention_head_dim=(1, CHANNELS // 32, CHANNELS // 16),  # the number of heads
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        norm_num_groups=32,
    )
    theirs = tiny_unet(code, ours)
    weights = {f"{LDM_UNET_KEY}{name}": x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(convert_ldm_unet_checkpoint(weights, ours.config))
    texts = {"text_encoder": clip(), "text_encoder_2": clip(projected=True)}
    return Base(
        "sdxl",
        {"unet": ours, **texts},
        {"unet": theirs, **texts},
        ("input_blocks_7_1", "input_blocks_8_1"),
    )


def main() -> None:
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    work = Work("sd_scripts_xl")
    files = [the_file(work, name) for name in (UNET, LORA)]
    stub_library()
    base = base_of(imported("library.sdxl_original_unet", files[0]))
    theirs = imported("sd_scripts_lora", files[1])
    bare, meant = outputs("sdxl", base.theirs), outputs("sdxl", base.ours)
    work.agrees("both bases, bare: outputs", largest(bare, meant), 0, BAR, "outputs")
    both_ways(work, theirs, base)


if __name__ == "__main__":
    main()
