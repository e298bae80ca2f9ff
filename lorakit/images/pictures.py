"""A folder of pictures with captions: found, read, and checked to the last file.

Three forms are read, at any depth of the folder:

- ``a.png`` with its caption beside it in ``a.txt`` (endings may be in capitals);
- ``metadata.jsonl`` or ``metadata.csv`` with a column ``file_name`` and one of captions, which is
  how ``datasets`` lays out an image folder;
- pictures alone, with one caption given for all.

A mask (white: learn this) lies beside its picture as ``a.mask.png`` (or another ending of
pictures), in the metadata's column ``mask_file_name``, or is the picture's own transparency.
Everything that is wrong is collected: each file is named with what is wrong and what would help.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorakit.data.pictures import laid_on, opened
from lorakit.data.readers import table
from lorakit.errors import DataError, collected
from lorakit.optional import require

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
MASK = ".mask"
#: names of a caption's column, tried in this order
CAPTION_COLUMNS = ("text", "caption", "prompt", "description")
#: captions may be long, but a file of this size is none
_MOST_CAPTION_BYTES = 1 << 16

Bad = Literal["error", "skip"]


@dataclass(frozen=True)
class Picture:
    """One picture that was checked."""

    path: Path
    caption: str
    width: int
    """Pixels, after the file's own rotation."""
    height: int
    digest: str
    """sha256 (hex) of the file, and of its mask if one is wanted and there."""
    mask: Path | None = None
    masked: bool = False
    """Whether only a part of it is learnt: what its mask shows, or what is not transparent."""
    where: str = ""
    """Its path in the folder, for messages."""


@dataclass(frozen=True)
class PicturesSpec:
    """Which pictures to read, and how."""

    path: str
    caption: str | None = None
    """Of pictures that have none of their own."""
    caption_column: str | None = None
    """Column of the metadata; ``None``: the first of ``text``, ``caption``, ``prompt`` …"""
    trigger: str | None = None
    """Words put before every caption, by which the adapter is called."""
    masks: bool = False
    """Whether only what masks show is learnt, of pictures that have one."""
    bad: Bad = "error"
    """What a picture that cannot be used does: stop everything, or be left out and counted."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for YAML."""
        return dict(vars(self))


@dataclass(frozen=True)
class PicturesReport:
    """What was read, and what was left out and why."""

    folder: str
    found: int
    used: int
    source: str
    """Where the captions came from."""
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    """``"512 × 768"`` → pictures that are trained on at this size."""

    def lines(self) -> list[str]:
        """Sentences for the screen."""
        found = [f"Pictures: {self.used} of {self.folder} (captions: {self.source})"]
        if self.sizes:
            each = ", ".join(f"{n} at {size}" for size, n in self.sizes.items())
            found.append(f"Sizes: {each}")
        if self.left_out:
            found.append(f"Left out: {len(self.left_out)} of {self.found}")
            found += [f"  {line}" for line in self.left_out[:20]]
        return found + [f"note: {line}" for line in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = {**vars(self), "sizes": dict(self.sizes)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@dataclass
class _Row:
    """A picture before it was looked at."""

    path: Path
    caption: str | Path | None
    """A path is that of the file with the caption. It is read later on, with the picture, so that
    what is wrong with it is named with it."""
    mask: Path | None
    where: str
    """For messages."""
    remedy: str
    """What would give it a caption."""


# --- reading -------------------------------------------------------------------------------------


def read_pictures(spec: PicturesSpec) -> tuple[list[Picture], PicturesReport]:
    """All pictures of a folder, in the order of their paths.

    Raises:
        DataError: as of :func:`find_pictures` and :func:`check_usable`.
        MissingDependencyError: Pillow is not installed.
    """
    pictures, report = find_pictures(spec)
    check_usable(report, spec.bad)
    return pictures, report


def find_pictures(spec: PicturesSpec) -> tuple[list[Picture], PicturesReport]:
    """Those that can be used, in the order of their paths; the report has the others.

    Raises:
        DataError: there is no such folder, or nothing in it is a picture.
        MissingDependencyError: Pillow is not installed.
    """
    require("PIL", extra="images", purpose="reading pictures")
    folder = Path(spec.path).expanduser()
    _check_folder(folder)
    rows, problems, source, notes = _rows(folder, spec)
    pictures: list[Picture] = []
    for row in rows:
        try:
            pictures.append(_checked(row, folder, spec))
        except DataError as error:
            problems.append(str(error))
    found = len(pictures) + len(problems)
    notes += _duplicates(pictures, folder)
    report = PicturesReport(
        str(folder), found, len(pictures), source, tuple(problems), tuple(notes)
    )
    return pictures, report


def check_usable(report: PicturesReport, bad: Bad) -> None:
    """Refuse a folder of which pictures were left out where none should be, or that has no others.

    Raises:
        DataError: all of them are named.
    """
    if report.left_out and bad == "error":
        raise DataError(
            collected(f"{report.folder} has pictures that cannot be used", report.left_out)
            + "\nMend or remove them; or leave them out with --bad-pictures skip, which counts "
            "them."
        )
    if not report.used:
        raise DataError(f"{report.folder} holds no picture that can be used: " + _first(report))


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise DataError(
            f"{folder} does not exist. Give the folder that holds the pictures and their captions."
        )
    if not folder.is_dir():
        raise DataError(
            f"{folder} is a file. Give the folder that holds the pictures and their captions."
        )


def _first(report: PicturesReport) -> str:
    if not report.left_out:
        return f"{report.source} has no rows"
    return f"{len(report.left_out)} were left out, the first: {report.left_out[0]}"


def _rows(folder: Path, spec: PicturesSpec) -> tuple[list[_Row], list[str], str, list[str]]:
    """Rows, problems with them, where the captions come from, and notes."""
    paths = sorted(p for p in folder.rglob("*") if not _hidden(p, folder))
    files = [p for p in paths if p.is_file()]
    metadata = [p for p in files if p.name in METADATA]
    notes: list[str] = []
    linked = [p for p in paths if p.is_symlink() and p.is_dir()]
    if linked:  # they may lead anywhere, and round in circles
        notes.append(
            f"{len(linked)} folders are links, such as {linked[0].relative_to(folder)}; they are "
            "not searched"
        )
    if metadata:
        rows, problems = _metadata_rows(metadata, folder, spec, notes)
        source = ", ".join(str(p.relative_to(folder)) for p in metadata)
        named = {row.path for row in rows} | {row.mask for row in rows}
        spare = [p for p in files if _is_picture(p) and p.resolve() not in named]
        if spare:
            notes.append(
                f"{len(spare)} pictures are in the folder and not in {source}, such as "
                f"{spare[0].relative_to(folder)}; they are not used"
            )
        return sorted(rows, key=lambda row: row.path), problems, source, notes
    if spec.caption_column is not None:
        raise DataError(
            f"--caption-column {spec.caption_column}: {folder} has no metadata.jsonl and no "
            "metadata.csv. Captions beside the pictures need no column; leave it out."
        )
    rows = _plain_rows(files, folder)
    if not rows:
        other = {p.suffix or p.name for p in files}
        there = [f"it holds {', '.join(sorted(other)[:6])}"] if other else []
        raise DataError(
            "; ".join([f"{folder} holds no picture", *there, *notes])
            + f". Pictures end in {', '.join(SUFFIXES)}."
        )
    if spec.masks:
        used = {row.mask for row in rows}
        spare = [p for p in files if _is_mask(p) and p.resolve() not in used]
        if spare:
            notes.append(
                f"{len(spare)} masks are not used, such as {spare[0].relative_to(folder)}: a "
                f"picture NAME.png has one mask beside it, NAME{MASK}.png"
            )
    return rows, [], "a .txt beside each", notes


def _plain_rows(files: Sequence[Path], folder: Path) -> list[_Row]:
    """Pictures, each with the caption and the mask that are called as it is."""
    captions = {p.with_suffix(""): p for p in files if p.suffix.lower() == ".txt"}
    masks = {p.with_suffix("").with_suffix(""): p.resolve() for p in files if _is_mask(p)}
    return [
        _Row(
            p.resolve(),
            captions.get(p.with_suffix("")),
            masks.get(p.with_suffix("")),
            str(p.relative_to(folder)),
            f"Write {p.stem}.txt beside it",
        )
        for p in files
        if _is_picture(p) and not _is_mask(p)
    ]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_mask(path: Path) -> bool:
    return _is_picture(path) and path.stem.lower().endswith(MASK)


def _metadata_rows(
    files: Iterable[Path], folder: Path, spec: PicturesSpec, notes: list[str]
) -> tuple[list[_Row], list[str]]:
    rows: list[_Row] = []
    problems: list[str] = []
    seen: set[Path] = set()
    for file in files:
        name = str(file.relative_to(folder))
        long: list[_Row] = []
        for number, values, wrong in _read_metadata(file, notes):
            where = f"{name} line {number}"
            if wrong is not None:
                problems.append(f"{where}: {wrong}")
                continue
            row = _metadata_row(file, where, values, spec)
            if isinstance(row, str):
                problems.append(f"{where}: {row}")
            elif row.path in seen:
                problems.append(f"{where}: {row.path.name} has a row already; keep one of them")
            else:
                seen.add(row.path)
                rows.append(row)
                if isinstance(row.caption, str) and "\n" in row.caption.strip():
                    long.append(row)
        if long and file.suffix == ".csv":  # in JSON nothing is left open without being broken
            notes.append(
                f"{len(long)} captions go over several lines, such as that of {long[0].where}; "
                "where that is not meant, a quote was left open"
            )
    return rows, problems


def _read_metadata(
    file: Path, notes: list[str]
) -> Iterator[tuple[int, Mapping[str, Any], str | None]]:
    """Line number, values, what is wrong with the line."""
    if file.suffix == ".csv":
        for row in table.read(file, str(file), notes):
            yield row.line or row.number, row.values, row.problem
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            yield number, {}, f"is no JSON: {error}"
            continue
        if isinstance(values, dict):
            yield number, values, None
        else:
            yield number, {}, "is no JSON object"


def _metadata_row(
    file: Path, where: str, values: Mapping[str, Any], spec: PicturesSpec
) -> _Row | str:
    """A row; or what is wrong with it."""
    name = values.get("file_name")
    if not isinstance(name, str) or not name:
        there = ", ".join(str(key) for key in values) or "nothing"
        return f"has no file_name; it has {there}"
    for key, value in values.items():
        if isinstance(value, str) and "\0" in value:
            return f"its {key} holds zero bytes, so it is no text"
    path = _inside(file.parent, name)
    if path is None:
        return f"{name} lies outside of the folder; name files below {file.parent}"
    column = spec.caption_column or next((c for c in CAPTION_COLUMNS if c in values), None)
    if spec.caption_column is not None and column not in values:
        there = ", ".join(str(key) for key in values)
        return f"has no column {spec.caption_column!r}; it has {there}"
    caption = None if column is None else values[column]
    if caption is not None and not isinstance(caption, str):
        return f"its {column} is {caption!r:.60}; a caption is text"
    if caption is not None and len(caption) > _MOST_CAPTION_BYTES:
        return f"its {column} is no caption, it has {len(caption)} characters"
    mask_name = values.get("mask_file_name")
    mask = None
    if isinstance(mask_name, str) and mask_name:
        mask = _inside(file.parent, mask_name)
        if mask is None or not mask.is_file():
            return f"its mask {mask_name} is not there"
    remedy = f"Write it into the column {column or CAPTION_COLUMNS[0]} of {file.name}"
    return _Row(path, caption, mask, f"{name} ({where})", remedy)


def _inside(folder: Path, name: str) -> Path | None:
    """A file below a folder, whatever ``name`` says."""
    root = folder.resolve()
    path = Path(os.path.normpath(root / name))
    return path if path.is_relative_to(root) else None


def _duplicates(pictures: list[Picture], folder: Path) -> list[str]:
    first: dict[str, Picture] = {}
    twice = []
    for picture in pictures:
        if picture.digest in first:
            twice.append((first[picture.digest], picture))
        else:
            first[picture.digest] = picture
    if not twice:
        return []
    one, other = twice[0]
    return [
        f"{len(twice)} pictures are equal to another one, such as {other.path.name} to "
        f"{one.path.name}; each is trained on"
    ]


# --- looking at one ------------------------------------------------------------------------------


def _checked(row: _Row, folder: Path, spec: PicturesSpec) -> Picture:
    """The picture of a row.

    Raises:
        DataError: it cannot be used.
    """
    try:
        content = row.path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{row.where}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{row.where}: cannot be read ({error.strerror or error})") from error
    picture = _looked_at(content, row.where)
    width, height = picture.size
    caption = _caption(row, spec)
    digest = hashlib.sha256(content)
    mask = row.mask if spec.masks else None
    shown = picture.getchannel("A") if picture.mode == "RGBA" else None
    if mask is not None:
        inside = mask.read_bytes()
        shown = greys_of(_looked_at(inside, f"{mask.name}, the mask of {row.where}"))
        wide, high = shown.size
        if (wide, high) != (width, height):
            raise DataError(
                f"{row.where}: it is {width} × {height} pixels and its mask {wide} × {high}; make "
                "them equal"
            )
        digest.update(inside)
    least, most = (255, 255) if shown is None else shown.getextrema()
    if spec.masks and most == 0:
        cause = "it is transparent" if mask is None else f"its mask {mask.name} is black"
        raise DataError(
            f"{row.where}: {cause} everywhere, so nothing of the picture would be learnt"
        )
    return Picture(
        row.path,
        caption,
        width,
        height,
        digest.hexdigest(),
        mask,
        spec.masks and (mask is not None or least < 255),
        row.where,
    )


def _looked_at(content: bytes, where: str) -> Any:
    """What :func:`opened` gives, and its errors with a name."""
    try:
        return opened(content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def greys_of(mask: Any) -> Any:
    """A mask that :func:`opened` gave, in 8 bits of grey; nothing is learnt where it is clear."""
    return laid_on(mask, "black").convert("L")


def _caption(row: _Row, spec: PicturesSpec) -> str:
    found = row.caption
    caption = _caption_of(found, row.where) if isinstance(found, Path) else found
    if caption is None or not caption.strip():
        caption = spec.caption
    if caption is None:
        raise DataError(
            f"{row.where}: it has no caption. {row.remedy}, or give one for all such pictures with "
            "--caption"
        )
    caption = " ".join(caption.split())
    if spec.trigger:
        caption = f"{spec.trigger}, {caption}" if caption else spec.trigger
    return caption


def _caption_of(path: Path, where: str) -> str:
    try:
        if path.stat().st_size > _MOST_CAPTION_BYTES:
            raise DataError(
                f"{where}: {path.name} is no caption, it has {path.stat().st_size} bytes"
            )
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{where}: its caption {path.name} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{where}: its caption cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise DataError(f"{where}: its caption {path.name} holds zero bytes, so it is no text")
    return text
