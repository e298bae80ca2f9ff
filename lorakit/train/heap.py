"""What lives throughout a training is kept out of the way of the garbage collector."""

from __future__ import annotations

import gc
from types import TracebackType

#: rounds without a run that joined or left, after which what lives is taken to stay
_SETTLED = 25


class StillHeap:
    """Sets aside what lives between two rounds, as long as the same runs take part.

    A full collection walks through everything: of transformers and a model these are half a million
    objects and a sixth of a second, and the rounds of eight adapters leave enough behind for one
    in ten of them. What is set aside (``gc.freeze``) is looked at again when a run joins or leaves,
    and in the end. Where somebody else freezes objects too, before or after, theirs stay so.
    """

    def __init__(self) -> None:
        self._rounds = 0
        self._frozen = 0

    def between_rounds(self) -> None:
        """Nothing of a step is alive now."""
        self._rounds += 1
        if self._rounds == _SETTLED and gc.isenabled() and not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            self._frozen = gc.get_freeze_count()

    def changed(self) -> None:
        """A run joined or left."""
        self._rounds = 0
        # what is frozen can die; more of it is somebody else's, and all of it can be freed alone
        if self._frozen and gc.get_freeze_count() <= self._frozen:
            gc.unfreeze()
        self._frozen = 0

    def __enter__(self) -> StillHeap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.changed()
