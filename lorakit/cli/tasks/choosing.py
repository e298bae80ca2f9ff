"""Which task the flags, the data and the adapters mean, and its kind with what they tell of it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import adapter_path
from lorakit.cli.output import say
from lorakit.cli.rows import merged_map
from lorakit.errors import BaseError, DataError, InputError, SpecError, collected

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter
    from lorakit.tasks.kinds import RowKind
    from lorakit.tasks.rows import RowSpec

CAUSAL = "causal"
#: repeated here, for the help must not import what computes them; a test compares the two
TASKS = (CAUSAL, "seq2seq", "classify", "vision", "speech", "embed", "vision-chat")

#: flags about texts that are continued
OF_CAUSAL = ("system", "format", "loss_on")
#: why a flag about answers cannot act
LABEL = "its answer is a label"
AS_IT_IS = "how many inputs are answered at a time is the task's own choice"
#: why one cannot act in ``eval``, with the flags that ask for answers
UNANSWERED = "answers are made for {} alone"
#: PEFT's task type → the task, of adapters that say no more
_BY_TYPE = {"SEQ_CLS": "classify", "SEQ_2_SEQ_LM": "seq2seq", "FEATURE_EXTRACTION": "embed"}


def add_task_argument(group: Any) -> None:
    """Add ``--task``, and what tasks have of their own."""
    group.add_argument(
        "--task",
        choices=TASKS,
        help="what the model does: causal (continues text), seq2seq (T5, BART), classify (labels "
        "texts), vision (labels pictures), speech (Whisper), embed (vectors of texts), vision-chat "
        "(chats with pictures); default: by the base and the data, and said",
    )
    group.add_argument(
        "--language",
        metavar="L",
        help="what is spoken in the recordings of --task speech, such as german or de; needed for "
        "a Whisper of many languages, and kept in its adapter",
    )


def chosen_task(
    options: argparse.Namespace,
    path: Sequence[str] | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> tuple[str, str]:
    """The task of these flags, and why; ``"causal"`` where nothing is known.

    Args:
        path: the files of the data, if there are any.
        adapters: which may say what they were trained for; by default that of ``--from``.

    Raises:
        InputError: adapters of different tasks, or the adapter of ``--from`` cannot be read.
        SpecError: a flag of another task.
    """
    if adapters is None and getattr(options, "start", None) is not None:
        from lorakit.formats import load_adapter

        adapters = {options.start: load_adapter(adapter_path(options.start))}
    task, why = _fitting(options, path, adapters or {})
    if task != "speech":
        refuse(options, f"{task} ({why})", {"language": "it is about recordings of speech"})
    return task, why


def _fitting(
    options: argparse.Namespace, path: Sequence[str] | None, adapters: Mapping[str, Adapter]
) -> tuple[str, str]:
    if options.task is not None:
        return options.task, "as asked"
    said = {name: _task_of(adapter) for name, adapter in adapters.items()}
    known = {name: task for name, task in said.items() if task is not None}
    if len(set(known.values())) > 1:
        told = ", ".join(f"{name}: {task}" for name, task in known.items())
        raise InputError(f"the adapters were trained for different tasks ({told}); give one kind")
    if known:
        return next(iter(known.values())), f"what {', '.join(known)} was trained for"
    from lorakit.bases.config import read_config

    if not options.base:
        return CAUSAL, "there is no base"
    try:
        config = read_config(options.base)
    except BaseError:
        return CAUSAL, "its config cannot be read"  # which is told when the base is loaded
    from lorakit.tasks.registry import fitting_task

    with _quiet():
        return fitting_task(config, lambda: _columns(path or ()))


def _quiet() -> contextlib.AbstractContextManager[None]:
    from lorakit.bases.quiet import quiet_transformers

    return quiet_transformers()


def _task_of(adapter: Adapter) -> str | None:
    told = adapter.provenance.get("task")
    if isinstance(told, Mapping) and told.get("name") in TASKS:
        return str(told["name"])
    return _BY_TYPE.get(adapter.task_type or "")


def _columns(path: Sequence[str]) -> list[str]:
    from lorakit.tasks.rows import first_columns
    from lorakit.tasks.vision import holds_classes

    if not path or holds_classes(path):
        return []
    try:
        return first_columns(path)
    except DataError:
        return []  # which is told when the rows are read


def refuse(options: argparse.Namespace, task: str, flags: Mapping[str, str]) -> None:
    """Refuse flags that cannot act for a task, where they are not as if they were not given.

    Raises:
        SpecError: names them.
    """
    given = [
        f"--{name.replace('_', '-')}: {why}"
        for name, why in flags.items()
        if getattr(options, name, None) != options.defaults.get(name)
    ]
    if given:
        raise SpecError(collected(f"These flags cannot act, for the task is {task}", given))


def row_spec(options: argparse.Namespace, path: Sequence[str] | None = None) -> RowSpec:
    """The data settings of these flags."""
    from lorakit.tasks.rows import RowSpec

    return RowSpec(
        tuple(options.data if path is None else path),
        map=merged_map(options),
        template=options.template,
        max_length=options.max_length,
        truncate=options.truncate,
        bad_rows=options.bad_rows,
    )


def kind_for(
    options: argparse.Namespace,
    task: str,
    spec: RowSpec | None,
    adapters: Mapping[str, Adapter] | None = None,
) -> RowKind:
    """The kind with what adapters, base and data tell of it.

    Args:
        spec: the data, if there is any.

    Raises:
        InputError: adapters that know different labels; or nothing tells the labels.
    """
    from lorakit.bases.config import read_config
    from lorakit.bases.fetch import NotCachedError, fetch_file
    from lorakit.bases.source import find_source
    from lorakit.tasks.registry import row_kind

    own = {} if options.language is None else {"language": options.language}
    told = {
        name: dict(adapter.provenance["task"])
        for name, adapter in (adapters or {}).items()
        if isinstance(adapter.provenance.get("task"), Mapping)
    }
    settings = list(told.values())
    if any(one != settings[0] for one in settings):
        raise InputError(
            f"the adapters {' and '.join(told)} were trained for different labels or settings; "
            "give them one at a time"
        )
    if settings and settings[0].pop("name", None) == task:
        return row_kind(task, **{**settings[0], **own})
    source = find_source(options.base, options.revision)
    config = {**read_config(options.base)}
    kind = row_kind(task, **own)
    if source.kind == "folder":
        config["_folder"] = source.location
    elif source.kind == "hub" and kind.beside_config is not None:
        try:
            path = fetch_file(source, kind.beside_config)
        except NotCachedError as error:
            path = None
            if not getattr(options, "quiet", False):
                say(f"note: {str(error)[:-1]}, so {kind.without_it}")
        config["_folder"] = "" if path is None else str(path.parents[kind.beside_config.count("/")])
    kind = kind.from_base(config, options.base) if spec is None else kind.fitted(spec, config)
    for name, adapter in (adapters or {}).items():
        kind, notes = kind.for_adapter(adapter, name)
        for note in () if getattr(options, "quiet", False) else notes:
            say(f"note: {note}")
    return kind
