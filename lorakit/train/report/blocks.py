"""Pieces of markup that every part is made of."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources

from lorakit import __version__
from lorakit.train.report.markup import Html, fill, join
from lorakit.train.report.words import shown

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · lorakit</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="eyebrow">{kind}</p>
<h1>{title}</h1>
<p class="lead">{lead}</p>
</header>
<main>
{body}
</main>
<footer>Written by lorakit {version} from {source}; nothing on this page is loaded from
elsewhere.</footer>
</body>
</html>
"""


def framed(title: str, lead: object, parts: Iterable[Html], *, kind: str, source: str) -> Html:
    """A whole page.

    Args:
        parts: of its body; empty ones are left out.
        kind: what stands over the title.
        source: what the page was made from.
    """
    style = resources.files("lorakit.train.report").joinpath("report.css").read_text("utf-8")
    return fill(
        _PAGE,
        title=title,
        style=Html(style),
        kind=kind,
        lead=lead,
        body=join((part for part in parts if part), "\n"),
        version=__version__,
        source=source,
    )


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
