"""Regular expressions from files: how long one may take, known before it is tried.

Python's matcher goes back and tries again, so ``(a+)+$`` on a name of forty letters runs for years,
and nothing can stop it. What an expression of a config can cost is bounded by its form alone:
every repetition may try each length of a name, every branch doubles what follows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

# the module's own parser; tests hold every kind of node that it gives against what is done here
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from lorakit.errors import clipped

#: characters of an expression; the names of a large model's modules, joined by ``|``
MAX_LENGTH = 1_000_000
#: repetitions whose length is open, in a row
MAX_DEGREE = 4
#: ways through branches and optional parts
MAX_WAYS = 1_000_000

#: a rank above this is no rank, and overflows a float's division
MAX_RANK = 2**31 - 1

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


@dataclass(frozen=True)
class Cost:
    """At most about ``ways · n**degree / degree!`` steps on a name of n characters."""

    ways: int = 1
    degree: int = 0
    repeats: bool = False
    """Whether anything in it is repeated."""

    def steps(self, length: int) -> float:
        """The bound for a name of this length."""
        return self.ways * max(length, 1) ** self.degree / math.factorial(self.degree)


class _TooCostly(Exception):
    """Says what in an expression has no bound."""


def cost_of(text: str) -> Cost:
    """What an expression can cost.

    Raises:
        ValueError: it is no expression, or one whose cost is not bounded. It says why.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_LENGTH} are read")
    try:
        cost = _sequence(_parser.parse(text))
    except _TooCostly as error:
        raise ValueError(str(error)) from error
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from error
    if cost.degree > MAX_DEGREE or cost.ways > MAX_WAYS:
        raise ValueError(
            f"it has {cost.degree} open repetitions and {cost.ways:.3g} ways through its branches; "
            f"at most {MAX_DEGREE} and {MAX_WAYS:.0e} are tried"
        )
    return cost


def _sequence(nodes: Iterable[tuple[Any, Any]]) -> Cost:
    ways, degree, highest, repeats = 1, 0, 0, False
    for op, value in nodes:
        one = _node(str(op), value)
        ways, repeats = min(ways * one.ways, 10**30), repeats or one.repeats
        highest = max(highest, degree + one.degree)
        if str(op) not in ("ASSERT", "ASSERT_NOT"):  # what was looked at is not tried again
            degree += one.degree
    return Cost(ways, highest, repeats)


def _node(op: str, value: Any) -> Cost:
    if op in _REPEATS:
        return _repeat(*value)
    if op == "BRANCH":
        costs = [_sequence(branch) for branch in value[1]]
        return Cost(
            sum(c.ways for c in costs),
            max(c.degree for c in costs),
            any(c.repeats for c in costs),
        )
    if op == "SUBPATTERN":
        return _sequence(value[-1])
    if op in ("ASSERT", "ASSERT_NOT"):
        return _sequence(value[1])
    if op == "ATOMIC_GROUP":
        return _sequence(value)
    if op in ("GROUPREF", "GROUPREF_EXISTS"):
        raise _TooCostly("it refers back to a group")
    return Cost()


def _repeat(least: int, most: Any, body: Iterable[tuple[Any, Any]]) -> Cost:
    inner = _sequence(body)
    if int(most) <= 1:  # an optional part
        return Cost(inner.ways + 1, inner.degree, inner.repeats)
    if inner.repeats or inner.ways > 1:
        raise _TooCostly("it repeats what repeats or branches itself")
    return Cost(1, 0 if least == most else 1, True)


def wrong_expression(text: object) -> str | None:
    """What is wrong with an expression that stands for the end of a path; ``None`` if nothing."""
    if not isinstance(text, str):
        return f"{text!r} is no text"
    if "\n" not in text and re.fullmatch(r"[\w.-]*", text):
        return None  # a plain name, which most are
    try:
        cost_of(text)
        re.compile(rf"(.*\.)?({text})$")
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        return f"{clipped(text, 80)!r}: {error}"
    return None
