"""A base and its adapters judged on data of another task than causal."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import BASE_NAME, attach_adapters, mixes_of, use_tokenizer
from lorakit.cli.bases import load_base_from
from lorakit.cli.judged import say_not_finite
from lorakit.cli.output import console, emit_json, plain, plural, printable_stdout, say
from lorakit.cli.tasks.choosing import (
    AS_IT_IS,
    LABEL,
    OF_CAUSAL,
    UNANSWERED,
    kind_for,
    refuse,
    row_spec,
)
from lorakit.errors import SpecError

if TYPE_CHECKING:
    from lorakit.bases import Base
    from lorakit.core.adapter import Adapter
    from lorakit.tasks.kinds import RowKind
    from lorakit.tasks.rows import RowData


@dataclass(frozen=True)
class _Item:
    """What is asked once, and all that the data has for it."""

    asked: Any
    references: list[str]
    rows: list[int]


def evaluate(
    options: argparse.Namespace, task: str, why: str, adapters: Mapping[str, Adapter]
) -> int:
    """Judge a base and its adapters on data of a task other than causal."""
    from lorakit.tasks.registry import kind_class

    idle = {
        **dict.fromkeys(OF_CAUSAL, "it is about texts that are continued"),
        "full": "give the folder of the trained model as --base",
        "forgetting": "it is the loss of a causal language model",
        "parallel": AS_IT_IS,
    }
    named = kind_class(task)
    if not options.metrics and options.save is None:
        ways = "--metrics or --save" if named.text_metrics else "--save"
        idle |= dict.fromkeys(("show", "max_new_tokens"), UNANSWERED.format(ways))
    elif not named.text_metrics:
        idle["max_new_tokens"] = LABEL
    refuse(options, task, idle)
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
    items = _items(kind, data)[: options.limit]
    length = _answer_length(options, kind, base, items)
    judged = [
        _judged(options, kind, base, handle, name, mix, data, items, length, task_on)
        for name, mix in mixes.items()
    ]
    if options.save is not None:
        _save(Path(options.save), items, judged)
    num_rows = sum(len(item.rows) for item in items)
    if options.json:
        emit_json(
            {
                "models": [{k: v for k, v in one.items() if k != "answers"} for one in judged],
                "base": base.ref,
                "task": task,
                "data": {
                    "files": data.report.files,
                    "digest": data.digest,
                    "items": len(items),
                    "rows": num_rows,
                },
            }
        )
        return 0
    counts = plural(num_rows, "row")
    if len(items) < num_rows:
        counts = f"{plural(len(items), 'item')}, {counts}"
    _print(judged, items, counts, options.show)
    return 0


def _items(kind: RowKind, data: RowData) -> list[_Item]:
    """Rows that share a prompt are one item, in the order of first appearance; one whose answer
    is no text stands alone, for it has no references."""
    groups: dict[bytes | int, list[int]] = {}
    for i in range(len(data)):
        groups.setdefault(data.prompt_key(i) if kind.text_metrics else i, []).append(i)
    return [
        _Item(
            kind.asked(data, rows[0]),
            list(dict.fromkeys(kind.expected(data, i) for i in rows)),
            rows,
        )
        for rows in groups.values()
    ]


def _answer_length(
    options: argparse.Namespace, kind: RowKind, base: Base, items: Sequence[_Item]
) -> int:
    """Tokens that an answer may have, which is said; 0 where no text is generated."""
    from lorakit.evaluate.comparison import BEYOND

    if not kind.text_metrics or not (options.metrics or options.save is not None):
        return 0
    length: int = options.max_new_tokens or 0
    if not length:
        texts = [text for item in items for text in item.references]
        # a translator may write what it answers with other tokens than what it is asked
        ids = base.require_tokenizer()(text_target=texts, add_special_tokens=False)["input_ids"]
        length = max(map(len, ids)) + BEYOND
    say(f"Answers of at most {length} tokens, greedy")
    return length


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
    items: Sequence[_Item],
    length: int,
    task: Any,
) -> dict[str, Any]:
    from lorakit.cli.meter import meter
    from lorakit.evaluate import example_losses, mean_loss
    from lorakit.evaluate.metrics import text_metrics

    indices = [i for item in items for i in item.rows]
    with meter() as tell:
        losses = example_losses(
            base.model, handle, mix, data, indices, task=task,
            on_batch=lambda done, total: tell(f"{name}: loss", done, total),
        )  # fmt: skip
    result = mean_loss(losses)
    say_not_finite(name, result, data, indices)
    metrics = dict(kind.metrics(result.loss, data, indices, losses.outputs))
    found: dict[str, Any] = {"name": name, "loss": result.loss}
    if "perplexity" in metrics:
        found["perplexity"] = metrics.pop("perplexity")
    answers: list[str] = []
    if options.metrics or options.save is not None:
        answers = kind.predict(base, handle, mix, [item.asked for item in items], length)
    if options.metrics:
        references = [item.references for item in items]
        metrics |= text_metrics(answers, references, options.metrics)
    return {**found, "metrics": metrics, "answers": answers}


def _save(path: Path, items: Sequence[_Item], judged: Sequence[Mapping[str, Any]]) -> None:
    import json

    from lorakit.core.files import write_atomic

    lines = [
        json.dumps(
            plain(
                {
                    "prompt": str(item.asked),
                    "references": item.references,
                    "models": [{"name": j["name"], "answer": j["answers"][n]} for j in judged],
                }
            ),
            allow_nan=False,
        )
        for n, item in enumerate(items)
    ]
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    say(f"Answers written to {path}")


def _print(
    judged: Sequence[Mapping[str, Any]], items: Sequence[_Item], counts: str, show: int
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
    out.print(f"[dim]{counts}[/dim]")
    for n, item in enumerate(items[: show if judged[0]["answers"] else 0]):
        out.print()
        out.print(escape(str(item.asked)), soft_wrap=True)
        for text in item.references:
            out.print(f"  expected: {escape(text)}", soft_wrap=True)
        for one in judged:
            text = escape(f"{one['name']}: {one['answers'][n]}")
            out.print(f"  {text}", soft_wrap=True)
