"""A GGUF file becomes a model folder once, and is read from there ever after.

The folder's name is made of the file's content, so a file that changes gets another folder and a
file that moves keeps its own. The folder appears whole or not at all; its seal, the list of what
it holds, tells a damaged one, which is then made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.bases.gguf_file import GgufHeader, read_header
from lorakit.bases.gguf_left import take_over
from lorakit.bases.gguf_tokenizer import PROBE, gguf_tokenizer
from lorakit.bases.quiet import quiet_transformers
from lorakit.core.files import atomic_folder, cache_dir, clear_disk_errors, write_atomic
from lorakit.errors import BaseError
from lorakit.optional import require

#: raise it when the folder that is written changes; folders of other versions are left alone
CACHE_VERSION = 1
_SEAL = "lorakit.json"
_MEBIBYTE = 1 << 20

Say = Callable[[str], None]


@dataclass(frozen=True)
class CachedBase:
    """A model folder that was made of a GGUF file."""

    folder: Path
    storage: str
    """How the GGUF stores most of the weights; the folder holds float32."""
    notes: tuple[str, ...]


def cached_base(gguf: Path, say: Say) -> CachedBase:
    """The model folder of a GGUF file; dequantises it if that was not done yet.

    Two processes may call this at once: one builds, the other waits and says so.

    Args:
        gguf: the file.
        say: called at once with what takes long.

    Raises:
        BaseError: the file cannot be used, or the disk has no room for the folder.
    """
    folder = _folder_of(gguf)
    found = _read(folder)
    if found is not None:
        return found
    header = read_header(gguf)
    with _alone(folder, say):
        found = _read(folder)  # the process that we waited for may have built it
        if found is None:
            _build(gguf, header, folder, say)
            found = _read(folder)
    assert found is not None, f"{folder} was written and cannot be read"
    return found


def cached_if_there(gguf: Path) -> CachedBase | None:
    """The model folder of a GGUF file, if it was made already."""
    return _read(_folder_of(gguf))


def _folder_of(gguf: Path) -> Path:
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in gguf.stem)[:80]
    return cache_dir() / "bases" / f"{stem}-{_content_hash(gguf)[:16]}-v{CACHE_VERSION}"


def _content_hash(gguf: Path) -> str:
    """SHA-256 of the file; remembered by path, size and time, so that it is read only once."""
    facts = gguf.stat()
    now = {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    path_hash = hashlib.sha256(str(gguf.resolve()).encode()).hexdigest()[:32]
    memo = cache_dir() / "bases" / "hashes" / f"{path_hash}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        known = json.loads(memo.read_text("utf-8"))
        if {name: known[name] for name in now} == now and len(known["sha256"]) == 64:
            return str(known["sha256"])
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_atomic(memo, json.dumps({**now, "sha256": digest}).encode())
    return digest


@contextlib.contextmanager
def _alone(folder: Path, say: Say) -> Iterator[None]:
    """Hold the lock of ``folder``. The system frees it when its holder ends, however it ends."""
    from filelock import FileLock, Timeout  # torch depends on it

    lock = folder.with_name(f".{folder.name}.lock")
    with clear_disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        try:
            held.acquire(timeout=0)
        except Timeout:
            say(f"another process is preparing this base in {folder}; waiting for it")
            held.acquire()
    try:
        yield
    finally:
        held.release()


def _build(gguf: Path, header: GgufHeader, folder: Path, say: Say) -> None:
    """Write the folder; call it with the lock held."""
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
    # the limit of the folder's size: float32, and a little for the tokenizer
    num_bytes = 4 * header.num_elements + 32 * _MEBIBYTE
    free = shutil.disk_usage(folder.parent).free
    if num_bytes > free:
        raise BaseError(
            f"{gguf.name} takes {num_bytes / 1e9:.1f} GB when dequantised, and {folder.parent} "
            f"has {free / 1e9:.1f} GB free. Free some space, or set LORAKIT_CACHE to a folder on "
            "a larger disk."
        )
    say(f"dequantising {gguf.name} ({header.storage}) to float32, once, into {folder}")
    began = time.monotonic()
    with atomic_folder(folder) as temporary:
        notes = write_model(gguf, header, temporary)
        _write_seal(temporary, {"source": gguf.name, "storage": header.storage, "notes": notes})
    say(f"dequantised in {time.monotonic() - began:.0f} s; the next start reads that folder")


def write_model(gguf: Path, header: GgufHeader, folder: Path) -> list[str]:
    """Write config, weights and tokenizer of a GGUF file to ``folder``; return what to say."""
    import torch

    require("accelerate", extra="train", purpose="dequantising a .gguf file")
    notes: list[str] = []
    with quiet_transformers(stderr=True), torch.random.fork_rng(devices=[]):
        try:
            model = dequantised(gguf)
            notes += take_over(gguf, model)
            model.save_pretrained(folder)
            del model
            if header.has_tokenizer:
                tokenizer, of_tokenizer = gguf_tokenizer(gguf, header)
                notes += of_tokenizer
                tokenizer.save_pretrained(folder)
                _check_tokenizer(tokenizer, folder, gguf)
        except (ValueError, NotImplementedError, KeyError, RuntimeError, MemoryError) as error:
            if isinstance(error, BaseError):
                raise
            raise BaseError(_reason(gguf, header, error)) from error
    if not header.has_tokenizer:
        notes.append(f"{gguf.name} holds no tokenizer")
    return notes


def dequantised(gguf: Path) -> Any:
    """The model in float32, as if it had never been quantised."""
    import torch
    import transformers

    place: dict[str, Any] = {"gguf_file": gguf.name}
    config = transformers.AutoConfig.from_pretrained(str(gguf.parent), **place)
    if hasattr(transformers, "GgufConfig"):  # newer versions keep some architectures packed
        place["quantization_config"] = transformers.GgufConfig(dequantize=True)
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_pretrained(str(gguf.parent), dtype=torch.float32, **place)
    # it would be loaded, saved and refused as a quantised model otherwise
    for owner in (model, model.config):
        for name in ("hf_quantizer", "quantization_config", "quantization_method"):
            owner.__dict__.pop(name, None)
    model.is_quantized = False
    return model


def _check_tokenizer(tokenizer: Any, folder: Path, gguf: Path) -> None:
    """Raise if the tokenizer that was saved is not the one that was made."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(str(folder))
    same = saved(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"] and all(
        getattr(saved, name) == getattr(tokenizer, name)
        for name in ("chat_template", "bos_token_id", "eos_token_id", "pad_token_id")
    )
    if not same:
        raise BaseError(
            f"The tokenizer of {gguf} cannot be saved as it is. Give the model's folder or hub id "
            "in the safetensors format instead."
        )


def _reason(gguf: Path, header: GgufHeader, error: BaseException) -> str:
    memory = 4 * header.num_elements / 1e9
    if isinstance(error, MemoryError) or "memory" in str(error):
        return (
            f"{gguf} does not fit into the memory while it is dequantised: it takes about "
            f"{2 * memory:.1f} GB. Use a smaller model, or a machine with more memory."
        )
    return (
        f"transformers cannot build {gguf} ({header.architecture}, {header.storage}): {error}. "
        "Give the model's folder or hub id in the safetensors format instead."
    )


def _write_seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write the list of what the folder holds; its presence and truth make the folder whole."""
    import transformers

    files = {f.name: _fingerprint(f) for f in sorted(folder.iterdir())}
    seal = {**facts, "transformers": transformers.__version__, "files": files}
    (folder / _SEAL).write_text(json.dumps(seal, indent=1), "utf-8")


def _read(folder: Path) -> CachedBase | None:
    """The cached base in ``folder``, or ``None`` if it is absent, partial or damaged."""
    try:
        seal = json.loads((folder / _SEAL).read_text("utf-8"))
        if any(_fingerprint(folder / name) != known for name, known in seal["files"].items()):
            return None
        return CachedBase(folder, str(seal["storage"]), tuple(seal["notes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fingerprint(path: Path) -> str:
    """Size, and a hash of the first and the last MiB: what a lost write or a cut file changes."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_MEBIBYTE))
        if size > _MEBIBYTE:
            file.seek(max(_MEBIBYTE, size - _MEBIBYTE))
            digest.update(file.read())
    return digest.hexdigest()
