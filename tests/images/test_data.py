"""The pictures of a run: those that are left out, and those that are held out."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lorakit.core.spec import LoRASpec
from lorakit.errors import DataError
from lorakit.images.data import PictureSettings, PicturesPlan, load_pictures
from lorakit.images.pictures import PicturesSpec
from lorakit.images.targets import picture_targets
from lorakit.images.training import picture_trainer
from lorakit.train import TrainSettings
from tests.images import tiny
from tests.images.conftest import loaded


@pytest.fixture(scope="module")
def base():
    return loaded("sd")


def test_small_pictures_are_among_those_that_cannot_be_used(base, tmp_path):
    folder = tiny.pictures(tmp_path / "data", 3)
    (folder / "00.png").write_bytes(b"")
    (folder / "deep").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "deep" / "s.png")
    with pytest.raises(DataError) as caught:
        load_pictures(PicturesPlan(PicturesSpec(str(folder), "x"), 16), base)
    for line in ("00.png: the file is empty", "deep/s.png: it is 9 × 9 pixels, too small"):
        assert line in str(caught.value)
    spec = PicturesSpec(str(folder), "x", bad="skip")
    report = load_pictures(PicturesPlan(spec, 16), base).report.pictures
    assert (report.found, report.used, len(report.left_out)) == (4, 2, 2)
    assert load_pictures(PicturesPlan(spec, 8), base).report.pictures.used == 3
    with pytest.raises(DataError, match="holds no picture that can be used: 4 were left out"):
        load_pictures(PicturesPlan(spec, 64), base)


def test_pictures_that_may_be_mirrored_are_other_data(base, tmp_path):
    """And those that may not are the data that they were before there was such a setting."""
    spec = PicturesSpec(str(tiny.pictures(tmp_path / "data", 2)))
    plans = [PicturesPlan(spec, 16, PictureSettings(flip=flip)) for flip in (False, True)]
    plain, both = (load_pictures(plan, base) for plan in plans)
    assert both.digest != plain.digest
    assert PicturesPlan.from_dict(both.spec.to_dict()) == both.spec
    assert "flip" not in f"{plain.settings} {plain[0].placed}"
    section = plain.spec.to_dict()
    del section["settings"]["flip"]
    assert PicturesPlan.from_dict(section) == plain.spec


def trainer_of(base, tmp_path, own, prior=0, batch_size=4, fraction=None):
    """A trainer on ``own`` different pictures, and ``prior`` of a class."""
    folders = [tiny.pictures(tmp_path / name, n) for name, n in (("own", own), ("class", prior))]
    specs = [PicturesSpec(str(folder)) for folder in folders]
    plan = PicturesPlan(specs[0], 16, prior=specs[1] if prior else None)
    spec = LoRASpec(rank=1, targets=picture_targets(base, "cross-attention"))
    settings = TrainSettings(
        steps=1, batch_size=batch_size, samples=0, validation_fraction=fraction
    )
    return picture_trainer(base, plan, spec, settings, str(tmp_path / "run"))


@pytest.mark.parametrize(("prior", "batch_size"), [(20, 4), (0, 64)])
def test_nothing_is_held_out_of_few_pictures(base, tmp_path, prior, batch_size):
    """Neither a class that is to stay nor repetitions make them more."""
    trainer = trainer_of(base, tmp_path, 5, prior, batch_size)
    assert len(trainer.data) >= 40
    assert trainer.validation is None
    assert any("5 pictures are too few" in note for note in trainer.notes)


@pytest.mark.parametrize(("fraction", "count"), [(None, 16), (0.5, 20)])
def test_only_pictures_to_learn_are_held_out(base, tmp_path, fraction, count):
    trainer = trainer_of(base, tmp_path, 40, 20, fraction=fraction)
    data, held = trainer.validation
    assert len(held) == count
    assert {Path(data.where(i)).parent.name for i in held} == {"own"}
