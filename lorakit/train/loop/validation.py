"""Evaluations of runs on their validation parts."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from lorakit.evaluate import LossResult, example_losses, mean_loss
from lorakit.evaluate.losses import Losses
from lorakit.tasks.task import Examples
from lorakit.train.distributed import World
from lorakit.train.loop.forwards import Forwards, Share
from lorakit.train.loop.members import Failed
from lorakit.train.loop.stopping import Stopping
from lorakit.train.room import give_back_memory, is_memory_error, num_tokens
from lorakit.train.run import Run


class Validation:
    """Evaluates runs whose forwards are those of one task."""

    def __init__(self, forwards: Forwards, stopping: Stopping, world: World) -> None:
        self._forwards = forwards
        self._stopping = stopping
        self._world = world
        self._base_losses: list[tuple[Examples, tuple[int, ...], LossResult]] = []

    def evaluate(self, run: Run) -> None:
        """Evaluate one run.

        Raises:
            Stopped: somebody asked.
            LorakitError: as ``run.evaluated``; or its longest example does not fit.
        """
        job = run.job
        run.hold()
        started = time.perf_counter()
        try:
            if job.step == 0 and not run.continued:
                result = base = self._base_loss(run)
            else:
                result = base = self._loss_of(run, job.trained.name)
                if job.step == 0:
                    base = self._loss_of(run, None)
        except Failed as failed:
            raise failed.error from None
        run.evaluated(result, base.loss, time.perf_counter() - started)

    def _base_loss(self, run: Run) -> LossResult:
        """The loss of a run that begins as the base; once for all with one validation part."""
        assert run.validation is not None
        data, indices = run.validation
        for known, rows, result in self._base_losses:
            if known is data and rows == tuple(indices):
                return result
        result = self._loss_of(run, run.job.trained.name)
        self._base_losses.append((data, tuple(indices), result))
        return result

    def _loss_of(self, run: Run, adapter: str | None) -> LossResult:
        """The validation loss. Each process takes a share of the examples, unless all are
        needed for every forward."""
        assert run.validation is not None
        data, indices = run.validation
        world = self._world
        mine = slice(None) if world.sharded else slice(world.rank, None, world.size)
        # a process without a row of its own makes the first one's forward all the same, for the
        # form of its outputs; what it finds has no place below
        rows = indices[mine] if len(indices[mine]) else indices[:1]

        def losses() -> Losses:
            while True:
                found = self._losses_with_room(run, adapter, data, rows)
                if found is not None:
                    return found

        both = np.zeros((2, len(indices)))
        found = self._stopping.together(losses)
        both[:, mine] = found.sums, found.counts
        outputs = found.outputs
        if not world.sharded:
            world.sum_(torch.from_numpy(both))
            outputs = self._outputs_of_all(outputs, mine, len(indices))
        result = mean_loss(Losses(both[0], both[1].astype(np.int64), outputs))
        return dataclasses.replace(
            result, metrics=self._forwards.kind.metrics(result.loss, data, indices, outputs)
        )

    def _outputs_of_all(
        self, outputs: np.ndarray | None, mine: slice, count: int
    ) -> np.ndarray | None:
        """What all processes found, each for its own examples."""
        if outputs is None or self._world.size == 1:
            return outputs
        whole = np.zeros((count, *outputs.shape[1:]))
        whole[mine] = outputs
        self._world.sum_(torch.from_numpy(whole))
        return whole

    def _losses_with_room(
        self, run: Run, adapter: str | None, data: Examples, indices: Sequence[int]
    ) -> Losses | None:
        """Each example's loss; ``None`` if it does not fit and forwards are smaller from now on.

        Raises:
            Failed: the longest example alone does not fit.
        """
        job, task = run.job, self._forwards.task
        try:
            return example_losses(
                task.model,
                task.handle,
                adapter,
                data,
                indices,
                token_budget=job.most_tokens,
                task=task,
                on_batch=lambda *_: self._stopping.look(),
            )
        except (RuntimeError, MemoryError) as error:
            if self._world.sharded or not is_memory_error(error):
                raise
            message = str(error).strip().split("\n")[0]
        give_back_memory()
        examples = sorted((data[i] for i in indices), key=lambda e: e.size, reverse=True)
        alone = examples[0].size >= (job.most_tokens or math.inf)
        part = examples[:1] if alone else examples
        tokens = min(num_tokens(part), job.most_tokens or num_tokens(part)) // 2
        why = f"the memory was too small in an evaluation ({message})"
        self._forwards.cut_smaller([Share(run, part, 1)], tokens, why)
        return None
