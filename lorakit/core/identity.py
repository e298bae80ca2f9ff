"""Which base an adapter belongs to, as a value that travels with it.

An identity holds the architecture, the shapes of the weights, and a few sampled numbers of some
of them. Comparing two identities needs neither model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lorakit.errors import BaseError, collected

#: largest relative difference (L2, per sampled tensor) that storing a weight so can cause;
#: measured on SmolLM2: bf16 0.2 %, int8 1.2 %, Q4_1 and NF4 7–10 %
STORAGE_ERROR = {
    "float64": 1e-6,
    "float32": 1e-6,
    "float16": 2e-3,
    "bfloat16": 8e-3,
    "int8": 4e-2,
    "8-bit": 4e-2,
    "4-bit": 0.2,
}


@dataclass(frozen=True)
class BaseIdentity:
    """A base model: what it is called, what it is, and how its weights were stored."""

    name: str
    """How the user named it: a hub id, a folder's name, a file's name."""
    architecture: str
    """The class of the model, such as ``"LlamaForCausalLM"``."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameter path → shape, of the sampled parameters."""
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Parameter path → a few of its values, at positions fixed by the shape."""
    storage: str = "float32"
    """How the weights were stored where the samples were taken: a key of STORAGE_ERROR."""
    revision: str | None = None
    """The commit on the hub, where there is one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = asdict(self)
        data["shapes"] = {path: list(shape) for path, shape in sorted(self.shapes.items())}
        data["samples"] = {path: list(values) for path, values in sorted(self.samples.items())}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BaseIdentity:
        """The inverse of :meth:`to_dict`.

        Raises:
            BaseError: the data is not an identity.
        """
        try:
            return cls(
                name=str(data["name"]),
                architecture=str(data["architecture"]),
                shapes={str(k): tuple(map(int, v)) for k, v in data["shapes"].items()},
                samples={str(k): tuple(map(float, v)) for k, v in data["samples"].items()},
                storage=str(data["storage"]),
                revision=data.get("revision"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BaseError(f"the base identity in the adapter is malformed: {error!r}") from error


def compare_identities(trained_on: BaseIdentity, used_on: BaseIdentity) -> list[str]:
    """What differs between the base an adapter was trained on and the one it is used on.

    Returns:
        Differences that are allowed and must be said: another name, another storage.

    Raises:
        BaseError: another architecture, other shapes, or weights whose samples differ by more
            than the two storages explain.
    """
    problems = []
    if trained_on.architecture != used_on.architecture:
        problems.append(
            f"architecture: trained on {trained_on.architecture}, used on {used_on.architecture}"
        )
    allowed = max(
        STORAGE_ERROR.get(trained_on.storage, 0.2), STORAGE_ERROR.get(used_on.storage, 0.2)
    )
    worst = 0.0
    for path, shape in trained_on.shapes.items():
        other = used_on.shapes.get(path)
        if other is None:
            problems.append(f"{path}: not in this base")
        elif _without_rows(path, shape) != _without_rows(path, other):
            problems.append(f"{path}: trained on shape {shape}, used on {other}")
        elif other == shape and path in trained_on.samples and path in used_on.samples:
            difference = _relative_difference(trained_on.samples[path], used_on.samples[path])
            worst = max(worst, difference)
            if not difference <= allowed:
                problems.append(
                    f"{path}: sampled weights differ by {difference:.1%} "
                    f"(at most {allowed:.2g} is explained by {trained_on.storage} and "
                    f"{used_on.storage} storage)"
                )
    if problems:
        raise BaseError(
            collected(
                f"The adapter was trained on {trained_on.name!r}; this base, "
                f"{used_on.name!r}, is another one",
                problems,
                limit=6,
            )
            + "\nGive the base it was trained on, or pass allow_other_base=True "
            "(--allow-other-base) if you know that they are interchangeable."
        )
    notes = []
    if trained_on.storage != used_on.storage:
        notes.append(
            f"the adapter was trained on this base stored as {trained_on.storage} and is used "
            f"on {used_on.storage}; sampled weights differ by up to {worst:.2%}"
        )
    return notes


def _without_rows(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, less the vocabulary of an embedding: added tokens do not make another base."""
    return shape[1:] if "embed" in path and len(shape) == 2 else shape


def _relative_difference(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    if len(first) != len(second):
        return math.inf
    distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)))
    norm = math.sqrt(sum(a * a for a in first))
    return distance / norm if norm else (0.0 if distance == 0.0 else math.inf)
