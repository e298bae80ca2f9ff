"""A picture's file as pixels: upright, and of 8 bits."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from lorakit.errors import DataError
from lorakit.optional import require


def opened(content: bytes, *, extra: str = "images") -> Any:
    """A PIL picture of 8 bits in RGB or RGBA, turned as its file says.

    Args:
        extra: the extra of lorakit that brings Pillow, for who has it not.

    Raises:
        DataError: it cannot be read, or moves; without a name.
        MissingDependencyError: Pillow is not installed.
    """
    image = require("PIL.Image", extra=extra, purpose="reading pictures")
    ops = require("PIL.ImageOps", extra=extra, purpose="reading pictures")
    if not content:
        raise DataError("the file is empty")
    if content.startswith(b"version https://git-lfs"):
        raise DataError("is a Git LFS pointer; run `git lfs pull` in the folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of metadata that nobody needs
            picture = image.open(io.BytesIO(content))
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # a photo with a second view: the first
                raise DataError(f"it has {frames} frames; save the one that is meant")
            picture.load()
            turned = ops.exif_transpose(picture)  # a camera writes how it was held
    except (image.DecompressionBombWarning, image.DecompressionBombError):
        raise DataError(
            "it has more pixels than anything should decode unasked; make it smaller"
        ) from None
    except DataError:
        raise
    except Exception as error:  # each of its readers raises in its own way
        raise DataError(f"it is damaged or no picture ({error})".replace("\n", " ")) from error
    transparent = turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info
    if turned.mode.startswith(("I", "F")):
        greys = np.asarray(turned)
        clear = turned.info.get("transparency")  # the one grey that is
        turned = image.fromarray(_eight_bits(greys)).convert("RGB")
        if transparent:
            turned.putalpha(image.fromarray(np.where(greys == clear, 0, 255).astype(np.uint8)))
    return turned.convert("RGBA" if transparent else "RGB")


def laid_on(picture: Any, colour: str) -> Any:
    """What :func:`opened` gives in RGB, with a colour where it is transparent."""
    if picture.mode != "RGBA":
        return picture
    image = require("PIL.Image", extra="images", purpose="reading pictures")
    ground = image.new("RGBA", picture.size, colour)
    return image.alpha_composite(ground, picture).convert("RGB")


def _eight_bits(greys: np.ndarray) -> np.ndarray:
    """[H, W] of 16 bits as uint8; Pillow's own conversion cuts off what is above 255.

    Raises:
        DataError: numbers of another range.
    """
    if greys.dtype.kind == "f" or greys.min() < 0 or greys.max() > 0xFFFF:
        raise DataError(
            "its greys are no whole numbers of 16 bits, so nothing says which of them is white; "
            "save it with 8 or 16 bits"
        )
    return np.round(greys / 257).astype(np.uint8)
