"""What the kinds other than causal language models share: settings, rows, texts and labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch

from lorakit.bases import Base, context_length, load_base
from lorakit.bases.load import Task as BaseTask
from lorakit.core.adapter import Adapter
from lorakit.core.spec import LoRASpec
from lorakit.data.columns import checked_text
from lorakit.data.rows import RowError, shown
from lorakit.data.template import Template, parse_template
from lorakit.errors import DataError, InputError
from lorakit.layers import Handle
from lorakit.layers.handle import CHILD
from lorakit.layers.routing import MixLike
from lorakit.layers.targets import output_heads, whole_modules
from lorakit.tasks.causal import Causal, perplexity
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import Fields, RowData, RowSpec
from lorakit.tasks.task import Task


@dataclass(frozen=True)
class RowKind:
    """What every kind of rows answers in the same way; its fields are its settings."""

    name: ClassVar[str]
    peft_type: ClassVar[str | None] = None
    command: ClassVar[str] = Causal.command
    memory_advice: ClassVar[str] = Causal.memory_advice
    base_task: ClassVar[BaseTask]
    fields: ClassVar[Fields]
    unit: ClassVar[str] = "tokens"
    text_metrics: ClassVar[bool] = False
    """Whether its answers are texts that are compared with references."""
    no_prompts: ClassVar[str | None] = None
    """Why it has no answer to a prompt of ``generate``; ``None`` where it has."""
    beside_config: ClassVar[str | None] = None
    """A small file of the base that :meth:`fitted` reads in the config's ``_folder``."""
    without_it: ClassVar[str] = ""
    """What is assumed where that file cannot be had."""

    def settings(self) -> Mapping[str, Any]:
        """As run.yaml and the adapter's file keep them."""
        found = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}

    def fitted(self, spec: RowSpec, config: Mapping[str, Any]) -> Self:
        """The kind with what only data and base tell, such as the labels.

        Args:
            config: of the base, as plain data.

        Raises:
            DataError: the data cannot be read, or does not tell.
        """
        return self

    def from_base(self, config: Mapping[str, Any], name: str) -> Self:
        """The kind with what the base alone tells, where there is no data.

        Args:
            name: of the base, for messages.

        Raises:
            InputError: the labels are not known.
        """
        return self

    def for_adapter(self, adapter: Adapter, name: str) -> tuple[Self, list[str]]:
        """The kind with what an adapter shows that does not say what it was trained for, and
        sentences on that.

        Args:
            name: of the adapter, for messages.

        Raises:
            InputError: it does not fit.
        """
        return self, []

    @property
    def load_base(self) -> Callable[..., Base]:
        return partial(load_base, task=self.base_task)

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

    def check_start(self, start: Adapter, base: Base) -> None:
        """Check an adapter that training goes on with.

        Raises:
            InputError: it does not bring what the base lacks.
        """

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


# --- labels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled(RowKind):
    """What kinds share that tell one label of a row.

    Args:
        labels: what the head's outputs stand for, in their order.
    """

    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))

    def from_base(self, config: Mapping[str, Any], name: str) -> Self:
        labels = known_labels(config)
        if not labels:
            raise InputError(
                f"nothing tells which labels there are: {name} names none, and no adapter that "
                "lorakit trained is given"
            )
        return dataclasses.replace(self, labels=labels)

    def for_adapter(self, adapter: Adapter, name: str) -> tuple[Self, list[str]]:
        """As many labels as its head has rows; whole numbers below that are their own places."""
        classes = classes_of(adapter)
        if classes is None:
            return self, []
        numbers = tuple(map(str, range(classes)))
        labels = numbers if set(self.labels) <= set(numbers) else self.labels
        if len(labels) != classes:
            raise InputError(
                f"the head of {name} has {classes} classes and does not name them, and "
                f"{len(labels)} labels are known ({', '.join(labels[:8])}). Name all of them, in "
                "the order of the head, as id2label in the base's config.json"
            )
        told = f"{name} does not name its classes; they are taken to be, in this order, "
        return dataclasses.replace(self, labels=labels), [told + ", ".join(labels)]

    @property
    def load_base(self) -> Callable[..., Base]:
        return partial(_load_with_labels, self.base_task, self.labels)

    def adapter_spec(self, spec: LoRASpec, base: Base) -> tuple[LoRASpec, list[str]]:
        return with_head(spec, base)

    def check_start(self, start: Adapter, base: Base) -> None:
        brought = {
            f"{path}.{name}" if name else path
            for path, site in start.replaced.items()
            for name in site.tensors_by_name
        }
        lacking = [name for name in base.new_weights if name not in brought]
        if lacking:
            raise InputError(
                f"neither {base.ref} nor the adapter to go on with has {', '.join(lacking[:6])}: "
                "they would stay random and would not be saved. Train a new adapter (without "
                f"--from), or go on with one that was trained for {self.name}"
            )

    def metrics(
        self, loss: float, examples: Any, indices: Sequence[int], outputs: np.ndarray | None
    ) -> dict[str, float]:
        assert outputs is not None
        return class_metrics(outputs, [examples[int(i)].inputs["label"] for i in indices])


def _load_with_labels(task: BaseTask, labels: Sequence[str], **arguments: Any) -> Base:
    # the signature that run.yaml's section is checked against is open; load_base checks it
    base = load_base(**arguments, task=task, num_labels=len(labels))
    config: Any = base.model.config  # so that a model that is saved whole knows them too
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    return base


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
    try:  # "1" and "01" are one number and two labels
        return tuple(sorted(different, key=lambda label: (int(label), label)))
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


def classes_of(adapter: Adapter) -> int | None:
    """Classes of the head that an adapter brings: the fewest rows of a matrix that it has whole;
    ``None`` where it has none."""
    shapes = [t.shape for site in adapter.replaced.values() for t in site.tensors().values()]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=None)


def head_of(model: torch.nn.Module) -> list[str]:
    """Paths of a classifier's head: the modules behind the body that have parameters."""
    return [
        path
        for path in output_heads(model)
        if path != CHILD and any(True for _ in model.get_submodule(path).parameters())
    ]


def with_head(spec: LoRASpec, base: Base) -> tuple[LoRASpec, list[str]]:
    """The spec with the head of a classifier trained whole, unless the user chose otherwise.

    What the base's files lack, in the head or before it (such as the pooler of a BERT that filled
    gaps), is always trained and saved: nothing could tell the adapter's user what it was.

    Raises:
        TargetError: ``train_modules`` names nothing.
    """
    new = sorted({name.rpartition(".")[0] for name in base.new_weights} - {""})
    head = [
        path
        for path in head_of(base.model)
        if not spec.train_modules or any(_inside(one, path) for one in new)
    ]
    before = [path for path in new if not any(_inside(path, one) for one in head)]
    chosen = whole_modules(base.model, spec.train_modules)
    head, before = (
        [path for path in paths if not any(_inside(path, one) for one in chosen)]
        for paths in (head, before)
    )
    notes = []
    if head:
        is_new = any(_inside(one, path) for one in new for path in head)
        why = "is new" if is_new else "is the base's own"
        notes.append(
            f"the head ({', '.join(head)}) {why}, is trained whole and is saved in the adapter"
        )
    if before:
        notes.append(
            f"{', '.join(before)}: new, for the base's files lack it, so it is trained whole and "
            "saved in the adapter too"
        )
    words = (*spec.train_modules, *head, *before)
    return dataclasses.replace(spec, train_modules=words), notes


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


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
        self.tokenizer = base.require_tokenizer()
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


@dataclass(frozen=True, eq=False)
class Asked:
    """A text, or a pair of texts, as a model is asked with it."""

    texts: tuple[str, ...]
    ids: Sequence[int] | np.ndarray
    """Token ids of what the model sees: where a row was cut, of what is left of it."""
    types: np.ndarray | None = None
    """Token types of a pair, where the model has such."""

    def __str__(self) -> str:
        return " ⏎ ".join(self.texts)


def asked_of(base: Base, text: Any, limit: int | None) -> Asked:
    """What a model is asked with: that of a row as it is, or a prompt.

    Args:
        limit: tokens of a prompt at most.

    Raises:
        InputError: the prompt is longer.
        BaseError: the base has no tokenizer.
    """
    if isinstance(text, Asked):
        return text
    ids = base.require_tokenizer()(str(text))["input_ids"]
    if limit is not None and len(ids) > limit:
        raise InputError(
            f"the prompt {str(text)[:40]!r} … has {len(ids):,} tokens, and {base.ref} takes "
            f"{limit:,} at most; shorten it"
        )
    return Asked((str(text),), ids)


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


def end_id(model: Any) -> int | None:
    """The token by which an encoder-decoder's head finds a text's end; ``None`` of others."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    found = getattr(model.config, "eos_token_id", None)
    return found if isinstance(found, int) else None


def random_ids(model: Any, length: int, *, seed: int = 0) -> list[int]:
    """Token ids for a trial, with the end that a text has; the same for every call."""
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed + length)
    top = int(embedding.weight.shape[0])
    low = min(10, top - 1)  # special tokens, which some models look for, stand at the beginning
    ids = [int(i) for i in torch.randint(low, top, (length,), generator=generator)]
    end = end_id(model)
    return ids if end is None else [*(i - (i == end) for i in ids[:-1]), end]  # and no other end
