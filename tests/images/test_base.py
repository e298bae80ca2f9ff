"""Pipelines as bases: what is adapted of them, four bits, and unusual ones."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
import transformers

import lorakit
from lorakit.core.spec import LoRASpec
from lorakit.errors import BaseError, InputError, TargetError
from lorakit.images.base import base_of, load_pipeline
from lorakit.images.cache import encoded_picture, fingerprint
from lorakit.images.data import PictureSettings, PicturesPlan, load_pictures
from lorakit.images.drawing import decoded
from lorakit.images.pictures import PicturesSpec
from lorakit.images.targets import picture_targets
from lorakit.images.task import PICTURES
from lorakit.layers.targets import resolve_targets
from lorakit.tasks.registry import kind_of
from lorakit.tasks.task import Stretch
from tests.formats.pictures import unet
from tests.images import tiny
from tests.images.conftest import loaded


def kinds_of(base, words, **changes):
    spec = LoRASpec(rank=1, targets=picture_targets(base, words, **changes))
    return {target.path: target.shape.kind for target in resolve_targets(base.model, spec)}


def test_targets_of_a_unet():
    base = loaded("sd")
    cross, attention = kinds_of(base, "cross-attention"), kinds_of(base, "attention")
    assert all(".attn2." in path for path in cross)
    assert len(attention) == 2 * len(cross)
    linear, conv = kinds_of(base, "all-linear"), kinds_of(base, "conv")
    assert set(attention) < set(linear) < set(conv)
    assert set(linear.values()) == {"linear"}
    assert "conv" in conv.values()
    assert "unet.conv_in" not in conv
    both = kinds_of(base, ["attention", "conv_in"], text=True)
    assert "unet.conv_in" in both
    assert sum(path.startswith("text_encoder.") for path in both) == 2 * 6


def test_targets_of_a_transformer():
    base = loaded("flux")
    with pytest.raises(TargetError, match="Give --targets attention"):
        picture_targets(base, "cross-attention")
    attention = kinds_of(base, "attention")
    assert "transformer.transformer_blocks.0.attn.add_k_proj" in attention
    assert "transformer.single_transformer_blocks.0.attn.to_q" in attention
    assert not any("ff" in path for path in attention)
    text = kinds_of(base, "attention", text=True)
    assert {path.partition(".")[0] for path in text} == {"transformer", "text_encoder"}


def test_four_bits(tmp_path):
    """A transformer of width 64 in nf4: its losses are near the dense one's, and it trains."""
    pipe = tiny.make("flux")
    pipe.transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    folder = tiny.pictures(tmp_path / "data", 3)
    found = []
    for quantize in (None, "nf4"):
        base = base_of(pipe, "tiny", quantize=quantize, text_length=8)
        data = load_pictures(PicturesPlan(PicturesSpec(str(folder)), 16), base)
        spec = LoRASpec(rank=2, targets=picture_targets(base, "attention"))
        handle = lorakit.attach(base.model, spec, "a", trainable=True)
        losses = PICTURES.on(base.model, handle).losses([Stretch(data[:3], "a")])
        losses.sum().backward()
        assert all(p.grad is not None for p in handle.parameters("a"))
        found.append(losses.item())
        handle.detach()
    assert any("are stored as nf4" in note for note in base.notes)
    assert 1e-4 < abs(found[0] - found[1]) < 0.1 * found[0]


def test_bfloat16(tmp_path):
    base = loaded("sd", dtype="bfloat16")
    plain = loaded("sd")
    assert base.pipe.vae.dtype == torch.float32
    folder, losses = tiny.pictures(tmp_path / "data", 2), []
    for one in (base, plain):
        data = load_pictures(PicturesPlan(PicturesSpec(str(folder)), 16), one)
        losses.append(PICTURES.on(one.model, None).losses([Stretch(data[:2], None)]).item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_another_text_encoder_and_an_autoencoder_without_a_distribution(tmp_path):
    """As the emoji's pipeline: a BERT, and AutoencoderTiny; saved, loaded, trained a step."""
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, pad_token_id=1, use_attention_mask=True,
    )  # fmt: skip
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=3,
        ),
        text_encoder=transformers.BertModel(config, add_pooling_layer=False),
        tokenizer=tiny.tokenizer(), unet=unet(in_channels=3, out_channels=3),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "pipe")
    base = load_pipeline(tmp_path / "pipe", device="cpu", dtype="float32")
    folder = tiny.pictures(tmp_path / "data", 3)
    settings = PictureSettings(train_text=True)
    data = load_pictures(PicturesPlan(PicturesSpec(str(folder)), 16, settings), base)
    spec = LoRASpec(rank=2, targets=picture_targets(base, "attention", text=True))
    handle = lorakit.attach(base.model, spec, "a", trainable=True)
    try:
        assert sum(p.startswith("text_encoder.") for p in handle.snapshot("a").sites) == 12
        PICTURES.on(base.model, handle).losses([Stretch(data[:3], "a")]).sum().backward()
        assert all(p.grad is not None for p in handle.parameters("a"))
    finally:
        handle.detach()


def test_pixels_survive_encoding_and_decoding(tmp_path):
    """Without a VAE latents are pixels; crops are at the middle."""
    base = loaded("pixels")
    folder = tiny.pictures(tmp_path / "data", 4)
    data = load_pictures(PicturesPlan(PicturesSpec(str(folder)), 8, square=True), base)
    example = data[3]
    latent = encoded_picture(base, example.picture, example.placed)
    assert set(latent) == {"mean"}
    assert latent["mean"].shape == (3, 8, 8)
    again = decoded(base, latent["mean"][None])[0]
    torch.testing.assert_close(again * 2 - 1, latent["mean"])
    from PIL import Image

    whole = Image.open(example.picture.path).resize((12, 8), Image.Resampling.LANCZOS)
    expected = np.asarray(whole.crop((2, 0, 10, 8)), np.float32) / 127.5 - 1
    torch.testing.assert_close(latent["mean"].permute(1, 2, 0), torch.from_numpy(expected))


def test_a_fingerprint_tells_weights_apart():
    base = loaded("sd")
    before = fingerprint(base.pipe.vae)
    assert before == fingerprint(base.pipe.vae)
    with torch.no_grad():
        base.pipe.vae.decoder.conv_out.bias[0] += 1e-3
    assert fingerprint(base.pipe.vae) != before
    with torch.no_grad():
        base.pipe.vae.decoder.conv_out.bias[0] -= 1e-3


def test_an_unknown_pipeline(tmp_path):
    pipe = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())
    with pytest.raises(BaseError, match="a DDPMPipeline is given"):
        base_of(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(BaseError, match="is a DDPMPipeline; pictures are trained with Flux"):
        load_pipeline(tmp_path / "pipe")
    with pytest.raises(BaseError, match="is no pipeline"):
        PICTURES.on(torch.nn.Linear(1, 1), None)
    with pytest.raises(InputError, match="lorakit images train --resume"):
        kind_of({"name": PICTURES.name})
