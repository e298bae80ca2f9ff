"""Processes that train together, started from one with everything imported."""

from __future__ import annotations

import gc
import os
import signal
import socket
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train.child import context


def together(work: Callable[..., Any], *arguments: Any, size: int = 2, seconds: float = 90) -> list:
    """``work(world, *arguments)`` in ``size`` processes; what each gives, or how it failed.

    Args:
        work: found by its name in a module, so that a process can be given it.
        seconds: after which those that still run are killed, and ``None`` stands for them.
    """
    made = context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [made.Pipe(duplex=False) for _ in range(size)]
    processes = [
        made.Process(target=_run, args=(work, rank, size, port, pipes[rank][1], arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = []
    for process, (ours, theirs) in zip(processes, pipes, strict=True):
        theirs.close()
        try:
            found.append(ours.recv() if ours.poll(seconds) else None)
        except EOFError:  # it was killed
            found.append(None)
        process.join(10)
        process.kill()
        process.join()
    return found


def _run(work: Any, rank: int, size: int, port: int, pipe: Any, arguments: tuple) -> None:
    import torch

    from lorakit.train.distributed import joined

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        with joined() as world:
            result = work(world, *arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
        if not hasattr(error, "said"):
            result += traceback.format_exc()
    pipe.send(result)


class Hit:
    """Sends a signal to this process after a step, once; a callback without a class of ours."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def __call__(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.number)


SETTINGS = {
    "steps": 10,
    "batch_size": 5,
    "lr": 1e-2,
    "eval_every": 4,
    "samples": 2,
    "sample_tokens": 4,
    "micro_batch_tokens": 24,
    "checkpoint_every": 3,
}


def trainer(base: Path, data: Path, out: Path, **options: Any) -> Any:
    """A trainer in float64, in which sums in another order differ by rounding alone."""
    from lorakit.bases import load_base
    from lorakit.core.spec import LoRASpec
    from lorakit.data import DataSpec, load_data
    from lorakit.train import Origin, Trainer, TrainSettings

    loaded = load_base(str(base), device="cpu", dtype="float64")
    spec = DataSpec(path=(str(data),))
    return Trainer(
        loaded,
        LoRASpec(rank=3, alpha=6, dropout=0.1),
        load_data(spec, loaded.tokenizer, context_length=64),
        TrainSettings(**{**SETTINGS, **options.pop("settings", {})}),
        out,
        origin=Origin(
            base={"ref": str(base), "device": "cpu", "dtype": "float64"},
            data=spec,
        ),
        **options,
    )


def both_ways(world: Any, base: Path, data: Path, folder: Path) -> dict[str, Any]:
    """A run with the base in each process, and one with the base in shards."""
    replicated = trainer(base, data, folder / "replicated")
    replicated.run()
    sharded = trainer(base, data, folder / "sharded", shard=True)
    model = sharded._base.model
    before = [weakref.ref(p) for p in model.model.layers.parameters() if p.ndim > 1]
    result = sharded.run()
    gc.collect()
    stored = dict(model.named_parameters())
    return {
        "steps": result.steps,
        "last_loss": result.last_loss,
        "local": {
            n: tuple(p.to_local().shape) for n, p in stored.items() if hasattr(p, "to_local")
        },
        "whole": {n: tuple(p.shape) for n, p in stored.items()},
        "bytes": sum(
            (p.to_local() if hasattr(p, "to_local") else p).untyped_storage().nbytes()
            for p in stored.values()
        ),
        "still_there": sum(whole() is not None for whole in before),
        "notes": sharded.notes,
    }


def stopped(world: Any, base: Path, data: Path, out: Path, who: int, step: int) -> None:
    """A run of which one process is asked to stop after a step."""
    from lorakit.train.loop import Loop

    hit = Hit(step)
    round_once = Loop.round

    def then_hit(self: Any) -> Any:
        failed = round_once(self)
        if world.rank == who:
            hit(self.runs[0].job.step)
        return failed

    Loop.round = then_hit
    trainer(base, data, out).run()


def one_fails(world: Any, base: Path, data: Path, out: Path, who: int) -> None:
    """A run of which one process fails in the middle of its fifth step."""
    from lorakit.errors import TrainingError
    from lorakit.train.loop.forwards import Forwards

    backward = Forwards.backward

    def fail(self: Any, shares: Any) -> Any:
        if world.rank == who and shares[0].run.job.step == 4:
            raise TrainingError("this process cannot go on")
        return backward(self, shares)

    Forwards.backward = fail
    trainer(base, data, out).run()


def asked_for_something_wrong(world: Any) -> Any:
    """What only the first process finds out."""
    from lorakit.errors import InputError

    def look() -> None:
        assert world.first
        raise InputError("it is wrong")

    try:
        world.share(look)
    except InputError as error:
        return str(error), error.said
    return None
