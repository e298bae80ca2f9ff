"""Sizes at which pictures are trained on: one area, several aspect ratios.

Each picture goes to the size whose ratio is nearest to its own, is scaled until it covers it, and
is cropped at its middle. Which sizes there are, and which is nearest, is diffusers' own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.errors import DataError, SpecError, collected
from lorakit.images.pictures import Picture
from lorakit.optional import require


@dataclass(frozen=True)
class Placed:
    """How a picture becomes one of a bucket's size."""

    height: int
    """Pixels of the bucket."""
    width: int
    scaled: tuple[int, int]
    """(height, width) of the whole picture once it is scaled."""
    top: int
    """Pixels of the scaled picture that are cropped off above."""
    left: int
    original: tuple[int, int]
    """(height, width) of the file."""

    @property
    def size(self) -> str:
        """For people."""
        return f"{self.width} × {self.height}"


def bucket_sizes(resolution: int, step: int, *, square: bool = False) -> list[tuple[int, int]]:
    """(height, width) of each bucket.

    Args:
        resolution: side of the square whose area they have.
        step: what every side is a multiple of, in pixels.
        square: only that square.

    Raises:
        SpecError: the resolution is no multiple of ``step``, or below it.
    """
    if resolution < step or resolution % step:
        near = max(step, round(resolution / step) * step)
        raise SpecError(
            f"resolution is {resolution}; of this base it must be a multiple of {step}, such as "
            f"{near}"
        )
    if square:
        return [(resolution, resolution)]
    training = require("diffusers.training_utils", extra="images", purpose="training on pictures")
    made: list[tuple[int, int]] = training.generate_aspect_ratio_buckets(resolution, step)
    # with a coarse step some would be far from the area that was asked for
    fitting = [(h, w) for h, w in made if 0.7 < h * w / resolution**2 < 1.4]
    return sorted(fitting or [(resolution, resolution)])


def place(picture: Picture, sizes: Sequence[tuple[int, int]]) -> Placed:
    """The bucket of a picture, and how it gets there."""
    training = require("diffusers.training_utils", extra="images", purpose="training on pictures")
    height, width = sizes[training.find_nearest_bucket(picture.height, picture.width, list(sizes))]
    factor = max(height / picture.height, width / picture.width)
    scaled = (
        max(height, round(picture.height * factor)),
        max(width, round(picture.width * factor)),
    )
    return Placed(
        height,
        width,
        scaled,
        (scaled[0] - height) // 2,
        (scaled[1] - width) // 2,
        (picture.height, picture.width),
    )


def place_all(
    pictures: Sequence[Picture], sizes: Sequence[tuple[int, int]], *, enlarge: bool
) -> list[Placed]:
    """The bucket of every picture.

    Args:
        enlarge: let those that are too small be scaled up.

    Raises:
        DataError: some are smaller than their bucket; all are named.
    """
    placed = [place(picture, sizes) for picture in pictures]
    small = [
        f"{picture.path.name} is {picture.width} × {picture.height} pixels; its size here is "
        f"{there.size}"
        for picture, there in zip(pictures, placed, strict=True)
        if min(picture.width / there.width, picture.height / there.height) < 1
    ]
    if small and not enlarge:
        raise DataError(
            collected(f"{len(small)} pictures are too small for this resolution", small)
            + "\nTake larger ones out of their source, give a lower --resolution, or allow it with "
            "--enlarge (they come out blurred, and so will what is learnt from them)."
        )
    return placed


def counted(placed: Sequence[Placed]) -> dict[str, int]:
    """Size → pictures, the most frequent first."""
    return dict(Counter(one.size for one in placed).most_common())
