"""What models are asked with: rows as they were cut, prompts, files; and what stands around it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lorakit.data.rows import Row
from lorakit.errors import InputError
from lorakit.tasks import speech
from lorakit.tasks.rows import RowSpec
from lorakit.tasks.seq2seq import answer_ids, decoder_batch
from lorakit.tasks.vision import AskedFile, Vision, opened

from . import small

LONG = "w1 w2 " * 40


def rows_of(bench, base, folder, rows, **options):
    file = small.write_rows(folder / "rows.jsonl", rows)
    return bench.kind.load_data(RowSpec((str(file),), **options), base)


def test_texts_are_asked_as_their_rows_were_cut(benches, tmp_path):
    """A pair is no text with a mark in it, and what was cut is not asked whole."""
    bench = benches["classify"]
    base = bench.base()
    rows = [
        {"text": LONG, "text_pair": "w3 w4", "label": "a"},
        {"text": "w1 ⏎ w2", "text_pair": "w3 w4 w5", "label": "b"},
    ]
    data = rows_of(bench, base, tmp_path, rows, truncate=True)
    asked = [bench.kind.asked(data, i) for i in range(2)]
    assert [str(one) for one in asked] == [f"{LONG} ⏎ w3 w4", "w1 ⏎ w2 ⏎ w3 w4 w5"]
    logits = bench.kind.on(base.model, None).measured(list(data), None).outputs
    shares = torch.softmax(logits, -1).amax(1)
    found = bench.kind.predict(base, None, None, asked, 8)
    assert [text.partition(" ")[2] for text in found] == [f"({float(p):.1%})" for p in shares]
    with pytest.raises(InputError, match=r"'w1 w2 .* has 82 tokens, and .* takes 32 at most"):
        bench.kind.predict(base, None, None, [LONG], 8)


def test_prompts_are_asked_as_their_rows_were_cut(benches, tmp_path):
    bench = benches["bart"]
    base = bench.base()
    data = rows_of(bench, base, tmp_path, [{"prompt": LONG, "completion": LONG}], truncate=True)
    assert len(bench.kind.predict(base, None, None, [bench.kind.asked(data, 0)], 4)) == 1
    with pytest.raises(InputError, match=r"'w1 w2 .* has 82 tokens, and .* takes 64 at most"):
        bench.kind.predict(base, None, None, [LONG], 4)


def test_prompts_go_one_at_a_time_where_padding_is_seen(benches, monkeypatch):
    bench = benches["t5"]
    base = bench.base()
    widths = []
    kind = type(bench.kind)
    monkeypatch.setattr(kind, "on", lambda *_: SimpleNamespace(mode="single"))
    monkeypatch.setattr(
        "lorakit.tasks.seq2seq.generated",
        lambda model, handle, adapter, batch, length: (
            widths.append(tuple(batch["input_ids"].shape)) or batch["input_ids"]
        ),
    )
    bench.kind.predict(base, None, None, ["w1", "w1 w2 w3"], 4)
    assert widths == [(1, 1), (1, 3)]


def test_an_answer_that_ends_with_its_language_has_one_end():
    """As mBART's do: the words, the end, the language; a cut takes words alone."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁w1", "▁w2", "▁"]
    tokenizer = transformers.MBartTokenizer(
        vocab=[(word, 0.0 if word[0] == "<" else -1.0) for word in [*words, "<mask>"]],
        src_lang="en_XX",
        tgt_lang="de_DE",
    )
    end, german = tokenizer.convert_tokens_to_ids(["</s>", "de_DE"])
    texts = SimpleNamespace(tokenizer=tokenizer, limit=None, truncate=True)
    assert answer_ids(texts, "w1 w2 w1", end) == [4, 5, 4, end, german]
    texts.limit = 4
    assert answer_ids(texts, "w1 w2 w1", end) == [4, 5, end, german]


def test_the_language_of_recordings_stands_before_the_transcript(benches, monkeypatch):
    bench = benches["speech"]
    base = bench.base()
    base.tokenizer = small.whisper_tokenizer()
    marks = ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    prefix = base.tokenizer.convert_tokens_to_ids(marks)
    base.model.config.decoder_start_token_id = prefix[0]
    base.model.config.eos_token_id = base.tokenizer.eos_token_id
    with pytest.raises(InputError, match="is not told its language; leave it out"):
        speech.Speech(language="de").prefix_ids(base)  # it is one of English alone
    base.model.generation_config.is_multilingual = True
    with pytest.raises(InputError, match="say which one is spoken, such as --language german"):
        bench.data(base)
    with pytest.raises(InputError, match="--language Elvish: Whisper has no such language"):
        speech.Speech(language="Elvish").prefix_ids(base)
    kind = speech.Speech(language="German")
    base.tokenizer = small.whisper_tokenizer()
    data = kind.load_data(RowSpec((str(bench.file),)), base)
    end = base.tokenizer.eos_token_id
    words = base.tokenizer("w0 w1", add_special_tokens=False)["input_ids"]
    assert len(words) == 5
    seen = []
    base.model.model.decoder.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].tolist()), with_kwargs=True
    )
    kind.on(base.model, None).measured([data[1]], None)
    assert seen == [[[*prefix, *words]]]
    labels = decoder_batch(base.model, [data[1]])["_labels"]
    assert labels.tolist() == [[-100, -100, -100, *words, end]]
    assert data[1].weight == 6
    given = []

    def generated(model, handle, adapter, batch, length):
        given.append((batch["decoder_input_ids"].tolist(), length))
        return torch.tensor([[*prefix, *words, end]])

    monkeypatch.setattr(speech, "generated", generated)
    assert kind.predict(base, None, None, [kind.asked(data, 1)], 40) == ["w0 w1"]
    assert given == [([prefix], 28)]  # of 32 positions


def test_a_transcript_fits_the_positions_of_the_decoder(benches, tmp_path):
    bench = benches["speech"]
    base = bench.base()
    rows = small.write_sounds(tmp_path, 1)
    rows[0]["text"] = LONG
    with pytest.raises(InputError, match="81 tokens; at most 32 fit"):
        rows_of(bench, base, tmp_path, rows)
    assert rows_of(bench, base, tmp_path, rows, truncate=True)[0].weight == 32


def test_pictures_stand_upright_and_need_no_file(benches):
    """A camera writes how it was held, by which the picture is turned before it is cut."""
    picture = Image.new("RGB", (30, 20), "red")
    picture.paste("blue", (0, 0, 15, 20))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # a quarter turn
    picture.save(file, "PNG", exif=exif)
    turned = opened(file.getvalue(), "it")
    assert turned.size == (20, 30)
    assert turned.getpixel((10, 2)) == (0, 0, 255)
    bench = benches["vision"]
    base = bench.base()
    asked = AskedFile("a column of bytes", file.getvalue())
    assert len(bench.kind.predict(base, None, None, [asked], 8)) == 1


def written(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_pictures_of_more_than_eight_bits():
    """Pillow's own conversion makes nearly all of 16 bits white, and all in [0, 1] black."""
    ramp = np.linspace(0, 0xFFFF, 16).round().reshape(4, 4)
    read = opened(written(Image.fromarray(ramp.astype(np.uint16)), "PNG"), "it")
    assert read.mode == "RGB"
    np.testing.assert_allclose(np.asarray(read)[..., 0], ramp / 257, atol=0.5)
    grey = Image.fromarray((ramp / 0xFFFF).astype(np.float32))
    with pytest.raises(InputError, match=r"a\.tif: its greys are no whole numbers of 16 bits"):
        opened(written(grey, "TIFF"), "a.tif")


def test_a_picture_that_moves_is_named():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    moving = written(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"a\.gif: it has 2 frames; save the one that is meant"):
        opened(moving, "a.gif")


def test_of_a_photo_with_a_second_view_the_first_is_read():
    """Phones write such for depth and for wide colours; it is no film."""
    views = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    photo = written(views[0], "MPO", save_all=True, append_images=views[1:])
    assert Image.open(io.BytesIO(photo)).n_frames == 2
    red, _, blue = opened(photo, "a.jpg").getpixel((4, 4))
    assert red > 250
    assert blue < 5


def test_what_is_transparent_lies_on_white():
    read = opened(written(Image.new("RGBA", (2, 2), (0, 0, 255, 51)), "PNG"), "it")
    assert (read.mode, read.getpixel((0, 0))) == ("RGB", (204, 204, 255))


def test_folders_of_classes(benches, tmp_path):
    """What is hidden is no class and no picture; what no class has is told."""
    files = ["a/0.png", "a/1.png", "b/0.png", ".ipynb_checkpoints/0.png", "b/._0.png"]
    files += ["0.png", "nested/deep/0.png", "a/.old/0.png"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    spec, base = RowSpec((str(tmp_path),)), benches["vision"].base()
    kind = Vision().fitted(spec, {})
    assert kind.labels == ("a", "b")
    report = kind.load_data(spec, base).report
    assert report.classes == {"a": 2, "b": 1}
    (note,) = report.notes
    assert "2 pictures not used, such as 0.png; a picture stands in the folder of its" in note


@pytest.mark.parametrize("name", ["vision", "speech", "vision-chat"])
def test_a_column_of_bytes_is_never_read_from_a_file_of_its_name(
    benches, name, tmp_path, monkeypatch
):
    """A path beside bytes, as ``datasets`` writes them, tells where they came from."""
    bench = benches[name]
    base, beside = bench.base(), bench.file.parent
    data, task = bench.data(base), bench.kind.on(base.model, None)
    ending, column = ("wav", "audio") if name == "speech" else ("png", "image")
    monkeypatch.chdir(tmp_path)
    Path(f"0.{ending}").write_bytes((beside / f"1.{ending}").read_bytes())
    held = {"bytes": (beside / f"0.{ending}").read_bytes(), "path": f"0.{ending}"}
    row = json.loads(bench.file.read_text().split("\n")[0])
    if name == "vision-chat":
        row["messages"][0]["content"][0]["image"] = held
    else:
        row[column] = held
    read = [Row("rows.parquet", "row", 1, row)]
    monkeypatch.setattr("lorakit.tasks.rows.open_all", lambda *_: iter(read))
    (example,) = bench.kind.load_data(RowSpec(("rows.parquet",)), base)

    def seen(example):
        return next(t for t in task._batch([example]).values() if t.is_floating_point())

    assert torch.equal(seen(example), seen(data[0]))
    assert not torch.equal(seen(example), seen(data[1]))
    asked = [one.inputs["asked"] for one in (example, data[0])]
    assert len(set(bench.kind.predict(base, None, None, asked, 4))) == 1


def test_a_mark_in_a_text_is_the_place_of_a_picture(benches, tmp_path):
    """As LLaVA's rows have it; what the model sees is that of the same chat in parts."""
    bench = benches["vision-chat"]
    base = bench.base()
    small.write_pictures(tmp_path, 2)
    first, second = ({"type": "image", "image": f"{i}.png"} for i in range(2))
    words = [{"type": "text", "text": text} for text in ("w1", "w2 w3")]
    answer = {"role": "assistant", "content": "w4"}

    def row(content, **more):
        return {"messages": [{"role": "user", "content": content}, answer], "images": None, **more}

    rows = [
        row("<image>\nw1\n<image>\nw2 w3", images=["0.png", "1.png"]),
        row([first, words[0], second, words[1]]),
    ]
    marked, parts = rows_of(bench, base, tmp_path, rows)
    assert marked.inputs["messages"] == parts.inputs["messages"]
    task = bench.kind.on(base.model, None)
    for name, seen in task._batch([marked]).items():
        assert torch.equal(seen, task._batch([parts])[name])


def test_a_head_that_names_no_classes(benches):
    """As PEFT writes it: how many there are is seen, which they are is guessed and said."""
    bench = benches["classify"]
    handle = bench.attached(bench.base())
    adapter = handle.snapshot("a")
    kind, notes = bench.kind.for_adapter(adapter, "theirs")
    assert kind.labels == ("a", "b", "c")
    assert notes == [
        "theirs does not name its classes; they are taken to be, in this order, a, b, c"
    ]
    numbers, _ = replace(kind, labels=("0", "2")).for_adapter(adapter, "theirs")
    assert numbers.labels == ("0", "1", "2")
    with pytest.raises(InputError, match=r"has 3 classes .* 2 labels are known \(a, b\)"):
        replace(kind, labels=("a", "b")).for_adapter(adapter, "theirs")
    embedding = benches["embed"].attached(benches["embed"].base()).snapshot("a")
    assert kind.for_adapter(embedding, "theirs") == (kind, [])


def test_an_unknown_pooling_of_a_base_on_the_hub_is_said(monkeypatch, capsys):
    from lorakit.bases import config, fetch
    from lorakit.cli.tasks.choosing import kind_for

    def offline(*_):
        raise fetch.NotCachedError("1_Pooling/config.json of it is not cached, and so on.")

    monkeypatch.setattr(config, "read_config", lambda _: {"model_type": "bert"})
    monkeypatch.setattr(fetch, "fetch_file", offline)
    options = SimpleNamespace(base="owner/encoder", revision=None, language=None)
    assert kind_for(options, "embed", None).pooling == "mean"
    said = capsys.readouterr().err
    assert "is not cached, and so on, so the vector is taken to be the mean over" in said


@pytest.mark.parametrize(("told", "pooling"), [("cls", "cls"), (None, "mean")])
def test_the_pooling_of_a_base_on_the_hub(monkeypatch, tmp_path, told, pooling):
    from lorakit.bases import config, fetch
    from lorakit.cli.tasks.choosing import kind_for

    path = tmp_path / "1_Pooling" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"pooling_mode": told}))
    monkeypatch.setattr(config, "read_config", lambda _: {"model_type": "bert"})
    monkeypatch.setattr(fetch, "fetch_file", lambda *_: path if told else None)
    options = SimpleNamespace(base="owner/encoder", revision=None, language=None)
    assert kind_for(options, "embed", None).pooling == pooling
