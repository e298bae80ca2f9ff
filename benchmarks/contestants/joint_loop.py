"""lorakit's joint step: K adapters in one forward and backward, each with its own optimizer.

``joint_loop:joint`` is that, ``joint_loop:one_by_one`` the same adapters in forwards of their own,
and ``joint_loop:one_adapter`` a single adapter over the same tokens. Adapters are attached in the
step that warms up, so that their memory counts as above the loaded base.
"""

from __future__ import annotations

from typing import Any

from benchmarks.contestants import task as shared


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    base, data, batches = shared.load(task)
    return {"task": task, "base": base, "data": data, "batches": batches, "loops": None}


def _begin(state: dict[str, Any]) -> None:
    from lorakit.infer.packed import PackedModel
    from lorakit.layers import attach
    from lorakit.tasks import CausalTask
    from lorakit.tasks.causal import CAUSAL
    from lorakit.train.interrupt import StopRequest
    from lorakit.train.job import Job
    from lorakit.train.loop import Loop
    from lorakit.train.run import Run
    from lorakit.train.trained import TrainedAdapter

    task, base, data = state["task"], state["base"], state["data"]
    one = task["variant"] == "one_adapter"
    ranks = [shared.RANK] if one else task["ranks"]
    batch = task["batch_size"]
    rows = shared.job_rows(state["batches"], len(ranks))
    handle, jobs = None, []
    for number, rank in enumerate(ranks):
        name = f"job {number}"
        if handle is None:
            handle = attach(base.model, spec(rank), name, trainable=True, seed=number)
            handle.activate(None)
        else:
            handle.add(spec(rank), name, trainable=True, seed=number)
        trained = TrainedAdapter(name, handle)
        job = Job(trained, data, unshuffled(rows[number]), settings(batch // len(ranks)))
        jobs.append(job)
    packed = PackedModel(base.model, handle)
    if packed.fused is None and not task["base"].startswith("random:tiny"):
        raise RuntimeError(f"the layers do not run fused: {packed.notes}")
    budget, task_ = task.get("token_budget"), CausalTask(packed)
    runs = [Run(job, task=task_, kind=CAUSAL, world=_world(), continued=False, validation=None,
                events=_events(), folder=_Folder(), metrics=None, keep=_nothing, decided={},
                hold=_nothing) for job in jobs]  # fmt: skip
    if task["variant"] == "one_by_one":
        loops = [Loop(task_, world=_world(), stop=StopRequest(), budget=budget) for _ in runs]
    else:
        loops = [Loop(task_, world=_world(), stop=StopRequest(), budget=budget)] * len(runs)
    for loop, run in zip(loops, runs, strict=True):
        loop.enter(run)
    state["loops"], state["device"] = list(dict.fromkeys(loops)), packed.device


def step(state: dict[str, Any], i: int) -> dict[str, float]:
    import torch

    if state["loops"] is None:
        _begin(state)
    _LOSSES.clear()
    _TOKENS.clear()
    for loop in state["loops"]:
        failed = loop.round()
        if failed:
            raise next(iter(failed.values()))
    if state["device"].type == "cuda":
        torch.cuda.synchronize()
    return {"loss": sum(_LOSSES) / len(_LOSSES), "tokens": float(sum(_TOKENS))}


_LOSSES: list[float] = []
_TOKENS: list[int] = []


def unshuffled(rows: list[int]) -> list[int]:
    """Rows in such an order that a job's own shuffling, with seed 0, leaves them as they were."""
    from lorakit.data import order

    arranged = [0] * len(rows)
    for place, row in zip(order(len(rows), 0, 0).tolist(), rows, strict=True):
        arranged[place] = row
    return arranged


def spec(rank: int) -> Any:
    from lorakit import LoRASpec

    return LoRASpec(rank=rank, alpha=shared.ALPHA)


def settings(batch: int) -> Any:
    from lorakit.train.settings import TrainSettings

    return TrainSettings(
        steps=10**6,
        batch_size=batch,
        lr=shared.LR,
        warmup=0,
        schedule="constant",
        checkpoint_every=10**6,
        micro_batch_tokens=2048,
    )


def _world() -> Any:
    from lorakit.train.distributed import World

    return World()


def _events() -> Any:
    from lorakit.train.callbacks import Callback

    class Notes(Callback):
        def on_step(self, metrics: Any) -> None:
            _LOSSES.append(metrics.loss)
            _TOKENS.append(metrics.tokens)

    return Notes()


def _nothing(*_: Any) -> None:
    """Nothing is kept of a measurement."""


class _Folder:
    """Where nothing is written."""

    path = checkpoints = None
