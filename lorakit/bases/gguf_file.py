"""What a GGUF file says of itself, checked before anything is made of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import BaseError
from lorakit.optional import require

#: GGUF's names of the types that are plain floats → ours
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: transformers' names of special tokens → GGUF's
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
#: what `gguf` and numpy raise on a file that ends early or holds nonsense
_DAMAGE = (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError)


@dataclass(frozen=True)
class GgufHeader:
    """The part of a GGUF file that says what its weights are."""

    architecture: str
    """llama.cpp's name of it, such as ``"llama"``."""
    storage: str
    """How most of the weights are stored: ``"Q4_1"``, ``"float16"``, …"""
    num_elements: int
    """Numbers in all tensors together."""
    pre_tokenizer: str | None
    """llama.cpp's name for the rule that cuts text into words, such as ``"smollm"``."""
    has_tokenizer: bool
    context_length: int | None
    """Tokens."""
    special_tokens: dict[str, str]
    """transformers' name, such as ``"eos_token"`` → token."""


def read_header(path: Path) -> GgufHeader:
    """Read and check the header.

    Raises:
        BaseError: it is not a GGUF, is damaged, or holds something else than a whole model of an
            architecture that transformers can build.
    """
    reader, architecture = open_whole(path)
    _check_supported(path, architecture)
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = sizes.most_common(1)[0][0] if sizes else "F32"
    pre = reader.fields.get("tokenizer.ggml.pre")
    context = reader.fields.get(f"{architecture}.context_length")
    return GgufHeader(
        architecture=architecture,
        storage=_FLOATS.get(kind, kind),
        num_elements=sum(int(tensor.n_elements) for tensor in reader.tensors),
        pre_tokenizer=str(pre.contents()) if pre else None,
        has_tokenizer="tokenizer.ggml.tokens" in reader.fields,
        context_length=int(context.contents()) if context else None,
        special_tokens=_special_tokens(reader),
    )


def open_whole(path: Path) -> tuple[Any, str]:
    """A ``GGUFReader`` of a file that holds a whole model, and llama.cpp's name of what it is.

    Raises:
        BaseError: it is not a GGUF, is damaged, or holds something else.
    """
    _check_magic(path)
    reader = _open(path)
    text = {k: f.contents() for k, f in reader.fields.items() if k.startswith("general.")}
    architecture = str(text.get("general.architecture", ""))
    _check_whole(path, reader, text, architecture)
    return reader, architecture


def _special_tokens(reader: Any) -> dict[str, str]:
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    found = {}
    for ours, theirs in _SPECIAL.items():
        number = reader.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if tokens is not None and number is not None and number.contents() < len(tokens.data):
            token = tokens.parts[tokens.data[number.contents()]]
            found[ours] = bytes(token).decode("utf-8", errors="replace")
    return found


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    if start[:4] == b"GGUF":
        return
    if start.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer; the weights were not downloaded. Run `git lfs pull` there."
    elif start[:4] in (b"ggml", b"lmgg", b"fmgg", b"tjgg"):
        what = "an old GGML file; convert it with llama.cpp, or download the GGUF of this model."
    else:
        what = (
            f"not a GGUF file: it begins with {start[:8]!r}, not with b'GGUF'. Download it again."
        )
    raise BaseError(f"{path} is {what}")


def _open(path: Path) -> Any:
    gguf = require("gguf", extra="train", purpose="reading a .gguf file")
    try:
        return gguf.GGUFReader(str(path))
    except _DAMAGE as error:
        raise BaseError(
            f"{path} is damaged or was not downloaded completely "
            f"({path.stat().st_size / 1e6:.1f} MB are here; {error}). Download it again."
        ) from error


def _check_whole(path: Path, reader: Any, general: dict[str, Any], architecture: str) -> None:
    if general.get("general.type") == "adapter":
        base = general.get("general.base_model.0.name", "its base")
        raise BaseError(f"{path} is an adapter, not a model; give {base} as the base.")
    if architecture == "clip" or general.get("general.type") == "mmproj":
        raise BaseError(f"{path} is the image part of a model; give the GGUF of its language part.")
    split = reader.fields.get("split.count")
    if split is not None and int(split.contents()) > 1:
        raise BaseError(
            f"{path} is one of {int(split.contents())} parts. Join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    if not reader.tensors:
        raise BaseError(f"{path} holds no weights, only a vocabulary or settings. Give the model.")


def _check_supported(path: Path, architecture: str) -> None:
    from lorakit.bases.quiet import quiet_transformers

    require("transformers", extra="train", purpose="loading a base model")
    with quiet_transformers():
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
    known = {*GGUF_SUPPORTED_ARCHITECTURES}
    with contextlib.suppress(ImportError, AttributeError):  # a second table in newer versions
        known |= {*require("transformers.integrations.gguf").GGUF_ARCHS}
    # transformers' tables use its own names with "_" where llama.cpp writes "-" or nothing
    plain = {name.replace("_", "").replace("-", "") for name in known}
    if architecture.replace("-", "").replace("_", "") not in plain:
        raise BaseError(
            f"{path} is a GGUF of the architecture {architecture!r}, which transformers cannot "
            f"build from a GGUF. It can: {', '.join(sorted(known))}. Give the model's folder or "
            "hub id in the safetensors format instead."
        )
