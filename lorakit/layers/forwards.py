"""Which plan holds now: captured when the root's forward begins, kept for its recomputation.

A thread-local or a context variable would not do: streaming generation runs the model in another
thread, and activation checkpointing runs parts of it again in the backward pass, when the ``with``
block has long ended. So

- the routing in use belongs to the model, and every root forward captures it at its entry;
- ``generate`` captures it too, for its whole length and its own thread;
- a recomputation finds the forward it repeats by autograd's sequence numbers: each node made
  during a forward has a number in that forward's interval;
- a second forward while one runs raises, because compiled code reads buffers that stay put.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import RoutingError
from lorakit.layers.routing import Plan, Routing

#: forwards whose backward may still recompute them
REMEMBERED_FORWARDS = 256


def _sequence_number() -> int:
    """The number that autograd gives to this thread's next node."""
    return int(torch._C._autograd._get_sequence_nr())


class _Past(NamedTuple):
    start: int
    end: int
    thread: int
    plan: Plan


class Forwards:
    """The routing in use on one model, and the forwards that run or may be recomputed."""

    def __init__(self) -> None:
        self.routing = Routing.uniform(None)
        self.names: tuple[str, ...] = ()
        #: float64 [rows, K], for compiled code; its storage stays while its shape does
        self.weights = torch.zeros(1, 0, dtype=torch.float64)
        self.device = torch.device("cpu")
        self.after_first: Any = None
        """Called once, with the adapters' names, when the first root forward that uses any has
        ended well."""
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._plan: Plan | None = None
        self._used: frozenset[str] = frozenset()  # by the forward that ended last
        self._thread = 0
        self._depth = 0
        self._start = 0
        self._past: deque[_Past] = deque(maxlen=REMEMBERED_FORWARDS)
        self._held: dict[int, Routing] = {}
        self._direct: Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model starts with no forward under way; locks do not travel."""
        kept = ("routing", "names", "weights", "device", "after_first")
        return {key: self.__dict__[key] for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # --- entries ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def scope(self, routing: Routing | None = None) -> Iterator[None]:
        """One forward made of several calls, such as a body and then its head."""
        self.begin(routing or self._in_use(), None, frozenset())
        done = False
        try:
            yield
            done = True
        finally:
            self.end()
        if done:
            self._check_first()

    @contextlib.contextmanager
    def held(self, expand: int) -> Iterator[None]:
        """Keep the routing now in use for this thread, whatever others choose meanwhile."""
        thread = threading.get_ident()
        outer = self._held.get(thread)
        self._held[thread] = (outer or self.routing).with_expand(expand)
        try:
            yield
        finally:
            if outer is None:
                del self._held[thread]
            else:
                self._held[thread] = outer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Pre-forward hook of the root."""
        batch, widths = _sizes(args, kwargs)
        self.begin(self._in_use(), batch, widths)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the root; also called when the forward raised."""
        self.end()
        if output is not None:
            self._check_first()

    def begin(self, routing: Routing, batch: int | None, widths: frozenset[int]) -> None:
        """Start a forward with this routing.

        Raises:
            RoutingError: another thread's forward is running, or the batch does not fit.
        """
        thread = threading.get_ident()
        with self._lock:
            if self._depth and self._thread != thread:
                raise RoutingError(
                    "a second forward began on this model while one is running in another "
                    "thread; their adapters would mix. Run them one after the other, or give "
                    "each thread its own copy of the model"
                )
            if self._depth:  # the root inside a scope: the scope's routing holds
                self._depth += 1
                return
            self._plan = Plan(routing, batch, widths)
            self._thread, self._depth = thread, 1
        self._start = _sequence_number()
        try:
            self._fill(self._plan)
        except RoutingError:
            self.end()
            raise

    def end(self) -> None:
        """End the forward; remember it for its recomputation."""
        if self._depth == 0 or self._thread != threading.get_ident():
            return  # its own begin raised, so there is nothing to end
        self._depth -= 1
        if self._depth == 0 and self._plan is not None:
            end = _sequence_number()
            self._used = self._plan.routing.names
            if end > self._start:
                self._past.append(_Past(self._start, end, self._thread, self._plan))
            self._plan = None

    # --- what sites ask --------------------------------------------------------------------

    def plan(self) -> Plan:
        """The plan of the forward that this call belongs to.

        Raises:
            RoutingError: the call recomputes a forward that is not known, or comes from
                another thread in the middle of a forward.
        """
        node = torch._C._current_autograd_node()
        if node is not None:
            return self._recomputed(node._sequence_nr())
        if self._depth:
            if self._thread != threading.get_ident() or self._plan is None:
                raise RoutingError(
                    "a part of this model was called while a forward runs in another thread"
                )
            return self._plan
        # a part called on its own, such as generate's call of an encoder
        routing = self._in_use()
        if self._direct is None or self._direct.routing is not routing:
            self._direct = Plan(routing, None, frozenset())
        return self._direct

    def _recomputed(self, number: int) -> Plan:
        found = [past for past in reversed(self._past) if past.start <= number < past.end]
        if len({id(past.plan) for past in found}) > 1:  # the numbers are counted per thread
            here = threading.get_ident()
            found = [past for past in found if past.thread == here] or found
        if not found:
            raise RoutingError(
                "the backward pass recomputes a part of a forward that did not go through the "
                f"attached module, or lies more than {REMEMBERED_FORWARDS} forwards back. Call "
                "the module that was given to attach()"
            )
        return found[0].plan

    def _in_use(self) -> Routing:
        return self._held.get(threading.get_ident(), self.routing)

    def _fill(self, plan: Plan) -> None:
        """Write the weights for compiled code; the buffer keeps its place where it fits."""
        if plan.batch is None and plan.routing.axis == "uniform":
            return  # a scope, which is never compiled as a whole
        matrix = plan.matrix(self.names)
        with torch.inference_mode(False), torch.no_grad():
            if matrix.shape == self.weights.shape and self.weights.device == self.device:
                self.weights.copy_(matrix)
            else:
                precise = self.device.type != "mps"  # which has no float64
                self.weights = matrix.to(self.device, torch.float64 if precise else torch.float32)

    def _check_first(self) -> None:
        if self.after_first is not None and self._depth == 0 and self._used:
            check, self.after_first = self.after_first, None
            check(self._used)


def _sizes(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int | None, frozenset[int]]:
    """Rows of the input and the second dimensions of all inputs with that many rows."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() >= 1]
    if not tensors:
        return None, frozenset()
    first = next((t for t in tensors if t.dim() >= 2), tensors[0])
    batch = int(first.shape[0])
    widths = {int(t.shape[1]) for t in tensors if t.dim() >= 2 and t.shape[0] == batch}
    return batch, frozenset(widths)
