"""What an adapter knows and PEFT's config has no field for: one JSON object in the header.

It lies under ``lorakit`` in the metadata of ``adapter_model.safetensors``, beside the weights that
it describes, where other readers do not look. Another tool that saves the adapter again drops it,
and with it whatever would no longer be true.

Fields, each left out where it says nothing: ``base`` (identity), ``provenance``, ``spec`` (settings
that the config does not give back), ``replaced`` (paths of the sites that are no low-rank ones),
``task_type``, ``scaling`` (factors that no alpha divides to exactly), ``no_bias`` (sites whose bias
in the file is PEFT's and not theirs), ``prefix`` (modules of a prefix that the file only numbers).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.core.expressions import MAX_RANK, wrong_expression
from lorakit.core.identity import BaseIdentity
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError, LorakitError

KEY = "lorakit"
#: raised when the layout changes in a way that older code would misread
LAYOUT = 1


#: what reading damaged JSON ends in
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class Header:
    """The content of the block."""

    base: BaseIdentity | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    task_type: str | None = None
    scaling: Mapping[str, float] = field(default_factory=dict)
    no_bias: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    """Attention modules of a prefix by layer, where the file has one tensor for all."""


def write_header(header: Header) -> dict[str, str]:
    """The metadata of the file: ours, and the ``format`` that transformers asks for.

    Raises:
        FormatError: the provenance is not plain JSON data.
    """
    content: dict[str, Any] = {
        "layout": LAYOUT,
        "base": None if header.base is None else header.base.to_dict(),
        "provenance": header.provenance,
        "spec": header.spec,
        "replaced": sorted(header.replaced),
        "task_type": header.task_type,
        "scaling": header.scaling,
        "no_bias": sorted(header.no_bias),
        "prefix": list(header.prefix),
    }
    said = {name: value for name, value in content.items() if value}
    try:
        _check_keys(header.provenance)
        # a loss that overflowed is a fact too: Python's JSON writes and reads Infinity
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"the adapter's provenance is not plain JSON data ({error}); keep strings, numbers, "
            "lists and dictionaries with string keys in it"
        ) from error
    return {"format": "pt", KEY: text}


def read_header(metadata: Mapping[str, str]) -> Header | None:
    """The block of a file; ``None`` if another tool wrote it.

    Raises:
        FormatError: it is damaged or newer than this version.
    """
    if KEY not in metadata:
        return None
    try:
        said = json.loads(metadata[KEY])
        json.dumps(said, ensure_ascii=False).encode()  # no halves of UTF-16 pairs
        if said["layout"] != LAYOUT:
            raise FormatError(
                f"its header has layout {said['layout']!r}; this version reads {LAYOUT}. Update "
                "lorakit, or save the adapter again from PEFT, which drops the header"
            )
        base = said.get("base")
        return Header(
            base=None if base is None else BaseIdentity.from_dict(base),
            provenance=_object(said, "provenance"),
            spec=_object(said, "spec"),
            replaced=_strings(said, "replaced"),
            task_type=_optional_string(said, "task_type"),
            scaling={str(k): float(v) for k, v in _object(said, "scaling").items()},
            no_bias=_strings(said, "no_bias"),
            prefix=_strings(said, "prefix"),
        )
    except FormatError:
        raise
    except (LorakitError, *_DAMAGE) as error:
        raise FormatError(
            f"its header's {KEY!r} entry is damaged ({type(error).__name__}: {error})"
        ) from error


def spec_difference(spec: LoRASpec, from_config: LoRASpec | None) -> dict[str, Any]:
    """The fields of ``spec`` that the config does not give back.

    Patterns become lists of pairs: their order counts, and JSON objects here are sorted.
    """
    difference = {}
    for name in (f.name for f in dataclasses.fields(LoRASpec)):
        value = getattr(spec, name)
        value = _pairs(value) if isinstance(value, Mapping) else value
        other = None if from_config is None else getattr(from_config, name)
        other = _pairs(other) if isinstance(other, Mapping) else other
        if from_config is None or value != other:
            difference[name] = _as_lists(value)
    return difference


def apply_difference(spec: LoRASpec, difference: Mapping[str, Any]) -> LoRASpec:
    """The inverse: ``spec`` from the config, with the fields of the header.

    Raises:
        FormatError: the header's fields make no spec.
    """
    changes: dict[str, Any] = {}
    try:
        for name, value in difference.items():
            if name.endswith("_pattern"):
                changes[name] = dict(value)
            else:
                changes[name] = tuple(value) if isinstance(value, list) else value
        problems = [f"{name} {wrong}" for name in changes if (wrong := _wrong(changes[name], name))]
        if problems:
            raise FormatError("; ".join(problems))
        return dataclasses.replace(spec, **changes)
    except (LorakitError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"its header's settings are damaged: {error}") from error


def _wrong(value: Any, name: str) -> str | None:
    """What is wrong with a field of a spec beyond what the spec itself checks."""
    if name in ("targets", "exclude", "train_modules"):
        if not (isinstance(value, str) and name == "targets") and not _is_names(value):
            return f"is {value!r}; expected names"
        words = (value,) if isinstance(value, str) else value
        return next((w for word in words if (w := wrong_expression(word))), None)
    if name == "layers" and value is not None and not isinstance(value, str):
        return f"is {value!r}; expected a text"
    if name == "rank" and (type(value) is not int or value > MAX_RANK):
        return f"is {value!r}; expected a whole number of at most {MAX_RANK}"
    if name.endswith("_pattern"):
        if any(type(n) not in (int, float) or n > MAX_RANK for n in value.values()):
            return f"is {value!r}; expected expressions with numbers of at most {MAX_RANK}"
        return next((w for text in value if (w := wrong_expression(text))), None)
    return None


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)


def _optional_string(said: Mapping[str, Any], name: str) -> str | None:
    value = said.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} is no string")
    return value


def _pairs(pattern: Mapping[str, Any]) -> list[list[Any]]:
    return [[expression, value] for expression, value in pattern.items()]


def _as_lists(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {key: _as_lists(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_lists(inner) for inner in value]
    return value


def _object(said: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = said.get(name, {})
    if not isinstance(value, dict):
        raise TypeError(f"{name} is no object")
    return value


def _strings(said: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = said.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} is no list of strings")
    return tuple(value)


def _check_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no string")
            _check_keys(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_keys(inner)
