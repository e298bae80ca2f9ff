"""A base on the hub becomes a folder on this machine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.bases.failures import explained, is_slow, missing_shards, unreachable
from lorakit.bases.source import Source
from lorakit.errors import BaseError
from lorakit.optional import require

#: seconds for which a hub that was not reached is not asked again
_PATIENCE = 60.0

#: other copies of the weights; everything else belongs to the model
_COPIES = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]


def fetch(source: Source, say: Callable[[str], None]) -> Path:
    """The folder of a base on the hub, with its safetensors; what is cached is not loaded again.

    Args:
        source: of the kind ``"hub"``.
        say: called before.

    Raises:
        BaseError: no such repository or revision, no permission, or no connection.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", extra="train", purpose="reading a model from the hub")
    say(f"fetching {source.location} from the hub, where it is not cached")
    with explained(source.location, "the model", how_to_get=source.how_to_get):
        folder = hub.snapshot_download(
            source.location, revision=source.revision, ignore_patterns=_COPIES
        )
    if not folder:
        raise BaseError(f"{source.location} was not downloaded; give a folder.")
    return Path(folder)


class NotCachedError(BaseError):
    """A file of a base was not fetched before, and now the hub is not reached."""


def fetch_file(source: Source, name: str) -> Path | None:
    """One small file of a base on the hub; ``None`` where it has none.

    Args:
        name: its path there, with slashes.

    Raises:
        NotCachedError: whether it has one cannot be known now.
        BaseError: no such repository or revision, no permission, or a hub that is out of order.
    """
    hub = require("huggingface_hub", extra="train", purpose="reading a model from the hub")
    where = {"repo_id": source.location, "filename": name, "revision": source.revision}
    cached_only = not is_reachable(source.location, source.revision)
    with explained(source.location, name, how_to_get=source.how_to_get):
        try:
            return Path(hub.hf_hub_download(**where, local_files_only=cached_only))
        except hub.errors.LocalEntryNotFoundError as error:  # of the others a special case
            if hub.try_to_load_from_cache(**where) is hub._CACHED_NO_EXIST:
                return None
            what = f"{name} of {source.location} is not cached"
            if cached_only:
                raise NotCachedError(f"{what}, and the hub is not reached.") from error
            raise BaseError(
                f"{what}, and the hub did not give it: {error.__cause__ or error}\n"
                "Try again later, or give a folder that holds the base."
            ) from error
        except hub.errors.EntryNotFoundError:
            return None


def loading_options(source: Source, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` is given beside a base's place.

    Where the hub cannot be reached, only what is cached is looked for: its client would try again
    for half a minute, for every file that is not.
    """
    options: dict[str, Any] = {
        "revision": source.revision,
        "trust_remote_code": trust_remote_code,
    }
    if source.kind == "hub" and not is_reachable(source.location, source.revision):
        options["local_files_only"] = True
    return options


def is_reachable(hub_id: str, revision: str | None) -> bool:
    """Whether the hub is to be asked for a base: it answers; or it is slow, and not all is cached.

    It is not asked again where it answered, nor within a minute where it did not. What it says, the
    load itself will tell.
    """
    key = hub_id, revision
    if (missed := _asked.get(key)) is None or time.monotonic() - missed > _PATIENCE:
        _asked[key] = time.monotonic() if _is_silent(hub_id, revision) else math.inf
    return _asked[key] == math.inf


#: id and revision → when the hub did not answer; infinity: it did
_asked: dict[tuple[str, str | None], float] = {}


def _is_silent(hub_id: str, revision: str | None) -> bool:
    hub = require("huggingface_hub", extra="train", purpose="reading a model from the hub")
    patience = max(10, hub.constants.HF_HUB_ETAG_TIMEOUT)
    try:
        hub.HfApi().model_info(hub_id, revision=revision, timeout=patience)
    except Exception as error:
        if is_slow(error):  # of every file it would be asked again, for minutes
            return _is_cached(hub_id, revision)
        return unreachable(error)
    return False


def _is_cached(hub_id: str, revision: str | None) -> bool:
    """Whether all that is loaded of a base lies on this machine."""
    hub = require("huggingface_hub", extra="train", purpose="reading a model from the hub")
    try:
        folder = Path(hub.snapshot_download(hub_id, revision=revision, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError:
        return False
    parts = [folder]
    if (index := folder / "model_index.json").is_file():  # a pipeline of diffusers
        named = json.loads(index.read_text("utf-8"))
        parts = [folder / name for name, of in named.items() if isinstance(of, list) and of[0]]
    elif not (folder / "config.json").is_file():
        return False
    if parts == [folder] and not any(folder.glob("*.safetensors")):
        return False
    return all(any(part.glob("*")) and missing_shards(part) is None for part in parts)
