"""Every format by name, and which of them a file is.

A module is imported when its format is asked for; detecting asks all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

from lorakit.errors import FormatError, InputError, collected
from lorakit.formats.dialects import describe_keys
from lorakit.formats.format import Format, Hints, Reading, Source
from lorakit.formats.opening import open_source

#: what ``--to`` and ``--from`` take → the module that holds it as ``FORMAT``
FORMATS = {
    "peft": "lorakit.formats.peft.format",
    "kohya": "lorakit.formats.kohya",
    "diffusers": "lorakit.formats.diffusers",
    "lycoris": "lorakit.formats.lycoris",
    "gguf": "lorakit.formats.gguf_adapter",
    "mlx": "lorakit.formats.mlx",
    "loralib": "lorakit.formats.loralib",
    "torchtune": "lorakit.formats.torchtune",
    "litgpt": "lorakit.formats.litgpt",
    "onnx": "lorakit.formats.onnx",
}

#: formats that are read and not written, and the other way round
READ_ONLY = ("lycoris", "torchtune", "litgpt")
WRITE_ONLY = ("onnx",)

#: formats whose layout depends on the heads or the names of the base
NEEDS_BASE = ("gguf", "torchtune", "litgpt")


def get(name: str) -> Format:
    """A format by its name.

    Raises:
        FormatError: there is none of this name.
    """
    if name not in FORMATS:
        raise FormatError(f"{name!r} is no format; the formats are {', '.join(FORMATS)}")
    return importlib.import_module(FORMATS[name]).FORMAT


def available() -> list[str]:
    """The formats of this installation."""
    return [name for name, module in FORMATS.items() if importlib.util.find_spec(module)]


def readable() -> list[str]:
    """The formats that are read."""
    return [name for name in available() if name not in WRITE_ONLY]


def writable() -> list[str]:
    """The formats that are written."""
    return [name for name in available() if name not in READ_ONLY]


def detect(path: str | os.PathLike[str]) -> tuple[Format, Source]:
    """The one format that recognises a file or folder.

    Raises:
        FormatError: nothing is there, no format recognises it, or several do. It says what the
            file looks like and what is readable.
    """
    source = open_source(path)
    return identify(source), source


def identify(source: Source) -> Format:
    """The one format that recognises an opened file; see :func:`detect`."""
    found = [form for form in map(get, readable()) if form.recognises(source)]
    if len(found) == 1:
        return found[0]
    if not found and "peft_type" in source.config:
        return get("peft")  # it knows best what is wrong with the keys
    if found:
        names = ", ".join(form.name for form in found)
        raise FormatError(
            f"{source.path} could be any of {names}. Say which: --from {found[0].name} on the "
            "command line, format= in Python."
        )
    raise FormatError(
        f"{source.path} is no adapter of a format that is read here. It holds "
        f"{_what_it_holds(source)}. Formats that are read: {', '.join(readable())}."
    )


def read(
    path: str | os.PathLike[str], *, format: str | None = None, hints: Hints | None = None
) -> Reading:
    """The adapter of a file or folder, with what was chosen and what was lost.

    Args:
        format: skips the detection.
        hints: what the file does not say.

    Raises:
        FormatError: it cannot be found, recognised or read, or a hint is missing.
    """
    hints = Hints() if hints is None else hints
    source = open_source(path)
    form = identify(source) if format is None else get(format)
    if form.name in WRITE_ONLY:
        raise FormatError(f"{form.title} is written and not read here. Keep the PEFT folder too.")
    return read_with(form, source, hints)


def read_with(form: Format, source: Source, hints: Hints) -> Reading:
    """``form.read``; an error names the file, whichever part of the reader raised it.

    Raises:
        FormatError: as the format's.
    """
    try:
        return form.read(source, hints)
    except InputError as error:  # settings that are impossible among them
        named = any(str(path) in str(error) for path in (source.path, source.weights.parent))
        if named and isinstance(error, FormatError):
            raise
        raise FormatError(f"{source.path} cannot be used as an adapter: {error}") from error


def refuse_losses(path: str | os.PathLike[str], reading: Reading) -> None:
    """Refuse what did not come over as a whole.

    Raises:
        FormatError: lists every tensor and field that was left out, and why.
    """
    if reading.lost:
        raise FormatError(
            collected(
                f"{path} holds what a LoRA adapter does not",
                (f"{name}: {why}" for name, why in reading.lost.items()),
            )
            + "\nLeave that out on purpose with `lorakit convert --to peft --allow-loss`."
        )


def _what_it_holds(source: Source) -> str:
    if source.storage == "gguf":
        kind = source.gguf.fields.get("general.type", "model")
        return (
            f"a GGUF of the type {kind!r}, not of the type 'adapter'; a GGUF model goes to --base"
        )
    return describe_keys(source.shapes)
