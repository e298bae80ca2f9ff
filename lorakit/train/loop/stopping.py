"""Where a run may stop: between two forwards, and all processes together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from lorakit.train.distributed import World
from lorakit.train.interrupt import StopRequest

T = TypeVar("T")


class Stopped(Exception):
    """Somebody asked to stop; every run stands between two steps."""


class Stopping:
    """Whether somebody asked.

    Args:
        stop: the wish of this process.
        world: the processes that stop together.
    """

    def __init__(self, stop: StopRequest, world: World) -> None:
        self._stop = stop
        self._world = world

    def look(self) -> None:
        """Between two forwards.

        Raises:
            Stopped: somebody asked.
        """
        # with a sharded base the others could not go on without this process
        if self._stop.received is not None and not self._world.sharded:
            raise Stopped

    def together(self, work: Callable[[], T]) -> T:
        """What this process makes of its share; if one was asked to stop, all do.

        Raises:
            Stopped: somebody asked one of the processes.
            PeerLost: another process has ended.
        """
        made: list[T] = []
        with self._world.guarded(), contextlib.suppress(Stopped):
            made.append(work())
        wish = self._world.sharded and self._stop.received is not None
        if self._world.any(wish or not made):
            raise Stopped
        return made[0]
