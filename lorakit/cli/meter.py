"""How far something is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from lorakit.cli.output import console, say
from lorakit.errors import MissingDependencyError

#: seconds between two lines where there is no terminal
_SECONDS = 10.0

#: (what, done, total)
Tell = Callable[[str, int, int], None]


@contextlib.contextmanager
def meter() -> Iterator[Tell]:
    """Gives a function that is told how far which piece of work is."""
    try:
        shown = sys.stderr.isatty() and not console().is_dumb_terminal
    except MissingDependencyError:
        shown = False
    if not shown:
        yield _lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bars:
        tasks = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield tell


def _lines() -> Tell:
    """Says the first time after some seconds, and at the end of what was said."""
    last = time.monotonic()
    spoken: dict[str, int] = {}

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        # what counts in megabytes comes to the last one several times
        if spoken.get(what) != done and (
            now - last >= _SECONDS or (done == total and what in spoken)
        ):
            say(f"{what}: {done:,} of {total:,}")
            spoken[what] = done
            last = now

    return tell
