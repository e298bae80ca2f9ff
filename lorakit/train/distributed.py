"""The processes of one run, as ``torchrun`` starts them: what each must know of the others.

Every process holds the whole adapter and makes the same steps with it. Of each step's examples it
takes its share; one sum over all processes then makes the shares' gradients that of the whole
batch. Only that gradient and a few numbers travel, and the base's weights where they are sharded.
The first process alone prints and writes.

Alone, a :class:`World` does nothing, so the loop reads the same in both cases.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorakit.errors import BaseError, LorakitError, SpecError, TrainingError

T = TypeVar("T")

#: how long one process waits for the others: as long as the first may take for an evaluation's
#: adapter, a checkpoint and the report together
TIMEOUT = datetime.timedelta(minutes=30)


class PeerLost(TrainingError):
    """Another process of the run has ended, or cannot be reached."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    """Its number among all, from 0."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on its machine, which is that of its GPU."""
    restarts: int = 0
    """How often torchrun's agent has started the processes again."""
    sharded: bool = False
    """Whether each holds a part of the base only, so that all must make the same forwards."""

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Put the sum over all processes in place of ``tensor``; bit for bit the same on each.

        Raises:
            PeerLost: a process has ended.
        """
        if self.size > 1:
            with _watched():
                dist.all_reduce(tensor)
        return tensor

    def copy_(self, tensor: Tensor) -> None:
        """Put the first process's values in place of ``tensor``; as :meth:`sum_`."""
        if self.size > 1:
            with _watched():
                dist.broadcast(tensor, src=0)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process; as :meth:`sum_`."""
        return bool(self.sum_(torch.tensor(float(flag))))

    def wait(self) -> None:
        """Go on when all are here; as :meth:`sum_`."""
        self.any(False)

    def share(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all.

        Raises:
            LorakitError: what ``make`` raises in the first process, in every one.
            PeerLost: a process has ended.
        """
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.first:
            try:
                made[0] = make()
            except LorakitError as error:
                made[1] = error
        with _watched():
            dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            made[1].said = not self.first
            raise made[1]
        result: T = made[0]
        return result

    def device(self, wanted: str) -> str:
        """The device that ``wanted`` means here: of several GPUs, each process has its own."""
        if self.size > 1 and torch.cuda.is_available() and wanted.startswith(("auto", "cuda")):
            return f"cuda:{self.local_rank}"
        return wanted

    def sharing(self) -> World:
        """This world with the base sharded.

        Raises:
            SpecError: there is one process.
        """
        if self.size == 1:
            raise SpecError(
                "--shard spreads the base over processes, and there is one. Start several: "
                "torchrun --nproc-per-node 2 -m lorakit.cli.main train …; or leave --shard out"
            )
        return replace(self, sharded=True)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Around forwards: where the base is sharded, they need the other processes.

        Raises:
            PeerLost: one of them has ended.
        """
        if not self.sharded:
            yield
            return
        with _watched(only=("gloo", "NCCL", "Connection closed", "connection")):
            yield


def current_world() -> World:
    """The processes that ``torch.distributed`` knows, once somebody has set it up."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not (dist.is_available() and dist.is_initialized()):
        return World(restarts=restarts)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return World(dist.get_rank(), dist.get_world_size(), local, restarts)


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Inside, the processes that torchrun started know each other; without it, one is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield current_world()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    with _watched():
        meeting: Any = dist.rendezvous("env://", timeout=TIMEOUT)  # type: ignore[attr-defined]
        store, rank, size = next(meeting)
        dist.init_process_group(
            backend, store=_fresh(store, rank, size), rank=rank, world_size=size, timeout=TIMEOUT
        )
    try:
        yield current_world()
    finally:
        dist.destroy_process_group()


def _fresh(store: Any, rank: int, size: int) -> Any:
    """A part of the store that no earlier start of these processes has used.

    torchrun's agent keeps one store over restarts, and with it the addresses of processes that
    are dead. Its count of restarts is no name for a start, for each machine has its own. So the
    first process makes one; every other asks for it under a name of its own, again unheard of, and
    says when it has it.
    """
    if rank:
        mine = uuid.uuid4().hex
        store.set(f"lorakit/asked/{rank}", mine)
        start = store.get(f"lorakit/told/{mine}").decode()
        store.set(f"lorakit/heard/{start}/{rank}", "yes")
        return dist.PrefixStore(start, store)  # type: ignore[attr-defined]
    start = uuid.uuid4().hex
    missing = set(range(1, size))
    until = time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"lorakit/asked/{other}"]):
                store.set(f"lorakit/told/{store.get(f'lorakit/asked/{other}').decode()}", start)
        missing = {k for k in missing if not store.check([f"lorakit/heard/{start}/{k}"])}
        if time.monotonic() > until:
            raise RuntimeError(f"processes {sorted(missing)} have not begun")
        time.sleep(0.01)
    return dist.PrefixStore(start, store)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _watched(only: tuple[str, ...] = ("",)) -> Iterator[None]:
    """Say what torch's errors of a broken connection mean.

    Args:
        only: words, one of which must be in the error.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LorakitError) or not any(word in str(error) for word in only):
            raise
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        reason = re.sub(r"^\[\S+\] ", "", reason)  # a place in gloo's source
        raise PeerLost(
            "another process of this run has ended or cannot be reached; its own message, if it "
            f"had time for one, is above or in torchrun's report ({reason})"
        ) from error


# --- a base in shards ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharded:
    """What became of a base's bytes."""

    whole: int
    """All parameters together."""
    here: int
    """Those that this process keeps between forwards."""


def shard_(model: nn.Module, device_type: str) -> Sharded:
    """Spread the weights of the body's blocks over the processes, in place (FSDP2).

    A block's weights are gathered when it runs, forwards and backwards, and let go behind it. The
    input embedding and the head stay whole in every process, since the head is called apart, a
    few positions at a time; so do norms and biases, which are small and are read at any time.

    Args:
        model: frozen; adapters on it stay whole.
        device_type: where its weights are, such as ``"cpu"``.

    Raises:
        BaseError: there are no blocks, or their weights are stored in a way that cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    body = getattr(model, "base_model", model)  # it is called for every forward, apart or within
    blocks = _blocks(body)
    whole = _bytes(model)
    odd = [n for n, p in blocks.named_parameters() if type(p) is not nn.Parameter]
    odd += [n for n, p in blocks.named_parameters() if not p.is_floating_point()]
    if odd:
        raise BaseError(
            f"a quantised base cannot be sharded ({odd[0]} holds packed weights). Leave --shard "
            "or --quantize out: quantised, a base is a quarter as large in every process"
        )
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    apart = {id(p) for block in blocks for p in block.parameters() if p.ndim > 1}
    kept = {p for p in body.parameters() if id(p) not in apart}
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    # the root has nothing of its own: it lets one block's weights come while another still runs
    kept = set(body.parameters()) - {p for block in blocks for p in block.parameters()} | kept
    fully_shard(body, mesh=mesh, ignored_params=kept)
    # nothing changes a block's output in place, which is what this warns of
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return Sharded(whole, _bytes(model))


def _blocks(body: nn.Module) -> nn.ModuleList:
    """The list of modules with most parameters."""
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise BaseError(
            f"{type(body).__name__} has no list of blocks, so it cannot be sharded. Leave --shard "
            "out"
        )
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def _bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters in this process, adapters left out."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        total += here.numel() * here.element_size()
    return total
