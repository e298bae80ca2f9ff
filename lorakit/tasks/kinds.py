"""What the kinds other than causal language models share: settings, rows, texts and labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from lorakit.bases import Base, context_length, load_base
from lorakit.core.spec import LoRASpec
from lorakit.data.columns import checked_text
from lorakit.data.rows import RowError, shown
from lorakit.data.template import Template, parse_template
from lorakit.errors import BaseError, DataError, InputError
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.tasks.causal import perplexity
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import Fields, RowData, RowSpec
from lorakit.tasks.task import Task


class RowKind:
    """What every kind of rows answers in the same way; a frozen dataclass of its settings."""

    name: ClassVar[str]
    peft_type: ClassVar[str | None] = None
    base_task: ClassVar[str]
    """As ``load_base`` takes it."""
    fields: ClassVar[Fields]
    unit: ClassVar[str] = "tokens"
    text_metrics: ClassVar[bool] = False
    """Whether its answers are texts that are compared with references."""
    asks_for: ClassVar[str] = "text"
    """What it is asked with: ``"text"``, or the path of a file."""

    def settings(self) -> Mapping[str, Any]:
        """As run.yaml and the adapter's file keep them."""
        found: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}

    def fitted(self, spec: RowSpec, config: Mapping[str, Any]) -> RowKind:
        """The kind with what only data and base tell, such as the labels.

        Args:
            config: of the base, as plain data.

        Raises:
            DataError: the data cannot be read, or does not tell.
        """
        return self

    def from_base(self, config: Mapping[str, Any], name: str) -> RowKind:
        """The kind with what the base alone tells, where there is no data.

        Args:
            name: of the base, for messages.

        Raises:
            InputError: the labels are not known.
        """
        if not hasattr(self, "labels"):
            return self
        labels = known_labels(config)
        if not labels:
            raise InputError(
                f"nothing tells which labels there are: {name} names none, and no adapter that "
                "lorakit trained is given"
            )
        return dataclasses.replace(self, labels=labels)  # type: ignore[type-var]

    @property
    def load_base(self) -> Callable[..., Base]:
        return partial(_load, self.base_task, self.num_labels, getattr(self, "labels", ()))

    @property
    def num_labels(self) -> int | None:
        """Classes of the head that the base is loaded with."""
        return None

    def data_spec(self, section: Mapping[str, Any]) -> RowSpec:
        return RowSpec(**section)

    def load_data(self, spec: RowSpec, base: Base) -> RowData:
        """The examples.

        Raises:
            DataError: rows cannot be used.
            BaseError: the base lacks what reads them.
        """
        raise NotImplementedError

    def on(
        self, model: torch.nn.Module, handle: Handle | None, recompute: Recompute = "none"
    ) -> Task:
        """The task on a model."""
        raise NotImplementedError

    def adapter_spec(self, spec: LoRASpec, base: Base) -> tuple[LoRASpec, list[str]]:
        """The settings of a new adapter, with what the kind adds, and sentences on that."""
        return spec, []

    def metrics(
        self, loss: float, examples: Any, indices: Sequence[int], outputs: np.ndarray | None
    ) -> dict[str, float]:
        """What is told beside the loss; of texts, whose loss is per token, the perplexity."""
        return {"perplexity": perplexity(loss)} if self.text_metrics else {}

    def predict(
        self,
        base: Base,
        handle: Handle | None,
        adapter: MixLike,
        inputs: Sequence[Any],
        max_new_tokens: int,
    ) -> list[str]:
        """What the model says to inputs, each a text or the path of a file.

        Raises:
            InputError: an input cannot be read.
        """
        raise NotImplementedError

    def asked(self, examples: RowData, index: int) -> Any:
        """The input of an example, as :meth:`predict` takes it."""
        return examples[index].inputs["asked"]

    def expected(self, examples: RowData, index: int) -> str:
        """The answer that the data has, as text."""
        return str(examples[index].inputs["expected"])

    def questions(
        self, base: Base, examples: RowData, indices: Sequence[int], count: int
    ) -> list[dict[str, Any]]:
        return [
            {"prompt": str(self.asked(examples, i)), "reference": [self.expected(examples, i)]}
            for i in indices[:count]
        ]

    def answers(
        self,
        base: Base,
        handle: Handle | None,
        adapter: str | None,
        examples: RowData,
        indices: Sequence[int],
        count: int,
        max_new_tokens: int,
    ) -> list[str]:
        if not count:
            return []
        inputs = [self.asked(examples, i) for i in indices[:count]]
        return self.predict(base, handle, adapter, inputs, max_new_tokens)


def _load(task: str, num_labels: int | None, labels: Sequence[str], **arguments: Any) -> Base:
    # the signature that run.yaml's section is checked against is open; load_base checks it
    base = load_base(**arguments, task=task, num_labels=num_labels)  # type: ignore[arg-type]
    if labels:  # so that a model that is saved whole knows them too
        config: Any = base.model.config
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    return base


# --- texts -------------------------------------------------------------------------------------


class Texts:
    """Makes token ids of a row's texts, as long as a base can take.

    Args:
        limit: tokens of a text at most; ``None``: no limit is known.

    Raises:
        BaseError: the base has no tokenizer.
        DataError: ``max_length`` is more than the base takes; the template cannot be read.
    """

    def __init__(self, spec: RowSpec, base: Base, field: str) -> None:
        self.tokenizer = tokenizer_of(base)
        self.field = field
        self.truncate = spec.truncate
        self.limit = limit_of(spec, base)
        self.template: Template | None = None
        if spec.template is not None:
            self.template = parse_template(spec.template, [])

    def text(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> str:
        """The text of a row: its field, or the filled template.

        Raises:
            RowError: it is missing, empty or no text.
        """
        if self.template is None:
            return checked_text(values[self.field], f"the {self.field}", self.field)
        text = self.template.fill(row)
        if not text.strip():
            raise RowError("empty prompt", "the filled template is empty")
        return text

    def ids(self, *texts: str, what: str = "") -> list[int]:
        """Token ids of one text, or of a pair.

        Raises:
            RowError: it is longer than the limit, and is not to be cut.
        """
        ids: list[int] = self.tokenizer(*texts)["input_ids"]
        if self.limit is None or len(ids) <= self.limit:
            return ids
        if not self.truncate:
            raise RowError(
                f"longer than {self.limit:,} tokens",
                f"{what or self.field}: {len(ids):,} tokens; at most {self.limit:,} fit",
            )
        cut: list[int] = self.tokenizer(*texts, truncation=True, max_length=self.limit)["input_ids"]
        return cut


def tokenizer_of(base: Base) -> Any:
    """The tokenizer of a base.

    Raises:
        BaseError: it has none.
    """
    if base.tokenizer is None:
        raise BaseError(
            f"{base.ref} has no tokenizer, so text cannot become tokens. Put its tokenizer "
            "files (tokenizer.json and tokenizer_config.json) beside the weights."
        )
    return base.tokenizer


def limit_of(spec: RowSpec, base: Base) -> int | None:
    """Tokens of a text at most.

    Raises:
        DataError: more are asked for than the base takes.
    """
    context = context_length(base.model)
    if spec.max_length is None:
        return context
    if context is not None and spec.max_length > context:
        raise DataError(
            f"max_length: {spec.max_length:,} given, but the base's context holds {context:,} "
            "tokens. Give at most that, or leave it out."
        )
    return spec.max_length


def pad_id(model: Any) -> int:
    """What padding is filled with; it is masked."""
    found = getattr(model.config, "pad_token_id", None)
    return int(found) if isinstance(found, int) and found >= 0 else 0


def random_ids(model: Any, length: int, *, seed: int = 0) -> list[int]:
    """Token ids for a trial; the same for every call."""
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed + length)
    top = int(embedding.weight.shape[0])
    low = min(10, top - 1)  # special tokens, which some models look for, stand at the beginning
    return [int(i) for i in torch.randint(low, top, (length,), generator=generator)]


# --- labels ------------------------------------------------------------------------------------


def label_of(value: Any) -> str:
    """A row's label as text.

    Raises:
        RowError: it is empty, or neither text nor a whole number.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # as tables hold whole numbers beside empty cells
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise RowError(
        "no label", f"the label is {shown(value)}; expected a word or a whole number, one a row"
    )


def in_order(labels: Sequence[str]) -> tuple[str, ...]:
    """Different labels, numbers by size and words by letters."""
    different = set(labels)
    try:
        return tuple(sorted(different, key=int))
    except ValueError:
        return tuple(sorted(different))


def known_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels that a base's own head has, by class; none where they have no names."""
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return ()
    found = tuple(str(names[key]) for key in sorted(names, key=lambda key: int(key)))
    generic = all(name.upper() == f"LABEL_{i}" for i, name in enumerate(found))
    return () if generic else found


def class_metrics(logits: np.ndarray, truth: Sequence[int]) -> dict[str, float]:
    """Accuracy, and the mean of the classes' F1 (classes that occur or are predicted)."""
    predicted, true = logits.argmax(1), np.asarray(truth)
    scores = []
    for label in np.union1d(predicted, true):
        hits = float(((predicted == label) & (true == label)).sum())
        wrong = float(((predicted == label) ^ (true == label)).sum())
        scores.append(2 * hits / (2 * hits + wrong))
    return {"accuracy": float((predicted == true).mean()), "macro_f1": float(np.mean(scores))}


def head_of(model: torch.nn.Module) -> list[str]:
    """Paths of a classifier's head: the modules behind the body that have parameters."""
    from lorakit.layers.handle import CHILD
    from lorakit.layers.targets import output_heads

    return [
        path
        for path in output_heads(model)
        if path != CHILD and any(True for _ in model.get_submodule(path).parameters())
    ]


def with_head(spec: LoRASpec, base: Base) -> tuple[LoRASpec, list[str]]:
    """The spec with the head of a classifier trained whole, unless the user chose otherwise.

    A head that the base's file does not have is always trained and saved: nothing could tell the
    adapter's user what it was.
    """
    missing = [path for path in head_of(base.model) if not _named(spec.train_modules, path)]
    is_new = bool(getattr(base, "new_weights", ()))
    if not missing or (spec.train_modules and not is_new):
        return spec, []
    words = (*spec.train_modules, *missing)
    named = ", ".join(missing)
    why = "is new" if is_new else "is the base's own"
    return dataclasses.replace(spec, train_modules=words), [
        f"the head ({named}) {why}, is trained whole and is saved in the adapter"
    ]


def _named(words: Sequence[str], path: str) -> bool:
    return any(path == word or path.endswith("." + word) for word in words)
