"""The safetensors file, read defensively and written reproducibly.

The layout is eight bytes with the header's length N (little endian), N bytes of JSON, then the
tensors' bytes without gaps. The usual writer orders the header's metadata by a random hash, so the
same adapter would give different files; this one sorts it. The reader checks every number in the
header before it believes it.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lorakit.core.names import odd_name
from lorakit.errors import FormatError, collected

#: the format's own reader accepts 100 MB, which take a gigabyte once parsed; the headers of the
#: largest models' shards have some MB
MAX_HEADER_BYTES = 32_000_000
#: a shape with more dimensions is no weight's
MAX_DIMENSIONS = 16

#: in the order of the format's own writer: wider ones first, so that all are aligned
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: of the format too, but nothing can be computed with them here
_TINY_FLOATS = ("F8_", "F6_", "F4")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}

_NEXT = "The file is damaged or no safetensors file; copy or download it again."


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file: bytes ``begin`` to ``end``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, on the CPU in their stored dtype, and the header's metadata.

    Raises:
        FormatError: the file is no sound safetensors file. It names the file and what is wrong.
    """
    with _opened(path) as file:
        entries, metadata = _read_entries(file, path)
        return {name: _read_tensor(file, e, path) for name, e in entries.items()}, metadata


def read_safetensors_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where each tensor lies, and the header's metadata; no tensor is read.

    Raises:
        FormatError: as :func:`read_safetensors`.
    """
    with _opened(path) as file:
        return _read_entries(file, path)


def read_entry(path: Path, entry: Entry) -> Tensor:
    """One tensor of a file whose header was read before; nothing else is read.

    Raises:
        FormatError: the file cannot be read, or has become shorter.
    """
    with _opened(path) as file:
        return _read_tensor(file, entry, path)


def read_rows(path: Path, entry: Entry, rows: Sequence[int]) -> Tensor:
    """Some rows of one tensor, [len(rows), n]: its first dimension by all others.

    Raises:
        FormatError: as :func:`read_entry`.
    """
    width = prod(entry.shape[1:])
    size = width * entry.dtype.itemsize
    found = torch.empty((len(rows), width), dtype=entry.dtype)
    with _opened(path) as file:
        for place, row in enumerate(rows):
            begin = entry.begin + row * size
            part = replace(entry, shape=(width,), begin=begin, end=begin + size)
            found[place] = _read_tensor(file, part, path)
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_entries(file: BufferedReader, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The checked entries, in the order of the file, and the metadata."""
    size = file.seek(0, 2)
    file.seek(0)
    header, data_start = _read_header(file, size, path)
    metadata = _metadata(header.pop("__metadata__", {}), path)
    entries = _entries(header, size - data_start, path)
    return {
        name: replace(e, begin=e.begin + data_start, end=e.end + data_start)
        for name, e in entries.items()
    }, metadata


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file whose bytes depend on nothing but the arguments' values.

    Tensors stand in the order that the format's own writer uses: by dtype (:data:`DTYPES`), those
    of one by name.

    Raises:
        FormatError: a dtype that the format has no name for.
    """
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_streamed(path, plan, tensors.__getitem__, metadata)


def write_streamed(
    path: Path,
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """As :func:`write_safetensors`, asking for one tensor at a time when it is its turn.

    Args:
        plan: name → dtype and shape of what ``make`` will give.
        make: called once for each name.

    Raises:
        FormatError: a dtype that the format has no name for.
    """
    foreign = [f"{name}: {dtype}" for name, (dtype, _) in plan.items() if dtype not in _NAMES]
    if foreign:
        raise FormatError(collected("safetensors cannot hold these dtypes", foreign))
    order = sorted(plan, key=lambda name: (_ORDER[plan[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begin = 0
    for name in order:
        dtype, shape = plan[name]
        end = begin + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == plan[name], name
            if tensor.numel():
                file.write(_bytes_of(tensor.detach().cpu().contiguous()))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; numpy has no bfloat16, so it goes as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_tensor(file: BufferedReader, entry: Entry, path: Path) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if tensor.numel():
        file.seek(entry.begin)
        if file.readinto(_bytes_of(tensor)) != entry.end - entry.begin:
            _damaged(path, "it became shorter while it was read")
    return tensor


def _read_header(file: BufferedReader, size: int, path: Path) -> tuple[dict[str, Any], int]:
    if size < 8:
        _damaged(path, f"it has {size} bytes; a header alone has more")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        _damaged(path, f"its header claims {length} bytes; {size - 8} bytes follow")
    text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except _Duplicate as error:
        _damaged(path, f"its header names {error} twice")
    except (ValueError, RecursionError) as error:
        _damaged(path, f"its header is no JSON ({error or type(error).__name__})")
    if not isinstance(header, dict):
        _damaged(path, "its header is no JSON object")
    return header, 8 + length


class _Duplicate(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _Duplicate(repr(next(name for name, count in counts.items() if count > 1)))
    return found


def _metadata(raw: Any, path: Path) -> dict[str, str]:
    if raw is None:  # what MLX writes where there is none, and the safetensors library reads
        return {}
    if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
        _damaged(path, "its metadata is no mapping of strings to strings")
    if any(not _is_text(part) for item in raw.items() for part in item):
        _damaged(path, "its metadata holds halves of characters, which are no text")
    return raw


def _is_text(text: str) -> bool:
    """Whether it can be written again; JSON can name one half of a UTF-16 pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _entries(header: Mapping[str, Any], data_size: int, path: Path) -> dict[str, Entry]:
    """The checked entries, in the order of the file."""
    entries: dict[str, Entry] = {}
    problems = []
    for name, raw in header.items():
        if (odd := odd_name(name)) is not None:
            problems.append(f"{name!r}: {odd}")
            continue
        try:
            entries[name] = _entry(raw)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"{name}: {error}")
    tiny = [name for name, raw in header.items() if _is_tiny(raw)]
    if tiny and len(tiny) == len(problems):
        raise FormatError(
            collected(f"{path} holds floats of 8 bits or less, which are not read here", problems)
            + "\nSave it with 16 bits first: load_file, tensor.half(), save_file of "
            "safetensors.torch. The values stay what they are."
        )
    if problems:
        _damaged(path, *problems)
    position = 0
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    for name, entry in ordered.items():
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a gap"
            problems.append(f"{name}: begins at byte {entry.begin}, expected {position}; it {what}")
        position = max(position, entry.end)
    if position != data_size:
        less = "the file is cut off" if position > data_size else "bytes are left over"
        problems.append(f"the tensors take {position} bytes, the file has {data_size}; {less}")
    if problems:
        _damaged(path, *problems)
    return ordered


def _is_tiny(raw: Any) -> bool:
    dtype = raw.get("dtype") if isinstance(raw, dict) else None
    return isinstance(dtype, str) and dtype.startswith(_TINY_FLOATS)


def _entry(raw: Any) -> Entry:
    """One tensor's place.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry needs exactly dtype, shape and data_offsets")
    if raw["dtype"] not in DTYPES:
        raise ValueError(f"dtype {raw['dtype']!r}; expected one of {', '.join(DTYPES)}")
    dtype, shape, offsets = DTYPES[raw["dtype"]], raw["shape"], raw["data_offsets"]
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"shape {shape!r} and data_offsets {offsets!r} must be lists of counts")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"it has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    if prod(max(n, 1) for n in shape) >= 2**60:
        raise ValueError(f"shape {shape} is beyond any memory")
    begin, end = offsets
    needed = prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise ValueError(f"shape {shape} needs {needed} bytes, its place has {end - begin}")
    return Entry(dtype, tuple(shape), begin, end)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _damaged(path: Path, *problems: str) -> NoReturn:
    raise FormatError(collected(f"{path} cannot be read", problems) + f"\n{_NEXT}")
