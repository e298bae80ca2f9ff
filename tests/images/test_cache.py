"""Latents and embeddings on the disk: found again by what decides them, and by nothing else."""

from __future__ import annotations

import shutil

import torch
from PIL import Image
from safetensors.torch import save_file

from lorakit.images.buckets import Placed
from lorakit.images.cache import encoded_caption, encoded_picture, pixels_of
from lorakit.images.data import PictureSettings, PicturesPlan, load_pictures
from lorakit.images.drawing import decoded
from lorakit.images.pictures import PicturesSpec
from tests.images import tiny
from tests.images.conftest import loaded


def filled(base, folder, resolution=16, **settings):
    """How many had to be computed: six pictures, three captions."""
    plan = PicturesPlan(PicturesSpec(str(folder)), resolution, PictureSettings(**settings))
    return load_pictures(plan, base).fill()


def test_what_decides_a_file(tmp_path):
    base, folder = loaded("sd"), tiny.pictures(tmp_path / "data")
    assert filled(base, folder) == 6 + 3
    assert filled(base, folder) == 0
    shutil.copytree(folder, tmp_path / "moved")
    assert filled(base, tmp_path / "moved") == 0
    (folder / "00.txt").write_text("another caption")
    assert filled(base, folder) == 1
    shutil.copy(folder / "01.png", folder / "02.png")  # seen already, and the old one is no more
    assert filled(base, folder) == 0
    assert filled(base, folder, resolution=20) == 5
    assert filled(base, folder, caption_dropout=0.1) == 1  # the empty one
    assert filled(base, folder, train_text=True) == 0
    assert filled(base, folder, flip=True) == 5
    with torch.no_grad():
        base.pipe.text_encoder.get_input_embeddings().weight[5] += 1e-3
    assert filled(load_again(base), folder) == 4
    with torch.no_grad():
        base.pipe.vae.encoder.conv_in.bias[0] += 1e-3
    assert filled(load_again(base), folder) == 5


def test_a_file_that_was_not_written_under_its_name(tmp_path, caplog):
    """Whatever it holds: other names, other shapes, or another picture's."""
    base, folder = loaded("sd"), tiny.pictures(tmp_path / "data", 2)
    data = load_pictures(PicturesPlan(PicturesSpec(str(folder)), 16), base)
    data.fill()
    one, other = (data.cache._latent_path(data[i].picture, data[i].placed) for i in (0, 1))
    whole = one.read_bytes()
    for tensors in ({"other": torch.ones(2)}, {"mean": torch.ones(4, 2, 2)}, None):
        shutil.copy(other, one)
        if tensors is not None:
            save_file(tensors, one)
        assert filled(base, folder) == 1
        assert one.read_bytes() == whole
    assert caplog.text.count(f"{one} is not what was written there") == 3


@torch.no_grad()
def test_a_vae_that_says_the_mean_and_spread_of_its_latents(tmp_path):
    """Encoded as SDXL's pipeline decodes, and as diffusers' training scripts encode."""
    base, folder = loaded("sd"), tiny.pictures(tmp_path / "data", 1)
    vae, mean, std = base.pipe.vae, [0.1, -0.2, 0.3, 0.4], [0.5, 0.8, 1.2, 2.0]
    vae.register_to_config(latents_mean=mean, latents_std=std)
    example = load_pictures(PicturesPlan(PicturesSpec(str(folder)), 16), base)[0]
    found = encoded_picture(base, example.picture, example.placed)
    spread = vae.encode(pixels_of(example.picture, example.placed)[0][None]).latent_dist
    mean, std = torch.tensor(mean).view(4, 1, 1), torch.tensor(std).view(4, 1, 1)
    torch.testing.assert_close(found["mean"], (spread.mean[0] - mean) * 0.5 / std)
    torch.testing.assert_close(found["std"], spread.std[0] * 0.5 / std)
    expected = (vae.decode(spread.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded(base, found["mean"][None]), expected, rtol=1e-5, atol=1e-5)


def test_a_mirrored_picture_is_the_same_part_of_it(tmp_path):
    """Of a picture that is cropped, and of its mask; in a file of its own."""
    base, folder = loaded("sd"), tiny.pictures(tmp_path / "data", 4)
    Image.new("L", (36, 24)).save(folder / "03.mask.png")
    with Image.open(folder / "03.mask.png") as mask:
        mask.paste(255, (0, 0, 12, 24))
        mask.save(folder / "03.mask.png")
    plan = PicturesPlan(PicturesSpec(str(folder), masks=True), 16, square=True)
    for one in load_pictures(plan, base):
        other = one.mirrored()
        pixels = pixels_of(one.picture, one.placed)[0]
        assert torch.equal(pixels_of(other.picture, other.placed)[0], pixels.flip(-1))
        assert not torch.equal(other.latent()["mean"], one.latent()["mean"])
    assert torch.equal(other.latent()["mask"], one.latent()["mask"].flip(-1))
    assert not torch.equal(other.latent()["mask"], one.latent()["mask"])


def test_an_odd_crop_is_mirrored_too():
    """The denoisers that are told where a picture is cropped are told it of the mirrored one."""
    placed = Placed(16, 16, (16, 21), 0, 2, (32, 42))
    assert placed.mirrored().left == 3
    assert placed.mirrored().mirrored() == placed


def test_an_empty_caption_is_what_guidance_compares_with():
    base = loaded("sdxl")
    text, no_text, pooled, not_pooled = base.pipe.encode_prompt("a red thing", device="cpu")
    found = base.family.encode(base.pipe, ["", "a red thing"], None)
    torch.testing.assert_close(found["text"], torch.cat([no_text, text]))
    torch.testing.assert_close(found["pooled"], torch.cat([not_pooled, pooled]))
    assert not found["text"][0].any()
    base.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert all(tensor.any() for tensor in encoded_caption(base, "").values())


def load_again(base):
    """The same pipeline with its changed weights, as a base of its own."""
    from lorakit.images.base import base_of

    return base_of(base.pipe, base.ref)


def test_captions_that_are_not_read_to_their_end(tmp_path):
    folder = tiny.pictures(tmp_path / "data", 2)
    (folder / "00.txt").write_text("a " * 20)
    plan = PicturesPlan(PicturesSpec(str(folder)), 16)
    (note,) = load_pictures(plan, loaded("sd")).report.pictures.notes
    assert note.startswith("text_encoder reads 8 tokens, and 1 of 2 captions are longer")
    notes = load_pictures(plan, loaded("flux")).report.pictures.notes
    assert [one.partition(" ")[0] for one in notes] == ["text_encoder", "text_encoder_2"]
