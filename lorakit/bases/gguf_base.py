"""A base as the parts of a GGUF: fields and tensors, read row by row, whatever it is stored as.

There are two makers: :func:`from_gguf` (here) takes a GGUF as it is, and
:func:`lorakit.bases.gguf_convert.from_folder` converts a transformers folder. Rows are in
llama.cpp's order (:mod:`lorakit.core.gguf_names`) in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.bases.gguf_file import open_whole
from lorakit.bases.gguf_write import DEFAULT_ALIGNMENT, dequantize
from lorakit.bases.identity import sample_positions
from lorakit.core.gguf_names import gguf_name, interleaved_heads, norm_offset, row_order
from lorakit.core.identity import BaseIdentity
from lorakit.errors import BaseError

#: what transformers calls the models of an architecture of llama.cpp; the first is built from GGUF
_CLASSES = {
    "llama": ("LlamaForCausalLM", "MistralForCausalLM"),
    "qwen2": ("Qwen2ForCausalLM",),
    "qwen3": ("Qwen3ForCausalLM",),
    "gemma": ("GemmaForCausalLM",),
}
_STORAGE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base, under llama.cpp's name."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """GGUF's name of the type it has, or (from a folder) would have unquantised."""
    rows: Callable[[int, int], np.ndarray]
    """Rows ``begin`` to ``end`` of the tensor as a matrix ``[product of the others, last]``, in
    float32. A vector is one row."""
    copy: Callable[[], Iterator[Any]] | None = None
    """Its bytes as they lie in the base, where that is a GGUF."""

    @property
    def num_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))


@dataclass(frozen=True)
class GgufBase:
    """Everything that a GGUF of this base says."""

    name: str
    """How the user calls it."""
    architecture: str
    """llama.cpp's."""
    num_heads: int
    num_kv_heads: int
    fields: Mapping[str, bytes]
    """Key → encoded value."""
    tensors: Mapping[str, BaseTensor]
    """By llama.cpp's name, in the order of the file."""
    tokens: tuple[str, ...] = ()
    """The vocabulary by number, without what fills it up."""
    alignment: int = DEFAULT_ALIGNMENT
    notes: tuple[str, ...] = field(default=())

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding, as in small models."""
        return "output.weight" not in self.tensors

    def heads(self, name: str) -> int:
        """Heads by which the rows of this tensor are interleaved; 0 if they are not."""
        return interleaved_heads(self.architecture, name, self.num_heads, self.num_kv_heads)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of transformers' classes that this base may be."""
        return _CLASSES.get(self.architecture, ())


def from_gguf(path: Path, name: str) -> GgufBase:
    """The parts of a GGUF file; tensors stay in the file.

    Raises:
        BaseError: it is damaged, no whole model, or of the other byte order.
    """
    reader, architecture = open_whole(path)
    if reader.byte_order != "I":
        raise BaseError(
            f"{path} is stored in the other byte order than this machine's. Convert it first: "
            "gguf-convert-endian, of the package gguf."
        )
    heads = _number(reader, path, f"{architecture}.attention.head_count", 0)
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    return GgufBase(
        name=name,
        architecture=architecture,
        num_heads=heads,
        num_kv_heads=_number(reader, path, f"{architecture}.attention.head_count_kv", heads),
        fields={
            key: _encoded(reader, found)
            for key, found in reader.fields.items()
            if not key.startswith("GGUF.")  # the reader's own, of the header
        },
        tensors={t.name: _tensor(t) for t in reader.tensors},
        tokens=tuple(bytes(tokens.parts[i]).decode("utf-8", "replace") for i in tokens.data)
        if tokens
        else (),
        alignment=int(reader.alignment),
    )


def _number(reader: Any, path: Path, key: str, default: int) -> int:
    found = reader.fields.get(key)
    value = default if found is None else found.contents()
    if not isinstance(value, int):
        raise BaseError(
            f"{path} gives each layer its own {key}; the order of its rows is not known here. "
            "Merge into the model's folder, and convert that with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    return value


def _encoded(reader: Any, found: Any) -> bytes:
    """A field's type and value as they lie in the file."""
    size = sum(int(part.nbytes) for part in found.parts)
    key = int(found.parts[0].nbytes + found.parts[1].nbytes)
    return bytes(reader.data[found.offset + key : found.offset + size])


def _tensor(raw: Any) -> BaseTensor:
    kind = raw.tensor_type.name
    matrix = raw.data.reshape(-1, raw.data.shape[-1])

    def rows(begin: int, end: int) -> np.ndarray:
        return dequantize(matrix[begin:end], kind)

    def copy() -> Iterator[Any]:
        flat = raw.data.reshape(-1).view(np.uint8)
        for begin in range(0, flat.size, _COPY_BYTES):
            yield flat[begin : begin + _COPY_BYTES]

    shape = tuple(int(n) for n in reversed(raw.shape.tolist()))
    return BaseTensor(raw.name, shape, kind, rows, copy)


def identity_of(base: GgufBase, like: BaseIdentity) -> BaseIdentity:
    """The identity of this base at the places where another was sampled.

    Args:
        like: the identity in an adapter; says which weights to look at, and the class, if this
            base may be of it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    samples: dict[str, tuple[float, ...]] = {}
    stored: dict[str, str] = {}
    for path in like.shapes:
        tensor = base.tensors.get(f"{gguf_name(path.removesuffix('.weight'))}.weight")
        if tensor is not None:
            shapes[path] = tensor.shape
            stored[path] = _STORAGE.get(tensor.kind, tensor.kind)
            samples[path] = _samples(base, tensor)
    matrices = [stored[path] for path, shape in shapes.items() if len(shape) > 1]
    main = max(matrices, key=matrices.count) if matrices else "float32"
    known = base.classes or (like.architecture,)
    return BaseIdentity(
        name=base.name,
        architecture=like.architecture if like.architecture in known else known[0],
        shapes=shapes,
        samples=samples,
        storage=main,
        stored={path: kind for path, kind in stored.items() if kind != main},
        embedding=like.embedding,
    )


def _samples(base: GgufBase, tensor: BaseTensor) -> tuple[float, ...]:
    """Values at the fixed places of transformers' tensor, from rows in llama.cpp's order."""
    width = tensor.shape[-1]
    offset = norm_offset(base.architecture, tensor.name)
    where = row_order(tensor.num_rows, base.heads(tensor.name)).argsort().tolist()
    found = []
    for position in sample_positions(tensor.shape):
        row = where[position // width]
        value = float(tensor.rows(row, row + 1).reshape(-1)[position % width]) - offset
        found.append(float(f"{value:.9g}"))
    return tuple(found)
