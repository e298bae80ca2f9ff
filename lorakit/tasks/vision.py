"""``vision``: one label of a picture; the head is part of the adapter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lorakit.bases import Base
from lorakit.bases.load import Task as BaseTask
from lorakit.data import pictures
from lorakit.data.rows import Row, RowError, plural, shown
from lorakit.errors import BaseError, DataError, InputError
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.tasks.classify import chosen_labels, class_of, class_sums, labels_of, said
from lorakit.tasks.forwards import RowTask
from lorakit.tasks.kinds import Labelled
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import Fields, Made, RowData, RowExample, RowSpec, load_rows

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Vision(Labelled):
    """Image classification."""

    name: ClassVar[str] = "vision"
    base_task: ClassVar[BaseTask] = "vision"
    fields: ClassVar[Fields] = Fields(
        {
            "image": ("image", "img", "picture", "file_name", "image_path", "path"),
            "label": ("label", "labels", "class", "category"),
        },
        lengths=(),
    )
    unit: ClassVar[str] = "patches"

    def fitted(self, spec: RowSpec, config: Mapping[str, Any]) -> Self:
        if self.labels:
            return self
        if holds_classes(spec.path):
            found = [str(row.values["label"]) for row in class_folders(spec.path)]
            return replace(self, labels=chosen_labels(found, config, ", ".join(spec.path)))
        return replace(self, labels=labels_of(spec, self.fields, config, self.name))

    def load_data(self, spec: RowSpec, base: Base) -> RowData:
        processor = processor_of(base, "pictures")
        patches = _patches(base.model)

        def make(row: Row, values: Mapping[str, Any]) -> Made:
            content, asked = file_content(values["image"], row.file, "picture")
            opened(content, asked.name)
            label = class_of(values["label"], self.labels)
            key = hashlib.sha256(content).digest()
            inputs = {
                "processor": processor,
                "label": label,
                "asked": asked,
                "expected": self.labels[label],
            }
            return Made(inputs, patches, 1, key + str(label).encode(), key)

        in_folders = holds_classes(spec.path)
        return load_rows(
            spec, self.fields, make, task=self.name, unit=self.unit,
            rows=class_folders(spec.path) if in_folders else None,
            notes=_pictures_apart(spec.path) if in_folders else (),
            label=lambda made: str(made.inputs["expected"]),
        )  # fmt: skip

    def on(self, model: nn.Module, handle: Handle | None, recompute: Recompute = "none") -> RowTask:
        return RowTask(model, handle, picture_batch, class_sums, recompute=recompute)

    def predict(
        self,
        base: Base,
        handle: Handle | None,
        adapter: MixLike,
        inputs: Sequence[Any],
        max_new_tokens: int,
    ) -> list[str]:
        """The likeliest label of each picture, with its probability."""
        processor = processor_of(base, "pictures")
        task = RowTask(base.model.eval(), handle, picture_batch, class_sums)
        found = []
        for given in inputs:
            asked = asked_file(given, "picture")
            try:
                opened(asked.read(), asked.name)
            except RowError as error:
                raise InputError(str(error)) from None
            one = {"asked": asked, "processor": processor, "label": 0}
            logits = task.measured([RowExample(0, 0, "", 1, 1, one)], adapter).outputs
            assert logits is not None
            found.append(said(logits[0], self.labels))
        return found


@dataclass(frozen=True)
class AskedFile:
    """A picture or a recording, as a model is asked with it."""

    name: str
    source: str | bytes
    """Its path, from which it is read whenever it is needed; or its content, where it is in no
    file of its own."""

    def read(self) -> bytes:
        return Path(self.source).read_bytes() if isinstance(self.source, str) else self.source

    def __str__(self) -> str:
        return self.name


def asked_file(given: Any, what: str) -> AskedFile:
    """What a model is asked with: that of a row as it is, or the path of a file.

    Raises:
        InputError: there is no such file.
    """
    if isinstance(given, AskedFile):
        return given
    if not os.path.isfile(str(given)):
        raise InputError(f"{given}: there is no such {what}")
    return AskedFile(str(given), str(given))


def picture_batch(examples: Sequence[RowExample]) -> dict[str, Tensor]:
    """Pictures as the base's processor makes them, with their labels."""
    pixels = []
    for example in examples:
        asked = example.inputs["asked"]
        picture = opened(asked.read(), asked.name)
        pixels.append(example.inputs["processor"](picture, return_tensors="pt")["pixel_values"])
    labels = torch.tensor([example.inputs["label"] for example in examples])
    return {"pixel_values": torch.cat(pixels), "_labels": labels}


def opened(content: bytes, name: str) -> Any:
    """A picture, decoded and upright, in RGB; what is transparent lies on white.

    Raises:
        RowError: it cannot be read, or moves.
    """
    try:
        picture = pictures.opened(content, extra="vision")
    except DataError as error:
        raise RowError("a picture that cannot be used", f"{name}: {error}") from None
    return pictures.laid_on(picture, "white")


def file_content(value: Any, file: str, what: str) -> tuple[bytes, AskedFile]:
    """What a row's picture or recording holds, and where it is read again.

    Args:
        value: a path, beside the file of rows or absolute; or a column of ``datasets``, whose
            ``path`` only names the bytes that stand with it.
        file: the file of rows.
        what: what it is, such as ``"picture"``.

    Raises:
        RowError: there is none.
    """
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if isinstance(content, bytes):
            return content, AskedFile(str(path or what), content)
        value = path
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"no {what}", f"the {what} is {shown(value)}; expected a path")
    beside = Path(file).parent / value if os.path.exists(file) else Path(value)
    path = beside if beside.is_file() else Path(value)
    try:
        return path.read_bytes(), AskedFile(str(path), str(path))
    except OSError as error:
        why = error.strerror or "it cannot be read"
        raise RowError(f"a missing {what}", f"{value}: {why} (looked in {beside.parent})") from None


def holds_classes(path: Sequence[str]) -> bool:
    """Whether it is one folder with a folder of pictures for each class."""
    if len(path) != 1 or not os.path.isdir(path[0]):
        return False
    return any(map(_pictures_in, _folders_in(Path(path[0]))))


def class_folders(path: Sequence[str]) -> Iterator[Row]:
    """Rows of :func:`holds_classes`: the pictures in order, each with its folder as the label."""
    files = [file for folder in _folders_in(Path(path[0])) for file in _pictures_in(folder)]
    for number, file in enumerate(files, 1):
        values = {"image": str(file.resolve()), "label": file.parent.name}
        yield Row(str(file), "picture", number, values)


def _pictures_apart(path: Sequence[str]) -> list[str]:
    """A sentence on the pictures that :func:`class_folders` passes over, where there are any."""
    root = Path(path[0])
    used = {file for folder in _folders_in(root) for file in _pictures_in(folder)}
    apart = sorted(
        file
        for file in root.rglob("*")
        if _is_picture(file)
        and file not in used
        and not any(map(_is_hidden, file.relative_to(root).parts))
    )
    if not apart:
        return []
    return [
        f"{path[0]}: {plural(len(apart), 'picture')} not used, such as "
        f"{apart[0].relative_to(root)}; a picture stands in the folder of its class, and not deeper"
    ]


def _folders_in(root: Path) -> list[Path]:
    return sorted(one for one in root.iterdir() if one.is_dir() and not _is_hidden(one.name))


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if _is_picture(f) and not _is_hidden(f.name))


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in _ENDINGS


def _is_hidden(name: str) -> bool:
    """Whether a program put it aside, as ``.ipynb_checkpoints`` and macOS's ``._a.png``."""
    return name.startswith(".")


def processor_of(base: Base, what: str) -> Any:
    """What a base reads pictures or sound with.

    Raises:
        BaseError: it has none.
    """
    if base.processor is None:
        raise BaseError(
            f"{base.ref} has no preprocessor_config.json, so {what} cannot be read for it. Copy "
            "that file from the model that it was made of."
        )
    return base.processor


def _patches(model: Any) -> int:
    """What a picture is to the model: patches, where its config tells; otherwise 256."""
    size, patch = (getattr(model.config, name, None) for name in ("image_size", "patch_size"))
    if isinstance(size, int) and isinstance(patch, int) and patch:
        return (size // patch) ** 2 + 1
    return 256
