"""``classify``: one label of a text, or of a pair of texts; the head is part of the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.bases import Base, context_length
from lorakit.bases.load import Task as BaseTask
from lorakit.data.columns import checked_text
from lorakit.data.readers import open_all
from lorakit.data.rows import Problems, Row, RowError
from lorakit.errors import BaseError, DataError
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.tasks.forwards import RowTask, padded
from lorakit.tasks.kinds import (
    Asked,
    Labelled,
    Texts,
    asked_of,
    end_id,
    in_order,
    known_labels,
    label_of,
    pad_id,
    random_ids,
)
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import (
    Fields,
    Made,
    RowData,
    RowExample,
    RowSpec,
    find_fields,
    load_rows,
)

_LABELS = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True)
class Classify(Labelled):
    """Sequence classification."""

    name: ClassVar[str] = "classify"
    peft_type: ClassVar[str | None] = "SEQ_CLS"
    base_task: ClassVar[BaseTask] = "classify"
    fields: ClassVar[Fields] = Fields(
        {
            "text": ("text", "sentence", "sentence1", "premise", "question", "content"),
            "label": _LABELS,
        },
        {"text_pair": ("text_pair", "sentence2", "hypothesis")},
        templated="text",
    )

    def fitted(self, spec: RowSpec, config: Mapping[str, Any]) -> Self:
        return replace(self, labels=self.labels or labels_of(spec, self.fields, config, self.name))

    def load_data(self, spec: RowSpec, base: Base) -> RowData:
        check_end(base)
        texts = Texts(spec, base, "text")

        def make(row: Row, values: Mapping[str, Any]) -> Made:
            parts = [texts.text(row.values, values)]
            if "text_pair" in values:
                parts.append(checked_text(values["text_pair"], "the text_pair", "text_pair"))
            label = class_of(values["label"], self.labels)
            ids = texts.ids(*parts)
            key = "\0".join(parts)
            types = _types(texts.tokenizer, parts, len(ids))
            asked = Asked(tuple(parts), np.array(ids, np.int32), types)
            inputs = {
                "ids": asked.ids,
                "types": types,
                "label": label,
                "asked": asked,
                "expected": self.labels[label],
            }
            return Made(inputs, len(ids), 1, f"{key}\0{label}".encode(), key.encode())

        return load_rows(
            spec, self.fields, make, task=self.name, unit=self.unit,
            label=lambda made: str(made.inputs["expected"]),
        )  # fmt: skip

    def on(self, model: nn.Module, handle: Handle | None, recompute: Recompute = "none") -> RowTask:
        pad = pad_id(model)

        def batch(examples: Sequence[RowExample]) -> dict[str, Tensor]:
            return text_batch(examples, pad)

        probe = [
            RowExample(i, i, "", n, 1, {"ids": random_ids(model, n), "types": None, "label": 0})
            for i, n in enumerate((7, 4))
        ]
        return RowTask(model, handle, batch, class_sums, recompute=recompute, probe=probe)

    @torch.no_grad()
    def predict(
        self,
        base: Base,
        handle: Handle | None,
        adapter: MixLike,
        inputs: Sequence[Any],
        max_new_tokens: int,
    ) -> list[str]:
        """The likeliest label of each text, with its probability."""
        check_end(base)
        pad, limit = pad_id(base.model), context_length(base.model)
        task = RowTask(base.model.eval(), handle, lambda part: text_batch(part, pad), class_sums)
        found = []
        for text in inputs:
            asked = asked_of(base, text, limit)
            one = {"ids": asked.ids, "types": asked.types, "label": 0}
            example = RowExample(0, 0, "", len(asked.ids), 1, one)
            logits = task.measured([example], adapter).outputs
            assert logits is not None
            found.append(said(logits[0], self.labels))
        return found


def labels_of(
    spec: RowSpec, fields: Fields, config: Mapping[str, Any], task: str
) -> tuple[str, ...]:
    """The labels: those of the base's own head where it has names for all of the data's, else
    those of the data, in order.

    Raises:
        DataError: no row has a label, or all have the same; rows that cannot be read are named.
    """
    found: list[str] = []
    columns: dict[str, str] = {}
    problems, count = Problems(), 0
    for row in open_all(spec.path, []):
        count += 1
        if row.problem is not None:
            problems.add(row.where, row.reason, row.problem)
            continue
        if not columns:
            columns = find_fields(spec, fields, list(map(str, row.values)), row.where, task)
        try:
            found.append(label_of(row.values.get(columns["label"])))
        except RowError as error:
            problems.add(row.where, error.reason, str(error))
    try:
        return chosen_labels(found, config, ", ".join(spec.path))
    except DataError as error:
        if not problems.total:
            raise
        raise problems.error(count, f"Without them: {error}.") from None


def chosen_labels(found: Sequence[str], config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """See :func:`labels_of`."""
    known = known_labels(config)
    if known and set(found) <= set(known):
        return known
    labels = in_order(found)
    if len(labels) < 2:
        what = f"every row has the label {labels[0]!r}" if labels else "no row has a label"
        raise DataError(f"{where}: {what}; a classifier needs at least two different labels")
    if len(labels) > max(50, len(found) // 2):
        raise DataError(
            f"{where}: {len(labels):,} different labels in {len(found):,} rows, such as "
            f"{labels[0][:40]!r}; that is no set of classes. Name the column of the labels with "
            "--map label=COLUMN"
        )
    return labels


def check_end(base: Base) -> None:
    """Check that texts have the end by which the head of an encoder-decoder finds them.

    Raises:
        BaseError: the base's tokenizer puts none.
    """
    end = end_id(base.model)
    if end is not None and end not in base.require_tokenizer()("a")["input_ids"]:
        raise BaseError(
            f"the head of {base.ref} reads a text at its end token ({end}), and its tokenizer "
            "puts none behind a text. Copy the tokenizer's files of the model that it was made of"
        )


def class_of(value: Any, labels: Sequence[str]) -> int:
    """The class of a row's label.

    Raises:
        RowError: it is none of the known ones.
    """
    label = label_of(value)
    if label not in labels:
        shown = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
        raise RowError("an unknown label", f"the label {label!r} is none of {shown}")
    return list(labels).index(label)


def text_batch(examples: Sequence[RowExample], pad: int) -> dict[str, Tensor]:
    """Texts, padded, with their labels."""
    ids = [example.inputs["ids"] for example in examples]
    batch = {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([np.ones(len(one), np.int64) for one in ids], 0),
        "_labels": torch.tensor([example.inputs["label"] for example in examples]),
    }
    if any(example.inputs["types"] is not None for example in examples):
        batch["token_type_ids"] = padded([example.inputs["types"] for example in examples], 0)
    return batch


def class_sums(output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's label, [E], and the logits, [E, classes]."""
    wide = torch.promote_types(torch.float32, output.logits.dtype)
    logits = output.logits.to(wide)
    return F.cross_entropy(logits, batch["_labels"], reduction="none"), logits.detach()


def said(logits: Tensor, labels: Sequence[str]) -> str:
    """``food (97.1%)``."""
    share = logits.double().softmax(-1)
    best = int(share.argmax())
    return f"{labels[best]} ({float(share[best]):.1%})"


def _types(tokenizer: Any, parts: Sequence[str], length: int) -> Any:
    """Token types of a pair of texts, where the model has such."""
    if len(parts) == 1:
        return None
    found = tokenizer(*parts, truncation=True, max_length=length).get("token_type_ids")
    return None if found is None else np.array(found, np.int32)
