"""The folder of a merged model around its weights: it appears whole or not at all.

Config, tokenizer and generation files are the base's, an adapter's tokenizer goes over them, and a
record says what the model was made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import lorakit
from lorakit.core.adapter import Adapter
from lorakit.core.files import clear_disk_errors, new_folder, try_lock
from lorakit.errors import InputError
from lorakit.formats.tokenizer_files import is_tokenizer_file
from lorakit.layers.merge_plan import Weighted

#: what the merge was made of, beside the model
RECORD = "lorakit_merge.json"
_LOCK = ".merging"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
#: beside tokenizer files and JSON
_KEPT_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")


def checked_out(path: Path) -> Path:
    """The folder to write to.

    Raises:
        InputError: something is there.
    """
    path = path.expanduser().absolute()
    if path.is_dir():
        _clear_leftovers(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(
            f"{path} exists and is not empty. Give --out a new folder; nothing is overwritten."
        )
    return path


@contextlib.contextmanager
def building(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well.

    A process that is killed outright leaves it behind; the next merge to the same place removes
    what no process holds.
    """
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        try:
            with new_folder(path, last="config.json") as temporary:
                lock = open(temporary / _LOCK, "w")  # noqa: SIM115 - held as long as the block
                try:
                    try_lock(lock.fileno())
                    yield temporary
                finally:
                    (temporary / _LOCK).unlink(missing_ok=True)
                    lock.close()
        except FileExistsError as error:
            raise InputError(
                f"{path} exists and is not empty. Give --out a new folder; nothing is overwritten."
            ) from error


def _clear_leftovers(path: Path) -> None:
    """Remove what merges to ``path`` left that were killed: their lock is free."""
    for folder in [*path.parent.glob(f".{path.name}.*.tmp"), path / ".new.tmp"]:
        lock = folder / _LOCK
        if not lock.is_file():
            continue
        with open(lock) as file:
            if try_lock(file.fileno()):
                shutil.rmtree(folder, ignore_errors=True)


def copy_other_files(
    source: Path,
    folder: Path,
    adapters: Sequence[Weighted],
    untied: bool,
    dtype: torch.dtype | None,
) -> None:
    """Config, tokenizer and generation files; an adapter's tokenizer goes over the base's."""
    if source.is_dir() and source != folder:
        files = [*source.glob("*"), *source.glob("additional_chat_templates/*")]
        for file in sorted(files):
            name = file.relative_to(source).as_posix()
            if file.is_file() and _is_kept(name):
                target = folder / name
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    for name, content in _tokenizer_files(adapters).items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    path = folder / "config.json"
    if path.exists() and (untied or dtype is not None):
        config = read_json(path)
        for part in [config, *(v for v in config.values() if isinstance(v, dict))]:
            if untied and (part is config or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
            for key in ("dtype", "torch_dtype"):
                if dtype is not None and key in part:
                    part[key] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_kept(name: str) -> bool:
    if is_tokenizer_file(name) or name.startswith(_KEPT_NAMES):
        return True
    if name.endswith((*_WEIGHT_SUFFIXES, ".index.json")) or name.startswith(
        ("adapter_", "lorakit")
    ):
        return False
    return name.endswith((".json", ".py", ".jinja", ".model", ".txt"))


def _tokenizer_files(adapters: Sequence[Weighted]) -> dict[str, bytes]:
    """Name → content, of what the adapters bring.

    Raises:
        InputError: two adapters bring different ones.
    """
    found: dict[str, bytes] = {}
    for adapter, _ in adapters:
        for name, content in adapter.tokenizer_files.items():
            if found.setdefault(name, content) != content:
                raise InputError(
                    f"two of the adapters bring different tokenizer files ({name}), so the merged "
                    "model could read text in one way only; merge one of them"
                )
    return found


def write_record(
    folder: Path, base: str, source: Path, adapters: Sequence[Weighted], notes: Sequence[str]
) -> None:
    """Beside the model, what it was made of: by adapter, its weight in all merges together.

    Args:
        base: its name.
        source: where it lies; merges into it before this one are told there.
    """
    merged = _merged(source)
    for adapter, weight in adapters:
        digest = _digest(adapter)
        merged[digest] = {
            "weight": merged.get(digest, {}).get("weight", 0.0) + weight,
            "sha256": digest,
            "base": None if adapter.base is None else adapter.base.name,
            "parameters": adapter.num_parameters,
        }
    record = {
        "lorakit": lorakit.__version__,
        "base": base,
        "adapters": [one for one in merged.values() if abs(one["weight"]) > 1e-12],
        "notes": list(notes),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def merged_weight(base: str | os.PathLike[str], adapter: Adapter) -> float:
    """With what weight this very adapter was merged into a base; 0.0 where nothing tells that it
    was."""
    merged = _merged(Path(base))
    return (
        float(merged[digest]["weight"])
        if merged and (digest := _digest(adapter)) in merged
        else 0.0
    )


def _merged(base: Path) -> dict[str, dict[str, Any]]:
    """What the record in a folder says of each adapter, by its digest."""
    told = read_json(base / RECORD).get("adapters")
    return {
        one["sha256"]: one
        for one in (told if isinstance(told, list) else ())
        if isinstance(one, dict)
        and isinstance(one.get("sha256"), str)
        and isinstance(one.get("weight"), int | float)
    }


def _digest(adapter: Adapter) -> str:
    """SHA-256 of the adapter's numbers, by path."""
    found = hashlib.sha256()
    for path, site in sorted(adapter.sites.items()):
        for name, tensor in sorted(site.tensors().items()):
            found.update(f"{path}.{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(flat.numpy().data)
    return found.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
