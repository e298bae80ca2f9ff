"""What every file format of adapters has in common: it recognises, reads, and writes.

A format is one file of this package with one object at its end, listed in ``registry``. Reading
gives an :class:`Adapter` whose paths are those of the model in transformers or diffusers; writing
gives the files to be, before anything touches the disk. Both list what they could not carry over,
and whoever called decides whether that is acceptable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.gguf_file import GgufFile, read_gguf
from lorakit.core.safetensors_io import Entry, read_safetensors, read_safetensors_header
from lorakit.errors import FormatError
from lorakit.formats.pickled import read_pickled

#: a file's content, or what writes it to a path
Content = bytes | Callable[[Path], None]

#: how a file of tensors is stored
Storage = Literal["safetensors", "gguf", "pickle"]


@dataclass(frozen=True)
class Source:
    """A file or folder whose format is not known yet; read as far as it is asked for."""

    path: Path
    """What the user named."""
    weights: Path
    """The file of tensors: ``path`` itself, or the one in the folder."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The JSON object of ``adapter_config.json`` beside the weights; empty if there is none."""

    @cached_property
    def storage(self) -> Storage:
        """By the first bytes, then by the name: what is called .bin may be any of them."""
        try:
            with open(self.weights, "rb") as file:
                start = file.read(4)
        except OSError as error:
            raise FormatError(
                f"{self.weights} cannot be read: {error.strerror or error}."
            ) from error
        if start == b"GGUF" or self.weights.suffix == ".gguf":
            return "gguf"
        return "safetensors" if self.weights.suffix in (".safetensors", ".sft") else "pickle"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape; only of a pickle, the data is read for it."""
        if self.storage == "safetensors":
            return {name: entry.shape for name, entry in self._header[0].items()}
        if self.storage == "gguf":
            return {name: entry.shape for name, entry in self.gguf.entries.items()}
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of a safetensors header; of other files, empty."""
        return self._header[1] if self.storage == "safetensors" else {}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensor name → tensor on the CPU; in its stored dtype, unless that is a GGUF's blocks."""
        if self.storage == "safetensors":
            return read_safetensors(self.weights)[0]
        if self.storage == "gguf":
            return self.gguf.tensors()
        return read_pickled(self.weights)

    @cached_property
    def gguf(self) -> GgufFile:
        """The fields and the tensors' places of a GGUF."""
        return read_gguf(self.weights)

    @cached_property
    def _header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        return read_safetensors_header(self.weights)


@dataclass(frozen=True)
class Hints:
    """What a file may not say, and its user can."""

    alpha: float | None = None
    """Of formats that do not store it (loralib)."""
    rank: int | None = None
    """The rank to approximate at, where a file's change has no low rank (LoKr)."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """The base's ``config.json``, for formats whose layout depends on its heads or names."""
    enabled: tuple[bool, ...] = ()
    """Which parts of a joined projection are adapted (loralib's ``enable_lora``, litgpt's query,
    key and value), such as ``(True, False, True)``."""
    family: str | None = None
    """Naming of a picture model, such as ``"sdxl"``, where the adapter does not tell."""


@dataclass(frozen=True)
class Reading:
    """What came out of a file."""

    adapter: Adapter
    notes: tuple[str, ...] = ()
    """Choices that were made, each with its reason, and errors of approximations."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Tensor or field that was not carried over → why."""


@dataclass(frozen=True)
class Written:
    """The files that an adapter becomes."""

    files: Mapping[str, Content]
    """File name → content; one file, or those of a folder."""
    notes: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    """Path of a site, or name of a setting, that was not carried over → why."""


class Format(Protocol):
    """One dialect of adapter files."""

    name: str
    """What ``--to`` takes."""
    title: str
    """What a person calls it."""
    folder: bool
    """Whether it is a folder of files rather than one file."""

    def recognises(self, source: Source) -> bool:
        """Whether a file is of this format, by its names, metadata and config alone."""

    def read(self, source: Source, hints: Hints) -> Reading:
        """The adapter of a file.

        Raises:
            FormatError: the file is malformed, or lacks what a hint would give. All problems are
                in one message.
        """

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """The files of an adapter; the same adapter gives the same bytes.

        Raises:
            FormatError: nothing of the adapter can be written, a hint is missing, or the format
                is read only.
        """
