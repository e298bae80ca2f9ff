"""HTML that is escaped unless it says otherwise."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable


class Html(str):
    """Text that is markup already; every other text is escaped by :func:`fill`."""

    __slots__ = ()


def fill(template: str, **values: object) -> Html:
    """Markup with ``{name}`` replaced: text is escaped, :class:`Html` goes in as it is.

    Only ``{name}`` with a lower-case name is a place; other braces stay, so that CSS can.

    Raises:
        KeyError: a place has no value.
    """
    return Html(_PLACE.sub(lambda match: escape(values[match[1]]), template))


def escape(value: object) -> Html:
    """The value as markup, with ``& < > " '`` replaced unless it is :class:`Html`.

    Signs that HTML forbids (control characters, lone surrogates) become ``�``.
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", str(value)), quote=True))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Several pieces as one; ``between`` is markup."""
    return Html(between.join(escape(part) for part in parts))


_PLACE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
