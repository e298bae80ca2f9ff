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

from lorakit.bases import Base
from lorakit.core.identity import BaseIdentity
from lorakit.core.spec import LoRASpec
from lorakit.errors import BaseError, DataError, InputError, collected
from lorakit.tasks.causal import CAUSAL
from lorakit.tasks.task import Examples, Kind


@dataclass(frozen=True)
class Origin:
    """How the base and the data of a run were loaded."""

    base: Mapping[str, Any]
    """Arguments of the kind's ``load_base``, among them ``ref``."""
    data: Any = None
    """A ``DataSpec``, or what else the kind's ``load_data`` takes; ``None``: the caller made the
    data, and has to give it again."""
    validation: Any = None
    kind: Kind = CAUSAL
    """Of the task: how base and data are loaded."""

    @classmethod
    def of(
        cls, base: Base, data: Examples, validation: Examples | None, kind: Kind = CAUSAL
    ) -> Origin:
        """What the objects themselves know."""
        return cls(
            base={"ref": base.ref},
            data=getattr(data, "spec", None),
            validation=getattr(validation, "spec", None),
            kind=kind,
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
    def from_dict(cls, sections: Mapping[str, Any], kind: Kind = CAUSAL) -> Origin:
        """The inverse of :meth:`to_dict`.

        Args:
            kind: of the task, which says what the sections mean.

        Raises:
            InputError: a section is missing or malformed.
        """
        try:
            inspect.signature(kind.load_base).bind(**sections["base"])
            return cls(
                base=dict(sections["base"]),
                data=_spec_from_dict(sections["data"], kind),
                validation=_spec_from_dict(sections["validation"], kind),
                kind=kind,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"run.yaml does not say how to load the run again: {error}") from error

    def on(self, device: Callable[[str], str]) -> Origin:
        """The same with another device, told by the one that is named here."""
        named = str(self.base.get("device", "auto"))
        return dataclasses.replace(self, base={**self.base, "device": device(named)})

    def load_base(self) -> Base:
        """Load the base as it was loaded before."""
        base: Base = self.kind.load_base(**self.base)
        return base

    def load_data(self, base: Base) -> Any:
        """Load the training data as before.

        Raises:
            InputError: where it came from was not recorded, so only its program can give it again.
            DataError: the data cannot be read.
            BaseError: the base has no tokenizer.
        """
        if self.data is None:
            raise InputError(
                "this run did not record where its data came from; give it again: "
                "Trainer.resume(out, data=…), or of a search resume_tune(out, data=…)"
            )
        return self.kind.load_data(self.data, base)

    def load_validation(self, base: Base) -> Any:
        """Load the validation data as before; ``None`` if there were no files of it.

        Raises:
            DataError: the data cannot be read.
            BaseError: the base has no tokenizer.
        """
        if self.validation is None:
            return None
        return self.kind.load_data(self.validation, base)


def content_hashes(
    base: Base, data: Examples, validation: Examples | None
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
                "back; or train on the new one in a run of its own, from this one's adapter: "
                "--from RUN/adapter --data … --out …"
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
            "--from RUN/adapter --data … --out …"
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


def _spec_to_dict(spec: Any) -> dict[str, Any] | None:
    if spec is None:
        return None
    data: dict[str, Any] = plain(spec.to_dict())
    path = data["path"]
    data["path"] = _absolute(path) if isinstance(path, str) else [_absolute(one) for one in path]
    if data.get("template") is not None:
        data["template"] = _absolute(data["template"])
    return data


def _absolute(text: str) -> str:
    """The absolute path of a file or folder; any other text as it is."""
    try:
        return str(Path(text).resolve()) if Path(text).exists() else text
    except OSError:  # a text too long for a path
        return text


def _spec_from_dict(data: Mapping[str, Any] | None, kind: Kind) -> Any:
    return None if data is None else kind.data_spec(data)


def _identity_hash(identity: BaseIdentity) -> str:
    facts = identity.to_dict()
    facts.pop("name")  # the same base may have moved
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _short(digest: object) -> str:
    return "none" if digest is None else str(digest)[:12]
