"""A whole model's weights on disk: one safetensors file or several, read one tensor at a time.

Nothing here needs the model, or more memory than its largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorakit.core.names import odd_name
from lorakit.core.safetensors_io import Entry, read_entry, read_safetensors_header
from lorakit.errors import FormatError, collected

#: names under which libraries store a whole model, in the order in which they are looked for
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")


#: the largest models' indexes have some MB
MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model; ``shards`` in the order of their names."""

    path: Path
    """The folder, or the one file."""
    shards: tuple[Shard, ...]
    index: Path | None = None
    """The file that says which tensor is in which shard, where there are several."""

    @property
    def entries(self) -> dict[str, Entry]:
        """Tensor name → its dtype, shape and place, over all shards."""
        return {name: entry for shard in self.shards for name, entry in shard.entries.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU in its stored dtype.

        Raises:
            KeyError: no shard holds it.
            FormatError: the file cannot be read.
        """
        for shard in self.shards:
            if name in shard.entries:
                return read_entry(shard.path, shard.entries[name])
        raise KeyError(name)


def open_checkpoint(path: Path) -> Checkpoint:
    """A folder with ``model.safetensors`` or an index of shards, or one such file.

    Raises:
        FormatError: nothing of the kind is there, a shard is missing or damaged, or the index
            and the shards name different tensors. All problems are in one message.
    """
    if path.is_file():
        return Checkpoint(path, (_shard(path),))
    if not path.is_dir():
        what = "is no file and no folder" if path.exists() else "does not exist"
        raise FormatError(f"{path} {what}. Give the folder of a model.")
    for stem in _STEMS:
        index = path / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _sharded(path, index)
        if (path / f"{stem}.safetensors").is_file():
            return Checkpoint(path, (_shard(path / f"{stem}.safetensors"),))
    names = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise FormatError(
        f"{path} holds no model.safetensors and no index of shards; it holds {names}. Give the "
        "folder of a model saved as safetensors."
    )


def _shard(path: Path) -> Shard:
    entries, metadata = read_safetensors_header(path)
    return Shard(path, entries, metadata)


def _is_file_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and len(name) <= 255
        and Path(name).name == name
        and not odd_name(name)
    )


def _sharded(folder: Path, index: Path) -> Checkpoint:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"it has {index.stat().st_size} bytes")
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{index} is no index of shards ({type(error).__name__}: {error}); copy or download "
            "it again."
        ) from error
    problems = [
        f"{name!r} is no name of a file in the folder" for name in files if not _is_file_name(name)
    ]
    problems = problems or [f"{name} is missing" for name in files if not (folder / name).is_file()]
    shards = () if problems else tuple(_shard(folder / name) for name in files)
    of_file: dict[str, set[str]] = {}
    for name, file in where.items():
        of_file.setdefault(file, set()).add(name)
    for shard in shards:
        named = of_file[shard.path.name]
        problems += [f"{shard.path.name} lacks {n}" for n in sorted(named - set(shard.entries))]
        problems += [
            f"{shard.path.name} holds {n}, which the index does not place there"
            for n in sorted(set(shard.entries) - named)
        ]
    if problems:
        raise FormatError(
            collected(f"{folder} is no whole checkpoint", problems) + "\nCopy or download it again."
        )
    return Checkpoint(folder, shards, index)
