"""What transformers' own reader leaves out of a GGUF without a word: taken over here, or refused.

llama.cpp computes with everything in the file. transformers (5.23) builds a Llama without biases
and rotates without any scaling, whatever the file says. The rotation's is a setting, which can be
written into the model's config; a tensor that no parameter took cannot be brought in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.bases.gguf_convert import llama3_factors
from lorakit.bases.gguf_file import open_whole
from lorakit.core.gguf_names import ARCHITECTURES, module_path
from lorakit.errors import BaseError, collected

_FACTORS = "rope_freqs.weight"
#: of Llama 3.1, 3.2 and 3.3; only their factor and, in theory, the old length differ
_LOW, _HIGH = 1.0, 4.0
_OLD_LENGTHS = tuple(1 << power for power in range(5, 21))


def take_over(path: Path, model: Any) -> list[str]:
    """Bring into a model's config what its reader left out of the file; return what to say.

    Args:
        path: the file.
        model: what transformers built of it, not used yet: its config is changed, its modules
            are not.

    Raises:
        BaseError: tensors or a scaling were left out that cannot be brought in. All are named.
    """
    reader, architecture = open_whole(path)
    if architecture not in ARCHITECTURES.values():
        return _by_count(path, reader, model)
    problems = _without_parameter(reader, model)
    scaling = _scaling(reader, architecture, model.config, problems)
    if problems:
        raise BaseError(
            collected(f"transformers leaves out what llama.cpp reads in {path}", problems)
            + "\nThe model would be another one. Give its folder or hub id in the safetensors "
            "format instead."
        )
    if scaling is not None:
        model.config.rope_parameters = {**model.config.rope_parameters, **scaling}
    return []


def _by_count(path: Path, reader: Any, model: Any) -> list[str]:
    """For architectures whose names are not known here."""
    in_file = sum(int(tensor.n_elements) for tensor in reader.tensors)
    in_model = sum(value.numel() for value in [*model.parameters(), *model.buffers()])
    if in_file <= in_model:
        return []
    return [
        f"{path.name} holds {in_file - in_model} numbers more than the model that transformers "
        "builds of it; what llama.cpp computes with them is missing"
    ]


def _without_parameter(reader: Any, model: Any) -> list[str]:
    taken = model.state_dict().keys()
    lost = []
    for tensor in reader.tensors:
        stem, _, leaf = tensor.name.rpartition(".")
        if tensor.name != _FACTORS and f"{module_path(stem)}.{leaf}" not in taken:
            lost.append(f"{tensor.name}: no parameter took it")
    return lost


def _scaling(
    reader: Any, architecture: str, config: Any, problems: list[str]
) -> dict[str, Any] | None:
    """The scaling of the rotation as transformers' settings; ``None`` where there is none."""
    fields = reader.fields
    prefix = f"{architecture}.rope.scaling."
    told = {
        key.removeprefix(prefix): found.contents()
        for key, found in fields.items()
        if key.startswith(prefix)
    }
    factors = next((t.data for t in reader.tensors if t.name == _FACTORS), None)
    kind = told.get("type", "linear" if told.get("factor") else "none")  # as llama.cpp has it
    if kind == "linear" and factors is None:
        return {"rope_type": "linear", "factor": float(told.get("factor", 1.0))}
    if kind != "none":
        problems.append(f"{prefix}type: {kind!r}, a scaling of the rotation")
        return None
    if factors is None:
        return None
    found = _llama3(np.asarray(factors, np.float32).reshape(-1), config.rope_parameters)
    if found is None:
        problems.append(f"{_FACTORS}: no factors of a Llama 3's rotation")
    return found


def _llama3(factors: np.ndarray, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3's settings that give exactly these factors; ``None`` where none do."""
    for old in _OLD_LENGTHS:
        found = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": old,
        }
        made = llama3_factors(found, float(rope["rope_theta"]), 2 * factors.size)
        if np.allclose(made, factors, rtol=1e-5, atol=0):
            return found
    return None
