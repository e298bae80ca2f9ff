"""Kinds by name, as ``--task`` and section ``task`` of run.yaml have them, and which one fits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakit.errors import InputError
from lorakit.tasks.causal import CAUSAL
from lorakit.tasks.kinds import RowKind
from lorakit.tasks.task import Kind

#: name → its class
_KINDS = {
    "seq2seq": "Seq2Seq",
    "classify": "Classify",
    "vision": "Vision",
    "speech": "Speech",
    "embed": "Embed",
    "vision-chat": "VisionChat",
}


def named(kind: Kind) -> dict[str, Any]:
    """Section ``task`` of run.yaml, and of an adapter's provenance."""
    return {"name": kind.name, **kind.settings()}


def kind_of(section: Mapping[str, Any] | None) -> Kind:
    """The inverse of :func:`named`; ``None`` is the causal language model.

    Raises:
        InputError: no such kind, or it has no such settings.
    """
    if section is None or section.get("name") == CAUSAL.name:
        return CAUSAL
    settings = dict(section)
    name = settings.pop("name", None)
    if name == "pictures":
        raise InputError(
            "this is a run on pictures, which goes on with: lorakit images train --resume RUN"
        )
    if name not in _KINDS:
        raise InputError(
            f"the task is {name!r}; lorakit knows causal, {', '.join(_KINDS)}. A run of another "
            "program is resumed by that program"
        )
    return row_kind(str(name), **settings)


def kind_class(name: str) -> type[RowKind]:
    """What kinds of rows of this name are; ``name`` is one that ``--task`` takes."""
    module = importlib.import_module(f"lorakit.tasks.{name.replace('-', '_')}")
    found: type[RowKind] = getattr(module, _KINDS[name])
    return found


def row_kind(name: str, **settings: Any) -> RowKind:
    """A kind of rows.

    Raises:
        InputError: it has no such settings.
    """
    try:
        return kind_class(name)(**settings)
    except TypeError as error:
        raise InputError(f"section task does not fit {name!r}: {error}") from error


def fitting_task(
    config: Mapping[str, Any], columns: Callable[[], Sequence[str]]
) -> tuple[str, str]:
    """Which task fits a base and the columns of the data, and why, as a clause.

    Args:
        config: the base's, as plain data.
        columns: gives those of the first row, where they decide; none in folders of pictures.
    """
    from transformers.models.auto import modeling_auto as auto

    model_type = str(config.get("model_type"))
    names = [str(name) for name in config.get("architectures") or ()]
    named_so = ", ".join(names) or model_type
    if model_type in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES and "bart" not in model_type:
        return "speech", f"{named_so} makes text of sound"
    if config.get("is_encoder_decoder") and not _ends(names, "ForSequenceClassification"):
        return "seq2seq", f"{named_so} is an encoder-decoder"
    if model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "vision", f"{named_so} sees pictures"
    if model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and (
        "vision_config" in config
    ):
        return "vision-chat", f"{named_so} continues chats with pictures"
    decodes = model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _ends(
        names, "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"
    )
    encodes = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if decodes and not (encodes and not config.get("is_decoder")):
        return CAUSAL.name, f"{named_so} continues text"
    there = columns() if encodes else ()
    for name in ("embed", "classify"):
        fields = kind_class(name).fields
        if fields.fits(there) and not (name == "embed" and "label" in there):
            rows = " and ".join(fields.needs)
            return name, f"{named_so} reads a text whole, and the rows have {rows}"
    if encodes or _ends(names, "ForSequenceClassification"):
        return "classify", f"{named_so} reads a text whole"
    return CAUSAL.name, "nothing says otherwise"


def _ends(names: Sequence[str], *endings: str) -> bool:
    return any(name.endswith(endings) for name in names)
