"""Latents and embeddings on the disk: found again by what decides them, and by nothing else."""

from __future__ import annotations

import shutil

import torch

from lorakit.images.data import PictureSettings, PicturesPlan, load_pictures
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
    with torch.no_grad():
        base.pipe.text_encoder.get_input_embeddings().weight[5] += 1e-3
    assert filled(load_again(base), folder) == 4
    with torch.no_grad():
        base.pipe.vae.encoder.conv_in.bias[0] += 1e-3
    assert filled(load_again(base), folder) == 5


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
