"""What the ``datasets`` library reads: folders of ``save_to_disk``, and data sets on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.data.rows import Row
from lorakit.errors import DataError
from lorakit.optional import require

_BATCH = 1000

#: owner/name or name, then :config, @revision and /split as wanted
_REFERENCE = re.compile(
    r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w.-]+))?"
    r"(?:/(?P<split>[\w.-]+))?"
)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def looks_like_id(ref: str) -> bool:
    """Whether this may name a data set on the hub."""
    return _REFERENCE.fullmatch(ref) is not None and not ref.startswith(".")


def read_saved(folder: Path, name: str, notes: list[str]) -> Iterator[Row]:
    """The rows of a folder of ``save_to_disk``; of several splits the one called train."""
    library = require("datasets", extra="train", purpose="a datasets folder")
    try:
        loaded = library.load_from_disk(str(folder))
    except Exception as error:  # pyarrow, json and datasets each raise their own
        raise DataError(
            f"{name}: the datasets folder cannot be read ({_first_line(error)}). "
            "It may be incomplete; save it again."
        ) from None
    yield from _rows(_one_split(loaded, name, notes), name)


def read_hub(ref: str, notes: list[str]) -> Iterator[Row]:
    """The rows of a data set on the hub; the split is ``train`` unless the id names another.

    Raises:
        DataError: the hub has no such data set, config or split, or cannot be reached.
    """
    library = require("datasets", extra="train", purpose="a data set from the hub")
    match = _REFERENCE.fullmatch(ref)
    assert match is not None
    split = match["split"] or "train"
    try:
        loaded = library.load_dataset(
            match["id"], match["config"], split=split, revision=match["revision"]
        )
    except Exception as error:  # the hub's client, pyarrow and datasets each raise their own
        raise DataError(
            f"{ref}: there is no such file or folder, and as a data set of the hub (split "
            f"{split!r}) it cannot be loaded: {_first_line(error)}. Check the path; a hub id is "
            "owner/name, with :config and /split behind it where needed."
        ) from None
    notes.append(f"{ref}: from the hub, split {split!r}")
    yield from _rows(loaded, ref)


def _one_split(loaded: Any, name: str, notes: list[str]) -> Any:
    if not hasattr(loaded, "keys"):
        return loaded
    splits = list(loaded.keys())
    if "train" not in splits and len(splits) != 1:
        raise DataError(
            f"{name}: it holds the splits {', '.join(splits)} and none called train; give the "
            f"folder of one, such as {name}/{splits[0] if splits else 'train'}."
        )
    chosen = "train" if "train" in splits else splits[0]
    notes.append(f"{name}: the split {chosen!r} is read (of {', '.join(splits)})")
    return loaded[chosen]


def _rows(table: Any, name: str) -> Iterator[Row]:
    number = 0
    try:
        for batch in table.iter(batch_size=_BATCH):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Row(name, "row", number, dict(zip(columns, values, strict=True)))
    except Exception as error:  # as above; and what Python cannot hold, such as text of bad bytes
        raise DataError(
            f"{name}: it cannot be read after row {number} ({_first_line(error)}). "
            "Make it again without the values that are broken."
        ) from None
    if number == 0:
        raise DataError(f"{name}: it holds no rows; expected at least one.")


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:200].rstrip(".")
    return text or type(error).__name__
