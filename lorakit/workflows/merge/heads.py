"""Whether a base's files are those of the model that adapters were trained on, or lack its head."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lorakit.bases.config import read_config
from lorakit.core.adapter import Adapter
from lorakit.errors import InputError
from lorakit.tasks.kinds import Labelled, RowKind, known_labels
from lorakit.tasks.names import TASKS
from lorakit.tasks.registry import kind_of


def trained_for(named: Mapping[str, Adapter]) -> RowKind | None:
    """What the adapters were trained for; ``None`` where that is to continue text, or not said.

    Raises:
        InputError: different things.
    """
    told = [adapter.provenance.get("task") for adapter in named.values()]
    kinds = [kind_of(one) for one in told if isinstance(one, Mapping) and one.get("name") in TASKS]
    if any(kind != kinds[0] for kind in kinds):
        raise InputError(
            f"the adapters {' and '.join(named)} were trained for different tasks, labels or "
            "settings; merge them one at a time"
        )
    return kinds[0] if kinds and isinstance(kinds[0], RowKind) else None


def why_in_memory(
    base: str | os.PathLike[str], kind: RowKind, named: Mapping[str, Adapter]
) -> str | None:
    """Why these adapters need :func:`~lorakit.workflows.merge.memory.merge_in_memory`: the base's
    files are those of a model with another head. ``None`` where they are the trained one's.

    Args:
        kind: of :func:`trained_for`; the merge loads the base by its ``load_base``.
    """
    config = read_config(os.fspath(base))
    stored = {str(name) for name in config.get("architectures") or ()}
    trained = {adapter.base.architecture for adapter in named.values() if adapter.base is not None}
    if stored and trained - stored - {""}:
        return (
            f"the adapter is of a {', '.join(sorted(trained - stored))}, and the files of {base} "
            f"are those of a {', '.join(sorted(stored))}"
        )
    if isinstance(kind, Labelled) and kind.labels != known_labels(config):
        return f"the head of {base} has other labels than {', '.join(kind.labels[:8])}"
    return None
