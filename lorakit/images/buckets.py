"""Sizes at which pictures are trained on: one area, several aspect ratios.

Each picture goes to the size whose ratio is nearest to its own, is scaled until it covers it, and
is cropped at its middle. Which sizes there are, and which is nearest, is diffusers' own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lorakit.errors import SpecError
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
    flipped: bool = field(default=False, repr=False)  # digests of data are of its repr
    """Whether the scaled picture is mirrored, left to right, before it is cropped."""

    @property
    def size(self) -> str:
        """For people."""
        return f"{self.width} × {self.height}"

    def mirrored(self) -> Placed:
        """The same part of the picture, left to right."""
        left = self.scaled[1] - self.width - self.left
        return replace(self, left=left, flipped=not self.flipped)


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
) -> tuple[list[tuple[Picture, Placed]], list[str]]:
    """The pictures with their buckets, and a line for each that is smaller than its own.

    Args:
        enlarge: let those be scaled up.
    """
    found: list[tuple[Picture, Placed]] = []
    small: list[str] = []
    for picture in pictures:
        placed = place(picture, sizes)
        if enlarge or min(picture.width / placed.width, picture.height / placed.height) >= 1:
            found.append((picture, placed))
        else:
            small.append(
                f"{picture.where}: it is {picture.width} × {picture.height} pixels, too small for "
                f"its size here, {placed.size}; a lower --resolution would do, or --enlarge (it "
                "comes out blurred, and so will what is learnt of it)"
            )
    return found, small


def counted(placed: Sequence[Placed]) -> dict[str, int]:
    """Size → pictures, the most frequent first."""
    return dict(Counter(one.size for one in placed).most_common())
