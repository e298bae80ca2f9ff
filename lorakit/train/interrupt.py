"""Ctrl-C, SIGTERM and SIGHUP as a wish, granted between two forwards."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

#: SIGHUP, of a closed terminal, where the system has it
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


#: what is told when the first signal comes, while a run is under way
STOPPING = "stopping after this forward; again to stop now"

_tell: list[Callable[[str], None]] = []


@contextlib.contextmanager
def signals_as_interrupts(tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, where nobody cares yet.

    Args:
        tell: called at once with a sentence when a :class:`StopRequest` notes a signal; from a
            signal handler, so it had better not write through a buffer.
    """
    previous = {}
    if tell is not None:
        _tell.append(tell)
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                previous[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        if tell is not None:
            _tell.remove(tell)
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """While entered, the first signal is only noted; a second one interrupts at once.

    A SIGHUP that is ignored, as under nohup, stays ignored. Outside the main thread, where
    Python allows no handlers, signals act as they did.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The signal that asked to stop."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        for tell in _tell:
            tell(STOPPING)
