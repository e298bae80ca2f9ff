"""The emoji example: packages that are what they should be, pictures, the split, the base's recipe,
its pipeline, and what judges its pictures."""

from __future__ import annotations

import argparse
import base64
import copy
import dataclasses
import hashlib
import io
import json
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("resvg_py")

import diffusers
import transformers

from examples.emoji import artwork, captions, data, evaluate, judge, packages, pipeline, sheets
from examples.emoji import train_base as base
from lorakit.images.pictures import PicturesSpec, read_pictures

# diffusers' scheduler turns tensors into arrays as numpy 1 did
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning:diffusers")

RED_LEFT = '<path fill="#f00" d="M0 0h8v16h-8z"/><path fill="#00f" d="M8 0h8v16h-8z"/>'
ICONS = {
    "prefix": "tiny",
    "width": 16,
    "height": 16,
    "icons": {
        "red-apple": {"body": RED_LEFT},
        "flag": {"body": '<path fill="currentColor" d="M0 0h16v8h-16z"/>', "height": 8},
    },
    "aliases": {
        "apple-back": {"parent": "red-apple", "hFlip": True},
        "apple-twice": {"parent": "apple-back", "hFlip": True},
        "apple-down": {"parent": "red-apple", "rotate": 1},
    },
}
CONTENTS = {"icons": ICONS, "chars": {"1f34e": "red-apple"}, "metadata": {"categories": {}}}
RED, BLUE, WHITE, BLACK = [255, 0, 0], [0, 0, 255], [255] * 3, [0] * 3


def _packed(folder: Path) -> packages.IconSet:
    """A package as the registry packs it, and what is known of it."""
    file = folder / "tiny-1.0.0.tgz"
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as archive:
        for stem, content in CONTENTS.items():
            written = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{stem}.json")
            info.size = len(written)
            archive.addfile(info, io.BytesIO(written))
    digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    return packages.IconSet("tiny", "@icons/tiny", "1.0.0", f"sha512-{digest}", "MIT", "A", "B")


# --- packages and pictures -----------------------------------------------------------------------


def test_a_package_is_read_only_if_its_hash_is_the_one_written_down(tmp_path):
    one = _packed(tmp_path)
    assert packages.contents(packages.fetch(one, tmp_path)) == CONTENTS
    (tmp_path / "tiny-1.0.0.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"its hash is sha512-.*Delete it"):
        packages.fetch(one, tmp_path)


def test_every_set_is_pinned_and_has_a_licence():
    page = (Path(packages.__file__).parent / "README.md").read_text(encoding="utf-8")
    for one in packages.SETS:
        assert len(base64.b64decode(one.integrity.removeprefix("sha512-"))) == 64
        told = f"| `{one.package}` {one.version} | {one.author} | {one.licence} |"
        assert told in page


@pytest.mark.parametrize(
    ("name", "corners"),
    [
        ("red-apple", [RED, BLUE, RED, BLUE]),
        ("apple-back", [BLUE, RED, BLUE, RED]),
        ("apple-twice", [RED, BLUE, RED, BLUE]),
        ("apple-down", [RED, RED, BLUE, BLUE]),  # a quarter, clockwise: what was left is above
        ("flag", [WHITE, WHITE, WHITE, WHITE]),
    ],
)
def test_icons_are_drawn_as_their_aliases_say(name, corners):
    drawn = artwork.draw(artwork.svg(ICONS, name), 32)
    assert drawn.shape == (32, 32, 3)
    assert [drawn[y, x].tolist() for y in (1, 30) for x in (1, 30)] == corners


def test_what_is_not_square_stands_in_the_middle_in_black_on_white():
    drawn = artwork.draw(artwork.svg(ICONS, "flag"), 32)
    assert drawn[16, 16].tolist() == BLACK
    assert [drawn[y, 16].tolist() for y in (6, 25)] == [WHITE, WHITE]


def test_an_inked_picture_has_lines_where_colours_change():
    body = '<path fill="red" d="M0 0h8v16H0z"/><path fill="blue" d="M8 0h8v16H8z"/>'
    document = artwork.svg({"icons": {"flag": {"body": body}}, "width": 16, "height": 16}, "flag")
    lined = artwork.inked(document, 32, colours=False)
    outlined = artwork.inked(document, 32, colours=True)
    assert lined.shape == outlined.shape == (32, 32, 3)
    assert lined[16, 16].max() < 140  # the border of both
    assert outlined[16, 16].max() < 140
    assert (lined[:, [2, 29]] == 255).all()
    assert (outlined[:, 2] == RED).all()
    assert (outlined[:, 29] == BLUE).all()


def test_inked_sets_are_of_the_emoji_that_their_own_has_and_no_judge_learns_them(monkeypatch):
    sets = {**_sets(40), "fluent-flat": {"chars": {"1f401": "red-apple"}, "metadata": {}}}
    emoji = [data.with_inked(one) for one in captions.emoji_of(sets)]
    assert [one.key for one in emoji if data.INKED.keys() & one.names.keys()] == ["1f401"]
    icons = {"fluent-flat": {"icons": ICONS}}
    (one,) = (one for one in emoji if one.key == "1f401")
    names = {name: icon for name, icon in one.names.items() if name.startswith("fluent-flat")}
    drawn = data.draw_all([dataclasses.replace(one, names=names)], icons)
    assert set(drawn) == {"fluent-flat", *data.INKED}
    pictures = data.Pictures([dataclasses.replace(one, names=names)], drawn)
    assert set(pictures.by_hand) == {"fluent-flat"}

    def seen(pictures, emoji, sets, least):
        assert tuple(sets) == pictures.by_hand
        raise StopIteration

    monkeypatch.setattr(judge, "_seen", seen)
    with pytest.raises(StopIteration):
        judge.train_features(torch.nn.Identity(), pictures, [], steps=1, seed=0)


# --- the split -----------------------------------------------------------------------------------


def _sets(number: int = 600) -> dict:
    names = {f"{0x1F400 + i:x}": f"thing-{i}" for i in range(number)}
    names |= {f"{0x1F900 + i:x}-fe0f": f"{who}-{i}" for i, who in enumerate(["man-x", "woman-x"])}
    names |= {"1f44b-1f3fd": "hand-medium"}
    categories = {"One": [f"thing-{i}" for i in range(0, number, 4)]}
    first = {"chars": names, "metadata": {"categories": categories}}
    fewer = {key.removesuffix("-fe0f"): f"other-{name}" for key, name in names.items()}
    del fewer["1f400"]
    return {"noto": first, "twemoji": {"chars": fewer, "metadata": {"categories": {}}}}


def test_emoji_are_split_by_family_and_the_test_has_a_picture_in_every_set():
    emoji = captions.emoji_of(_sets())
    count = {part: len(captions.of_part(emoji, part)) for part in ("style", "known", "new")}
    wanted = captions.NUM_STYLE, captions.NUM_KNOWN, captions.NUM_NEW
    assert tuple(count.values()) == wanted
    assert not any("medium" in one.caption for one in emoji)
    for part in count:
        chosen = captions.of_part(emoji, part)
        assert all(len(one.names) == 2 for one in chosen)
        # in proportion: a quarter of all is of the one category
        assert sum(one.category == "One" for one in chosen) == count[part] // 4
    assert captions.emoji_of(_sets()) == emoji


def test_a_set_without_code_points_is_matched_by_the_names_of_the_others():
    sets = _sets()
    sets["old"] = {
        "chars": {},
        "icons": {
            "icons": {"other-thing-7": {}, "thing9": {}, "elsewhere": {}},
            "aliases": {"thing-8": {"parent": "elsewhere"}, "thing-5": {"parent": "thing9"}},
        },
    }
    emoji = captions.emoji_of(sets)
    names = {one.caption: one.names["old"] for one in emoji if "old" in one.names}
    # thing 9 has that drawing by its own name, so it is not thing 5's by another
    wanted = {"thing 7": "other-thing-7", "thing 8": "thing-8", "thing 9": "thing9"}
    assert names == wanted
    parts = {one.key: one.part for one in captions.emoji_of(_sets())}
    assert {one.key: one.part for one in emoji} == parts  # nobody changes sides by it


def test_of_a_family_one_is_for_the_test_and_the_others_for_nobody():
    rows = [(f"{who} {i}", "c", 2) for i in range(300) for who in ("man", "woman")]
    parts = captions._parts(rows)
    by_family: dict[str, list[str]] = {}
    for (caption, *_), part in zip(rows, parts, strict=True):
        by_family.setdefault(captions.family(caption), []).append(part)
    assert {tuple(found) for found in by_family.values()} == {
        ("base", "base"),
        ("new", "unused"),
        ("known", "unused"),
        ("style", "unused"),
    }


COLOURS = [RED, BLUE, WHITE, BLACK, [0, 255, 0], *([90, 25 * i, 120] for i in range(9))]


def _pictures(number: int = 300) -> data.Pictures:
    """Every set draws its emoji in colours of its own; the emoji is in their places."""
    emoji = captions.emoji_of(
        {name: _sets(number)["noto"] for name in [one.name for one in packages.SETS]}
    )
    drawn = {}
    for k, one in enumerate(packages.SETS):
        pixels = np.full((len(emoji), 32, 32, 3), 255, np.uint8)
        pixels[:, 8:24, 8:24] = COLOURS[k]
        for i in range(len(emoji)):
            pixels[i, i % 8 * 4 : i % 8 * 4 + 4, i // 8 % 8 * 4 : i // 8 % 8 * 4 + 4] = 0
        drawn[one.name] = pixels
    return data.Pictures(emoji, drawn)


def test_a_style_is_a_folder_that_lorakit_reads_and_the_base_knows_its_captions(tmp_path):
    pictures = _pictures()
    data.write_style(pictures, "openmoji", tmp_path)
    found, _ = read_pictures(PicturesSpec(str(tmp_path)))
    told = {data.told(one) for one in captions.of_part(pictures.emoji, "style")}
    assert {one.caption for one in found} == told
    assert len(found) == captions.NUM_STYLE
    one = next(e for e in pictures.emoji if e.part == "style")
    read = np.asarray(Image.open(tmp_path / f"{one.key}.png"))
    assert np.array_equal(read, pictures.of("openmoji", one))
    drawn, of_base = pictures.for_base()
    assert len(drawn) == len(of_base) == len(set(of_base))
    assert told < set(of_base)
    assert not {one.caption for one in captions.of_part(pictures.emoji, "new")} & set(of_base)


def test_what_is_written_is_read_again(tmp_path):
    pictures = _pictures()
    data.write(pictures.emoji, pictures._drawn, tmp_path)
    again = data.Pictures.read(tmp_path)
    assert again.emoji == pictures.emoji
    assert all(np.array_equal(again._drawn[s], pictures._drawn[s]) for s in pictures.sets)


# --- the base ------------------------------------------------------------------------------------


def test_the_autoencoder_changes_nothing():
    vae = pipeline.identity_autoencoder()
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    latents = vae.encode(pixels).latents
    # what the UNet sees are the pixels, up to float32; the decoder's tanh costs z · (1/128)²/27
    assert torch.allclose(latents * vae.config.scaling_factor, pixels, atol=2e-6, rtol=0)
    assert torch.allclose(vae.decode(latents).sample, pixels, atol=5e-6, rtol=0)


def test_the_weights_are_small_enough_to_ship():
    with torch.device("meta"):
        unet = pipeline.new_unet()
    assert 2 * sum(p.numel() for p in unet.parameters()) <= 15 * 2**20


_new_tiny_unet = partial(pipeline.new_unet, (8, 8, 16))


def _tiny_unet() -> torch.nn.Module:
    torch.manual_seed(1)
    return _new_tiny_unet()


def _examples(recipe: base.Recipe) -> base.Examples:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(0, 256, (10, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    told = torch.randn(10, pipeline.NUM_TOKENS, pipeline.TEXT_WIDTH, generator=generator)
    return base.Examples(drawn, told, torch.zeros(told.shape[1:]), recipe)


RECIPE = base.Recipe(batch_size=4, warmup=2, cooldown=2)


def test_a_training_that_was_stopped_gives_the_weights_of_one_that_was_not(tmp_path):
    examples = _examples(RECIPE)

    def go_on(training: base.Training, to: int) -> base.Training:
        while training.step < to:
            training.update(examples.batch(training.step), RECIPE.rate(training.step, 4))
        return training

    whole = go_on(base.Training(RECIPE, "cpu", _tiny_unet()), 4)
    go_on(base.Training(RECIPE, "cpu", _tiny_unet()), 2).save(tmp_path / base.STATE)
    resumed = base.Training(RECIPE, "cpu", _tiny_unet())
    resumed.load(tmp_path / base.STATE)
    assert resumed.step == 2
    go_on(resumed, 4)
    for mine, theirs in zip(
        [*whole.unet.parameters(), *whole.average.parameters()],
        [*resumed.unet.parameters(), *resumed.average.parameters()],
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    kept = base.weights_of(tmp_path)
    assert all(torch.equal(kept[k], v) for k, v in base._stored(tmp_path)["average"].items())
    other = base.Training(base.Recipe(batch_size=5), "cpu", _tiny_unet())
    with pytest.raises(ValueError, match="'batch_size': 4"):
        other.load(tmp_path / base.STATE)


def test_the_recipe_tells_the_pictures_and_the_weights_that_it_begins_with(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "new_unet", _new_tiny_unet)
    options = argparse.Namespace(seed=0, batch_size=4, lr=1e-3, begin_with=None)
    pictures = _pictures()
    recipe, unet = base._recipe(options, pictures)
    assert unet is None
    begun = _tiny_unet()
    with torch.no_grad():
        begun.conv_in.bias.fill_(7)
    save_file(begun.state_dict(), tmp_path / "weights.safetensors")
    options.begin_with = tmp_path / "weights.safetensors"
    other, unet = base._recipe(options, pictures)
    assert (unet.conv_in.bias == 7).all()
    assert other.learns == recipe.learns
    assert other.begins_with
    pictures._drawn["noto"][0, 0, 0] += 1
    changed, _ = base._recipe(options, pictures)
    assert changed.learns != other.learns

    base.Training(other, "cpu", unet).save(tmp_path / "state.pt")
    base.Training(other, "cpu", _tiny_unet()).load(tmp_path / "state.pt")
    for wrong, named in ((recipe, "begins_with"), (changed, "learns")):
        with pytest.raises(ValueError, match=named):
            base.Training(wrong, "cpu", _tiny_unet()).load(tmp_path / "state.pt")


def test_batches_mix_noise_in_as_diffusers_does_and_see_every_picture_once_an_epoch():
    recipe = base.Recipe(batch_size=5)
    examples = _examples(recipe)
    rows = torch.cat([examples._rows(0), examples._rows(1)])
    assert sorted(rows.tolist()) == list(range(10))
    noised, times, target, weights, _ = examples.batch(3)
    schedule = diffusers.DDPMScheduler.from_config(pipeline.new_scheduler().config)
    clean = examples.pixels[examples._rows(3)].float() / 127.5 - 1
    kept = schedule.alphas_cumprod[times].double()
    a, s = kept.sqrt().view(-1, 1, 1, 1), (1 - kept).sqrt().view(-1, 1, 1, 1)
    noise = (noised.double() - a * clean.double()) / s
    velocity = schedule.get_velocity(clean, noise.float(), times)
    assert torch.allclose(target, velocity, atol=1e-3)  # noise was divided by s, small at times
    snr = kept / (1 - kept)
    assert torch.allclose(weights.double(), snr.clamp_max(5) / (snr + 1), rtol=1e-4)


def test_the_sampler_goes_where_the_prediction_that_was_cut_points():
    schedule = pipeline.new_scheduler()
    schedule.set_timesteps(10)
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x, told = noise, 1.5  # as if guidance had pushed the whole picture out of its range
    for i, time in enumerate(schedule.timesteps):
        a, s = schedule.alpha_t[time], schedule.sigma_t[time]
        velocity = a * (x - a * told) / s - s * told  # v = a ε - s x0
        x = schedule.step(velocity, time, x).prev_sample
        sigma = schedule.sigmas[i + 1]  # of s / a
        a = 1 / (1 + sigma**2).sqrt()
        assert torch.allclose(x, a * 1.0 + a * sigma * noise, atol=1e-3)
    assert torch.allclose(x, torch.ones_like(x))


def _text(folder: Path) -> tuple:
    """A BERT of MiniLM's width, and a tokenizer of letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{word}" for word in words[5:]]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(
        str(folder / "vocab.txt"), model_max_length=pipeline.NUM_TOKENS
    )
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=pipeline.TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    config.use_attention_mask = True
    return transformers.BertModel(config, add_pooling_layer=False).eval(), tokenizer


def test_the_base_is_a_pipeline_that_diffusers_and_lorakit_draw_with(tmp_path):
    from lorakit.images.base import load_pipeline

    encoder, tokenizer = _text(tmp_path)
    made = pipeline.assemble(_tiny_unet(), encoder, tokenizer)
    made.save_pretrained(tmp_path / "base")
    told = ["a", "b"]
    ours = sheets.draw(made, told, steps=2)
    assert ours.shape == (2, 32, 32, 3)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "base", safety_checker=None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    assert np.array_equal(sheets.draw(theirs, told, steps=2), ours)
    embedded = pipeline.embed(told, encoder, tokenizer)
    expected, _ = made.encode_prompt(told, "cpu", 1, False)
    assert torch.equal(embedded, expected)
    loaded = load_pipeline(tmp_path / "base", dtype="float32")
    assert sheets.draw_cells(loaded, None, None, told, steps=2).shape == (2, 32, 32, 3)


# --- judging -------------------------------------------------------------------------------------


def test_the_judges_learn_what_every_set_has_in_common(monkeypatch):
    for name in ("NUM_STYLE", "NUM_KNOWN", "NUM_NEW"):
        monkeypatch.setattr(captions, name, 12)
    pictures = _pictures(60)
    judges = judge.train(pictures, steps=(30, 2), batch_size=32)
    found = judge.worth(judges, pictures)
    assert found["style accuracy"] > 0.9
    assert found["emoji"] == captions.NUM_KNOWN + captions.NUM_NEW
    assert set(found["caption"]) == set(data.JUDGED)


def test_the_features_learn_in_sets_that_have_the_emoji():
    names = [f"thing {i}" for i in range(5)]
    sets = ["abcd", "abc", "ab", "acd", "bcd"]
    emoji = [
        captions.Emoji(n, n, "c", "base", dict.fromkeys(there, n))
        for n, there in zip(names, sets, strict=True)
    ]
    drawn = {
        name: np.stack([_marked(i) for i, there in enumerate(sets) if name in there])
        for name in "abcd"
    }
    real, has = judge._seen(data.Pictures(emoji, drawn), emoji, "abcd", 3)
    kept = [i for i in range(5) if i != 2]
    assert has.T.tolist() == [[name in sets[i] for name in "abcd"] for i in kept]
    wanted = judge.as_input(np.stack([_marked(i) for i in kept]))
    for row, there in zip(real, has, strict=True):
        assert torch.equal(row[there], wanted[there])


def test_another_hand_draws_at_random_and_leaves_white_paper_white():
    def drawn(pictures: torch.Tensor, seed: int) -> torch.Tensor:
        return judge.redrawn(pictures, torch.Generator().manual_seed(seed))

    pictures = torch.ones(64, 3, 32, 32)
    assert drawn(pictures, 0).median() > 0.95  # but for noise
    pictures[:, :, 8:24, 8:24] = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
    ours = drawn(pictures, 0)
    assert ours.shape == pictures.shape
    assert ours.abs().max() <= 1
    assert torch.equal(ours, drawn(pictures, 0))
    assert not torch.equal(ours, drawn(pictures, 1))


class _Told(torch.nn.Module):
    """Features that are written in a picture's first pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 0, :4]


def _marked(number: int, near: int | None = None) -> np.ndarray:
    picture = np.full((32, 32, 3), 127, np.uint8)
    picture[0, number, 0] = 255
    if near is not None:
        picture[0, near, 0] = 254
    return picture


def test_the_nearest_real_emoji_is_counted():
    names = [f"thing {i}" for i in range(4)]
    emoji = [captions.Emoji(n, n, "c", "new", {"a": n, "b": n}) for n in names]
    real = np.stack([_marked(i) for i in range(4)])
    pictures = data.Pictures(emoji, {"a": real, "b": real})
    judges = judge.Judges(("a", "b"), torch.nn.Identity(), _Told())
    nearest = judge.Nearest(judges, pictures, emoji)
    assert nearest.right(real) == {"first": 1.0, "first five": 1.0}
    drawn = np.stack([_marked(0), _marked(2, 1), _marked(2), _marked(0)])
    assert nearest.right(drawn)["first"] == 0.5
    assert nearest.right(drawn[[3]], [0])["first"] == 1.0


def test_the_way_is_measured_from_the_base_to_the_real_style():
    found = evaluate.compared(
        {"share": 0.7, "shown": {"first": 0.4}},
        {"share": 0.1, "shown": {"first": 0.5}},
        {"share": 0.9, "shown": {"first": 0.9}},
    )
    assert found["way"] == pytest.approx(0.75)
    assert found["shown, to the base"] == {"first": pytest.approx(0.8)}


def test_what_is_kept_has_an_interval_over_captions():
    base = np.zeros((2, 200), int)  # the base shows everything
    half = np.tile([0, 3], 100)[None].repeat(2, 0)  # by the nearest, every other caption is shown
    found = evaluate.kept_between(base, half)
    assert found["first five"] == (1.0, 1.0)
    low, high = found["first"]
    # a mean of 200 coins has a deviation of 0.5 / sqrt(200), and 95% lie within 1.96 of these
    assert low == pytest.approx(0.5 - 1.96 * 0.0354, abs=0.011)
    assert high == pytest.approx(0.5 + 1.96 * 0.0354, abs=0.011)
    # resampled are captions and not pictures: the number of pictures of one changes nothing
    assert evaluate.kept_between(base[:1], half[:1]) == found
    assert evaluate.kept_between(base + 9, half)["first"] is None


def test_numbers_alone_can_be_asked_for_in_one_manner():
    from examples.emoji.__main__ import _parser

    options = _parser().parse_args(["evaluate"])
    assert set(options.manner) == set(evaluate.MANNERS)
    assert options.sheets
    options = _parser().parse_args(["evaluate", "--manner", "late", "--no-sheets"])
    assert (options.manner, options.sheets) == (["late"], False)


def test_smoothness_tells_even_steps_from_a_jump():
    even = np.stack([np.full((1, 32, 32, 3), 20 * i, np.uint8) for i in range(5)])
    assert evaluate.smoothness(even) == pytest.approx({"largest step": 0.25, "way": 1.0})
    jump = copy.copy(even)
    jump[:3], jump[3:] = 0, 80
    assert evaluate.smoothness(jump)["largest step"] == pytest.approx(1.0)


def test_adapters_are_judged_drawn_over_weights_blended_and_merged(tmp_path, monkeypatch):
    from lorakit import LoRASpec
    from lorakit.images.base import base_of
    from lorakit.images.targets import picture_targets
    from lorakit.layers import attach

    for name in ("NUM_STYLE", "NUM_KNOWN", "NUM_NEW"):
        monkeypatch.setattr(captions, name, 4)
    monkeypatch.setattr(evaluate, "WEIGHTS", (0.0, 0.5, 1.0))
    pictures = _pictures(16)
    loaded = base_of(pipeline.assemble(_tiny_unet(), *_text(tmp_path)))
    spec = LoRASpec(rank=2, targets=picture_targets(loaded, "conv"))
    adapters = {}
    for seed, style in enumerate(data.STYLES):
        torch.manual_seed(seed)
        handle = attach(loaded.model, spec, style)
        handle.flat(style).data.normal_(std=0.1)
        adapters[style] = handle.snapshot(style)
        handle.detach()
    judges = judge.Judges.new(data.JUDGED)
    found = evaluate.report(loaded, adapters, pictures, judges, tmp_path, steps=2, each=2)
    names = {f"weights-{style}.png" for style in data.STYLES}
    names |= {"blend-0.png", "blend-1.png", "beside-known.png", "beside-new.png"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    for style in data.STYLES:
        assert found["merged, largest difference of a pixel"][style] <= 1 / 255  # of rounding
        assert found["weights"][style]["way"] >= 1 - 1e-9  # of more than nothing
        assert set(found[style]) == {"known", "new"}
        seen = {"real style", "real base art", "base", *evaluate.MANNERS}
        assert set(found[style]["known"]) == seen
    alone = evaluate.report(
        loaded,
        adapters,
        pictures,
        judges,
        tmp_path / "nowhere",
        steps=2,
        each=2,
        manners=["late"],
        with_sheets=False,
    )
    assert set(alone) == set(data.STYLES)
    for style in data.STYLES:
        for part in ("known", "new"):
            there = {k: v for k, v in found[style][part].items() if k != "usual"}
            assert alone[style][part] == there


def test_sheets_hold_every_picture():
    drawn = np.zeros((5, 32, 32, 3), np.uint8)
    page = sheets.grid(drawn, 3, titles=list("abcde"), zoom=2)
    assert page.size == (3 * 68 + 4, 2 * 80 + 4)
    table = sheets.table([drawn, drawn], ["one", "two"], list("abcde"))
    assert table.width > 5 * 128
