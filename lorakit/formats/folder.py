"""Writing an adapter's folder so that whoever looks at it sees a whole adapter.

Three cases: a new folder appears by one rename. A folder that holds an adapter and nothing else
changes places with the new one in one step, or has one file replaced where only that one differs.
A folder with other things in it keeps them: the new files are written beside the old ones, and
only when all are on the disk are they renamed. Where more than one file changed, there is no config
between these renames, so that it is never taken for a whole adapter while it is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorakit.core.files import atomic_file, atomic_folder, clear_disk_errors, flush
from lorakit.errors import FormatError
from lorakit.formats.tokenizer_files import is_tokenizer_file

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CARD = "README.md"

#: in every card that was not written by hand
CARD_MARK = "<!-- written by lorakit -->"

#: a file's content, or what writes it to a path
Content = bytes | Callable[[Path], None]


def adapter_in(path: Path) -> Path:
    """The adapter of a run folder, ``runs/mine/adapter`` of ``runs/mine``; else the path itself."""
    inner = path / "adapter"
    # os.path, because a Path raises where a name is too long
    if not os.path.exists(path / CONFIG) and os.path.exists(inner / CONFIG):
        logger.info("%s is a run folder; its adapter is %s", path, inner)
        return inner
    return path


def write_folder(folder: Path, files: Mapping[str, Content]) -> None:
    """Write an adapter's files; a card that somebody wrote by hand stays.

    Args:
        files: name → content; the config must be among them. Tokenizer files and older weights
            that are there and not named are removed.

    Raises:
        FormatError: there is a file in the folder's place.
        InputError: the place cannot be written to.
        TrainingError: the disk is full.
    """
    assert CONFIG in files
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is a file. Give the path of a folder to save the adapter in.")
    with clear_disk_errors(folder):
        if not folder.exists():
            _write_new(folder, files)
            return
        card = _own_card(folder)
        files = {**files, CARD: card} if card is not None else files
        there = _names_in(folder)
        changed = {name: files[name] for name in files if _differs(folder / name, files[name])}
        stale = [name for name in there - set(files) if _is_adapter_file(name)]
        if CONFIG not in there or any(not _is_ours(name) for name in there):
            if len(changed.keys() - {CARD}) > 1:
                changed[CONFIG] = files[CONFIG]
            _replace_files(folder, changed, stale)
        elif len(changed) == 1 and not stale:
            _replace_files(folder, changed)
        else:
            _write_new(folder, files)


def _write_new(folder: Path, files: Mapping[str, Content]) -> None:
    with atomic_folder(folder) as temporary:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, content)


def _replace_files(folder: Path, files: Mapping[str, Content], stale: Sequence[str] = ()) -> None:
    with contextlib.ExitStack() as renames:  # they are made from the last to the first: the config
        for name in sorted(files, key=lambda name: name != CONFIG):
            temporary = renames.enter_context(atomic_file(folder / name))
            _write(temporary, files[name])
            flush(temporary)
        if CONFIG in files and len(files) > 1:
            (folder / CONFIG).unlink(missing_ok=True)
    for name in stale:
        if (folder / name).is_file():
            (folder / name).unlink()


def _differs(path: Path, content: Content) -> bool:
    return callable(content) or not path.is_file() or path.read_bytes() != content


def _write(path: Path, content: Content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


def _names_in(folder: Path) -> set[str]:
    """What lies in the folder, and in its one subfolder that can be ours."""
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return {path.relative_to(folder).as_posix() for path in paths}


def _own_card(folder: Path) -> bytes | None:
    """The card in the folder, if lorakit did not write it."""
    with contextlib.suppress(FileNotFoundError):
        content = (folder / CARD).read_bytes()
        if CARD_MARK.encode() not in content:
            return content
    return None


def _is_adapter_file(name: str) -> bool:
    return name in (CONFIG, WEIGHTS, PICKLED) or is_tokenizer_file(name)


def _is_ours(name: str) -> bool:
    left_over = name.startswith(".") and name.endswith(".tmp")  # of a write that was killed
    return _is_adapter_file(name) or name in (CARD, "additional_chat_templates") or left_over
