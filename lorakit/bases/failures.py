"""What transformers, safetensors and the hub raise while a base is loaded, in words that help."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from lorakit.errors import BaseError, LorakitError, MissingDependencyError

_log = logging.getLogger(__name__)

#: classes of the hub's client, and of what it reaches the hub with
_OFFLINE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "TimeoutException"}


@contextlib.contextmanager
def explained(location: str, what: str, *, how_to_get: str | None = None) -> Iterator[None]:
    """Turn the errors of loading ``what`` from ``location`` into ours.

    Args:
        location: a folder or a hub id.
        what: completes "… cannot be loaded": ``"the model"``, ``"the tokenizer"``.
        how_to_get: what to do where the hub cannot be reached.

    Raises:
        BaseError: with the reason and the next step.
        MissingDependencyError: transformers asks for a package that is not installed.
    """
    try:
        yield
    except LorakitError:
        raise
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, MemoryError) as error:
        _log.debug("loading %s from %s", what, location, exc_info=True)
        raise _explanation(location, what, error, how_to_get) from error
    except Exception as error:  # safetensors and pickle raise their own
        home = type(error).__module__.partition(".")[0]
        if home not in ("safetensors", "safetensors_rust", "tokenizers", "pickle", "_pickle"):
            raise
        _log.debug("loading %s from %s", what, location, exc_info=True)
        raise _explanation(location, what, error, how_to_get) from error


def unreachable(error: BaseException) -> bool:
    """Whether this says that the hub was not reached (or may not be: offline mode)."""
    chain = list(_chain(error))
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    text = " ".join(str(link) for link in chain)
    return bool(kinds & _OFFLINE) or "offline mode" in text or "couldn't connect" in text.lower()


def is_slow(error: BaseException) -> bool:
    """Whether this says that the hub was reached, and had not answered when patience ended."""
    return any(type(link).__name__ == "ReadTimeout" for link in _chain(error))


def _explanation(
    location: str, what: str, error: BaseException, how_to_get: str | None
) -> LorakitError:
    chain = list(_chain(error))
    text = " ".join(str(link) for link in chain)
    if isinstance(error, ImportError):
        return MissingDependencyError(f"{what} of {location} needs another package: {error}")
    if _out_of_memory(chain, text):
        return BaseError(
            f"{location} does not fit into the memory. Use a smaller model, a quantised one "
            "(--quantize nf4), or a device with more memory."
        )
    folder = Path(location)
    if folder.is_dir():
        return BaseError(_local(folder, what, error, text))
    return BaseError(_remote(location, what, chain, text, how_to_get))


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _out_of_memory(chain: list[BaseException], text: str) -> bool:
    return any(isinstance(link, (MemoryError, torch.OutOfMemoryError)) for link in chain) or any(
        words in text for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def _local(folder: Path, what: str, error: BaseException, text: str) -> str:
    damaged = _damaged_weights(folder)
    if damaged is not None:
        return damaged
    if "no file named" in text or "checkpoint index" in text:
        held = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        return (
            f"{folder} holds no weights (model.safetensors); it holds: {held}. Copy them there, "
            "or give the folder that has them."
        )
    if "model_type" in text or "not recognize this architecture" in text.replace("does ", ""):
        return (
            f"{folder}/config.json does not describe a model that the installed transformers "
            f"knows: {_first_lines(error, 2)}\nUpdate transformers, or check the file."
        )
    if isinstance(error, OSError) and "JSON" in text:
        return f"A file in {folder} is not valid JSON: {error}. Copy it again from the model."
    return f"{what} of {folder} cannot be loaded: {_first_lines(error)}"


def _damaged_weights(folder: Path) -> str | None:
    """Name the weight files that are cut off, placeholders, or not there."""
    from safetensors import safe_open

    problems = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            if handle.read(64).startswith(b"version https://git-lfs"):
                problems.append(f"{file.name}: a Git LFS pointer; run `git lfs pull` in the folder")
                continue
        try:
            with safe_open(str(file), "pt"):
                pass
        except Exception as error:
            size = file.stat().st_size / 1e6
            problems.append(f"{file.name}: {size:.1f} MB are here, and {error}")
    if problems:
        return (
            f"The weights in {folder} are damaged or were not downloaded completely: "
            + "; ".join(problems)
            + ". Download or copy them again."
        )
    return missing_shards(folder)


def missing_shards(folder: Path) -> str | None:
    """Name the weight files that an index names and that are not there."""
    missing = []
    for index in folder.glob("*.index.json"):
        named = set(re.findall(r':\s*"([^"/]+\.(?:safetensors|bin))"', index.read_text("utf-8")))
        missing += sorted(name for name in named if not (folder / name).exists())
    if not missing:
        return None
    return (
        f"{folder} lacks {len(missing)} of its weight files: {', '.join(missing[:4])}. "
        "Download or copy the model again."
    )


def _remote(
    hub_id: str, what: str, chain: list[BaseException], text: str, how_to_get: str | None
) -> str:
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    hint = f" {how_to_get}" if how_to_get else ""
    if "GatedRepoError" in kinds:
        return (
            f"{hub_id} is gated on the hub. Ask for access at https://huggingface.co/{hub_id}, "
            "then log in: hf auth login"
        )
    if "RevisionNotFoundError" in kinds:
        return f"{hub_id} has no such revision on the hub. Look at its branches and commits there."
    if "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds:
        return (
            f"There is no model {hub_id} on the hub, or you may not see it (`hf auth login`), and "
            f"no folder of that name here.{hint}"
        )
    if unreachable(chain[0]):
        advice = hint or " Go online, or give a folder or a .gguf file."
        return f"The hub cannot be reached, and {hub_id} was not downloaded before.{advice}"
    if "does not appear to have a file named" in text or "no file named" in text:
        return (
            f"{hub_id} holds no model in the format of transformers: {_first_lines(chain[0], 1)}\n"
            "If it holds GGUF files, download one (`hf download`) and give its path; if it is an "
            "adapter, give it as --adapter and its base as --base."
        )
    return f"{what} of {hub_id} cannot be loaded: {_first_lines(chain[0])}{hint}"


def _first_lines(error: BaseException, num_lines: int = 6) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "\n  ".join(lines[:num_lines])
