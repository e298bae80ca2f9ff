"""The exceptions of lorakit.

::

    LorakitError                    everything below; catch this one
    ├── InputError (ValueError)     what was given is wrong; the command line exits with 2
    │   ├── SpecError               a setting that is impossible or cannot act
    │   ├── TargetError             targets that match nothing, or a site that is never called
    │   ├── DataError               a row, a column or a file of the training data
    │   ├── FormatError             an adapter file that cannot be read or written as asked
    │   └── BaseError               a base that cannot be loaded, or is not the adapter's
    ├── RoutingError (RuntimeError) a forward whose rows do not fit the routing, or two at once
    ├── TrainingError (RuntimeError) the run had to stop: a loss that is not finite, a full disk
    ├── Interrupted (Exception)     Ctrl-C or SIGTERM after the state was saved; exits with 130
    └── MissingDependencyError (ImportError)  an optional package; says the command that installs it

Every message names the thing, what came, what was expected, and the next step.
"""

from __future__ import annotations

from collections.abc import Iterable

#: characters of one line of a message
_MAX_LINE = 2000
#: of one problem in a list
_MAX_PROBLEM = 600


class LorakitError(Exception):
    """Base of everything that lorakit raises on purpose.

    A message quotes names from files, so characters that would steer a terminal are shown as
    escapes, and a line of a message is never longer than a screen.
    """

    said = False
    """Whether the user was told of it already, by another process of the same run for one."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*(_shown(arg) if isinstance(arg, str) else arg for arg in args), **kwargs)


def _shown(text: str) -> str:
    """A message that is safe to print."""
    if len(text) <= _MAX_LINE and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "\n".join(clipped(_escaped(line), _MAX_LINE) for line in text.split("\n"))


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(
        c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line
    )


def clipped(text: str, limit: int) -> str:
    """A text without its middle, if it is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} … {text[-limit // 2 + 3 :]}"


class InputError(LorakitError, ValueError):
    """Something that the caller gave is wrong."""


class SpecError(InputError):
    """A setting that is impossible, unknown, or cannot act."""


class TargetError(InputError):
    """Targets that match nothing, or a site that the first forward never called."""


class DataError(InputError):
    """A problem with training or evaluation data; names file, row and column."""


class FormatError(InputError):
    """An adapter file that cannot be read, or cannot hold what it is asked to."""


class BaseError(InputError):
    """A base model that cannot be loaded, or that an adapter does not belong to."""


class RoutingError(LorakitError, RuntimeError):
    """A forward that does not fit its routing."""


class TrainingError(LorakitError, RuntimeError):
    """A run that had to stop; the last good state is on disk."""


class Interrupted(LorakitError):
    """The user or the system stopped the run; its state was saved first."""


class MissingDependencyError(LorakitError, ImportError):
    """An optional package is not installed."""


def collected(title: str, problems: Iterable[str], *, limit: int = 20) -> str:
    """Join several problems into one message: a title, then a line each.

    Args:
        title: the sentence before the list, without a colon.
        problems: one line each.
        limit: how many are printed; the rest is counted.
    """
    lines = list(problems)
    shown = [f"  - {clipped(line, _MAX_PROBLEM)}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  … and {len(lines) - limit} more")
    return "\n".join([f"{title}:", *shown])
