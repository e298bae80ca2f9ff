"""Commands on models other than causal language models: which task it is, and what is its own.

``train``, ``eval``, ``generate`` and ``preview`` ask :func:`chosen_task` first, and hand over to
this module where the answer is not ``"causal"``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import BASE_NAME, adapter_path, attach_adapters, mixes_of, use_tokenizer
from lorakit.cli.bases import load_base_from
from lorakit.cli.output import console, emit_json, plain, plural, printable_stdout, say
from lorakit.cli.rows import merged_map
from lorakit.errors import BaseError, DataError, InputError, SpecError, collected

if TYPE_CHECKING:
    from lorakit.bases import Base
    from lorakit.core.adapter import Adapter
    from lorakit.tasks.kinds import RowKind
    from lorakit.tasks.rows import RowData, RowSpec
    from lorakit.train import Trainer
    from lorakit.train.distributed import World

CAUSAL = "causal"
#: repeated here, for the help must not import what computes them; a test compares the two
TASKS = (CAUSAL, "seq2seq", "classify", "vision", "speech", "embed", "vision-chat")

#: flags about texts that are continued
_OF_CAUSAL = ("system", "format", "loss_on")
#: why a flag about answers cannot act
_GREEDY, _LABEL = "answers are the likeliest ones", "its answer is a label"
_AS_IT_IS = "how many inputs are answered at a time is the task's own choice"
#: PEFT's task type → the task, of adapters that say no more
_BY_TYPE = {"SEQ_CLS": "classify", "SEQ_2_SEQ_LM": "seq2seq", "FEATURE_EXTRACTION": "embed"}
#: longest answer where nobody said
_ANSWER_TOKENS = 64


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
        _refuse(options, f"{task} ({why})", {"language": "it is about recordings of speech"})
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


def _refuse(options: argparse.Namespace, task: str, flags: Mapping[str, str]) -> None:
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
    if source.kind == "folder":
        config["_folder"] = source.location
    kind = row_kind(task, **own)
    kind = kind.from_base(config, options.base) if spec is None else kind.fitted(spec, config)
    for name, adapter in (adapters or {}).items():
        kind, notes = kind.for_adapter(adapter, name)
        for note in () if getattr(options, "quiet", False) else notes:
            say(f"note: {note}")
    return kind


# --- train -------------------------------------------------------------------------------------


def trainer_for(
    options: argparse.Namespace, task: str, why: str, world: World, callbacks: Sequence[Any]
) -> Trainer:
    """A trainer as these flags say, of a task other than causal."""
    from lorakit.cli import train
    from lorakit.core.spec import LoRASpec
    from lorakit.formats import load_adapter
    from lorakit.train import Origin, Trainer

    _refuse(
        options,
        task,
        {
            **dict.fromkeys(_OF_CAUSAL, "it is about texts that are continued"),
            "shard": "the base of this task is not spread over processes",
            "prefix": "a prefix stands in front of a text that is continued",
        },
    )
    if options.init in ("eva", "lora-ga"):
        raise SpecError(
            f"--init {options.init}: it looks at the texts of causal language models; leave it out"
        )
    tell: Callable[[str], None] = (lambda text: None) if options.quiet else say
    tell(f"Task: {task} ({why})")
    settings, what = train.settings_of(options), train.what_of(options)
    spec = row_spec(options)
    start: Adapter | None = None
    if options.start is not None:
        start = train.with_flags(load_adapter(adapter_path(options.start)), options)
    kind = kind_for(options, task, spec, None if start is None else {options.start: start})
    base = load_base_from(options, load=kind.load_base, quiet=options.quiet)
    if start is not None:
        kind.check_start(start, base)
    valid = None if options.valid is None else row_spec(options, options.valid)
    origin = Origin(base=train.base_options(options), data=spec, validation=valid, kind=kind)
    data, validation = origin.load_data(base), origin.load_validation(base)
    for found in filter(None, (data, validation)):
        for line in found.report.lines():
            tell(line)
    if start is None and isinstance(what, LoRASpec):
        what, notes = kind.adapter_spec(what, base)
        for note in notes:
            tell(f"note: {note}")
    return Trainer(
        base,
        what if start is None else start,
        data,
        settings,
        options.out,
        validation=validation,
        callbacks=callbacks,
        origin=origin,
        extra={"callbacks": {"report_to": options.report_to}} if options.report_to else None,
        allow_other_base=options.allow_other_base,
        world=world,
        task=kind,
    )


# --- eval --------------------------------------------------------------------------------------


def evaluate(
    options: argparse.Namespace, task: str, why: str, adapters: Mapping[str, Adapter]
) -> int:
    """Judge a base and its adapters on data of a task other than causal."""
    from lorakit.tasks.registry import kind_class

    idle = {
        **dict.fromkeys(_OF_CAUSAL, "it is about texts that are continued"),
        "full": "give the folder of the trained model as --base",
        "forgetting": "it is the loss of a causal language model",
        "parallel": _AS_IT_IS,
    }
    named = kind_class(task)
    if not options.metrics and options.save is None:
        ways = "--metrics or --save" if named.text_metrics else "--save"
        idle |= dict.fromkeys(("show", "max_new_tokens"), f"answers are made for {ways} alone")
    elif not named.text_metrics:
        idle["max_new_tokens"] = _LABEL
    _refuse(options, task, idle)
    say(f"Task: {task} ({why})")
    spec = row_spec(options)
    kind = kind_for(options, task, spec, adapters)
    _check_metrics(options, kind)
    base = load_base_from(options, load=kind.load_base)
    use_tokenizer(base, adapters)
    data = kind.load_data(spec, base)
    for line in data.report.lines():
        say(line)
    handle = attach_adapters(base, adapters, allow_other=options.allow_other_base)
    mixes: dict[str, Any] = mixes_of(options.adapter, blend=options.blend)
    if not options.no_base:
        mixes = {BASE_NAME: None, **mixes}
        if base.new_weights:
            say(f"note: {BASE_NAME} stands with a new, random head")
    task_on = kind.on(base.model, handle)
    for note in task_on.notes:
        say(f"note: {note}")
    indices = list(range(len(data)))[: options.limit]
    judged = [
        _judged(options, kind, base, handle, name, mix, data, indices, task_on)
        for name, mix in mixes.items()
    ]
    if options.save is not None:
        _save(Path(options.save), kind, data, indices, judged)
    if options.json:
        emit_json(
            {
                "models": [{k: v for k, v in one.items() if k != "answers"} for one in judged],
                "base": base.ref,
                "task": task,
                "data": {"files": data.report.files, "digest": data.digest, "rows": len(indices)},
            }
        )
        return 0
    _print(judged, kind, data, indices, options.show)
    return 0


def _check_metrics(options: argparse.Namespace, kind: RowKind) -> None:
    unfit = [name for name in options.metrics if name == "json" or not kind.text_metrics]
    if unfit:
        what = "texts" if kind.text_metrics else f"no texts; what {kind.name} tells is shown anyway"
        raise SpecError(f"--metrics {','.join(unfit)}: the answers of {kind.name} are {what}")
    if options.save is not None and kind.name == "embed":
        raise SpecError("--save: the task embed gives no answers; leave it out")


def _judged(
    options: argparse.Namespace,
    kind: RowKind,
    base: Base,
    handle: Any,
    name: str,
    mix: Any,
    data: RowData,
    indices: Sequence[int],
    task: Any,
) -> dict[str, Any]:
    from lorakit.cli.meter import meter
    from lorakit.evaluate import example_losses, mean_loss
    from lorakit.evaluate.metrics import text_metrics

    with meter() as tell:
        losses = example_losses(
            base.model, handle, mix, data, indices, task=task,
            on_batch=lambda done, total: tell(f"{name}: loss", done, total),
        )  # fmt: skip
    result = mean_loss(losses)
    metrics = dict(kind.metrics(result.loss, data, indices, losses.outputs))
    found: dict[str, Any] = {"name": name, "loss": result.loss}
    if "perplexity" in metrics:
        found["perplexity"] = metrics.pop("perplexity")
    answers: list[str] = []
    if options.metrics or options.save is not None:
        inputs = [kind.asked(data, i) for i in indices]
        length = options.max_new_tokens or _ANSWER_TOKENS
        answers = kind.predict(base, handle, mix, inputs, length)
    if options.metrics:
        references = [[kind.expected(data, i)] for i in indices]
        metrics |= text_metrics(answers, references, options.metrics)
    return {**found, "metrics": metrics, "answers": answers}


def _save(
    path: Path,
    kind: RowKind,
    data: RowData,
    indices: Sequence[int],
    judged: Sequence[Mapping[str, Any]],
) -> None:
    import json

    from lorakit.core.files import write_atomic

    lines = [
        json.dumps(
            plain(
                {
                    "prompt": str(kind.asked(data, i)),
                    "references": [kind.expected(data, i)],
                    "models": [{"name": j["name"], "answer": j["answers"][n]} for j in judged],
                }
            ),
            allow_nan=False,
        )
        for n, i in enumerate(indices)
    ]
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    say(f"Answers written to {path}")


def _print(
    judged: Sequence[Mapping[str, Any]],
    kind: RowKind,
    data: RowData,
    indices: Sequence[int],
    show: int,
) -> None:
    from rich.markup import escape
    from rich.table import Table

    printable_stdout()
    out = console(stdout=True)
    rows = [
        {k: one[k] for k in ("loss", "perplexity") if k in one} | one["metrics"] for one in judged
    ]
    table = Table("model", box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for one, values in zip(judged, rows, strict=True):
        table.add_row(escape(str(one["name"])), *(f"{value:.4g}" for value in values.values()))
    out.print(table)
    out.print(f"[dim]{plural(len(indices), 'row')}[/dim]")
    for n, i in enumerate(indices[: show if judged[0]["answers"] else 0]):
        out.print()
        out.print(escape(str(kind.asked(data, i))), soft_wrap=True)
        out.print(f"  expected: {escape(kind.expected(data, i))}", soft_wrap=True)
        for one in judged:
            text = escape(f"{one['name']}: {one['answers'][n]}")
            out.print(f"  {text}", soft_wrap=True)


# --- generate ----------------------------------------------------------------------------------


def generate(
    options: argparse.Namespace,
    task: str,
    why: str,
    models: Mapping[str, Any],
    prompts: Sequence[str],
    adapters: Mapping[str, Adapter],
) -> int:
    """What a base and adapters say to texts, pictures or recordings.

    Args:
        models: name → mix.
    """
    from lorakit.tasks.registry import kind_class

    named = kind_class(task)
    if named.no_prompts is not None:
        raise InputError(named.no_prompts)
    idle = {
        "system": "there is no chat",
        "format": "there is no chat",
        "raw": "inputs are taken as they are",
        **dict.fromkeys(("temperature", "top_p", "seed"), _GREEDY),
        "stop": "answers end by themselves",
        "parallel": _AS_IT_IS,
    }
    if not named.text_metrics:
        idle["max_new_tokens"] = _LABEL
    _refuse(options, task, idle)
    pairs = [name for name, adapter in adapters.items() if _judges_pairs(adapter)]
    if pairs:
        raise InputError(
            f"{', '.join(pairs)} judges pairs of texts, and a prompt is one text; give rows of "
            "both to lorakit eval --save"
        )
    say(f"Task: {task} ({why})")
    kind = kind_for(options, task, None, adapters)
    base = load_base_from(options, load=kind.load_base)
    use_tokenizer(base, adapters)
    handle = attach_adapters(base, adapters, allow_other=options.allow_other_base)
    length = options.max_new_tokens
    found = {
        name: kind.predict(base, handle, mix, list(prompts), length) for name, mix in models.items()
    }
    if options.json:
        emit_json(
            {
                "base": base.ref,
                "task": task,
                "answers": [
                    {"prompt": prompt, "model": name, "text": found[name][i]}
                    for i, prompt in enumerate(prompts)
                    for name in models
                ],
            }
        )
        return 0
    printable_stdout()
    for i, prompt in enumerate(prompts):
        for name in models:
            start = f"{prompt}\t" if len(prompts) > 1 else ""
            who = f"{name}: " if len(models) > 1 else ""
            sys.stdout.write(f"{start}{who}{found[name][i]}\n")
    return 0


def _judges_pairs(adapter: Adapter) -> bool:
    data = adapter.provenance.get("data")
    return isinstance(data, Mapping) and "text_pair" in (data.get("columns") or {})


# --- preview -----------------------------------------------------------------------------------


def preview(options: argparse.Namespace, task: str, why: str) -> int:
    """Show what would be trained on, of a task other than causal; the base's weights are loaded
    on the processor, for its sizes and what it reads its input with."""
    import dataclasses

    _refuse(options, task, dict.fromkeys(_OF_CAUSAL, "it is about texts that are continued"))
    asked = row_spec(options)
    kind = kind_for(options, task, asked)
    base = kind.load_base(
        ref=options.base,
        device="cpu",
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    data = kind.load_data(dataclasses.replace(asked, bad_rows="skip"), base)
    stops = asked.bad_rows == "error" and data.report.num_dropped > 0
    shown = [
        {
            "where": data.where(i),
            "size": data[i].size,
            "asked": str(kind.asked(data, i)),
            "expected": kind.expected(data, i),
        }
        for i in range(min(options.rows, len(data)))
    ]
    if options.json:
        emit_json(
            {
                "base": options.base,
                "task": task,
                "report": data.report.to_dict(),
                "digest": data.digest,
                "training_would_stop": stops,
                "examples": shown,
            }
        )
        return 0
    printable_stdout()
    lines = [f"Task: {task} ({why})", *data.report.lines()]
    if stops:
        lines.append(
            f"Training would stop at these {data.report.num_dropped:,} rows; with --bad-rows skip "
            "it leaves them out."
        )
    for one in shown:
        lines += ["", f"{one['where']}: {one['size']:,} {kind.unit}"]
        lines += [f"  asked:    {one['asked']}", f"  expected: {one['expected']}"]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
