"""What ``lorakit eval`` found, as a table, and answers beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.cli.output import console, plural, printable_stdout, say

if TYPE_CHECKING:
    from lorakit.data import PromptItem, TokenData
    from lorakit.evaluate import Forgetting, GeneralText, Judgement, LossResult
    from lorakit.tasks.rows import RowData


@dataclass
class Judged:
    """One line of the table."""

    judgement: Judgement
    adapters: list[dict[str, Any]]
    """What it is made of: refs and weights; empty for a base and a full model."""
    full: str | None
    """What ``--full`` was given."""
    size: int | None
    """Bytes of its weights on the disk, where they are known."""
    forgetting: Forgetting | None = None

    @property
    def name(self) -> str:
        """How it is called."""
        return self.judgement.name


def print_judged(
    judged: Sequence[Judged],
    items: Sequence[PromptItem] | None,
    general: GeneralText | None,
    show: int,
    prompt_column: str | None,
) -> None:
    """The table, and the answers to the first prompts.

    Args:
        show: how many prompts.
        prompt_column: where the data holds the prompt as somebody wrote it.
    """
    from rich.markup import escape
    from rich.table import Table

    printable_stdout()
    out = console(stdout=True)
    columns = _columns(judged)
    table = Table("model", box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for i, one in enumerate(judged):
        table.add_row(escape(one.name), *(cells[i] for cells in columns.values()))
    out.print(table)
    tokens = judged[0].judgement.loss.tokens
    what = "" if items is None else f"{plural(len(items), 'item')}, "
    out.print(f"[dim]{what}{tokens:,} supervised tokens; loss in nats a token[/dim]")
    if general is not None:
        out.print(
            f"[dim]general: loss on {plural(general.passages, 'passage')} of general text, "
            f"{int(general.data.supervised_counts.sum()):,} tokens; forgetting: that less the "
            "base's" + (", ± its standard error" if general.passages > 1 else "") + "[/dim]"
        )
    for i in range(min(show, len(items or ()))):
        assert items is not None
        if judged[0].judgement.answers:
            _print_answers(out, judged, items[i], i, prompt_column)


def say_not_finite(
    name: str, loss: LossResult, data: TokenData | RowData, rows: Sequence[int]
) -> None:
    """Name the first row whose loss is no finite number, if there is one.

    Args:
        name: who has this loss.
        rows: of ``data``, what the loss is over.
    """
    bad = loss.not_finite
    if len(bad):
        say(
            f"{name}: the loss of {len(bad)} of {len(rows)} rows is not a finite number, first at "
            f"{data.where(rows[bad[0]])}"
        )


def _columns(judged: Sequence[Judged]) -> dict[str, list[str]]:
    """Name of a column → its cells, each one of the judged."""
    losses = [one.judgement.loss for one in judged]
    found = {
        "loss": _cells([loss.loss for loss in losses], lower=True, digits=3),
        "perplexity": _cells([loss.perplexity for loss in losses], lower=True),
    }
    for name in judged[0].judgement.metrics:
        found[name] = _cells([one.judgement.metrics[name] for one in judged], lower=False)
    if all(one.forgetting for one in judged):
        found["general"] = [f"{one.forgetting.loss:.3f}" for one in judged if one.forgetting]
        if any(one.adapters or one.full for one in judged):
            found["forgetting"] = [_change(one) for one in judged]
    if any(one.size is not None for one in judged):
        found["size"] = [_size(one.size) for one in judged]
    return found


def _cells(values: Sequence[float], *, lower: bool, digits: int = 1) -> list[str]:
    """Numbers; bold where one is the best of several."""
    best = (min if lower else max)(values)
    texts = [f"{v:.{digits}f}" if abs(v) < 1e6 else f"{v:.3g}" for v in values]
    return [
        f"[bold green]{text}[/]" if len(values) > 1 and value == best else text
        for value, text in zip(values, texts, strict=True)
    ]


def _change(one: Judged) -> str:
    found = one.forgetting
    if found is None or not (one.adapters or one.full):
        return ""  # the base is what the others are held against
    error = "" if math.isnan(found.standard_error) else f" ± {found.standard_error:.3f}"
    return f"{found.difference:+.3f}{error}"


def _size(size: int | None) -> str:
    if size is None:
        return ""
    unit, name = (1e3, "kB") if size < 1e6 else (1e6, "MB") if size < 1e10 else (1e9, "GB")
    return f"{size / unit:,.1f} {name}"


def _print_answers(
    out: Any, judged: Sequence[Judged], item: PromptItem, i: int, prompt_column: str | None
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
        table.add_row(Text(one.name, style="bold"), Text(_short(one.judgement.answers[i].text)))
    out.print()
    out.print(table)


def _short(text: str, limit: int = 400) -> str:
    """On one line, the middle left out where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} … {line[-limit // 2 :]}"
