"""What lives throughout a training is kept out of the way of the garbage collector."""

from __future__ import annotations

import gc
from types import TracebackType

#: CPython 3.12 counts some hundreds of immortal objects as frozen; more were frozen by somebody
_IMMORTAL = 2000
#: rounds without a run that joined or left, after which what lives is taken to stay
_SETTLED = 25


class StillHeap:
    """Sets aside what lives between two rounds, as long as the same runs take part.

    A full collection walks through everything: of transformers and a model these are half a million
    objects and a sixth of a second, and the rounds of eight adapters leave enough behind for one
    in ten of them. What is set aside (``gc.freeze``) is looked at again when a run joins or leaves,
    and in the end. Where somebody has frozen objects before, nothing is done.
    """

    def __init__(self) -> None:
        self._rounds = 0
        self._frozen = False

    def between_rounds(self) -> None:
        """Nothing of a step is alive now."""
        self._rounds += 1
        if self._rounds == _SETTLED and gc.isenabled() and gc.get_freeze_count() < _IMMORTAL:
            gc.collect()
            self._frozen = True  # first: an interrupt may come between the two
            gc.freeze()

    def changed(self) -> None:
        """A run joined or left."""
        self._rounds = 0
        if self._frozen:
            gc.unfreeze()
            self._frozen = False

    def __enter__(self) -> StillHeap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.changed()
