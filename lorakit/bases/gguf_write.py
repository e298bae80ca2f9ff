"""Writing a GGUF file: fields and a stream of tensors, whole or not at all.

Layout (llama.cpp's ``docs/gguf.md``, version 3, little endian): magic, version, number of tensors,
number of fields; each field as key, type, value; each tensor as name, shape, type, offset; then the
tensors' bytes, each padded to the alignment. Fields are kept here as their encoded bytes, so those
of another file are copied exactly, and one tensor's block at a time is in memory. The bytes depend
on nothing but the arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lorakit.errors import BaseError, collected
from lorakit.optional import require

#: types of values
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_VERSION = 3
DEFAULT_ALIGNMENT = 32

#: the types that the gguf package can write, as `--quantize` names them → llama.cpp's number of a
#: file made mostly of them (``general.file_type``)
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "bf16": 32,
}
WRITABLE = tuple(name.upper() for name in FILE_TYPES)


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of the file to be."""

    name: str
    shape: tuple[int, ...]
    """As numpy has it: a linear weight is ``(d_out, d_in)``."""
    kind: str
    """GGUF's name of its type, such as ``"Q8_0"``."""
    blocks: Callable[[], Iterator[Any]]
    """Makes its bytes, as contiguous arrays or buffers, in order."""

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.shape, self.kind)


# --- values of fields


def text(value: str) -> bytes:
    """A string."""
    return _u32(_STRING) + _string(value)


def whole(value: int) -> bytes:
    """An unsigned whole number of 32 bits."""
    return _u32(_U32) + _u32(value)


def real(value: float) -> bytes:
    """A float32."""
    return _u32(_F32) + struct.pack("<f", value)


def truth(value: bool) -> bytes:
    """True or false."""
    return _u32(_BOOL) + struct.pack("<?", value)


def texts(values: Sequence[str]) -> bytes:
    """An array of strings."""
    return _array(_STRING, values, _string)


def wholes(values: Sequence[int]) -> bytes:
    """An array of signed whole numbers of 32 bits."""
    return _array(_I32, values, lambda n: struct.pack("<i", n))


def _array(kind: int, values: Sequence[Any], pack: Callable[[Any], bytes]) -> bytes:
    head = _u32(_ARRAY) + _u32(kind) + _u64(len(values))
    return head + b"".join(pack(value) for value in values)


def _string(value: str) -> bytes:
    data = value.encode("utf-8")
    return _u64(len(data)) + data


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


# --- tensors


def num_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes that a tensor of this shape takes in this type."""
    gguf = require("gguf", extra="train", purpose="writing a .gguf file")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return prod(shape) // int(block) * int(size)


def fits(shape: Sequence[int], kind: str) -> bool:
    """Whether rows of this length can be cut into the type's blocks."""
    gguf = require("gguf", extra="train", purpose="writing a .gguf file")
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return bool(shape) and shape[-1] % block == 0


def quantize(rows: np.ndarray, kind: str) -> np.ndarray:
    """Float32 rows ``[n, d]`` in a type of :data:`WRITABLE`; ``[n, bytes]``, or floats."""
    gguf = require("gguf", extra="train", purpose="writing a .gguf file")
    # a block of zeros is caught there; a value beyond float16 becomes infinite, and is found
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        packed: np.ndarray = gguf.quants.quantize(
            np.ascontiguousarray(rows, dtype=np.float32), gguf.GGMLQuantizationType[kind]
        )
    return packed


def dequantize(packed: np.ndarray, kind: str) -> np.ndarray:
    """The inverse, float32 ``[n, d]``; of every type that the gguf package can read."""
    gguf = require("gguf", extra="train", purpose="reading a .gguf file")
    found = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    # a copy where it is the file itself, mapped into memory
    return np.require(found, dtype=np.float32, requirements=["C", "W"])


# --- the file


def write_gguf(
    path: Path,
    fields: Mapping[str, bytes],
    tensors: Sequence[TensorPlan],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the file at ``path``, which the caller makes atomic.

    Args:
        fields: key → encoded value; an alignment other than the default must be among them.
        progress: called with the bytes written and those there will be.

    Raises:
        BaseError: a tensor has two of one name, or rows that do not fit its type.
        OSError: the disk is full, or cannot be written.
    """
    names = [plan.name for plan in tensors]
    problems = [
        f"{name}: there are two" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    problems += [
        f"{plan.name}: rows of {plan.shape[-1]} do not fit blocks of {plan.kind}"
        for plan in tensors
        if not fits(plan.shape, plan.kind)
    ]
    if problems:
        raise BaseError(collected("These tensors cannot be written", problems))
    total = sum(plan.num_bytes for plan in tensors)
    done = 0
    with path.open("wb") as file:
        file.write(b"GGUF" + _u32(_VERSION) + _u64(len(tensors)) + _u64(len(fields)))
        for key, value in fields.items():
            file.write(_string(key) + value)
        _write_directory(file, tensors, alignment)
        for plan in tensors:
            _pad(file, alignment)
            begin = file.tell()
            for block in plan.blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                file.write(data)
                done += data.nbytes
                progress(done, total)
            written = file.tell() - begin
            assert written == plan.num_bytes, f"{plan.name}: {written} of {plan.num_bytes} bytes"
        _pad(file, alignment)


def _write_directory(file: BinaryIO, tensors: Sequence[TensorPlan], alignment: int) -> None:
    gguf = require("gguf", extra="train", purpose="writing a .gguf file")
    offset = 0
    for plan in tensors:
        dims = b"".join(_u64(n) for n in reversed(plan.shape))
        kind = int(gguf.GGMLQuantizationType[plan.kind])
        file.write(_string(plan.name) + _u32(len(plan.shape)) + dims + _u32(kind) + _u64(offset))
        offset += -(-plan.num_bytes // alignment) * alignment


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
