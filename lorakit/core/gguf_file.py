"""The GGUF file, read defensively: every number in it is checked before it is believed.

Layout (version 2 and 3, little endian): ``GGUF``, u32 version, u64 number of tensors, u64 number
of fields; the fields (name, u32 type, value); the tensors (name, u32 dimensions, u64 each, u32
type, u64 offset); padding; the data. Dimensions are written from the fastest on, so they are
turned round here: ``shape`` is what numpy and torch would say.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lorakit.core.names import odd_name
from lorakit.errors import FormatError, collected

#: fields and tensors' names of an adapter take some kB; a whole model's vocabulary some MB
MAX_HEADER_BYTES = 200_000_000
MAX_TENSORS = 1_000_000
#: characters of a name: llama.cpp itself allows 64 for a tensor and 65535 for a field
MAX_NAME_BYTES = 65535
#: values of all arrays together; a number takes some thirty bytes once read, and the largest
#: vocabularies have half a million entries in each of four arrays
MAX_ARRAY_VALUES = 10_000_000

#: code of a field's type → its form
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

#: code of a tensor's type → its torch type
_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_Q8_0 = 8
#: 32 numbers in a block: a float16 scale, 32 int8
_Q8_0_BLOCK, _Q8_0_BYTES = 32, 34

_NEXT = "The file is damaged or no GGUF file; copy or download it again."


@dataclass(frozen=True)
class GgufEntry:
    """Where one tensor lies in a file: bytes ``begin`` to ``end``."""

    type: int
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufFile:
    """What a file says of itself."""

    path: Path
    fields: Mapping[str, Any]
    """Name → number, text, or list."""
    entries: Mapping[str, GgufEntry]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor on the CPU; Q8_0 as float32, which is exact.

        Raises:
            FormatError: a type that adapters are not stored in.
        """
        foreign = [
            f"{name}: type {e.type}"
            for name, e in self.entries.items()
            if e.type not in _FLOATS and e.type != _Q8_0
        ]
        if foreign:
            raise FormatError(
                collected(f"{self.path} holds tensors that are no floats and not Q8_0", foreign)
                + "\nConvert the adapter again as f32, f16, bf16 or q8_0."
            )
        with open(self.path, "rb") as file:
            return {name: _tensor(file, entry, self.path) for name, entry in self.entries.items()}


def read_gguf(path: Path) -> GgufFile:
    """The fields and the tensors' places; no tensor is read.

    Raises:
        FormatError: the file is no sound GGUF. It names the file and what is wrong.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            reader = _Reader(file.read(min(size, MAX_HEADER_BYTES)), path)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    if reader.take(4) != b"GGUF":
        _damaged(path, "it does not begin with GGUF")
    version = reader.number("<I")
    if version not in (2, 3):
        _damaged(path, f"it has version {version}; 2 and 3 are read, in little endian")
    num_tensors, num_fields = reader.number("<Q"), reader.number("<Q")
    if max(num_tensors, num_fields) > MAX_TENSORS:
        _damaged(path, f"it claims {num_tensors} tensors and {num_fields} fields")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        name = reader.text()
        if name in fields:
            _damaged(path, f"it has the field {name!r} twice")
        fields[name] = reader.value()
    places = [_place(reader) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        _damaged(path, f"general.alignment is {alignment!r}; expected a power of two")
    start = -(-reader.position // alignment) * alignment
    return GgufFile(path, fields, _entries(places, start, alignment, size, path))


class _Reader:
    """A header's bytes, of which none is read behind the end."""

    def __init__(self, content: bytes, path: Path) -> None:
        self._content, self._path, self.position = content, path, 0
        self._num_values = 0

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self._content):
            _damaged(self._path, f"it ends within its header, at byte {len(self._content)}")
        found = self._content[self.position : end]
        self.position = end
        return found

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, limit: int = MAX_NAME_BYTES) -> str:
        length = self.number("<Q")
        if length > limit:
            _damaged(self._path, f"a text at byte {self.position} claims {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            _damaged(self._path, f"a text before byte {self.position} is no UTF-8")

    def value(self) -> Any:
        code = self.number("<I")
        if code == _ARRAY:
            return self._array()
        return self._one(code)

    def _one(self, code: int) -> Any:
        if code == _STRING:
            return self.text(MAX_HEADER_BYTES)
        if code not in _SCALARS:
            _damaged(self._path, f"a field before byte {self.position} has the type {code}")
        return self.number(_SCALARS[code])

    def _array(self) -> list[Any]:
        code, length = self.number("<I"), self.number("<Q")
        self._num_values += length
        if code in _SCALARS:
            width = struct.calcsize(_SCALARS[code])
            if length * width > len(self._content) - self.position:
                _damaged(self._path, f"an array at byte {self.position} claims {length} values")
            self._refuse_too_many()
            raw = self.take(length * width)
            return [value for (value,) in struct.iter_unpack(_SCALARS[code], raw)]
        if code != _STRING:  # arrays of arrays exist in no adapter
            _damaged(self._path, f"an array at byte {self.position} has the type {code}")
        if length * 8 > len(self._content) - self.position:
            _damaged(self._path, f"an array at byte {self.position} claims {length} texts")
        self._refuse_too_many()
        return [self.text(MAX_HEADER_BYTES) for _ in range(length)]

    def _refuse_too_many(self) -> None:
        if self._num_values > MAX_ARRAY_VALUES:
            _damaged(
                self._path,
                f"its arrays have {self._num_values} values; at most {MAX_ARRAY_VALUES} are read",
            )


def _place(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type, and offset in the data, of one tensor."""
    name = reader.text()
    dims = reader.number("<I")
    if not 0 <= dims <= 4:
        _damaged(reader._path, f"{name}: it has {dims} dimensions; at most 4 exist")
    shape = tuple(reader.number("<Q") for _ in range(dims))[::-1]
    return name, shape, reader.number("<I"), reader.number("<Q")


def _entries(
    places: list[tuple[str, tuple[int, ...], int, int]],
    start: int,
    alignment: int,
    size: int,
    path: Path,
) -> dict[str, GgufEntry]:
    entries: dict[str, GgufEntry] = {}
    problems: list[str] = []
    for name, shape, code, offset in places:
        if name in entries:
            problems.append(f"{name}: it is there twice")
            continue
        if (odd := odd_name(name)) is not None:
            problems.append(f"{name!r}: {odd}")
            continue
        if prod(max(n, 1) for n in shape) >= 2**60:
            problems.append(f"{name}: shape {list(shape)} is beyond any memory")
            continue
        needed = _bytes_needed(shape, code)
        begin = start + offset
        if offset % alignment:
            problems.append(f"{name}: offset {offset} is no multiple of {alignment}")
        elif begin + needed > size:
            problems.append(f"{name}: ends at byte {begin + needed}, the file has {size}")
        else:
            entries[name] = GgufEntry(code, shape, begin, begin + needed)
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            problems.append(f"{name}: overlaps the tensor before it")
        end = max(end, entry.end)
    if problems:
        _damaged(path, *problems)
    return entries


def _bytes_needed(shape: tuple[int, ...], code: int) -> int:
    """Bytes of a tensor; of a type that is not read here, the least that it may have."""
    if code in _FLOATS:
        return prod(shape) * _FLOATS[code].itemsize
    if code == _Q8_0:
        row = shape[-1] if shape else 1
        return prod(shape) // max(row, 1) * (-(-row // _Q8_0_BLOCK) * _Q8_0_BYTES)
    return 0


def _tensor(file: Any, entry: GgufEntry, path: Path) -> Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape)
    file.seek(entry.begin)
    raw = bytearray(entry.end - entry.begin)
    if file.readinto(raw) != len(raw):
        _damaged(path, "it became shorter while it was read")
    if entry.type in _FLOATS:
        return torch.frombuffer(raw, dtype=_FLOATS[entry.type]).reshape(entry.shape)
    if not entry.shape or entry.shape[-1] % _Q8_0_BLOCK:
        _damaged(path, f"a Q8_0 tensor has the shape {entry.shape}; its rows need a multiple of 32")
    blocks = torch.frombuffer(raw, dtype=torch.uint8).reshape(-1, _Q8_0_BYTES)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return (blocks[:, 2:].contiguous().view(torch.int8).float() * scales).reshape(entry.shape)


def _damaged(path: Path, *problems: str) -> NoReturn:
    raise FormatError(collected(f"{path} cannot be read", problems) + f"\n{_NEXT}")
