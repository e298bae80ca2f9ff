"""Files that are either whole or absent: written beside, flushed, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorakit.errors import InputError, TrainingError

#: a path at fault, rather than the disk
_WRONG_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOTEMPTY, errno.EBUSY, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
}


def cache_dir() -> Path:
    """Where what can be made again is kept: ``$LORAKIT_CACHE``, or ``~/.cache/lorakit``."""
    chosen = os.environ.get("LORAKIT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lorakit"


@contextlib.contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's words for a full disk or an impossible place into ours.

    Raises:
        TrainingError: the disk is full, or a file may not become as large.
        InputError: the place cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise TrainingError(
                f"A file of {path} would be larger than the system allows; nothing that was "
                "complete is lost. Raise the limit (ulimit -f), then go on where it stopped."
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainingError(
                f"The disk that holds {path} is full; nothing that was complete is lost. "
                "Free some space, then go on where it stopped."
            ) from error
        if error.errno in _WRONG_PLACE:
            raise InputError(
                f"{path} cannot be written: {error.strerror}. Give a folder that you may write to."
            ) from error
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; renamed onto it when the block ends well.

    The content and the folder's entry are flushed to the disk before and after the rename. Where
    ``path`` is a link, what it points to is replaced, and the link stays.
    """
    path = path.resolve()
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            flush(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``; renamed to it when the block ends well.

    An existing folder changes places with it in one step where the system can do that (Linux,
    macOS). Elsewhere it is moved aside for the moment between two renames. Then it is removed.
    Where ``path`` is a link, the folder it points to is replaced, and the link stays.
    """
    path = path.resolve()
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    flush(file)
            os.chmod(temporary, 0o777 & ~_umask())
            if path.exists() and exchange(temporary, path):
                pass  # the old folder is the temporary one now, and goes with it below
            elif path.exists():
                aside = path.with_name(f".{path.name}.old{os.getpid()}.tmp")
                os.replace(path, aside)
                os.replace(temporary, path)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.replace(temporary, path)
            flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path, *, last: str) -> Iterator[Path]:
    """A temporary folder; what is in it lies in ``path`` when the block ends well.

    Where nothing is at ``path``, one rename makes it. An empty folder there stays the one it is,
    for it may be where somebody stands or where a disk is mounted: it is filled by renames, that
    of ``last`` at the end. Of several processes that want one place, one gets it.

    Raises:
        FileExistsError: something lies there, perhaps only since the block began.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.is_dir()
    if existed:
        temporary = path / ".new.tmp"
        temporary.mkdir()  # one process can
    else:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        if existed and len(os.listdir(path)) > 1:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                flush(file)
        if existed:
            for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == last):
                os.rename(entry, path / entry.name)
            flush(path)
        else:
            os.chmod(temporary, 0o777 & ~_umask())
            _rename_to_new(temporary, path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_to_new(folder: Path, path: Path) -> None:
    try:
        os.rename(folder, path)  # onto an empty folder at most
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        raise


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths of one file system in a single step; ``False`` if the system cannot."""
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform)
    here, swap = (-100, 2) if sys.platform == "linux" else (-2, 2)  # AT_FDCWD, *_EXCHANGE/_SWAP
    call = getattr(ctypes.CDLL(None), name, None) if name else None
    if call is None:
        return False
    return bool(call(here, os.fsencode(first), here, os.fsencode(second), swap) == 0)


def try_lock(file: int) -> bool | None:
    """Take a lock on an open file that ends with the process or the file's closing.

    Returns:
        Whether it was taken; ``None`` where the system, or this file system, has no locks.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def running_alone(folder: Path, file: Path) -> Iterator[None]:
    """Keep other processes from running what ``folder`` holds, by a lock on a file in it.

    Raises:
        InputError: another process runs it.
    """
    with clear_disk_errors(folder):
        handle = os.open(file, os.O_RDONLY)
    try:
        if try_lock(handle) is False:
            raise InputError(f"another process is running {folder}. Wait for it, or stop it first.")
        yield
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
