"""What fits the memory: errors of allocators, what is free, and how much a block takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lorakit.tasks.task import Example

#: share of the free memory that a forward and its backward may take
MARGIN = 0.9

_SAMPLE_SECONDS = 0.001
_MESSAGES = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_memory_error(error: BaseException) -> bool:
    """Whether an allocator had no more: CUDA's, MPS's, that of the CPU, or Python's own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def give_back_memory(*, collect: bool = True) -> None:
    """What nobody holds any more goes back to the system.

    Args:
        collect: look for garbage first, which takes a while.
    """
    if collect:
        gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(proc: Path = Path("/proc"), cgroup: Path | None = None) -> int | None:
    """Memory that this process can still take: the system's, and what its control group leaves.

    Args:
        proc: where the system's counters are.
        cgroup: the group's folder; ``None`` reads which it is.

    Returns:
        ``None`` where the system does not say.
    """
    found = [_system(proc), _left_in_group(_group(proc) if cgroup is None else cgroup)]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def _system(proc: Path) -> int | None:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _group(proc: Path) -> Path:
    """The folder of this process's control group; in a container, its root."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return root
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds and (root / path.lstrip("/") / "memory.max").is_file():
            return root / path.lstrip("/")
        if "memory" in kinds.split(","):
            inside = root / "memory" / path.lstrip("/")
            return inside if inside.is_dir() else root / "memory"
    return root


def _left_in_group(folder: Path) -> int | None:
    """Of control groups v2 and v1; file cache that can be dropped counts as free."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((folder / limit).read_text())
            now = int((folder / used).read_text())
            statistics = (folder / "memory.stat").read_text().split()
        except (OSError, ValueError):  # "max": no limit
            continue
        droppable = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(cache, "0")
        return max(0, most - now + int(droppable))
    return None


class PeakMemory:
    """Measures by how much the resident memory grew inside the block, at its peak.

    It is read once a millisecond; a shorter peak is missed.
    """

    grown: int | None = None
    """Bytes; ``None`` where the system does not say."""

    def __enter__(self) -> PeakMemory:
        give_back_memory(collect=False)
        self._before = self._peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._before is not None and self._peak is not None:
            self._thread.join()
            self.grown = max(self._peak, _resident() or 0) - self._before

    def _watch(self) -> None:
        while not self._done.is_set():
            self._peak = max(self._peak or 0, _resident() or 0)
            time.sleep(_SAMPLE_SECONDS)


def _resident() -> int | None:
    if sys.platform != "linux":
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def num_tokens(part: Sequence[Example]) -> int:
    """The size of a forward: its tokens, or what stands for them."""
    return sum(example.size for example in part)
