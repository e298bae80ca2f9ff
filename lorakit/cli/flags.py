"""What flags of several commands may hold: numbers, lists of names, text; and which are missing."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

from lorakit.errors import InputError


def _number(
    kind: Callable[[str], Any], fits: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # a whole number may be too long for a float
        limit = 2**63 if isinstance(value, int) else math.inf
        if value is None or not abs(value) < limit or not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} given; expected {expected}")
        return value

    return parse


positive_int = _number(int, lambda n: n >= 1, "a whole number of at least 1")
count = _number(int, lambda n: n >= 0, "a whole number of at least 0")
seed = _number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
finite_float = _number(float, lambda x: True, "a finite number")
positive_float = _number(float, lambda x: x > 0, "a number above 0")
non_negative_float = _number(float, lambda x: x >= 0, "a number of at least 0")
probability = _number(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
fraction = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def missing(options: argparse.Namespace, flags: Mapping[str, str]) -> list[str]:
    """A line for each flag that was not given: its name, and what it is for."""
    return [f"--{n}: {what}" for n, what in flags.items() if getattr(options, n) is None]


def comma_list(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: names separated by commas, each out of ``allowed``, none twice."""

    def parse(text: str) -> tuple[str, ...]:
        names = [part.strip() for part in text.split(",") if part.strip()]
        names = [name if name in allowed else name.lower() for name in names]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            what = ", ".join(unknown) or repr(text)
            raise argparse.ArgumentTypeError(
                f"{what} given; expected one or several of {','.join(allowed)}"
            )
        return tuple(dict.fromkeys(names))

    return parse


def check_text(text: str, where: str) -> None:
    """Refuse what came in as bytes that are no text.

    Args:
        where: the start of the message: ``"--system"``.

    Raises:
        InputError: it is not UTF-8, or holds zero bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 15) : error.start]
        raise InputError(
            f"{where}: character {error.start + 1}, after {near!r}, is not UTF-8; write it as UTF-8"
        ) from None
    if "\0" in text:
        raise InputError(f"{where}: it holds zero bytes, so it is no text; give UTF-8 text")
