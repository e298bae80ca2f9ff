"""Pictures drawn by a pipeline, and many of them on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

STEPS, GUIDANCE = 20, 6.0
_EDGE, _LINE = 4, 12


def noise(number: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    """What pictures begin from, [number, 3, size, size]; a picture's own whatever is beside it."""
    return torch.stack(
        [
            torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed * 100_003 + i))
            for i in range(number)
        ]
    )


@torch.no_grad()
def draw(
    made: Any, captions: Sequence[str], *, seed: int = 0, steps: int = STEPS, at_once: int = 64
) -> np.ndarray:
    """One picture per caption, [N, 32, 32, 3] uint8."""
    start = noise(len(captions), seed).to(made.unet.device, made.unet.dtype)
    drawn = []
    for i in range(0, len(captions), at_once):
        told = list(captions[i : i + at_once])
        drawn.append(
            made(
                told,
                latents=start[i : i + at_once],
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                output_type="np",
            ).images
        )
    return (np.concatenate(drawn) * 255).round().astype(np.uint8)


def grid(
    pictures: np.ndarray | Sequence[np.ndarray],
    columns: int,
    *,
    titles: Sequence[str] | None = None,
    zoom: int = 3,
) -> Image.Image:
    """Pictures in rows, each ``zoom`` times its size, with its title below it."""
    side = len(pictures[0]) * zoom
    wide, high = side + _EDGE, side + _EDGE + (_LINE if titles else 0)
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * wide + _EDGE, rows * high + _EDGE), "#dddddd")
    pen = ImageDraw.Draw(page)
    for i, picture in enumerate(pictures):
        x, y = _EDGE + i % columns * wide, _EDGE + i // columns * high
        page.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
        if titles:
            pen.text((x, y + side), titles[i][: side // 6], fill="black")
    return page


def draw_cells(
    base: Any,
    handle: Any,
    mix: Any,
    captions: Sequence[str],
    *,
    steps: int = STEPS,
    **fields: float,
) -> np.ndarray:
    """One picture per caption by a `lorakit.images` base and its adapters, [N, 32, 32, 3] uint8.

    The seed of a picture is its place, whatever the adapters are.

    Args:
        fields: of every cell, such as ``against`` and ``start``.
    """
    from lorakit.images.drawing import Cell, draw

    cells = [
        Cell(caption, seed=seed, mix=mix, steps=steps, guidance=GUIDANCE, **fields)
        for seed, caption in enumerate(captions)
    ]
    return (np.stack(draw(base, handle, cells, batch=32)) * 255).round().astype(np.uint8)


def table(
    pictures: Any, rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Image.Image:
    """Pictures [rows][columns], each [32, 32, 3] uint8, as `lorakit images` lays them out."""
    from lorakit.images.sheets import sheet

    return sheet([[one / 255 for one in row] for row in pictures], rows, columns, title)
