"""One drawing of an Iconify package → pixels.

The format is Iconify's JSON (iconify.design/docs/types/iconify-json.html): ``icons`` hold the
inside of an SVG element, ``aliases`` are other names of icons, perhaps turned or mirrored.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import resvg_py
from PIL import Image, ImageFilter

_FINER = 4
"""How many times larger a picture is while its lines are looked for."""
_SIDE = 16
"""Width and height of an icon that states none, by Iconify's definition."""


def svg(icons: Mapping[str, Any], name: str) -> str:
    """The drawing as an SVG document of its own; ``currentColor`` is black."""
    icon = _resolved(icons, name)
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", _SIDE))
    height = icon.get("height", icons.get("height", _SIDE))
    body = icon["body"]
    if moves := _moves(icon, left, top, width, height):
        body = f'<g transform="{moves}">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" color="black">{body}</svg>'
    )


def _resolved(icons: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An icon, or what its alias says on top of its parent."""
    if name in icons["icons"]:
        return dict(icons["icons"][name])
    alias = dict(icons["aliases"][name])
    parent = _resolved(icons, alias.pop("parent"))
    for mirrored in ("hFlip", "vFlip"):  # mirrored twice is as it was
        if alias.pop(mirrored, False):
            parent[mirrored] = not parent.get(mirrored, False)
    quarters = parent.get("rotate", 0) + alias.pop("rotate", 0)
    return {**parent, **alias, "rotate": quarters % 4}


def _moves(icon: Mapping[str, Any], left: float, top: float, width: float, height: float) -> str:
    """SVG's transforms for an icon that is mirrored or turned about its middle."""
    x, y = left + width / 2, top + height / 2
    moves = []
    if quarters := icon.get("rotate", 0):
        if width != height:
            raise ValueError(f"a turned icon of {width} × {height} is not known here")
        moves.append(f"rotate({90 * quarters} {x} {y})")
    if icon.get("hFlip"):
        moves.append(f"translate({2 * x} 0) scale(-1 1)")
    if icon.get("vFlip"):
        moves.append(f"translate(0 {2 * y}) scale(1 -1)")
    return " ".join(moves)


def draw(document: str, size: int) -> np.ndarray:
    """An SVG on white, [size, size, 3] uint8; what is not square stands in the middle."""
    png = resvg_py.svg_to_bytes(
        svg_string=document, width=size, height=size, skip_system_fonts=True
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    page = Image.new("RGBA", (size, size), "white")
    page.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return np.asarray(page.convert("RGB"))


def inked(document: str, size: int, *, colours: bool) -> np.ndarray:
    """An SVG with black lines where its colours change, [size, size, 3] uint8.

    Args:
        colours: keep them between the lines; otherwise what is neither a line nor dark is white.
    """
    large = draw(document, _FINER * size)
    page = Image.fromarray(large)
    brightest, darkest = (
        np.asarray(page.filter(kind(5))).astype(int)
        for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter)
    )
    black = ((brightest - darkest).max(2) > 40) | (large.max(2) < 90)
    between = large if colours else np.full_like(large, 255)
    return np.asarray(Image.fromarray(np.where(black[..., None], 0, between)).reduce(_FINER))
