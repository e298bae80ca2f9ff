"""Writing an adapter's folder so that whoever looks at it sees a whole adapter.

Three cases: a new folder appears by one rename. A folder that holds an adapter and nothing else
changes places with the new one in one step, or has one file replaced where only that one differs.
A folder with other things in it keeps them: its files are replaced one by one, without a config
in between, so that it is never taken for a whole adapter while it is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from lorakit.core.files import atomic_file, atomic_folder, clear_disk_errors
from lorakit.errors import FormatError
from lorakit.formats.tokenizer_files import is_tokenizer_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CARD = "README.md"

#: in every card that was not written by hand
CARD_MARK = "<!-- written by lorakit -->"

#: a file's content, or what writes it to a path
Content = bytes | Callable[[Path], None]


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
        strange = [name for name in there if not _is_ours(name)]
        if CONFIG not in there or strange:
            _replace_files(folder, files, there)
            return
        changed = _changed(folder, files, there)
        if len(changed) == 1:
            _write(folder / changed[0], files[changed[0]])
        else:
            _write_new(folder, files)


def _write_new(folder: Path, files: Mapping[str, Content]) -> None:
    with atomic_folder(folder) as temporary:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)


def _replace_files(folder: Path, files: Mapping[str, Content], there: set[str]) -> None:
    (folder / CONFIG).unlink(missing_ok=True)
    for name in sorted(there - set(files)):
        if _is_adapter_file(name) and (folder / name).is_file():
            (folder / name).unlink()
    for name in sorted(files, key=lambda name: name == CONFIG):  # the config last
        _write(folder / name, files[name])


def _changed(folder: Path, files: Mapping[str, Content], there: set[str]) -> list[str]:
    """The files to write; more than one if any must go."""
    changed = [
        name
        for name, content in files.items()
        if callable(content) or name not in there or (folder / name).read_bytes() != content
    ]
    stale = [name for name in there - set(files) if _is_adapter_file(name)]
    return changed + stale


def _write(path: Path, content: Content) -> None:
    with atomic_file(path) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)


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
