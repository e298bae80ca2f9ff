"""Pictures as files: contact sheets with labels, and PNGs that say how they were made."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorakit.optional import require

#: pixels below which a cell of a sheet is enlarged, each pixel to a square of equal ones
_LEAST_CELL = 128
_GAP, _TEXT = 6, 14
_INK, _PAPER = (40, 40, 40), (250, 250, 248)


def as_image(picture: np.ndarray) -> Any:
    """[H, W, 3] in [0, 1] as a PIL picture."""
    image = require("PIL.Image", extra="images", purpose="writing pictures")
    whole = np.nan_to_num(np.asarray(picture, np.float32)).clip(0, 1) * 255
    return image.fromarray(whole.round().astype(np.uint8))


def png(image: Any, facts: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a PNG; the same picture and facts give the same.

    Args:
        facts: plain data on how it was made. It is written as JSON under ``lorakit``, and as a
            line of text under ``parameters``, which other tools show.
    """
    plugin = require("PIL.PngImagePlugin", extra="images", purpose="writing pictures")
    info = plugin.PngInfo()
    if facts is not None:
        info.add_itxt("lorakit", json.dumps(facts, ensure_ascii=False, sort_keys=True))
        info.add_itxt("parameters", _as_parameters(facts))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _as_parameters(facts: Mapping[str, Any]) -> str:
    """The form that AUTOMATIC1111's web UI began, and many programs read."""
    lines = [str(facts.get("prompt", ""))]
    if facts.get("negative"):
        lines.append(f"Negative prompt: {facts['negative']}")
    names = {"steps": "Steps", "guidance": "CFG scale", "seed": "Seed", "size": "Size"}
    told = [f"{word}: {facts[name]}" for name, word in names.items() if facts.get(name) is not None]
    if facts.get("against", 1) != 1:
        told.append(f"Against: {facts['against']:g}")
    if facts.get("adapter_start"):
        told.append(f"Adapter start: {facts['adapter_start']:g}")
    if facts.get("base"):
        told.append(f"Model: {facts['base']}")
    for one in facts.get("adapters") or ():
        told.append(f"Lora: {one['name']}={one['weight']:g}")
    return "\n".join([*lines, ", ".join(told)])


def sheet(
    pictures: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
) -> Any:
    """A PIL picture of pictures in a table.

    Args:
        pictures: [rows][columns], each [H, W, 3] in [0, 1].
        rows, columns: their labels.
        title: above all.
    """
    image = require("PIL.Image", extra="images", purpose="writing pictures")
    drawing = require("PIL.ImageDraw", extra="images", purpose="writing pictures")
    font = require("PIL.ImageFont", extra="images", purpose="writing pictures").load_default(_TEXT)
    rows, columns, title = [_line(one) for one in rows], [*map(_line, columns)], _line(title)
    cells = [[_enlarged(as_image(one), image) for one in row] for row in pictures]
    width = max(cell.width for row in cells for cell in row)
    height = max(cell.height for row in cells for cell in row)
    probe = drawing.Draw(image.new("RGB", (1, 1)))
    wide = max((probe.textlength(_short(label), font=font) for label in rows), default=0)
    left = int(wide) + 2 * _GAP if any(rows) else _GAP
    line = _TEXT + 2 * _GAP
    top = (line if title else 0) + (line if any(columns) else 0) + _GAP
    count = max(len(row) for row in cells)
    page = image.new(
        "RGB",
        (left + count * (width + _GAP), top + len(cells) * (height + _GAP)),
        _PAPER,
    )
    pen = drawing.Draw(page)
    if title:
        pen.text((_GAP, _GAP), _fitting(title, page.width, pen, font), fill=_INK, font=font)
    for number, label in enumerate(columns):
        at = (left + number * (width + _GAP), top - line + _GAP)
        pen.text(at, _fitting(label, width, pen, font), fill=_INK, font=font)
    for i, row in enumerate(cells):
        y = top + i * (height + _GAP)
        pen.text((_GAP, y + height // 2 - _TEXT // 2), _short(rows[i]), fill=_INK, font=font)
        for j, cell in enumerate(row):
            page.paste(cell, (left + j * (width + _GAP), y))
    return page


def _enlarged(cell: Any, image: Any) -> Any:
    factor = max(1, -(-_LEAST_CELL // max(cell.size)))
    if factor == 1:
        return cell
    size = (cell.width * factor, cell.height * factor)
    return cell.resize(size, image.Resampling.NEAREST)


def _line(label: str) -> str:
    return " ".join(label.split())


def _short(label: str, most: int = 36) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _fitting(label: str, width: int, pen: Any, font: Any) -> str:
    for most in range(len(label), 0, -1):
        if pen.textlength(shown := _short(label, most), font=font) <= width:
            return shown
    return ""
