"""Whole runs on tiny pipelines: files that diffusers reads, kills and resumes, styles together."""

from __future__ import annotations

import dataclasses
import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import lorakit
from lorakit.core.spec import LoRASpec
from lorakit.errors import Interrupted, TrainingError
from lorakit.formats.convert import convert
from lorakit.images import training
from lorakit.images.data import PictureSettings, PicturesPlan
from lorakit.images.drawing import Cell, draw
from lorakit.images.pictures import PicturesSpec
from lorakit.images.targets import picture_targets
from lorakit.images.task import PictureTask
from lorakit.images.training import (
    SheetMaker,
    Sheets,
    finish,
    picture_trainer,
    resume_pictures,
    train_pictures,
)
from lorakit.train import Callback, RunInfo, RunResult, TrainSettings
from lorakit.train.callbacks import CallbackList
from tests.images import tiny
from tests.images.conftest import loaded

SHEETS = Sheets(prompts=("a red thing",), seeds=(0,), steps=2, every=4)
UNEQUAL = {"sd": {r"conv\d": 3, "to_k": 5}, "sdxl": {r"conv\d": 3, "to_k": 5}}
#: what the two runs of the same work have to leave equal, byte for byte
SAME = ("adapter/adapter_model.safetensors", "samples/step-00000000.png",
        "samples/step-00000004.png", "samples/step-00000008.png", "samples/kept.png")  # fmt: skip


def run_on(base, folder, out, *, words="attention", steps=8, ranks=None, callbacks=(), **changes):
    """A trainer; its text encoder is adapted where a rate for it is given."""
    text, every = changes.pop("text", False), changes.pop("every", 4)
    picture = changes.pop("picture", {})
    plan = PicturesPlan(PicturesSpec(str(folder)), 16, PictureSettings(train_text=text, **picture))
    spec = LoRASpec(
        rank=2, targets=picture_targets(base, words, text=text), rank_pattern=ranks or {},
        alpha_pattern={"to_q": 1.0} if ranks else {},
    )  # fmt: skip
    given = {"lr": 2e-2, "batch_size": 2, "steps": steps, "checkpoint_every": 2, **changes}
    settings = TrainSettings(validation_fraction=0.3, samples=0, **given)
    sheets = dataclasses.replace(SHEETS, every=every, off=not every)
    return picture_trainer(base, plan, spec, settings, str(out), sheets=sheets, callbacks=callbacks)


def finished(trainer):
    (result,) = train_pictures([trainer])
    if isinstance(result, Exception):
        raise result
    return result


#: steps, rate, and steps between two sheets
LENGTHS = [(8, 2e-2, 4), pytest.param((30, 5e-3, 14), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=LENGTHS, ids=["8 steps", "30 steps"])
def trained(request, family, tmp_path_factory):
    """A run: convolutions, text encoders and unequal ranks where there are such."""
    steps, lr, every = request.param
    folder = tmp_path_factory.mktemp(family)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("LORAKIT_CACHE", str(folder / "cache"))
        base = loaded(family, "v_prediction" if family == "sdxl" else "epsilon")
        words = {"sd": "conv", "sdxl": ["cross-attention", r"unet\..*conv1"]}
        words = words.get(family, "all-linear")
        result = finished(
            run_on(
                base,
                tiny.pictures(folder / "data"),
                folder / "run",
                words=words,
                steps=steps,
                ranks=UNEQUAL.get(family, {"to_k": 3}),
                text=True,
                every=every,
                lr=lr,
                picture={"caption_dropout": 0.1},
            )
        )
    return base, result, every


def test_a_run_of_each_family(family, trained):
    _, result, every = trained
    assert result.best_loss < result.base_loss
    adapter = lorakit.load_adapter(result.adapter)
    first = {path.partition(".")[0] for path in adapter.sites}
    assert (
        first
        == {
            "sd": {"unet", "text_encoder"},
            "sdxl": {"unet", "text_encoder", "text_encoder_2"},
            "sd3": {"transformer", "text_encoder", "text_encoder_2"},
            "flux": {"transformer", "text_encoder"},
        }[family]
    )
    kinds = {site.kind for site in adapter.low_rank.values()}
    assert kinds == ({"linear", "conv"} if family in UNEQUAL else {"linear"})
    assert len({site.rank for site in adapter.low_rank.values()}) > 1
    assert adapter.provenance["data"]["resolution"] == 16
    assert "perplexity" not in adapter.provenance["metrics"]
    for name in ("step-00000000.png", f"step-{every:08}.png", "kept.png"):
        with Image.open(result.out / "samples" / name) as sheet:
            assert min(sheet.size) > 100
    page = (result.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "lorakit images sample" in page
    assert "erplexity" not in page


FORMATS = [
    ("diffusers", "pytorch_lora_weights.safetensors", False),
    ("kohya", "k.safetensors", True),
]


@pytest.mark.parametrize(("form", "name", "portable"), FORMATS)
def test_files_give_our_pictures_in_diffusers(family, trained, form, name, portable, tmp_path):
    """Largest difference of a pixel 1e-5: the same float32 sums in another order."""
    base, result, _ = trained
    if form == "kohya" and family in ("sd3", "flux"):
        pytest.skip("diffusers reads kohya's Flux at its real widths alone; SD3 has no such names")
    adapter = lorakit.load_adapter(result.adapter)
    cells = [Cell("a blue thing", seed=s, mix="a", steps=3, width=16, height=16) for s in (1, 2)]
    handle = lorakit.attach(base.model, adapter, "a")
    try:
        ours = draw(base, handle, cells)
        bare = draw(base, handle, [Cell("a blue thing", seed=1, steps=3, width=16, height=16)])
    finally:
        handle.detach()
    assert np.abs(ours[0] - bare[0]).max() > 1e-2
    convert(result.adapter, tmp_path / name, to=form, portable=portable)
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(base.ref)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path), weight_name=name)
    options = {"max_sequence_length": 8} if family in ("sd3", "flux") else {}
    for seed, mine in zip((1, 2), ours, strict=True):
        theirs = pipe(
            "a blue thing", num_inference_steps=3, width=16, height=16, output_type="np",
            guidance_scale=base.family.guidance,
            generator=torch.Generator().manual_seed(seed), **options,
        ).images[0]  # fmt: skip
        assert np.abs(mine - theirs).max() <= 1e-5


# --- going on ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return tiny.pictures(tmp_path / "data")


@pytest.fixture(scope="module")
def base():
    return loaded("sd")


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step(self, metrics):
        if metrics.step == self.step:
            self.act()


def killed():
    raise RuntimeError("killed")


def files_of(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in SAME}


def test_killed_anywhere_and_resumed(base, folder, tmp_path, monkeypatch):
    """While pictures are encoded; by a signal; and between two checkpoints: files are equal."""
    whole = finished(run_on(base, folder, tmp_path / "whole"))
    expected = files_of(whole.out)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "other"))
    out = tmp_path / "run"

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    trainer = run_on(base, folder, out)
    with pytest.raises(KeyboardInterrupt):
        train_pictures([trainer], on_item=stop)
    assert not out.exists()
    kept = sorted((tmp_path / "other").rglob("*.safetensors"))
    assert len(kept) == 4
    assert not list((tmp_path / "other").rglob("*.tmp"))
    kept[0].write_bytes(kept[0].read_bytes()[:-7])  # and one of them is damaged
    before = [path.stat().st_mtime_ns for path in kept]

    crash = At(5, killed)
    with pytest.raises(Exception, match="killed"):
        finished(run_on(base, folder, out, callbacks=[crash]))
    after = [path.stat().st_mtime_ns for path in kept]
    assert [x == y for x, y in zip(before, after, strict=True)] == [False, True, True, True]
    signalled = At(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="lorakit images train --resume"):
        resume_pictures(str(out), callbacks=[signalled])
    result = resume_pictures(str(out))
    assert (result.steps, result.ending) == (8, "finished")
    assert files_of(out) == expected
    (out / "samples" / "kept.png").unlink()  # killed after the last step
    resume_pictures(str(out))
    assert files_of(out) == expected


def test_what_helps_a_picture_that_fits_no_memory(base, folder, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PictureTask, "losses", full)
    with pytest.raises(TrainingError, match=r"0\d\.png.*a lower --resolution; --recompute"):
        run_on(base, folder, tmp_path / "run").run()


@pytest.mark.parametrize(("every", "steps"), [(None, [0, 10, 20, 30, 40]), (0, [0]), (30, [0, 30])])
def test_when_sheets_are_drawn(base, tmp_path, monkeypatch, every, steps):
    drawn = []
    monkeypatch.setattr(training, "draw_sheet", lambda *given: drawn.append(given[4].name))
    maker = SheetMaker(base, Sheets(("a",), every=every))
    maker.on_start(RunInfo(out=tmp_path, total_steps=40))
    for step in range(1, 41):
        maker.on_step(SimpleNamespace(step=step))
    assert drawn == [f"step-{step:08}.png" for step in steps]


def test_a_sheet_that_fails_stops_nothing(base, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise ValueError("no ink")

    monkeypatch.setattr(training, "draw_sheet", fail)
    with CallbackList([SheetMaker(base, Sheets(("a",)))]) as events:
        events.on_start(RunInfo(out=tmp_path, total_steps=40))
    assert "sheets is switched off" in caplog.text
    result = RunResult(tmp_path, tmp_path / "adapter", 40)
    assert finish(result, base) is result
    assert f"lorakit images train --resume {tmp_path}" in caplog.text


@pytest.mark.slow  # that rows which share a forward are as if alone, test_task has in float64
def test_styles_that_are_trained_together_are_as_if_alone(base, tmp_path):
    """Adapters and losses up to rounding, which AdamW enlarges where gradients are tiny."""
    folders = [tiny.pictures(tmp_path / name, count) for name, count in (("x", 6), ("y", 9))]
    outs = [tmp_path / "runs" / folder.name for folder in folders]
    alone = [
        finished(
            run_on(
                base,
                folder,
                tmp_path / f"{folder.name}-alone",
                optimizer="sgd",
                lr=0.5,
                every=0,
                steps=4,
            )
        )
        for folder in folders
    ]
    together = train_pictures(
        [
            run_on(base, folder, out, optimizer="sgd", lr=0.5, every=0, steps=4)
            for folder, out in zip(folders, outs, strict=True)
        ]
    )
    for solo, joint in zip(alone, together, strict=True):
        assert joint.best_loss == pytest.approx(solo.best_loss, rel=1e-5)
        first, second = (lorakit.load_adapter(one.adapter).low_rank for one in (solo, joint))
        for path, site in first.items():
            torch.testing.assert_close(second[path].B, site.B, rtol=1e-3, atol=1e-6)
    assert abs(together[0].best_loss - together[1].best_loss) > 1e-4
