"""Folders of pictures: the forms that are read, and everything that can be wrong with one."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lorakit.data.pictures import opened
from lorakit.errors import DataError, SpecError
from lorakit.images.buckets import bucket_sizes, place, place_all
from lorakit.images.pictures import Picture, PicturesSpec, read_pictures
from tests.images import tiny


def spec(path, **changes):
    return PicturesSpec(str(path), **changes)


def problems_of(path, **changes):
    with pytest.raises(DataError) as caught:
        read_pictures(spec(path, **changes))
    return str(caught.value)


def test_captions_beside_the_pictures(tmp_path):
    tiny.pictures(tmp_path / "deep" / "er", 4)
    found, report = read_pictures(spec(tmp_path, trigger="sks"))
    assert [one.caption for one in found] == [
        "sks, a red thing", "sks, a blue thing", "sks, a green thing", "sks, a red thing",
    ]  # fmt: skip
    assert (found[0].width, found[0].height, found[3].width) == (24, 24, 36)
    assert (report.used, report.found, report.left_out) == (4, 4, ())
    assert len({one.digest for one in found}) == 4


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path, kind):
    """As ``datasets`` lays out an image folder; a picture without a row is named, not used."""
    tiny.pictures(tmp_path / "train", 3)
    rows = [("train/00.png", "one, with a comma"), ("train/02.png", "two")]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f, "text": t}) for f, t in rows]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    else:
        (tmp_path / "metadata.csv").write_text(
            "file_name,caption\n" + "".join(f'{f},"{t}"\n' for f, t in rows)
        )
    found, report = read_pictures(spec(tmp_path))
    assert [(one.path.name, one.caption) for one in found] == [
        ("00.png", "one, with a comma"), ("02.png", "two"),
    ]  # fmt: skip
    assert any("1 pictures are in the folder and not in metadata" in n for n in report.notes)


def test_the_picture_is_turned_as_its_file_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    (found,), _ = read_pictures(spec(tmp_path, caption="x"))
    assert (found.width, found.height) == (20, 30)


def test_masks_of_a_file_and_of_transparency(tmp_path):
    tiny.pictures(tmp_path, 2)
    Image.new("L", (24, 24), 255).save(tmp_path / "00.mask.png")
    clear = Image.new("RGBA", (24, 24), (9, 9, 9, 0))
    clear.putpixel((3, 3), (9, 9, 9, 255))
    clear.save(tmp_path / "01.png")
    found, _ = read_pictures(spec(tmp_path, masks=True))
    assert [(one.mask is not None, one.masked) for one in found] == [(True, True), (False, True)]
    without, _ = read_pictures(spec(tmp_path))  # the mask is no picture
    assert [(one.mask, one.masked) for one in without] == [(None, False), (None, False)]
    assert without[0].digest != found[0].digest


def test_masks_and_captions_have_any_of_their_endings(tmp_path):
    """And masks that are of no picture are said."""
    tiny.pictures(tmp_path, 4)
    for name in ("00.mask.png", "01.mask.JPG", "02.MASK.PNG", "3.mask.png"):
        with (tmp_path / name).open("wb") as file:
            Image.new("L", (24, 24), 255).save(file, "jpeg" if "JPG" in name else "png")
    (tmp_path / "00.txt").rename(tmp_path / "00.TXT")
    found, report = read_pictures(spec(tmp_path, masks=True))
    assert [one.mask and one.mask.name for one in found] == [
        "00.mask.png", "01.mask.JPG", "02.MASK.PNG", None,
    ]  # fmt: skip
    assert found[0].caption == "a red thing"
    (note,) = report.notes
    assert note.startswith("1 masks are not used, such as 3.mask.png")
    assert read_pictures(spec(tmp_path))[1].notes == ()


def test_masks_that_show_nothing(tmp_path):
    tiny.pictures(tmp_path, 3)
    Image.new("L", (24, 24)).save(tmp_path / "00.mask.png")
    # what is white and transparent is not shown
    Image.new("RGBA", (24, 24), (255, 255, 255, 0)).save(tmp_path / "01.mask.png")
    Image.new("RGBA", (24, 24), (9, 9, 9, 0)).save(tmp_path / "02.png")
    text = problems_of(tmp_path, masks=True)
    assert "00.png: its mask 00.mask.png is black everywhere, so nothing" in text
    assert "01.png: its mask 01.mask.png is black everywhere, so nothing" in text
    assert "02.png: it is transparent everywhere, so nothing" in text
    assert read_pictures(spec(tmp_path))[1].used == 3


def test_folders_that_are_links_are_said(tmp_path):
    tiny.pictures(tmp_path / "elsewhere", 2)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    said = "1 folders are links, such as link; they are not searched"
    assert f"holds no picture; {said}. Pictures end in" in problems_of(folder)
    tiny.pictures(folder, 1)
    _, report = read_pictures(spec(folder))
    assert (report.used, report.notes) == (1, (said,))


def test_everything_wrong_is_named_at_once(tmp_path):
    tiny.pictures(tmp_path, 9)
    whole = (tmp_path / "00.png").read_bytes()
    (tmp_path / "00.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "01.png").write_bytes(b"")
    (tmp_path / "02.txt").unlink()
    (tmp_path / "03.txt").write_text("  \n")
    (tmp_path / "04.txt").write_bytes(b"\xff\xfe caption")
    (tmp_path / "05.png").write_text("no picture")
    (tmp_path / "06.txt").write_text("a\0b")
    (tmp_path / "07.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    frames = [Image.fromarray(np.full((24, 24, 3), v, np.uint8)) for v in (0, 99)]
    frames[0].save(tmp_path / "10.gif", save_all=True, append_images=frames[1:])
    text = problems_of(tmp_path)
    for line in (
        "00.png: it is damaged", "01.png: the file is empty", "02.png: it has no caption",
        "03.png: it has no caption", "04.png: its caption 04.txt is not UTF-8",
        "05.png: it is damaged or no picture", "06.png: its caption 06.txt holds zero bytes",
        "07.png: is a Git LFS pointer", "10.gif: it has 2 frames",
    ):  # fmt: skip
        assert line in text
    assert "08.png" not in text
    found, report = read_pictures(spec(tmp_path, bad="skip"))
    assert (len(found), report.used, report.found, len(report.left_out)) == (1, 1, 10, 9)


def test_no_caption_names_a_file(tmp_path):
    """Captions are read from the .txt beside a picture, and from no path that a caption holds."""
    folder = tiny.pictures(tmp_path / "data", 2)
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    rows = [("00.png", f"\0{secret}"), ("01.png", "a thing")]
    lines = [json.dumps({"file_name": f, "text": t}) for f, t in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert "metadata.jsonl line 1: its text holds zero bytes" in problems_of(folder)
    (found,), _ = read_pictures(spec(folder, bad="skip"))
    assert found.caption == "a thing"
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png"}')
    (found,), _ = read_pictures(spec(folder, caption=f"\0{secret}"))
    assert found.caption != "a secret"


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    ramp = np.linspace(0, 0xFFFF, 24 * 24).round().reshape(24, 24)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / f"a.{ending}")
    read = opened((tmp_path / f"a.{ending}").read_bytes())
    assert read.mode == "RGB"
    np.testing.assert_allclose(np.asarray(read)[..., 1], ramp / 257, atol=0.5)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "b.tif")
    assert "b.tif: its greys are no whole numbers of 16 bits" in problems_of(tmp_path, caption="x")


def test_one_grey_of_sixteen_bits_is_transparent(tmp_path):
    ramp = np.linspace(0, 0xFFFF, 24 * 24).round().reshape(24, 24).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    chunk = b"tRNS" + struct.pack(">H", ramp[5, 7])
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    after_header = 8 + 25  # PNG's mark, and IHDR
    alpha = opened(content[:after_header] + chunk + content[after_header:]).getchannel("A")
    assert np.argwhere(np.asarray(alpha) == 0).tolist() == [[5, 7]]
    assert alpha.getextrema() == (0, 255)


def test_a_picture_with_too_many_pixels(tmp_path, monkeypatch):
    tiny.pictures(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "more pixels than anything should decode" in problems_of(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "00.png", "text": "a"}], "line 1: has no file_name; it has file, text"),
        ([{"file_name": "../out.png", "text": "a"}], "lies outside of the folder"),
        ([{"file_name": "9.png", "text": "a"}], "9.png (metadata.jsonl line 1): there is no such"),
        ([{"file_name": "00.png", "text": 7}], "its text is 7; a caption is text"),
        (
            [{"file_name": "00.png", "text": None}],
            "it has no caption. Write it into the column text of metadata.jsonl",
        ),
        ([{"file_name": "00.png", "text": "a" * 70_000}], "is no caption, it has 70000 characters"),
        ([{"file_name": "00.png", "text": "a"}] * 2, "00.png has a row already"),
        ([{"file_name": "00.png", "text": "a", "mask_file_name": "m.png"}], "m.png is not there"),
        (["text"], "is no JSON object"),
    ],
)
def test_bad_metadata(tmp_path, rows, message):
    tiny.pictures(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert message in problems_of(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "00.png,a red, thing\n",
            "metadata.csv line 2: 3 values for the 2 columns file_name, text",
        ),
        ('00.png,"a red thing\n01.png,b\n', 'a quote (") opened in the record of line 2 is never'),
        (f"00.png,{'a' * 200_000}\n", "its text is no caption, it has 200000 characters"),
        ("00.png,\n", "it has no caption"),
        ("", "metadata.csv: it has a header (file_name, text) and no rows"),
    ],
)
def test_bad_tables(tmp_path, lines, message):
    tiny.pictures(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + lines)
    assert message in problems_of(tmp_path)
    (tmp_path / "metadata.csv").write_text("")
    assert "metadata.csv: it is empty" in problems_of(tmp_path)


def test_a_quote_that_takes_other_rows_with_it(tmp_path):
    tiny.pictures(tmp_path, 3)
    text = 'file_name,text\n00.png,"a red thing\n01.png,a blue thing"\n02.png,a green thing\n'
    (tmp_path / "metadata.csv").write_text(text)
    _, report = read_pictures(spec(tmp_path))
    assert any(
        note.startswith("1 captions go over several lines, such as that of 00.png (metadata.csv l")
        for note in report.notes
    )


def test_bad_folders(tmp_path):
    text = problems_of(tmp_path / "nowhere")  # of --valid and --prior-data too
    assert "nowhere does not exist. Give the folder that holds the pictures" in text
    (tmp_path / "file.png").write_bytes(b"")
    assert "is a file" in problems_of(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("x")
    assert "holds no picture; it holds .md" in problems_of(tmp_path / "empty")
    tiny.pictures(tmp_path / "plain", 1)
    assert "--caption-column" in problems_of(tmp_path / "plain", caption_column="text")
    (tmp_path / "plain" / "metadata.jsonl").write_text("{no json")
    assert "metadata.jsonl line 1: is no JSON" in problems_of(tmp_path / "plain")
    (tmp_path / "plain" / "metadata.jsonl").write_text('{"file_name": "00.png", "other": "x"}')
    assert "has no column 'text'" in problems_of(tmp_path / "plain", caption_column="text")


def test_copies_are_said(tmp_path):
    tiny.pictures(tmp_path, 1)
    (tmp_path / "z.png").write_bytes((tmp_path / "00.png").read_bytes())
    _, report = read_pictures(spec(tmp_path, caption="x"))
    assert any("equal to another one" in note for note in report.notes)


# --- buckets -------------------------------------------------------------------------------------


def shaped(width, height, where=""):
    return Picture(None, "x", width, height, "0" * 64, where=where)


def test_a_picture_goes_where_its_ratio_is_nearest():
    sizes = bucket_sizes(512, 64)
    assert (512, 512) in sizes
    for width, height in ((1000, 1000), (1600, 900), (600, 2000), (1234, 777)):
        placed = place(shaped(width, height), sizes)
        ratio = width / height
        off = {abs(np.log(w / h / ratio)) for h, w in sizes}
        assert abs(np.log(placed.width / placed.height / ratio)) <= min(off) + 0.05
        high, wide = placed.scaled  # it covers its size, and hangs over on one side alone
        assert high >= placed.height
        assert wide >= placed.width
        assert min(high - placed.height, wide - placed.width) <= 1
        assert 0.7 < placed.height * placed.width / 512**2 < 1.4


def test_too_small_pictures_are_named():
    sizes = bucket_sizes(64, 8)
    good, small = shaped(64, 64), shaped(63, 64, "deep/s.png")
    ((kept, _),), lines = place_all([good, small], sizes, enlarge=False)
    assert kept is good
    assert [line.partition(",")[0] for line in lines] == ["deep/s.png: it is 63 × 64 pixels"]
    found, lines = place_all([good, small], sizes, enlarge=True)
    assert (len(found), lines) == (2, [])


@pytest.mark.parametrize("resolution", [4, 100])
def test_a_resolution_that_the_base_does_not_make(resolution):
    with pytest.raises(SpecError, match="must be a multiple of 64"):
        bucket_sizes(resolution, 64)


def test_squares():
    assert bucket_sizes(64, 8, square=True) == [(64, 64)]
