"""``PictureData``: the pictures of a run, checked, placed in buckets and encoded.

The examples of a data set are the pictures, and behind them, where a class is to stay as the base
draws it (prior preservation, Ruiz et al., arXiv 2208.12242), as many of that class: the shorter of
both is repeated, so that each is half of what is seen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lorakit.errors import DataError, SpecError, collected
from lorakit.images.base import PictureBase
from lorakit.images.buckets import Placed, bucket_sizes, counted, place_all
from lorakit.images.cache import Cache
from lorakit.images.noise import NoiseModel, Prediction
from lorakit.images.pictures import (
    Picture,
    PicturesReport,
    PicturesSpec,
    check_usable,
    find_pictures,
)

#: latent positions that count as one in a forward's budget: a picture of 512 pixels in SD's
#: latents has 4096 and counts 512, as a text of as many tokens needs about as much memory
_POSITIONS = 8

#: folders of pictures, as ``find_pictures`` gives them
Read = Mapping[PicturesSpec, tuple[list[Picture], PicturesReport]]
NOTHING: Read = {}


@dataclass(frozen=True)
class PictureSettings:
    """What a run minimises.

    Raises:
        SpecError: a value is impossible. All are listed.
    """

    min_snr: float | None = None
    """γ of min-SNR weighting (arXiv 2303.09556), usually 5; ``None``: all times count alike."""
    noise_offset: float = 0.0
    """Added to the noise of a whole channel, usually 0.05 to 0.1; 0: nothing."""
    caption_dropout: float = 0.0
    """Share of the examples that are seen without their caption, for guidance."""
    prior_weight: float = 1.0
    """Factor on the loss of pictures of the class that is to stay."""
    train_text: bool = False
    """Whether text encoders are adapted, so that captions are encoded in every step."""
    flip: bool = field(default=False, repr=False)  # digests of earlier runs' data are of the repr
    """Whether a picture is mirrored, left to right, in half of the steps that see it."""

    def __post_init__(self) -> None:
        problems = []
        for name, fits, expected in (
            ("min_snr", self.min_snr is None or self.min_snr > 0, "a number above 0"),
            ("noise_offset", self.noise_offset >= 0, "a number of at least 0"),
            ("caption_dropout", 0 <= self.caption_dropout < 1, "a number in [0, 1)"),
            ("prior_weight", self.prior_weight > 0, "a number above 0"),
        ):
            if not fits:
                problems.append(f"{name} is {getattr(self, name)!r}; it must be {expected}")
        if problems:
            raise SpecError(collected("These settings of pictures are impossible", problems))

    def check(self, base: PictureBase) -> None:
        """Refuse what cannot act on this base.

        Raises:
            SpecError: lists it.
        """
        problems = []
        if NoiseModel(base.pipe.scheduler).is_flow:
            if self.min_snr is not None:
                problems.append("min_snr: this base learns flows, whose loss has no such weights")
            if self.noise_offset:
                problems.append("noise_offset: this base learns flows, which begin at pure noise")
        if problems:
            raise SpecError(collected("These settings cannot act here", problems))


@dataclass(frozen=True)
class PictureExample:
    """One picture of a run."""

    id: int
    size: int
    picture: Picture
    placed: Placed
    settings: PictureSettings = field(repr=False)
    cache: Cache = field(repr=False)
    is_prior: bool = False
    weight: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width): those that are equal share a forward."""
        return self.placed.height, self.placed.width

    def mirrored(self) -> PictureExample:
        """The same, left to right."""
        return replace(self, placed=self.placed.mirrored())

    def latent(self) -> dict[str, Tensor]:
        """See :meth:`Cache.latent`."""
        return self.cache.latent(self.picture, self.placed)

    def text(self, caption: str) -> dict[str, Tensor]:
        """See :meth:`Cache.text`."""
        return self.cache.text(caption)


@dataclass(frozen=True)
class DataReport:
    """What was read, as ``run.yaml`` and the report tell it."""

    pictures: PicturesReport
    prior: PicturesReport | None = None
    resolution: int = 0
    trigger: str | None = None
    text_tokens: int | None = None
    prediction: Prediction | None = None
    """What the base predicts."""
    kind: str = "pictures"

    @property
    def files(self) -> tuple[str, ...]:
        """The folders."""
        return tuple(one.folder for one in (self.pictures, self.prior) if one is not None)

    def lines(self) -> list[str]:
        """Sentences for the screen."""
        prior = [] if self.prior is None else ["To stay as they are:", *self.prior.lines()]
        return [*self.pictures.lines(), *prior]

    def facts(self) -> dict[str, Any]:
        """What an adapter says of it."""
        return {
            "kind": self.kind,
            "files": [Path(file).name for file in self.files],
            "pictures": self.pictures.used,
            "resolution": self.resolution,
            "sizes": dict(self.pictures.sizes),
            "trigger": self.trigger,
            "text_tokens": self.text_tokens,
            "prediction": self.prediction,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {**self.facts(), **self.pictures.to_dict()}
        if self.prior is not None:
            found["prior"] = self.prior.to_dict()
        return found


class PictureData(Sequence[PictureExample]):
    """The examples of a run; made by :func:`load_pictures`."""

    spec: PicturesPlan
    """How they were read."""

    def __init__(
        self,
        own: Sequence[tuple[Picture, Placed]],
        prior: Sequence[tuple[Picture, Placed]],
        settings: PictureSettings,
        cache: Cache,
        report: DataReport,
        scale: int,
    ) -> None:
        self._own, self._prior = list(own), list(prior)
        self._half = max(len(own), len(prior))
        self.settings = settings
        self.cache = cache
        self.report = report
        #: tokens after which an answer is over; pictures have none
        self.stop_ids: tuple[int, ...] = ()
        area = scale * scale * _POSITIONS
        self._lengths = np.array(
            [
                max(1, math.ceil(p.height * p.width / area))
                for _, p in map(self._at, range(len(self)))
            ],
            np.int64,
        )

    def __len__(self) -> int:
        return self._half * (2 if self._prior else 1)

    def _at(self, index: int) -> tuple[Picture, Placed]:
        if index < self._half:
            return self._own[index % len(self._own)]
        return self._prior[(index - self._half) % len(self._prior)]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of a data set of {len(self)}")
        i %= len(self)
        picture, placed = self._at(i)
        return PictureExample(
            i,
            int(self._lengths[i]),
            picture,
            placed,
            self.settings,
            self.cache,
            is_prior=i >= self._half,
        )

    @property
    def lengths(self) -> np.ndarray:
        """[len] int64: the size of each example."""
        return self._lengths

    @property
    def digest(self) -> str:
        """sha256 (hex) of pictures, places, captions, and what is minimised."""
        flip = " flip" if self.settings.flip else ""
        digest = hashlib.sha256(f"{self.settings}{flip}".encode())
        for picture, placed in [*self._own, *self._prior]:
            told = f"{picture.digest} {picture.masked} {placed} {picture.caption!r}\n"
            digest.update(told.encode())
        digest.update(f"{len(self._own)} {len(self._prior)}".encode())
        return digest.hexdigest()

    def where(self, index: int) -> str:
        """The file of an example, for messages."""
        return str(self._at(int(index) % len(self))[0].path)

    def prompt_key(self, index: int) -> bytes:
        """The picture's own; a copy of it, and its repetitions, are on the same side of a split.
        Those of a class that is to stay have none, as they are never held out."""
        if int(index) % len(self) >= self._half:
            return b""
        return bytes.fromhex(self._at(int(index) % len(self))[0].digest)[:16]

    @property
    def num_pictures(self) -> int:
        """Different pictures to learn, without those of a class that is to stay."""
        return len({picture.digest for picture, _ in self._own})

    @property
    def captions(self) -> list[str]:
        """Each of them once, in the order of the pictures."""
        return list(dict.fromkeys(picture.caption for picture, _ in self._own))

    def fill(self, on_item: Callable[[int, int], None] | None = None) -> int:
        """Encode what was not encoded before; gives how many that were."""
        pairs = [*self._own, *self._prior]
        captions: Iterable[str] = [picture.caption for picture, _ in pairs]
        if self.settings.flip:
            pairs += [(picture, placed.mirrored()) for picture, placed in pairs]
        if self.settings.caption_dropout:
            captions = [*captions, ""]
        texts = () if self.settings.train_text else captions
        return self.cache.fill(pairs, texts, on_item=on_item)


@dataclass(frozen=True)
class PicturesPlan:
    """How the pictures of a run are read and what of them is minimised; plain data, as run.yaml
    keeps it in its section ``data``."""

    pictures: PicturesSpec
    resolution: int | None = None
    """Side of the square whose area every size has; ``None``: what the base makes unasked."""
    settings: PictureSettings = PictureSettings()
    prior: PicturesSpec | None = None
    """Pictures of a class that is to stay as the base draws it."""
    square: bool = False
    """Whether all become squares."""
    enlarge: bool = False
    """Whether pictures that are too small are scaled up."""
    least: int = 1
    """Pictures that a step takes; fewer of them are repeated, each time with other noise."""
    cache: str | None = None
    """Folder of the cache; ``None``: where caches are."""

    def to_dict(self) -> dict[str, Any]:
        """The inverse of :meth:`from_dict`."""
        found = {
            **self.pictures.to_dict(),
            **{n: v for n, v in vars(self).items() if n not in ("pictures", "settings", "prior")},
            "settings": dict(vars(self.settings)),
        }
        if self.prior is not None:
            path = str(Path(self.prior.path).expanduser().resolve())
            found["prior"] = {**self.prior.to_dict(), "path": path}
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PicturesPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: a name is missing or unknown.
        """
        left = dict(values)
        own = {one.name: left.pop(one.name) for one in fields(PicturesSpec)}
        prior = left.pop("prior", None)
        return cls(
            pictures=PicturesSpec(**own),
            settings=PictureSettings(**left.pop("settings")),
            prior=None if prior is None else PicturesSpec(**prior),
            **left,
        )


def load_pictures(plan: PicturesPlan, base: PictureBase, read: Read = NOTHING) -> PictureData:
    """Read, check and place the pictures of a run; nothing is encoded yet.

    Args:
        read: folders that were read already.

    Raises:
        DataError: pictures that cannot be used, or are too small; all are named.
        SpecError: a resolution that the base does not make, or settings that cannot act.
    """
    settings = plan.settings
    settings.check(base)
    resolution = plan.resolution or base.resolution
    sizes = bucket_sizes(resolution, base.step, square=plan.square)
    own, report = _placed(plan.pictures, sizes, plan.enlarge, read)
    if plan.pictures.masks and not any(picture.masked for picture, _ in own):
        raise DataError(
            f"{plan.pictures.path}: masks are asked for, and no picture has one. Put NAME.mask.png "
            "beside NAME.png (white: learn this), or use pictures with transparent places"
        )
    prior: list[tuple[Picture, Placed]] = []
    about = None
    if plan.prior is not None:
        prior, about = _placed(plan.prior, sizes, plan.enlarge, read)
    elif settings.prior_weight != 1:
        raise SpecError(
            f"prior_weight is {settings.prior_weight:g}, but there are no pictures of a class to "
            "keep; give --prior-data"
        )
    captions = list(dict.fromkeys(picture.caption for picture, _ in own))
    report = replace(report, notes=(*report.notes, *base.cut_captions(captions)))
    repeats = math.ceil(plan.least / (len(own) + len(prior)))
    if repeats > 1:
        note = (
            f"{len(own) + len(prior)} pictures are fewer than a step takes ({plan.least}), so each "
            f"is there {repeats} times, with other noise"
        )
        report = replace(report, notes=(*report.notes, note))
        own, prior = [*own] * repeats, [*prior] * repeats
    told = DataReport(
        report,
        about,
        resolution,
        plan.pictures.trigger,
        base.text_length,
        NoiseModel(base.pipe.scheduler).prediction,
    )
    data = PictureData(own, prior, settings, cache_of(base, plan.cache), told, base.scale)
    data.spec = plan
    return data


def _placed(
    spec: PicturesSpec, sizes: Sequence[tuple[int, int]], enlarge: bool, read: Read
) -> tuple[list[tuple[Picture, Placed]], PicturesReport]:
    pictures, report = read.get(spec) or find_pictures(spec)
    pairs, small = place_all(pictures, sizes, enlarge=enlarge)
    report = replace(
        report,
        used=len(pairs),
        left_out=(*report.left_out, *small),
        sizes=counted([placed for _, placed in pairs]),
    )
    check_usable(report, spec.bad)
    if spec.masks:
        masked = sum(picture.masked for picture, _ in pairs)
        note = f"of {masked} of {len(pairs)} pictures only what the masks show is learnt"
        report = replace(report, notes=(*report.notes, note))
    return pairs, report


def cache_of(base: PictureBase, folder: str | None) -> Cache:
    """The cache of a base in a folder, or where caches are."""
    return Cache(base, None if folder is None else Path(folder))
