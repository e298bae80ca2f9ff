"""Tiny pipelines from configs, and adapters of all that can be adapted in them."""

from __future__ import annotations

import contextlib
import random
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from lorakit.formats.format import Format, Hints, Reading, Source, Written

# --- models --------------------------------------------------------------------------------------


def unet(**changes: Any) -> nn.Module:
    """SD1's shape: convolutions around the attention, cross-attention in all blocks but one."""
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**settings | changes).eval()


def sdxl_unet(**changes: Any) -> nn.Module:
    """SDXL's shape: three blocks, the first without attention, several transformer blocks."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16, 16),
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 16,
    }
    return unet(**settings | changes)


def clip(*, projected: bool = False) -> nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, projection_dim=16, bos_token_id=0,
        eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def t5() -> nn.Module:
    import transformers

    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip


def components(family: str) -> dict[str, nn.Module]:
    """The parts of a pipeline that can be adapted."""
    if family == "sd1":
        return {"unet": unet(), "text_encoder": clip()}
    if family == "sdxl":
        return {
            "unet": sdxl_unet(), "text_encoder": clip(), "text_encoder_2": clip(projected=True)
        }  # fmt: skip
    return {"transformer": flux(), "text_encoder": clip(), "text_encoder_2": t5()}


class _NoTokenizer:
    """diffusers asks a Flux pipeline for the length that its tokenizer takes, and no more."""

    model_max_length = 16


def pipeline(family: str, parts: Mapping[str, nn.Module]) -> Any:
    """A real pipeline around the components; what loading adapters does not need is missing."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family == "sd1":
            return diffusers.StableDiffusionPipeline(
                vae=None, tokenizer=None, scheduler=diffusers.DDIMScheduler(),
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
                **parts,
            )  # fmt: skip
        if family == "sdxl":
            return diffusers.StableDiffusionXLPipeline(
                vae=None, tokenizer=None, tokenizer_2=None,
                scheduler=diffusers.DDIMScheduler(), add_watermarker=False, **parts,
            )  # fmt: skip
        return diffusers.FluxPipeline(
            vae=None, tokenizer=None, tokenizer_2=None,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts,
        )  # fmt: skip


@torch.no_grad()
def outputs(family: str, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What each component answers to one fixed input."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.arange(6).reshape(1, 6) + 3
    found = {n: m(ids)[0] for n, m in parts.items() if n.startswith("text_encoder")}
    if family == "flux":
        found["transformer"] = parts["transformer"](
            hidden_states=randn(1, 4, 4), encoder_hidden_states=randn(1, 3, 16),
            pooled_projections=randn(1, 16), timestep=torch.tensor([0.5]),
            guidance=torch.tensor([1.0]), img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3),
        ).sample  # fmt: skip
        return found
    more: dict[str, Any] = {}
    if family == "sdxl":
        more = {"added_cond_kwargs": {"text_embeds": randn(1, 16), "time_ids": randn(1, 6)}}
    width = parts["unet"].config.cross_attention_dim
    sample, context = randn(1, 4, 8, 8), randn(1, 3, width)
    found["unet"] = parts["unet"](sample, 10, context, **more).sample
    return found


# --- adapters ------------------------------------------------------------------------------------


def adaptable(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Path with its component → every linear and convolution."""
    return {
        f"{component}.{path}": module
        for component, model in parts.items()
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def site_for(
    module: nn.Module, rank: int, scaling: float, generator: torch.Generator, dtype=torch.float32
) -> LowRank:
    """A site of random values that fits a module."""
    weight = module.weight
    ones = [1] * (weight.ndim - 2)
    # small, since several hundred sites act on one output
    A = torch.randn(rank, *weight.shape[1:], generator=generator, dtype=torch.float64) * 0.2
    B = torch.randn(weight.shape[0], rank, *ones, generator=generator, dtype=torch.float64) * 0.2
    return LowRank(A.to(dtype), B.to(dtype), scaling, "conv" if ones else "linear")


def adapter_for(
    parts: Mapping[str, nn.Module],
    *,
    ranks: Iterable[int] = (4,),
    scalings: Iterable[float] = (1.0,),
    share: float = 1.0,
    seed: int = 0,
) -> Adapter:
    """An adapter of a share of all modules, with ranks and scalings drawn from those given.

    Text encoders are adapted whole: diffusers fails on kohya's files where their output
    projections and their MLP are missing.
    """
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    ranks, scalings = list(ranks), list(scalings)
    sites = {
        path: site_for(module, draw.choice(ranks), draw.choice(scalings), generator)
        for path, module in adaptable(parts).items()
        if draw.random() < share or path.startswith("text_encoder")
    }
    return Adapter(sites)


def of_component(adapter: Adapter, component: str) -> Adapter | None:
    """The sites of one component, under the paths of its model."""
    found = {
        path.removeprefix(component + "."): site
        for path, site in adapter.sites.items()
        if path.startswith(component + ".")
    }
    return adapter.with_(sites=found) if found else None


@contextlib.contextmanager
def attached(
    parts: Mapping[str, nn.Module], adapter: Adapter, weight: float = 1.0
) -> Iterator[None]:
    """Our own adapter on the components, at a weight."""
    import lorakit

    with contextlib.ExitStack() as stack:
        for component, model in parts.items():
            inner = of_component(adapter, component)
            if inner is not None:
                handle = lorakit.attach(model, inner, name="a")
                stack.callback(handle.detach)
                stack.enter_context(handle.use({"a": weight}))
        yield


def delta(site: LowRank) -> Tensor:
    """ΔW in float64 as a matrix ``[d_out, …]``, from the definition."""
    A, B = site.A.double().flatten(1), site.B.double().flatten(1)
    return site.scaling * B @ A


# --- files ---------------------------------------------------------------------------------------


def write(written: Written, folder: Path) -> Path:
    """The one file of a format on the disk."""
    ((name, content),) = written.files.items()
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    return path


def read(form: Format, path: Path, hints: Hints | None = None) -> Reading:
    source = Source(path, path)
    assert form.recognises(source)
    return form.read(source, hints or Hints())


def round_trip(
    form: Format, adapter: Adapter, hints: Hints | None = None
) -> tuple[Reading, Written, bytes]:
    """What comes back, what was written, and its bytes."""
    written = form.write(adapter, hints or Hints())
    with tempfile.TemporaryDirectory() as folder:
        path = write(written, Path(folder))
        return read(form, path), written, path.read_bytes()
