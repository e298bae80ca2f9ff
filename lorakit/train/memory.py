"""How much memory the process holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_MB = 2**20


def resident_mb() -> float:
    """Resident memory of this process, in units of 2^20 bytes; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / _MB
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the peak is the best there is
    return peak / _MB if sys.platform == "darwin" else peak / 1024


def peak_vram_mb() -> float | None:
    """Peak of the memory allocated on the current GPU, same unit; ``None`` without one in use."""
    if not (
        torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    ):
        return None
    return torch.cuda.max_memory_allocated() / _MB
