"""ONNX Runtime's adapters (``.onnx_adapter``), write only.

A FlatBuffer with the mark ``TORT``: names of graph inputs, and their values. ONNX Runtime GenAI's
model builder names the inputs of a module ``<path>.lora_A.MatMul.weight``, holding Aᵀ
``[d_in, r]``, and ``<path>.lora_B.MatMul.weight``, Bᵀ ``[r, d_out]`` with the scale in it; it says
``attn`` for ``self_attn``. The graph fixes which modules have inputs. Sources: onnxruntime's
``adapter_schema.fbs`` and onnxruntime-genai's ``models/builders/base.py``.

The FlatBuffer is written here: eight fields, and no library to install for them. Legend of its
layout: a table starts with the distance back to its vtable; every other reference is a distance
forward from where it stands.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from lorakit.errors import FormatError, collected
from lorakit.formats import phi3
from lorakit.formats.format import Hints, Reading, Source, Written
from lorakit.formats.pairs import left_behind
from lorakit.formats.portable import fold_sites, plain_sites

FILE = "adapter.onnx_adapter"
MARK = b"TORT"
FORMAT_VERSION, ADAPTER_VERSION, MODEL_VERSION = 1, 1, 1

#: ONNX's code of float32
_FLOAT = 1
#: offsets in a FlatBuffer are signed 32-bit numbers
_MAX_BYTES = 2**31 - 1

_ATTENTION = re.compile(r"(model\.layers\.\d+\.)self_attn(\.[qkvo]_proj)")
_KNOWN = re.compile(r"model\.layers\.\d+\.mlp\.(?:gate|up|down)_proj|lm_head")

#: both tables have four fields of four bytes each behind the distance to the vtable
_VTABLE = struct.pack("<HHHHHH", 12, 20, 4, 8, 12, 16)


class _Onnx:
    name = "onnx"
    title = "ONNX Runtime adapter"
    folder = False

    def recognises(self, source: Source) -> bool:
        """Never: it is not read."""
        return False

    def read(self, source: Source, hints: Hints) -> Reading:
        """Refused."""
        raise FormatError("ONNX Runtime's adapters are written and not read.")

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """The file, in float32, as the builder's graphs for the CPU take it."""
        plain, lost = plain_sites(adapter)
        kept: dict[str, LowRank] = {}
        for path, site in plain.items():
            parts = phi3.apart(path, site, hints.base)
            if isinstance(parts, str):
                lost[path] = parts
            else:
                kept |= parts
        names = {path: _input_of(path) for path in kept}
        for path, name in names.items():
            if name is None:
                lost[path] = "the model builder gives no inputs to a module of this name"
                del kept[path]
        if not kept:
            raise FormatError(
                collected(
                    "Nothing of this adapter fits ONNX Runtime",
                    (f"{p}: {w}" for p, w in lost.items()),
                )
            )
        folded, notes = fold_sites(kept)
        left, losses = left_behind(adapter, header=False)
        tensors: dict[str, Tensor] = {}
        for path, site in folded.items():
            tensors[f"{names[path]}.lora_A.MatMul.weight"] = site.A.T
            tensors[f"{names[path]}.lora_B.MatMul.weight"] = site.B.T
        wide = {t.dtype for t in tensors.values()} - {torch.float32}
        if wide:
            notes.append("all values are stored as float32, the type of the graph's inputs")
        return Written({FILE: flatbuffer(tensors)}, (*notes, *left), {**lost, **losses})


def _input_of(path: str) -> str | None:
    """The builder's name of a module; ``None`` where it makes no inputs for it."""
    attention = _ATTENTION.fullmatch(path)
    if attention is not None:
        return f"{attention[1]}attn{attention[2]}"
    return path if _KNOWN.fullmatch(path) else None


def flatbuffer(tensors: Mapping[str, Tensor]) -> bytes:
    """The file's bytes: the same tensors give the same ones.

    Raises:
        FormatError: it would be larger than the format allows.
    """
    names = sorted(tensors)
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    if size + 300 * len(names) > _MAX_BYTES:
        raise FormatError(
            f"the adapter has {size} bytes; an .onnx_adapter holds {_MAX_BYTES} at most. Compress "
            "it first (`lorakit compress`)."
        )
    out = bytearray(struct.pack("<I4s", 0, MARK))
    root = _table(out)
    struct.pack_into("<I", out, 0, root)
    struct.pack_into("<iii", out, root + 4, FORMAT_VERSION, ADAPTER_VERSION, MODEL_VERSION)
    _refer(out, root + 16)
    places = len(out) + 4
    out += struct.pack("<I", len(names)) + bytes(4 * len(names))
    for number, name in enumerate(names):
        _parameter(out, places + 4 * number, name, tensors[name])
    return bytes(out)


def _parameter(out: bytearray, place: int, name: str, tensor: Tensor) -> None:
    """Append one tensor, and refer to it at ``place``."""
    table = _table(out)
    struct.pack_into("<I", out, place, table - place)
    struct.pack_into("<i", out, table + 12, _FLOAT)
    text = name.encode()
    _refer(out, table + 4)
    out += struct.pack("<I", len(text)) + text + b"\0"
    dims = struct.pack(f"<{tensor.dim()}q", *tensor.shape)
    _vector(out, table + 8, tensor.dim(), dims)
    data = tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()
    _vector(out, table + 16, len(data), data)


def _table(out: bytearray) -> int:
    """Append a vtable and an empty table of four fields; the table's place."""
    _align(out, 4, 0)
    vtable = len(out)
    out += _VTABLE
    table = len(out)
    out += struct.pack("<i", table - vtable) + bytes(16)
    return table


def _vector(out: bytearray, place: int, length: int, content: bytes) -> None:
    """Append a vector whose elements start at a multiple of eight, and refer to it."""
    _align(out, 8, 4)
    struct.pack_into("<I", out, place, len(out) - place)
    out += struct.pack("<I", length) + content


def _refer(out: bytearray, place: int) -> None:
    """Refer at ``place`` to what is appended next, at a multiple of four."""
    _align(out, 4, 0)
    struct.pack_into("<I", out, place, len(out) - place)


def _align(out: bytearray, multiple: int, rest: int) -> None:
    out += bytes((rest - len(out)) % multiple)


FORMAT = _Onnx()
