"""The plain parts: data, settings, machine, notes."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.train.record import Record, is_finite
from lorakit.train.report.blocks import bullets, section, table_row
from lorakit.train.report.charts import Frame, bar_chart
from lorakit.train.report.markup import Html, fill, join
from lorakit.train.report.words import count_text, leaves, shown


def data(record: Record) -> Html:
    report = record.facts["data_report"]
    if not report:
        return Html("")
    parts = []
    tokens, supervised = report.get("tokens"), report.get("supervised_tokens")
    if is_finite(tokens) and is_finite(supervised) and tokens:
        share = supervised / tokens
        parts.append(
            fill(
                "<h3>Supervised: {share} of {tokens} tokens</h3>"
                '<div class="meter"><div style="width:{width}%"></div></div>',
                share=f"{share:.1%}",
                tokens=count_text(tokens),
                width=f"{100 * min(1.0, max(0.0, share)):.2f}",
            )
        )
    bars = report.get("histogram")
    if isinstance(bars, list) and bars and all(_is_bar(bar) for bar in bars):
        heights = [(str(a), float(n), f"{a}–{b - 1} tokens: {n} examples") for a, b, n in bars]
        frame = Frame(470, 190, (0, 1), (0.0, max(1.0, *(n for _, n, _ in heights)) * 1.06))
        chart = bar_chart("Lengths of the examples", heights, frame)
        parts.append(fill("<h3>Examples by length, in tokens</h3>{chart}", chart=chart))
    dropped = report.get("dropped")
    table = [
        (name, value)
        for name, value in report.items()
        if name not in ("histogram", "dropped", "dropped_rows", "notes", "cuts")
        and value not in (None, "", {}, [])
    ]
    rows = [
        table_row(name.replace("_", " "), count_text(value) if is_finite(value) else value)
        for name, value in table
    ]
    if isinstance(dropped, Mapping) and dropped:
        rows += [table_row("dropped", f"{shown(n)}: {reason}") for reason, n in dropped.items()]
    else:
        rows.append(table_row("dropped", "none"))
    lists = [
        (title, report.get(name))
        for name, title in (
            ("dropped_rows", "First dropped rows"),
            ("cuts", "Truncated"),
            ("notes", "Choices"),
        )
    ]
    for title, lines in lists:
        if isinstance(lines, list) and lines:
            parts.append(fill("<h3>{title}</h3>{list}", title=title, list=bullets(lines)))
    pair = fill(
        '<div class="pair"><div><table>{rows}</table></div><div>{parts}</div></div>',
        rows=join(rows),
        parts=join(parts),
    )
    return section("Data", "", pair, _validation(record))


def _validation(record: Record) -> Html:
    report = record.facts["validation_report"]
    if not report:
        return Html("")
    names = ("files", "rows", "used", "tokens", "supervised_tokens")
    rows = [
        table_row(n.replace("_", " "), count_text(report[n]) if is_finite(report[n]) else report[n])
        for n in names
        if report.get(n) is not None
    ]
    return fill("<h3>Validation data</h3><table>{rows}</table>", rows=join(rows))


def _is_bar(bar: object) -> bool:
    return isinstance(bar, list | tuple) and len(bar) == 3 and all(is_finite(n) for n in bar)


def settings(record: Record) -> Html:
    if not record.settings:
        return Html("")
    groups = []
    loose = {k: v for k, v in record.settings.items() if not isinstance(v, Mapping)}
    sections = {k: v for k, v in record.settings.items() if isinstance(v, Mapping) and v}
    for name, values in [*sections.items(), *([("other", loose)] if loose else [])]:
        rows = [table_row(key, value) for key, value in leaves(values).items()]
        groups.append(
            fill("<div><h3>{name}</h3><table>{rows}</table></div>", name=name, rows=join(rows))
        )
    body = fill('<div class="settings">{groups}</div>', groups=join(groups))
    return section("Settings", "Everything that run.yaml holds, choices resolved.", body)


def machine(record: Record) -> Html:
    tables = []
    for name, title in (("hardware", "Hardware"), ("versions", "Versions")):
        values = leaves(record.facts[name])
        if values:
            rows = join(table_row(key.replace("_", " "), value) for key, value in values.items())
            tables.append(
                fill("<div><h3>{title}</h3><table>{rows}</table></div>", title=title, rows=rows)
            )
    if not tables:
        return Html("")
    return section("Machine", "", fill('<div class="pair">{tables}</div>', tables=join(tables)))


def notes(record: Record) -> Html:
    parts = []
    if record.notes:
        parts.append(fill("<h3>Choices and events</h3>{list}", list=bullets(record.notes)))
    missing = list(record.missing)
    if not record.evals:
        missing.append("There was no evaluation, so no validation curve.")
    if not record.samples:
        missing.append("samples.jsonl is not there or empty, so no answers are shown.")
    if missing:
        title = "<h3>What this page could not show</h3>{list}"
        parts.append(fill(title, list=bullets(missing)))
    return section("Notes", "", *parts) if parts else Html("")
