"""Which plan holds now: captured when the root's forward begins, kept for its recomputation.

A thread-local or a context variable would not do: streaming generation runs the model in another
thread, and activation checkpointing runs parts of it again in the backward pass, when the ``with``
block has long ended. So the routing in use belongs to the model, and is captured at an entry:

==================== ==================================================================
entry                what it captures, and for how long
==================== ==================================================================
the root's forward   the routing in use, until that forward ends
``scope``            the given routing, until the block ends; root forwards in it join
``generate``         the routing in use, for all forwards of its own thread
a part called alone  the routing in use (``generate`` calls an encoder so)
a recomputation      the plan of the forward that it repeats, known by the autograd node
                     that asks for it: each node made during a forward has a sequence
                     number in that forward's interval
==================== ==================================================================

A second forward while one runs in another thread raises, and so does choosing adapters in two
threads at once. Compiled code reads :attr:`Forwards.weights`, which every entry fills.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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


class _Running(NamedTuple):
    plan: Plan
    thread: int
    start: int
    """Sequence number at its beginning."""
    is_scope: bool


class _Past(NamedTuple):
    plan: Plan
    thread: int
    start: int
    end: int


class Forwards:
    """The routing in use on one model, and the forwards that run or may be recomputed."""

    def __init__(self) -> None:
        self.routing = Routing.uniform(None)
        self.names: tuple[str, ...] = ()
        #: float64 [rows or 1, K], for compiled code; its storage stays while its shape does
        self.weights = torch.zeros(1, 0, dtype=torch.float64)
        self.device = torch.device("cpu")
        #: whether the running forward has keys that compiled code cannot read
        self.keyed = False
        self.after: Callable[[frozenset[str]], None] = _nothing
        """Called with the adapters' names when a forward has ended well."""
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._past: deque[_Past] = deque(maxlen=REMEMBERED_FORWARDS)
        self._held: dict[int, Routing] = {}
        self._choosing: list[int] = []
        self._direct: Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model starts with no forward under way; locks do not travel."""
        kept = ("routing", "names", "weights", "device", "keyed", "after")
        return {key: self.__dict__[key] for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # --- choosing --------------------------------------------------------------------------

    @contextlib.contextmanager
    def choose(self, routing: Routing) -> Iterator[None]:
        """Put a routing into use for the block.

        Raises:
            RoutingError: another thread is inside such a block; each would get the other's.
        """
        thread = threading.get_ident()
        with self._lock:
            alive = {t.ident for t in threading.enumerate()}
            self._choosing = [t for t in self._choosing if t in alive]
            if any(t != thread for t in self._choosing):
                raise RoutingError(
                    "another thread is inside a use(…) block of this model, and a routing holds "
                    "for the whole model. Let threads take turns around use(…), put their rows "
                    "into one batch with rows=[…], or give each thread a copy of the model"
                )
            self._choosing.append(thread)
        before, self.routing = self.routing, routing
        try:
            yield
        finally:
            self.routing = before
            with self._lock:
                self._choosing.remove(thread)

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

    # --- entries ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def scope(self, routing: Routing) -> Iterator[None]:
        """One forward made of several calls, such as a body and then its head."""
        self._begin(routing, None, frozenset(), is_scope=True)
        try:
            yield
        except BaseException:
            self._end()
            raise
        self.after(self._end())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Pre-forward hook of the root."""
        if self._joins_scope():
            return
        batch, widths = _sizes(args, kwargs)
        routing = self._in_use()
        self._begin(routing, batch, widths, is_scope=False)
        if len(set(routing.mixes)) > 1 and torch.is_grad_enabled():
            _check_balancing(module, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the root; also called when the forward raised an ``Exception``."""
        if self._joins_scope() or self._running is None:
            return
        if self._running.thread == threading.get_ident():  # else its own beginning had raised
            used = self._end()
            if output is not None:
                self.after(used)

    def _joins_scope(self) -> bool:
        running = self._running
        return running is not None and running.is_scope and running.thread == threading.get_ident()

    def _begin(
        self, routing: Routing, batch: int | None, widths: frozenset[int], *, is_scope: bool
    ) -> None:
        """Start a forward with this routing.

        Raises:
            RoutingError: another thread's forward is running, the batch does not fit, or a
                scope is opened inside a scope.
        """
        thread = threading.get_ident()
        plan = Plan(routing, batch, widths)
        with self._lock:
            running = self._running
            if running is not None:
                if running.thread != thread and _is_alive(running.thread):
                    raise RoutingError(
                        "a second forward began on this model while one is running in another "
                        "thread; their adapters would mix. Run them one after the other, or "
                        "give each thread its own copy of the model"
                    )
                if running.is_scope and running.thread == thread:
                    raise RoutingError(
                        "a scope was opened inside another; one forward has one routing"
                    )
                # a root forward that is still open here was left by a KeyboardInterrupt, which
                # runs no hooks: it is over
            self._running = _Running(plan, thread, _sequence_number(), is_scope)
        try:
            self._fill(plan)
        except BaseException:
            self._running = None
            raise

    def _end(self) -> frozenset[str]:
        """End the forward, remember it for its recomputation; gives the adapters it used."""
        running, self._running = self._running, None
        if running is None:
            return frozenset()
        end = _sequence_number()
        if end > running.start:
            self._past.append(_Past(running.plan, running.thread, running.start, end))
        return running.plan.routing.names

    # --- what sites ask --------------------------------------------------------------------

    def plan(self) -> Plan:
        """The plan of the forward that this call belongs to.

        Raises:
            RoutingError: the call recomputes a forward that is not known, or comes from
                another thread in the middle of a forward.
        """
        running = self._running
        here = running is not None and running.thread == threading.get_ident()
        if here and running is not None and not running.is_scope:
            return running.plan  # also where a backward hook runs a forward of its own
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            if not here or running is None or number < running.start:
                return self._recomputed(number)
        if running is not None:
            if not here:
                raise RoutingError(
                    "a part of this model was called while a forward runs in another thread"
                )
            return running.plan
        # a part called on its own, such as generate's call of an encoder
        routing = self._in_use()
        if self._direct is None or self._direct.routing is not routing:
            self._direct = Plan(routing, None, frozenset())
        return self._direct

    def _recomputed(self, number: int) -> Plan:
        found = [past for past in reversed(self._past) if past.start <= number < past.end]
        if len(found) > 1:  # the numbers are counted per thread
            here = threading.get_ident()
            found = [past for past in found if past.thread == here] or found
        if not found:
            raise RoutingError(
                "the backward pass recomputes a part of a forward that did not go through the "
                f"attached module, or lies more than {REMEMBERED_FORWARDS} forwards back. Call "
                "the module that was given to attach()"
            )
        if len({id(past.plan) for past in found}) > 1:
            raise RoutingError(
                "forwards of several threads await their backward, and which of them is "
                "recomputed cannot be told. Run the backward in its forward's thread"
            )
        return found[0].plan

    def _in_use(self) -> Routing:
        return self._held.get(threading.get_ident(), self.routing)

    def _fill(self, plan: Plan) -> None:
        """Write the weights for compiled code; the buffer keeps its place where it fits."""
        self.keyed = plan.dropout_keys is not None
        # what inference mode makes could not be written to in the next forward
        with torch.inference_mode(False), torch.no_grad():
            matrix = plan.matrix(self.names)
            if matrix.shape == self.weights.shape and self.weights.device == self.device:
                self.weights.copy_(matrix)
            else:
                precise = self.device.type != "mps"  # which has no float64
                self.weights = matrix.to(self.device, torch.float64 if precise else torch.float32)


def _nothing(names: frozenset[str]) -> None:
    """Stands where nobody wants to be told."""


def _check_balancing(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse a loss that would carry the rows of one adapter into the gradient of another.

    A mixture of experts may add to its loss how unevenly *all* tokens of a batch are spread over
    the experts (transformers' ``load_balancing_loss_func``), which is no sum over rows.

    Raises:
        RoutingError: it does so in this forward.
    """
    config = getattr(model, "config", None)
    asked = kwargs.get("output_router_logits")
    if asked is None:
        asked = getattr(config, "output_router_logits", False)
    if asked and kwargs.get("labels") is not None:
        raise RoutingError(
            "this forward adds the load-balancing loss of the experts, which is computed of all "
            "tokens of the batch, so that the rows of one adapter would change the gradient of "
            "another. Pass output_router_logits=False, or give the adapters forwards of their own"
        )


def _is_alive(thread: int) -> bool:
    return any(t.ident == thread for t in threading.enumerate())


def _sizes(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int | None, frozenset[int]]:
    """Rows of the input and the second dimensions of all inputs with that many rows."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() >= 1]
    if not tensors:
        return None, frozenset()
    first = next((t for t in tensors if t.dim() >= 2), tensors[0])
    batch = int(first.shape[0])
    widths = {int(t.shape[1]) for t in tensors if t.dim() >= 2 and t.shape[0] == batch}
    return batch, frozenset(widths)
