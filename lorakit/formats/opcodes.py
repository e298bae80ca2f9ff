"""What a pickle would do, read from its instructions before anything is built.

``torch.load(weights_only=True)`` runs no code, yet a pickle of a hundred bytes can keep it busy
for ever (the hash of a tuple that holds another twice, sixty times over) or ask for any amount of
memory (``bytearray(10**12)``). Files of tensors need few kinds of objects; here those, and no
others, pass.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

#: what files of tensors are made of: the tensors, their storages, and ordered dictionaries
_ALLOWED = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(?:tensor|tensor_v2|parameter)"
    r"|torch (?:\w+Storage|Size|float\w*|bfloat16|int\w*|uint\w*|bool|strided)"
    r"|torch\.storage (?:Untyped|Typed|_Untyped|_Typed)Storage"
)
#: a state dictionary of a large model has some thousand tensors of some forty instructions
MAX_INSTRUCTIONS = 5_000_000
#: values of an object once everything that it refers to is counted as often as it is referred to
_MAX_WEIGHT = 10_000_000

#: legacy files begin with three small pickles, then the object and the storages' names
_LEGACY_PICKLES = 5


class Refused(Exception):
    """Says what is wrong with a pickle."""


def check_pickle(path: Path) -> None:
    """Look through the instructions of a file of :func:`torch.save`, new or old.

    Raises:
        Refused: it would do more than build tensors and dictionaries, or is no pickle.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        if start != b"PK\x03\x04":  # as torch tells them apart
            _check_old(file)
            return
        for content in _pickles_in(file):
            _check(io.BytesIO(content))


def _pickles_in(file: IO[bytes]) -> list[bytes]:
    """The pickles of an archive, whose entries are stored as they are.

    Raises:
        Refused: it is packed, or damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            size, there = sum(entry.file_size for entry in entries), file.seek(0, 2)
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or size > there:
                raise Refused(
                    f"the archive of {there} bytes unpacks to {size} bytes; those of tensors are "
                    "not packed"
                )
            return [archive.read(e) for e in entries if e.filename.lower().endswith(".pkl")]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise Refused(f"the archive is damaged: {error}") from error


def _check_old(file: IO[bytes]) -> None:
    for _ in range(_LEGACY_PICKLES):
        _check(file)
        if not file.read(1):
            return
        file.seek(-1, io.SEEK_CUR)


def _check(file: IO[bytes]) -> None:
    """Follow one pickle with weights in place of its objects.

    Raises:
        Refused: see :func:`check_pickle`.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(file)):
            if number > MAX_INSTRUCTIONS:
                raise Refused(f"it has more than {MAX_INSTRUCTIONS} instructions")
            _step(code, argument, stack, marks, memo)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise Refused(f"it is no pickle of tensors: {error or type(error).__name__}") from error


def _step(
    code: pickletools.OpcodeInfo,
    argument: object,
    stack: list[int],
    marks: list[int],
    memo: dict[int, int],
) -> None:
    """One instruction: what it takes from the stack weighs on what it puts there."""
    name = code.name
    if name == "MARK":
        marks.append(len(stack))
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[int(str(argument))] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[int(str(argument))])
    elif name == "DUP":
        stack.append(stack[-1])
    elif name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
        if name != "GLOBAL" or not _ALLOWED.fullmatch(str(argument)):
            raise Refused(f"it asks for {argument or 'an object by its name'}")
        stack.append(1)
    else:
        taken = code.stack_before
        if pickletools.markobject in taken:
            begin = marks.pop() - taken.index(pickletools.markobject)
        else:
            begin = len(stack) - len(taken)
        if begin < 0:
            raise Refused("it takes what is not there")
        weight = 1 + sum(stack[begin:])
        del stack[begin:]
        if weight > _MAX_WEIGHT:
            raise Refused("it refers to the same objects so often that they never end")
        if code.stack_after:
            stack.append(weight)
