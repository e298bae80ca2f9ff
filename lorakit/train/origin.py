"""Where a run's base and data came from: what a resume needs to load them again."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.bases import Base, context_length, load_base
from lorakit.core.identity import BaseIdentity
from lorakit.core.spec import LoRASpec
from lorakit.data import DataSpec, TokenData, load_data
from lorakit.errors import BaseError, DataError, InputError, collected


@dataclass(frozen=True)
class Origin:
    """How the base and the data of a run were loaded."""

    base: Mapping[str, Any]
    """Arguments of ``load_base``, among them ``ref``."""
    data: DataSpec | None = None
    """``None``: the caller made the data, and has to give it again."""
    validation: DataSpec | None = None

    @classmethod
    def of(cls, base: Base, data: TokenData, validation: TokenData | None) -> Origin:
        """What the objects themselves know."""
        return cls(
            base={"ref": base.ref},
            data=getattr(data, "spec", None),
            validation=getattr(validation, "spec", None),
        )

    def to_dict(self, base: Base) -> dict[str, Any]:
        """Sections ``base``, ``data`` and ``validation`` of run.yaml; device and dtype as they
        were chosen, local paths absolute."""
        placement = base.placement
        chosen = {
            "device": str(placement.device),
            "dtype": str(placement.dtype).removeprefix("torch."),
        }
        ref = _absolute(str(self.base["ref"]))
        return {
            "base": plain({**self.base, **chosen, "ref": ref}),
            "data": _spec_to_dict(self.data),
            "validation": _spec_to_dict(self.validation),
        }

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> Origin:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: a section is missing or malformed.
        """
        try:
            inspect.signature(load_base).bind(**sections["base"])
            return cls(
                base=dict(sections["base"]),
                data=_spec_from_dict(sections["data"]),
                validation=_spec_from_dict(sections["validation"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"run.yaml does not say how to load the run again: {error}") from error

    def on(self, device: Callable[[str], str]) -> Origin:
        """The same with another device, told by the one that is named here."""
        named = str(self.base.get("device", "auto"))
        return dataclasses.replace(self, base={**self.base, "device": device(named)})

    def load_base(self) -> Base:
        """Load the base as it was loaded before."""
        return load_base(**self.base)

    def load_data(self, base: Base) -> TokenData:
        """Load the training data as before.

        Raises:
            InputError: the run's data was made by a program, so only it can give it again.
            DataError: the data cannot be read.
            BaseError: the base has no tokenizer.
        """
        if self.data is None:
            raise InputError(
                "this run's data did not come from files that lorakit read; give it again: "
                "Trainer.resume(out, data=…)"
            )
        return self._load(self.data, base)

    def load_validation(self, base: Base) -> TokenData | None:
        """Load the validation data as before; ``None`` if there were no files of it.

        Raises:
            DataError: the data cannot be read.
            BaseError: the base has no tokenizer.
        """
        return None if self.validation is None else self._load(self.validation, base)

    @staticmethod
    def _load(spec: DataSpec, base: Base) -> TokenData:
        if base.tokenizer is None:
            raise BaseError(
                f"{base.ref} has no tokenizer, so text cannot become tokens. Put its tokenizer "
                "files (tokenizer.json and tokenizer_config.json) beside the weights."
            )
        return load_data(spec, base.tokenizer, context_length=context_length(base.model))


def content_hashes(
    base: Base, data: TokenData, validation: TokenData | None
) -> dict[str, str | None]:
    """Section ``content`` of run.yaml: what a resumed run must find unchanged."""
    return {
        "base": _identity_hash(base.identity),
        "data": data.digest,
        "validation": None if validation is None else validation.digest,
    }


def check_content(stored: Mapping[str, Any], now: Mapping[str, str | None]) -> None:
    """Compare what is loaded now with what the run began with.

    Raises:
        DataError, BaseError: it changed; the run cannot go on exactly.
    """
    for name, what in (("data", "training data"), ("validation", "validation data")):
        if stored.get(name) != now[name]:
            raise DataError(
                f"the {what} changed since this run began (digest {_short(stored.get(name))} "
                f"then, {_short(now[name])} now), so it cannot go on exactly. Put the old file "
                "back; or train on the new one from this run's adapter: lorakit train --from "
                "RUN/adapter --data … --out …"
            )
    if stored.get("base") != now["base"]:
        raise BaseError(
            "the base changed since this run began: sampled weights differ. Put the old one back "
            "(--revision pins one from the hub), or start a new run."
        )


#: training settings that decide nothing about the adapter
_FREE = {"recompute", "checkpoint_every", "keep_checkpoints", "samples", "sample_tokens"}


def decisive(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of run.yaml that decide what the adapter becomes, by dotted name."""
    return {
        f"{section}.{name}": value
        for section in ("lora", "train")
        for name, value in (sections[section] or {}).items()
        if name not in _FREE
    }


def check_settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare :func:`decisive` settings with those of the steps made so far.

    Raises:
        InputError: names those that differ; the run cannot go on exactly.
    """
    changed = [
        f"{name}: {stored.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted({*stored, *now})
        if stored.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(
            collected("run.yaml was edited since this run's steps were made", changed)
            + "\nPut the old values back; or start a new run with the new ones from its adapter: "
            "lorakit train --from RUN/adapter --data … --out …"
        )


def spec_to_dict(spec: LoRASpec) -> dict[str, Any]:
    """Section ``lora`` of run.yaml."""
    return {field.name: plain(getattr(spec, field.name)) for field in dataclasses.fields(spec)}


def spec_from_dict(data: Mapping[str, Any]) -> LoRASpec:
    """The inverse of :func:`spec_to_dict`.

    Raises:
        SpecError: a value is impossible.
    """
    return LoRASpec(**data)


def plain(value: Any) -> Any:
    """Mappings, lists, text and numbers alone, as YAML and JSON hold them."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _spec_to_dict(spec: DataSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    data: dict[str, Any] = plain(spec.to_dict())
    data["path"] = [_absolute(path) for path in data["path"]]
    if data["template"] is not None:
        data["template"] = _absolute(data["template"])
    return data


def _absolute(text: str) -> str:
    """The absolute path of a file or folder; any other text as it is."""
    try:
        return str(Path(text).resolve()) if Path(text).exists() else text
    except OSError:  # a text too long for a path
        return text


def _spec_from_dict(data: Mapping[str, Any] | None) -> DataSpec | None:
    if data is None:
        return None
    return DataSpec(**data)


def _identity_hash(identity: BaseIdentity) -> str:
    facts = identity.to_dict()
    facts.pop("name")  # the same base may have moved
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _short(digest: object) -> str:
    return "none" if digest is None else str(digest)[:12]
