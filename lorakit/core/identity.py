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

#: largest relative difference (L2, over the 32 numbers sampled from one tensor) that storing it so
#: can cause. Measured on the linears of SmolLM2 and on Gaussian and Student-t matrices, 600 to 2200
#: draws each, median and largest: float16 0.02 % and 0.03 %, bfloat16 0.14 % and 0.28 % (at most
#: 2⁻⁸, having eight significant bits), int8 by rows 0.9 % and 8.6 % (a row with an outlier), NF4
#: 9.5 % and 21 %, FP4 12.8 % and 36 %; GGUF: Q8_0 0.6 % and 1.4 %, Q5 4.5 % and 12 %, Q4 9.0 %
#: and 18 %. Q6 and below Q4 follow from their bits: half as many levels, twice the difference.
#: An unrelated model differs by about 140 %.
STORAGE_ERROR = {
    "float64": 1e-6,
    "float32": 1e-6,
    "float16": 2e-3,
    "bfloat16": 8e-3,
    "int8": 0.12,
    "8-bit": 0.12,
    "nf4": 0.25,
    "fp4": 0.4,
    "int4": 0.25,
    "4-bit": 0.4,
    "Q8": 0.03,
    "Q6": 0.06,
    "Q5": 0.15,
    "Q4": 0.25,
    "Q3": 0.45,
    "Q2": 0.7,
    "Q1": 0.9,
}
#: storages that keep a number or round it in one way only: two of them alike hold the same numbers
_ONE_WAY = ("float64", "float32", "float16", "bfloat16")


def storage_error(storage: str) -> float:
    """The largest relative difference that ``storage`` explains.

    Args:
        storage: a key of STORAGE_ERROR, or a type of GGUF such as ``"Q4_K"`` or ``"IQ2_XXS"``.
            What is not known counts as 4-bit.
    """
    family = storage.removeprefix("T").removeprefix("I").partition("_")[0]
    return STORAGE_ERROR.get(storage, STORAGE_ERROR.get(family, STORAGE_ERROR["4-bit"]))


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
    """How the weights were stored where the samples were taken: see :func:`storage_error`."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """Parameter path → its storage, where it is another: norms stay exact in quantised models."""
    revision: str | None = None
    """The commit on the hub, where there is one."""
    embedding: str | None = None
    """Parameter path of the input embedding, whose rows may grow in number."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = asdict(self)
        data["shapes"] = {path: list(shape) for path, shape in sorted(self.shapes.items())}
        data["samples"] = {path: list(values) for path, values in sorted(self.samples.items())}
        data["stored"] = dict(sorted(self.stored.items()))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BaseIdentity:
        """The inverse of :meth:`to_dict`.

        Raises:
            BaseError: the data is not an identity.
        """
        try:
            texts = [data.get("revision"), data.get("embedding")]
            if any(text is not None and not isinstance(text, str) for text in texts):
                raise TypeError("its revision or embedding is no text")
            return cls(
                name=str(data["name"]),
                architecture=str(data["architecture"]),
                shapes={str(k): tuple(map(int, v)) for k, v in data["shapes"].items()},
                samples={str(k): tuple(map(float, v)) for k, v in data["samples"].items()},
                storage=str(data["storage"]),
                stored={str(k): str(v) for k, v in data.get("stored", {}).items()},
                revision=data.get("revision"),
                embedding=data.get("embedding"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
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
    worst, num_compared = 0.0, 0
    growing = (trained_on.embedding, used_on.embedding)  # added tokens do not make another base
    for path, shape in trained_on.shapes.items():
        other = used_on.shapes.get(path)
        if other is None:
            problems.append(f"{path}: not in this base")
        elif shape != other and not (path in growing and shape[1:] == other[1:]):
            problems.append(f"{path}: trained on shape {shape}, used on {other}")
        elif other == shape and path in trained_on.samples and path in used_on.samples:
            difference = _relative_difference(trained_on.samples[path], used_on.samples[path])
            worst, num_compared = max(worst, difference), num_compared + 1
            first = trained_on.stored.get(path, trained_on.storage)
            second = used_on.stored.get(path, used_on.storage)
            allowed = _explained(first, second)
            if not difference <= allowed:
                problems.append(
                    f"{path}: sampled weights differ by {difference:.2%} (storing them as {first} "
                    f"there and {second} here explains at most {allowed:.2%})"
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
    elif worst > STORAGE_ERROR["float32"]:
        notes.append(
            f"both bases are stored as {used_on.storage}, yet sampled weights differ by up to "
            f"{worst:.2%}: they were quantised from different files or by different programs, or "
            "are used in another dtype"
        )
    if trained_on.name != used_on.name:
        verdict = (
            "their sampled weights agree"
            if num_compared
            else "no weights were sampled, so nothing but their shapes could be compared"
        )
        notes.append(
            f"the adapter was trained on {trained_on.name!r} and is used on {used_on.name!r}; "
            + verdict
        )
    return notes


def _explained(first: str, second: str) -> float:
    """The largest relative difference between two storages of the same weight."""
    if first == second:
        return STORAGE_ERROR["float32"] if first in _ONE_WAY else storage_error(first)
    return math.hypot(storage_error(first), storage_error(second))


def _relative_difference(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    if len(first) != len(second):
        return math.inf
    distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)))
    norm = math.sqrt(sum(a * a for a in first))
    return distance / norm if norm else (0.0 if distance == 0.0 else math.inf)
