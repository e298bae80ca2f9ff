"""Show what would be trained, before anything is; of a language model no weights are loaded.

Prints the first examples as the model would see them, with the supervised tokens (those that
are learnt) coloured, or between ⟦ and ⟧ where there is no colour; the kind of rows and the
columns that were recognised; how long the examples are; and how many rows would be left out for
which reason, with the first ten of them.

  lorakit preview --base smollm2 --data mine.jsonl
  lorakit preview --base smollm2 --data mine.csv --map prompt=question,completion=answer
  lorakit preview --base B --data F --rows 10 --json
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lorakit.cli.bases import add_base_arguments
from lorakit.cli.flags import count
from lorakit.cli.output import add_json_argument, console, emit_json, say
from lorakit.cli.rows import add_data_arguments, data_spec
from lorakit.cli.training import note_defaults

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.data import TokenData

_BAR = 40
_SUPERVISED = "bold green"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_base_arguments(parser, weights=False, task=True)
    add_data_arguments(parser)
    parser.add_argument(
        "--rows", type=count, default=3, metavar="N", help="examples to show; default 3"
    )
    add_json_argument(parser)
    note_defaults(parser)


def run(options: argparse.Namespace) -> int:
    """Read the data with the base's tokenizer and show it."""
    import dataclasses

    from lorakit.bases import base_config, context_length, load_tokenizer
    from lorakit.cli import tasks
    from lorakit.data import load_data

    task, why = tasks.chosen_task(options, options.data)
    if task != tasks.CAUSAL:
        return tasks.preview(options, task, why)
    where: dict[str, Any] = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
    }
    tokenizer = load_tokenizer(options.base, **where)
    context = context_length(base_config(options.base, **where))
    asked = data_spec(options)
    # a preview goes on where training would stop, to show all that is wrong
    spec = dataclasses.replace(asked, bad_rows="skip")
    data = load_data(spec, tokenizer, context_length=context, progress=_progress())
    stops = asked.bad_rows == "error" and data.report.num_dropped > 0
    examples = [_example(data, tokenizer, i) for i in range(min(options.rows, len(data)))]
    if options.json:
        template = getattr(tokenizer, "chat_template", None)
        emit_json(
            {
                "base": options.base,
                "report": data.report.to_dict(),
                "chat_template": template if data.report.format == "chat" else None,
                "digest": data.digest,
                "training_would_stop": stops,
                "examples": examples,
            }
        )
    else:
        if hasattr(sys.stdout, "reconfigure"):  # rows may hold what this terminal cannot show
            sys.stdout.reconfigure(errors="backslashreplace")
        _print(data, examples, stops, console(stdout=True))
    return 0


def _progress() -> Any:
    """Says from time to time how far a long file is."""
    import time

    last = time.monotonic()

    def done(rows: int) -> None:
        nonlocal last
        if time.monotonic() - last > 2:
            last = time.monotonic()
            say(f"  {rows:,} rows read")

    return done


def _example(data: TokenData, tokenizer: Any, i: int) -> dict[str, Any]:
    """One example as plain values: its place, its text in spans, its counts."""
    example = data[i]
    return {
        "where": data.where(i),
        "file": example.file,
        "row": example.index,
        "tokens": len(example.ids),
        "supervised": int(example.supervised.sum()),
        "spans": [
            {"text": text, "supervised": supervised}
            for text, supervised in _spans(tokenizer, example.ids, example.supervised)
        ],
        "prompt": data.item(i).prompt,
        "completion": data.item(i).completion,
    }


def _spans(tokenizer: Any, ids: Any, supervised: Any) -> list[tuple[str, bool]]:
    """The tokens as text, cut where supervision begins or ends."""
    spans, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or supervised[end] != supervised[start]:
            text = tokenizer.decode(
                ids[start:end].tolist(),
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
            spans.append((text, bool(supervised[start])))
            start = end
    return spans


def _print(data: TokenData, examples: list[dict[str, Any]], stops: bool, out: Console) -> None:
    from rich.text import Text

    coloured = out.color_system is not None and out.is_terminal and not out.no_color
    marks = ("⟦", "⟧") if _can_print(out, "⟦⟧") else ("[[", "]]")
    for line in data.report.lines():
        out.print(Text(line), soft_wrap=True)
    if stops:
        out.print(
            Text(
                f"Training would stop at these {data.report.num_dropped:,} rows; with "
                "--bad-rows skip it leaves them out."
            ),
            soft_wrap=True,
        )
    steps = -(-data.report.used // 8)
    out.print(
        Text(
            f"One epoch: {data.report.tokens:,} tokens, {data.report.supervised_tokens:,} of them "
            f"supervised; {steps:,} steps of 8 examples"
        ),
        soft_wrap=True,
    )
    if examples:
        how = "coloured" if coloured else f"between {marks[0]} and {marks[1]}"
        out.print(Text(f"Supervised tokens are {how}."), soft_wrap=True)
    for one in examples:
        title = f"{one['where']}: {one['tokens']:,} tokens, {one['supervised']:,} supervised"
        out.print()
        out.print(Text(title, style="bold"), soft_wrap=True)
        out.print(_coloured(one["spans"], coloured, marks), soft_wrap=True)
    out.print()
    _print_lengths(data, out)


def _coloured(spans: list[dict[str, Any]], coloured: bool, marks: tuple[str, str]) -> Any:
    from rich.text import Text

    text = Text()
    for span in spans:
        if not span["supervised"]:
            text.append(span["text"], style="dim" if coloured else "")
        elif coloured:
            text.append(span["text"], style=_SUPERVISED)
        else:
            text.append(f"{marks[0]}{span['text']}{marks[1]}")
    return text


def _print_lengths(data: TokenData, out: Console) -> None:
    """A bar for each step of length."""
    from rich.text import Text

    rows = data.report.histogram
    full = max((number for _, _, number in rows), default=1)
    width = max((len(f"{end - 1:,}") for _, end, _ in rows), default=1)
    block = "█" if _can_print(out, "█") else "#"
    out.print(Text("Tokens per example", style="bold"))
    for start, end, number in rows:
        filled = -(-number * _BAR // full)
        label = f"{start:>{width},} – {end - 1:>{width},}"
        out.print(Text(f"  {label}  {block * filled:<{_BAR}}  {number:,}"), soft_wrap=True)


def _can_print(out: Console, text: str) -> bool:
    try:
        text.encode(out.encoding or sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
