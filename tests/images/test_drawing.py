"""Pictures: diffusers' own, several adapters in one forward, grids, and what PNGs tell."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from torch.utils._pytree import tree_map

import lorakit
from lorakit.core.spec import LoRASpec
from lorakit.errors import InputError, SpecError
from lorakit.images.drawing import Cell, bare_steps, draw
from lorakit.images.grid import cells_of, parse_grid
from lorakit.images.sheets import as_image, png, sheet
from lorakit.images.targets import picture_targets
from tests.images import tiny
from tests.images.conftest import loaded
from tests.models import randomize

SIZE = {"width": 16, "height": 16, "steps": 3}


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "pixels"])
def test_the_pictures_are_those_of_diffusers(family):
    """With a negative prompt where there is one; float32, the same operations in the same order."""
    base = loaded(family)
    size = dict(SIZE, width=8, height=8) if family == "pixels" else SIZE
    negative = None if family == "flux" else "dark"
    (mine,) = draw(base, None, [Cell("a red thing", negative, seed=4, guidance=4.0, **size)])
    options = {"guidance_scale": 4.0, "generator": torch.Generator().manual_seed(4)}
    if negative is not None:
        options["negative_prompt"] = negative
    if family in ("sd3", "flux"):
        options["max_sequence_length"] = 8
    factor = 8 if family == "pixels" else 1
    theirs = base.pipe(
        "a red thing", num_inference_steps=3, width=factor * size["width"],
        height=factor * size["height"],
        output_type="latent" if family == "pixels" else "np", **options,
    ).images[0]  # fmt: skip
    if family == "pixels":
        theirs = (theirs.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()
    assert mine.shape == (size["height"], size["width"], 3)
    assert np.abs(mine - theirs).max() <= 1e-6


@pytest.mark.parametrize(
    "family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow), "sd3", "flux"]
)
def test_pictures_of_several_adapters_share_forwards(family):
    """Guidance doubles the rows; each picture is as if it were drawn alone, up to the rounding of
    products of other sizes, which guidance enlarges."""
    base = loaded(family)
    words = "all-linear"
    spec = LoRASpec(rank=2, targets=picture_targets(base, words, text=True))
    handle = lorakit.attach(base.model, spec, "a")
    try:
        handle.add(spec, "b")
        randomize(handle, 0.1)
        mixes = [None, "a", {"a": 0.5, "b": -0.4}, "b"]
        cells = [Cell("a red thing", seed=i // 2, mix=m, **SIZE) for i, m in enumerate(mixes)]
        together = draw(base, handle, cells)
        alone = [draw(base, handle, [cell])[0] for cell in cells]
    finally:
        handle.detach()
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one - other).max() <= 1e-4
    assert np.abs(together[0] - together[1]).max() > 1e-3
    assert np.abs(together[2] - together[3]).max() > 1e-3


@pytest.mark.parametrize(
    "family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow), "sd3", "pixels"]
)
@pytest.mark.parametrize(("against", "negative"), [(0.0, None), (-0.5, "dark")])
def test_guidance_may_push_away_from_other_weights(family, against, negative, monkeypatch):
    """Compared with two merged models, one for each half of the rows and its text; each picture of
    a batch has its own adapters on both halves."""
    base = loaded(family)
    size = dict(SIZE, width=8, height=8) if family == "pixels" else SIZE
    spec = LoRASpec(rank=2, targets=picture_targets(base, "all-linear", text=family != "pixels"))
    handle = lorakit.attach(base.model, spec, "a")
    try:
        handle.add(spec, "b")
        randomize(handle, 0.1)
        cells = [
            Cell("a red thing", negative, 3, mix, guidance=4.0, against=against, **size)
            for mix in ("a", {"a": 0.5, "b": 0.5}, None)
        ]
        mine = draw(base, handle, cells)
        usual = draw(base, handle, [dataclasses.replace(cells[0], against=1.0)])
        adapter = handle.snapshot("a")
    finally:
        handle.detach()
    merged = copy.deepcopy(base)
    lorakit.merge(merged.model, [(adapter, 1.0)])
    undo = lorakit.merge(base.model, [(adapter, against)]) if against else lambda: None
    plain, ours = base.pipe.encode_prompt, merged.pipe.encode_prompt

    def encode_prompt(*args, **options):
        return tuple(
            ours if i % 2 == 0 else theirs
            for i, (ours, theirs) in enumerate(
                zip(ours(*args, **options), plain(*args, **options), strict=True)
            )
        )

    monkeypatch.setattr(base.pipe, "encode_prompt", encode_prompt)
    denoiser, with_adapter = base.denoiser.forward, merged.denoiser

    def forward(*args, **options):
        def half(which):
            return tree_map(
                lambda x: x[which : which + 1] if isinstance(x, torch.Tensor) and x.ndim else x,
                (args, options),
            )

        (args_0, options_0), (args_1, options_1) = half(0), half(1)
        pairs = zip(denoiser(*args_0, **options_0), with_adapter(*args_1, **options_1), strict=True)
        return tuple(torch.cat(pair) for pair in pairs)

    monkeypatch.setattr(base.denoiser, "forward", forward)
    (theirs,) = draw(base, None, [Cell("a red thing", negative, 3, guidance=4.0, **size)])
    monkeypatch.undo()
    undo()
    (bare,) = draw(base, None, [Cell("a red thing", negative, 3, guidance=4.0, **size)])
    assert np.abs(mine[0] - theirs).max() <= 1e-4
    assert np.abs(mine[2] - bare).max() <= 1e-4
    for other in (usual[0], mine[1], mine[2]):
        assert np.abs(mine[0] - other).max() > 1e-3


@pytest.mark.parametrize(
    ("family", "scheduler", "bare"),
    [
        ("sd", None, 2),
        ("sd", HeunDiscreteScheduler, 4),  # 4 steps are 7 forwards
        ("sd", partial(PNDMScheduler, skip_prk_steps=True), 3),  # 5, of which two share a time
        pytest.param("sdxl", None, 2, marks=pytest.mark.slow),
        ("sd3", None, 2),
        ("flux", None, 2),
    ],
)
def test_adapters_may_start_late(family, scheduler, bare, monkeypatch):
    """Compared with a merged model whose denoiser is the bare one's for the first forwards; who
    starts late draws beside who does not, and nothing stays behind."""
    base = loaded(family)
    if scheduler is not None:
        monkeypatch.setattr(base.pipe, "scheduler", scheduler())
    spec = LoRASpec(rank=2, targets=picture_targets(base, "all-linear", text=True))
    handle = lorakit.attach(base.model, spec, "a")
    usual = Cell("a red thing", seed=3, mix="a", width=16, height=16, steps=4)
    late = dataclasses.replace(usual, start=0.5)
    try:
        randomize(handle, 0.1)
        mine = draw(base, handle, [late, usual, dataclasses.replace(late, mix=None)])
        (again,) = draw(base, handle, [usual])
        adapter = handle.snapshot("a")
    finally:
        handle.detach()
    assert np.array_equal(mine[1], again)
    merged = copy.deepcopy(base)
    lorakit.merge(merged.model, [(adapter, 1.0)])
    ours, plain, done = merged.denoiser.forward, base.denoiser.forward, []

    def forward(*args, **options):
        done.append(None)
        return (plain if len(done) <= bare else ours)(*args, **options)

    monkeypatch.setattr(merged.denoiser, "forward", forward)
    (theirs,) = draw(merged, None, [dataclasses.replace(usual, mix=None)])
    assert np.abs(mine[0] - theirs).max() <= 1e-4
    (without,) = draw(base, None, [dataclasses.replace(usual, mix=None)])
    assert np.abs(mine[2] - without).max() <= 1e-4
    for other in mine[1:]:
        assert np.abs(mine[0] - other).max() > 1e-3


@pytest.mark.parametrize(
    ("start", "steps", "bare"), [(0.0, 20, 0), (0.35, 20, 7), (0.55, 20, 11), (0.3, 4, 2)]
)
def test_the_first_step_of_an_adapter(start, steps, bare):
    """Step k of n acts from k / n on."""
    assert bare_steps(start, steps) == bare
    assert all((k < bare) == (round(k / steps, 9) < start) for k in range(steps))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (-0.1, "start is -0.1; it is a share"),
        (0.8, "start is 0.8, after the last of 4 steps"),
        (1.0, "start is 1; it is a share"),
        (float("nan"), "start is nan; it is a share"),
    ],
)
def test_an_adapter_that_would_never_act(start, message):
    with pytest.raises(SpecError, match=message):
        draw(loaded("sd"), None, [Cell("a", start=start, steps=4, width=16, height=16)])


def test_a_start_of_what_is_not_on_the_denoiser_is_refused():
    """Of each picture by itself: another's adapter does not make it act, nor one of weight 0."""
    base = loaded("sd")
    texts = [path for path in picture_targets(base, "all-linear", text=True) if "text" in path]
    handle = lorakit.attach(base.model, LoRASpec(rank=2, targets=texts), "words")
    cell = Cell("a red thing", mix="words", start=0.5, width=16, height=16, steps=2)
    try:
        with pytest.raises(SpecError, match="words change nothing in the denoiser"):
            draw(base, handle, [cell])
        draw(base, handle, [dataclasses.replace(cell, mix=None)])
        handle.add(LoRASpec(rank=2, targets=picture_targets(base, "all-linear")), "strokes")
        both = dataclasses.replace(cell, mix={"words": 1.0, "strokes": 0.5})
        draw(base, handle, [both])
        for mix in ("words", {"words": 1.0, "strokes": 0.0}):
            with pytest.raises(SpecError, match="words change nothing in the denoiser"):
                draw(base, handle, [both, dataclasses.replace(cell, mix=mix)])
    finally:
        handle.detach()


def test_a_start_is_refused_where_steps_take_unequal_numbers_of_forwards(monkeypatch):
    base = loaded("sd")
    monkeypatch.setattr(base.pipe, "scheduler", PNDMScheduler())
    cell = Cell("a", start=0.5, width=16, height=16, steps=8)
    with pytest.raises(SpecError, match="Runge-Kutta"):
        draw(base, None, [cell])
    draw(base, None, [dataclasses.replace(cell, start=0.0)])


def test_a_picture_that_fails_leaves_no_hook(monkeypatch):
    base = loaded("sd")
    spec = LoRASpec(rank=2, targets=picture_targets(base, "all-linear"))
    handle = lorakit.attach(base.model, spec, "a")
    cell = Cell("a red thing", seed=3, mix="a", width=16, height=16, steps=4)
    try:
        randomize(handle, 0.1)
        (before,) = draw(base, handle, [cell])
        with monkeypatch.context() as patch:
            patch.setattr(base.denoiser.conv_in, "forward", lambda x: x.no_such_thing)
            with pytest.raises(AttributeError):
                draw(base, handle, [dataclasses.replace(cell, start=0.5)])
        (after,) = draw(base, handle, [cell])
    finally:
        handle.detach()
    assert np.array_equal(before, after)


def test_what_cannot_be_drawn():
    base = loaded("flux")
    with pytest.raises(SpecError, match=r"width is 18(.|\n)*negative prompt"):
        draw(base, None, [Cell("a", "b", width=18, height=16)])
    with pytest.raises(SpecError, match="guidance is 1"):
        draw(loaded("sd"), None, [Cell("a", "b", guidance=1.0)])
    with pytest.raises(SpecError, match=r"to push away from.*was distilled"):
        draw(base, None, [Cell("a", against=0)])
    with pytest.raises(SpecError, match=r"to push away from.*cannot act"):
        draw(loaded("sd"), None, [Cell("a", guidance=1.0, against=0)])
    # each cell by itself: what one lacks is no fault of another
    drawn = draw(loaded("sd"), None, [Cell("a", guidance=1.0, **SIZE), Cell("a", "b", **SIZE)])
    assert len(drawn) == 2


def test_a_base_that_takes_guidance_as_an_input_has_nothing_to_push_away_from(monkeypatch):
    """Consistency models: diffusers' pipelines double no rows of theirs."""
    base = loaded("sd")
    assert base.doubles
    config = FrozenDict({**base.denoiser.config, "time_cond_proj_dim": 8})
    monkeypatch.setattr(base.denoiser, "_internal_dict", config)
    monkeypatch.setattr(base.pipe, "_guidance_scale", 4.0, raising=False)
    assert not base.pipe.do_classifier_free_guidance
    with pytest.raises(SpecError, match="was distilled"):
        draw(base, None, [Cell("a", against=0)])


def test_grids():
    rows, columns = parse_grid("weight=0,0.5,1 seed=1,2", ["p"], ["a", "b"])
    assert (rows.labels(), columns.labels()) == (
        ["weight 0", "weight 0.5", "weight 1"], ["seed 1", "seed 2"],
    )  # fmt: skip
    table = cells_of((rows, columns), Cell("p"), {"a": 0.8, "b": 0.4})
    assert table[0][1] == Cell("p", seed=2)
    assert table[1][0].mix == {"a": 0.4, "b": 0.2}
    rows, columns = parse_grid("prompt adapter", ["p", "q"], ["a"])
    table = cells_of((rows, columns), Cell("p"), {"a": 0.8})
    assert [[(c.prompt, c.mix) for c in row] for row in table] == [
        [("p", None), ("p", {"a": 0.8})], [("q", None), ("q", {"a": 0.8})],
    ]  # fmt: skip
    (_, seeds) = parse_grid("seed=1234567,1234568", ["p"], [])
    assert seeds.labels() == ["seed 1234567", "seed 1234568"]
    (_, only) = parse_grid("step=5,10", ["p"], [])
    assert [c.steps for c in cells_of((_, only), Cell("p"), {})[0]] == [5, 10]
    (_, late) = parse_grid("start=0,0.25", ["p"], ["a"])
    assert late.labels() == ["start 0", "start 0.25"]
    assert [c.start for c in cells_of((_, late), Cell("p"), {"a": 1.0})[0]] == [0, 0.25]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=1", "the axes are weight, adapter, prompt, seed, step"),
        ("weight", "it has no values"),
        ("weight=a", "'a' is no number"),
        ("weight=1 weight=2", "weight is there twice"),
        ("seed=1 step=2 prompt", "3 axes"),
        ("seed=1.5", "no whole number"),
        ("step=0", "at least 1"),
        ("start=1", "'1' is no share of the steps"),
        ("start=-0.5", "'-0.5' is no share of the steps"),
        ("prompt=3", "there are 1 prompts"),
        ("adapter=c", "no adapter is called c; there are: a, base"),
        ("", "0 axes"),
    ],
)
def test_bad_grids(text, message):
    with pytest.raises(InputError, match=message):
        parse_grid(text, ["p"], ["a"])
    with pytest.raises(InputError, match="there is no adapter to weigh"):
        parse_grid("weight=1", ["p"], [])
    with pytest.raises(InputError, match="start: there is no adapter that could"):
        parse_grid("start=0.2", ["p"], [])


def test_sheets_and_what_pngs_tell(tmp_path):
    picture = np.zeros((16, 24, 3), np.float32)
    picture[:, :, 0] = 1.0
    page = sheet([[picture, picture]], ["o\nne"], ["seed 1", "se\ned 2"], "ti\ntle")
    assert page.width > 2 * 144  # each pixel is six by six
    assert (255, 0, 0) in set(page.convert("RGB").get_flattened_data())
    facts = {
        "prompt": "a ü", "seed": 3, "steps": 5, "guidance": 7.5, "size": "24x16",
        "negative": "dark", "base": "B", "adapters": [{"name": "s", "weight": 0.5}],
    }  # fmt: skip
    data = png(as_image(picture), facts)
    assert data == png(as_image(picture), facts)
    (tmp_path / "x.png").write_bytes(data)
    with Image.open(tmp_path / "x.png") as read:
        assert json.loads(read.text["lorakit"]) == facts
        assert read.text["parameters"] == (
            "a ü\nNegative prompt: dark\n"
            "Steps: 5, CFG scale: 7.5, Seed: 3, Size: 24x16, Model: B, Lora: s=0.5"
        )
