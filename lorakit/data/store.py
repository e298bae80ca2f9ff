"""Growing arrays that are kept in memory while they are small and on disk when they are not."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from lorakit.core.files import cache_dir, clear_disk_errors

log = logging.getLogger(__name__)

#: bytes of examples above which they are kept on disk
MEMORY_BYTES = 512 * 2**20


class Store:
    """Named columns to which bytes are appended; all move to disk together.

    The files are unlinked as soon as they are open, so that no crash leaves them behind; the
    memory maps keep them alive.
    """

    def __init__(self, dtypes: Mapping[str, Any], *, memory_bytes: int, folder: Path) -> None:
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._files: dict[str, IO[bytes]] = {name: BytesIO() for name in dtypes}
        self._memory_bytes = memory_bytes
        self._folder = folder
        self._size = 0
        self.on_disk = False

    def append(self, **arrays: np.ndarray | bytes) -> None:
        """Append to some of the columns; an array must have its column's dtype."""
        with clear_disk_errors(self._folder):
            for name, array in arrays.items():
                if isinstance(array, np.ndarray):
                    assert array.dtype == self._dtypes[name], (name, array.dtype)
                    array = array.tobytes()
                self._files[name].write(array)
                self._size += len(array)
            if not self.on_disk and self._size > self._memory_bytes:
                self._move_to_disk()

    def finish(self) -> dict[str, np.ndarray]:
        """The columns as read-only arrays; the store is not used any more."""
        with clear_disk_errors(self._folder):
            return {name: self._array(name, file) for name, file in self._files.items()}

    def _array(self, name: str, file: IO[bytes]) -> np.ndarray:
        dtype = self._dtypes[name]
        if isinstance(file, BytesIO):
            return np.frombuffer(file.getvalue(), dtype)
        file.flush()
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return np.empty(0, dtype)
        array = np.memmap(file, dtype, mode="r", shape=(size // dtype.itemsize,))
        file.close()
        return array

    def _move_to_disk(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        log.info("examples above %d bytes are kept on disk in %s", self._memory_bytes, self._folder)
        for name, file in self._files.items():
            assert isinstance(file, BytesIO)
            on_disk = tempfile.TemporaryFile(prefix=f"{name}.", dir=self._folder)  # noqa: SIM115
            on_disk.write(file.getbuffer())
            self._files[name] = on_disk
        self.on_disk = True


def spill_folder() -> Path:
    """Where large data sets lie while they are in use."""
    return cache_dir() / "data"
