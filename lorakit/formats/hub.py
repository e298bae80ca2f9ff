"""Adapters on the Hugging Face hub: asked for by id, uploaded on request, never otherwise."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from lorakit.errors import FormatError
from lorakit.formats.folder import CARD, CONFIG, PICKLED, WEIGHTS
from lorakit.formats.tokenizer_files import is_tokenizer_file
from lorakit.optional import require

logger = logging.getLogger(__name__)

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?")

#: what an adapter's repository is asked for; checkpoints and optimizer states stay there
_PATTERNS = [CONFIG, WEIGHTS, PICKLED, "*.json", "*.txt", "*.model", "*.spm", "*.jinja"]


def is_hub_id(ref: str) -> bool:
    """Whether ``ref`` has the form ``owner/name`` or ``owner/name@revision``."""
    return _ID.fullmatch(ref) is not None


def download(ref: str, *, revision: str | None = None) -> Path:
    """The local folder of an adapter on the hub, downloaded unless it is cached.

    Raises:
        FormatError: no such repository or revision, no permission, or no connection.
    """
    match = _ID.fullmatch(ref)
    assert match is not None, ref
    repo_id, named = match.groups()
    if revision is not None and named is not None and revision != named:
        raise FormatError(f"{ref} names revision {named!r}, and revision={revision!r} is given")
    revision = revision or named
    hub = require("huggingface_hub", extra="train", purpose="adapters from the hub")
    try:
        folder = hub.snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS)
    except Exception as error:
        reason = _why(repo_id, revision, error, "loaded from the hub")
        raise FormatError(f"There is no path {ref} here, and {reason}") from error
    logger.info("%s is in %s", ref, folder)
    return Path(folder)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload an adapter's files; the repository is made if it is not there.

    Returns:
        The address of the repository's page.

    Raises:
        FormatError: the id is malformed, there is no permission or no connection.
    """
    if _ID.fullmatch(repo_id) is None or "@" in repo_id:
        raise FormatError(f"{repo_id!r} is no repository id; expected owner/name")
    names = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _belongs(path.relative_to(folder).as_posix())
    ]
    hub = require("huggingface_hub", extra="train", purpose="uploading adapters")
    api: Any = hub.HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=names,
            revision=revision,
            commit_message=message or "Upload LoRA adapter",
        )
    except Exception as error:
        raise FormatError(_why(repo_id, revision, error, "uploaded")) from error
    return str(url)


def _belongs(name: str) -> bool:
    return name in (CONFIG, WEIGHTS, PICKLED, CARD) or is_tokenizer_file(name)


def _why(repo_id: str, revision: str | None, error: Exception, done: str) -> str:
    """What the hub's many errors mean, and what to do about each."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    at = f" at revision {revision!r}" if revision else ""
    if "GatedRepoError" in kinds:
        reason = "access to it must be asked for on its page; then log in with `hf auth login`"
    elif "RevisionNotFoundError" in kinds:
        reason = "there is no such revision; its page lists branches and tags"
    elif "RepositoryNotFoundError" in kinds:
        reason = (
            "there is no such repository, or it is private; check the name, and log in with "
            "`hf auth login` if it is private"
        )
    elif kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        reason = (
            "the hub cannot be reached, and it is not in the cache; check the connection "
            "(HF_HUB_OFFLINE switches it off), or give a local folder"
        )
    elif kinds & {"LocalTokenNotFoundError", "BadRequestError"} or "401" in str(error):
        reason = f"the hub refused ({_first_line(error)}); log in with `hf auth login`"
    else:
        reason = f"{type(error).__name__}: {_first_line(error)}; check the connection"
    return f"{repo_id}{at} cannot be {done}: {reason}."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
