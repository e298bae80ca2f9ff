"""Pieces of markup that every part is made of."""

from __future__ import annotations

from collections.abc import Iterable

from lorakit.train.report.markup import Html, fill, join
from lorakit.train.report.words import shown


def section(title: str, hint: str, *parts: Html) -> Html:
    return fill(
        "<section><h2>{title}</h2>{hint}{parts}</section>",
        title=title,
        hint=fill('<p class="hint">{hint}</p>', hint=hint) if hint else Html(""),
        parts=join(parts),
    )


def wide(content: Html) -> Html:
    return fill('<div class="wide">{content}</div>', content=content)


def table_row(name: str, value: object) -> Html:
    return fill("<tr><th>{name}</th><td>{value}</td></tr>", name=name, value=shown(value))


def bullets(lines: Iterable[object]) -> Html:
    return fill("<ul>{items}</ul>", items=join(fill("<li>{line}</li>", line=x) for x in lines))
