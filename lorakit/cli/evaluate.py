"""Judge a base and its adapters on the same data, side by side.

Rows are written as the adapters learnt them, where lorakit trained them and no flag says how.
Loss and perplexity are over the supervised tokens. With --metrics, each prompt is also answered
(greedily) and the answers are compared with the references; rows that share a prompt are one
item with several references.

  lorakit eval --base smollm2 --adapter runs/mine --data test.jsonl
  lorakit eval --base smollm2 --adapter runs/mine --data test.csv --map prompt=mr,completion=ref \\
      --metrics bleu,rouge --limit 100
  lorakit eval --base B --adapter a=0.7 --adapter b=0.3 --blend --data F --metrics json --json

metrics, from 0 to 100: bleu, chrf (sacrebleu), rouge (ROUGE-L), exact (equal to a reference),
json (json_valid: the whole answer is JSON; json_fields: fields right; json_record: all right).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.common import (
    BASE_NAME,
    add_adapter_arguments,
    add_base_arguments,
    add_data_arguments,
    add_json_argument,
    as_learnt,
    attach_adapters,
    check_names,
    comma_list,
    console,
    count,
    data_spec,
    emit_json,
    load_adapters,
    load_base_from,
    mixes_of,
    plain,
    plural,
    positive_int,
    printable_stdout,
    say,
    use_tokenizer,
)
from lorakit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorakit.bases import Base
    from lorakit.core.adapter import Adapter
    from lorakit.data import PromptItem, TokenData
    from lorakit.evaluate import Judgement

#: repeated here, for the help must not import what computes them; a test compares the two
METRICS = ("bleu", "chrf", "rouge", "exact", "json")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_base_arguments(parser)
    add_adapter_arguments(parser)
    parser.add_argument("--no-base", action="store_true", help="leave the bare base out")
    parser.add_argument(
        "--blend", action="store_true", help="judge the adapters, at their weights, as one"
    )
    add_data_arguments(parser, learnt=True)
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--limit", type=positive_int, metavar="N", help="judge the first N items; default: all"
    )
    judging.add_argument(
        "--metrics",
        type=comma_list(*METRICS),
        default=(),
        metavar="M,…",
        help=f"out of {','.join(METRICS)}; default: none, which answers nothing and is fast",
    )
    judging.add_argument(
        "--max-new-tokens",
        type=positive_int,
        metavar="N",
        help="longest answer; default: 16 more than the longest reference",
    )
    judging.add_argument(
        "--parallel", type=positive_int, metavar="N", help="prompts answered at a time"
    )
    judging.add_argument(
        "--save", metavar="FILE", help="write every answer, with its prompt, as JSON lines"
    )
    judging.add_argument(
        "--show", type=count, default=2, metavar="N", help="answers to print; default 2"
    )
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Load, judge, print."""
    check_names(options.adapter)
    mixes = mixes_of(options.adapter, blend=options.blend)
    if options.no_base and not mixes:
        raise InputError("--no-base leaves nothing to judge; give an --adapter too")
    if options.save is not None:
        _check_save(options.save, options.data)
    from lorakit.bases import context_length
    from lorakit.data import items as items_of
    from lorakit.data import load_data
    from lorakit.evaluate import Contestant, answer_length, compare
    from lorakit.infer import PackedModel

    spec = data_spec(options)
    adapters = load_adapters(options.adapter)
    base = load_base_from(options)
    use_tokenizer(base, adapters)
    spec = as_learnt(spec, options, adapters)
    data = load_data(spec, base.require_tokenizer(), context_length=context_length(base.model))
    for line in data.report.lines():
        say(line)
    for name, adapter in adapters.items():
        _compare_provenance(name, adapter, data)
    handle = attach_adapters(base, adapters, allow_other=options.allow_other_base)
    generate = bool(options.metrics or options.save)
    items, indices = None, None
    if data.report.kind != "text" or generate:
        items = items_of(data)[: options.limit]
    else:
        indices = list(range(len(data)))[: options.limit]
    length = options.max_new_tokens
    if generate and items:
        length = length or answer_length(data, items)
        say(f"Answers of at most {length} tokens, greedy")
    packed = PackedModel(base.model, handle)
    for note in packed.notes:
        say(f"note: {note}")
    contestants = [Contestant(name, mix) for name, mix in mixes.items()]
    if not options.no_base:
        contestants.insert(0, Contestant(BASE_NAME, None))
    with _meter() as tell:
        judged = compare(
            base,
            handle,
            contestants,
            data,
            items=items,
            indices=indices,
            metrics=options.metrics,
            generate=generate,
            max_new_tokens=length,
            batch_size=options.parallel,
            packed=packed,
            on_progress=lambda p: tell(f"{p.contestant}: {p.stage}", p.done, p.total),
        )
    _say_not_finite(judged, data, items, indices)
    if options.save is not None and items is not None:
        _save(Path(options.save), judged, items)
    if options.json:
        emit_json(_result(options, base, data, items, indices, judged, mixes))
    else:
        column = None if options.template else data.report.columns.get("prompt")
        _print(judged, items, options.show, column)
    return 0


def _check_save(target: str, data: Sequence[str]) -> None:
    """Refuse a place that cannot be written, or that holds the data, before hours of work.

    Raises:
        InputError: says which of these it is.
    """
    path = os.path.realpath(target)  # a link stays, and what it points to is written
    folder = os.path.dirname(path)
    there = True
    try:
        os.stat(path)
    except FileNotFoundError:
        there = False
    except OSError as error:
        raise InputError(f"--save {target} cannot be written: {error.strerror}") from None
    if os.path.isdir(path):
        raise InputError(f"--save {target} is a folder; give the name of a file")
    if there and any(os.path.exists(one) and os.path.samefile(path, one) for one in data):
        raise InputError(
            f"--save {target} is the file of --data, which would be lost; give another name"
        )
    if there and not os.path.isfile(path):
        return  # a pipe or a device is written to, so its folder does not matter
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"--save {target} cannot be written: {folder} is no folder that you may write to"
        )


def _meter() -> Any:
    from lorakit.cli.meter import meter

    return meter()


def _compare_provenance(name: str, adapter: Adapter, data: TokenData) -> None:
    """Say where this data is, or is written, otherwise than what the adapter learnt from."""
    learnt = adapter.provenance.get("data")
    if not isinstance(learnt, dict):
        return
    if learnt.get("digest") == data.digest:
        say(f"Adapter {name}: this is the very data that it was trained on")
    written = learnt.get("format")
    if written in ("chat", "plain") and written != data.report.format:
        say(
            f"Adapter {name}: it learnt from prompts written as {written}; these are written as "
            f"{data.report.format}. --format {written} writes them as it knows them"
        )
    template = learnt.get("template")
    if isinstance(template, str) and template != data.report.template:
        say(f"Adapter {name}: it learnt from prompts of this form: --template {template!r}")


def _rows_of(items: Sequence[PromptItem] | None, indices: Sequence[int] | None) -> list[int]:
    if items is None:
        return list(indices or ())
    return [i for item in items for i in item.indices]


def _say_not_finite(
    judged: Sequence[Judgement],
    data: TokenData,
    items: Sequence[PromptItem] | None,
    indices: Sequence[int] | None,
) -> None:
    rows = _rows_of(items, indices)
    for one in judged:
        bad = one.loss.not_finite
        if len(bad):
            say(
                f"{one.name}: the loss of {len(bad)} of {len(rows)} rows is not a finite number, "
                f"first at {data.where(rows[bad[0]])}"
            )


def _save(path: Path, judged: Sequence[Judgement], items: Sequence[PromptItem]) -> None:
    """One line an item: prompt, references, its row, and each one's answer and loss."""
    import json

    from lorakit.core.files import write_atomic

    lines, row = [], 0
    for i, item in enumerate(items):
        mine = slice(row, row + len(item.indices))
        row = mine.stop
        entry = {
            "prompt": item.prompt,
            "references": item.references,
            "row": item.fields,
            "models": [
                {
                    "name": one.name,
                    "answer": one.answers[i].text,
                    "finish": one.answers[i].finish,
                    "loss": one.loss.sums[mine].sum() / max(1, one.loss.counts[mine].sum()),
                }
                for one in judged
            ],
        }
        lines.append(json.dumps(plain(entry), ensure_ascii=True, allow_nan=False))
    content = "".join(line + "\n" for line in lines).encode()
    if path.exists() and not path.is_file():
        path.write_bytes(content)  # a pipe or a device: replacing it would leave its reader waiting
    else:
        write_atomic(path, content)
    say(f"Answers written to {path}")


def _result(
    options: argparse.Namespace,
    base: Base,
    data: TokenData,
    items: Sequence[PromptItem] | None,
    indices: Sequence[int] | None,
    judged: Sequence[Judgement],
    mixes: Mapping[str, Any],
) -> dict[str, Any]:
    refs = {one.name: one.ref for one in options.adapter}
    return {
        "models": [
            {
                "name": one.name,
                "loss": one.loss.loss,
                "perplexity": one.loss.perplexity,
                "metrics": one.metrics,
                "adapters": _parts(mixes.get(one.name), refs),
            }
            for one in judged
        ],
        "base": base.ref,
        "data": {
            "files": data.report.files,
            "digest": data.digest,
            "format": data.report.format,
            "items": None if items is None else len(items),
            "rows": len(_rows_of(items, indices)),
            "supervised_tokens": judged[0].loss.tokens,
        },
    }


def _parts(mix: Any, refs: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a contestant is made of."""
    if mix is None:
        return []
    weights = {mix: 1.0} if isinstance(mix, str) else mix
    return [{"ref": refs[name], "weight": weight} for name, weight in weights.items()]


# --- the table -------------------------------------------------------------------------------


def _print(
    judged: Sequence[Judgement],
    items: Sequence[PromptItem] | None,
    show: int,
    prompt_column: str | None,
) -> None:
    from rich.markup import escape
    from rich.table import Table

    printable_stdout()
    out = console(stdout=True)
    table = Table("model", box=None, header_style="bold", pad_edge=False)
    names = ["loss", "perplexity", *judged[0].metrics]
    for name in names:
        table.add_column(name, justify="right")
    columns = [[one.loss.loss, one.loss.perplexity, *one.metrics.values()] for one in judged]
    for one, values in zip(judged, columns, strict=True):
        cells = [
            _cell(value, [row[i] for row in columns], lower=i < 2, digits=3 if i < 1 else 1)
            for i, value in enumerate(values)
        ]
        table.add_row(escape(one.name), *cells)
    out.print(table)
    tokens = judged[0].loss.tokens
    what = "" if items is None else f"{plural(len(items), 'item')}, "
    out.print(f"[dim]{what}{tokens:,} supervised tokens; loss in nats a token[/dim]")
    for i in range(min(show, len(items or ()))):
        assert items is not None
        if judged[0].answers:
            _print_answers(out, judged, items[i], i, prompt_column)


def _cell(value: float, column: Sequence[float], *, lower: bool, digits: int) -> str:
    """A number; bold where it is the best of several."""
    text = f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"
    best = min(column) if lower else max(column)
    return f"[bold green]{text}[/]" if len(column) > 1 and value == best else text


def _print_answers(
    out: Any, judged: Sequence[Judgement], item: PromptItem, i: int, prompt_column: str | None
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    # as it stands in the data, where one column holds it; else with the template around it
    prompt = item.fields.get(prompt_column) if prompt_column else None
    table.add_row("prompt", Text(_short(str(prompt or item.prompt))))
    more = len(item.references) - 1
    table.add_row(
        "reference", Text(_short(item.references[0]) + (f"  (and {more} more)" if more else ""))
    )
    for one in judged:
        table.add_row(Text(one.name, style="bold"), Text(_short(one.answers[i].text)))
    out.print()
    out.print(table)


def _short(text: str, limit: int = 400) -> str:
    """On one line, the middle left out where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} … {line[-limit // 2 :]}"
