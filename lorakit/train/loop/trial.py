"""Whether the largest forward fits, found out before the first step.

A GPU's allocator raises where it has no more, so the forward is simply made. On a CPU the kernel
ends the process instead; there the need is measured on an eighth of it and compared with what is
free.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.errors import TrainingError
from lorakit.train.distributed import World
from lorakit.train.loop.forwards import Forwards, Share, taken, tokens_of
from lorakit.train.loop.members import Failed, Members
from lorakit.train.mode import training_mode
from lorakit.train.randomness import seeded
from lorakit.train.room import (
    MARGIN,
    PeakMemory,
    available_bytes,
    give_back_memory,
    is_memory_error,
    num_tokens,
)
from lorakit.train.run import Run

#: tokens from which a measured forward tells more of its tokens than of what any forward needs
_TELLING_TOKENS = 64

#: a run enters untried where so many times what a token was found to need would fit, as its ranks
#: and targets may differ from those that were measured
_BEYOND_DOUBT = 4

logger = logging.getLogger(__name__)


class Trial:
    """Tries forwards, and keeps what was learnt of them."""

    def __init__(self, forwards: Forwards, members: Members, world: World) -> None:
        self._forwards = forwards
        self._members = members
        self._world = world
        self._on_cpu = forwards.task.device.type == "cpu"
        self.bytes_per_token = 0.0
        """Of a forward and its backward, where it was measured."""
        self._longest = 0
        """Tokens of the longest example of those that were measured, in full."""

    def make(self, run: Run) -> None:
        """The largest forward with this run in it; nothing is changed by it.

        Raises:
            Failed: the memory has no room for one of its examples, or for its optimizer.
        """
        if self._surely_fits(run):
            return
        shares: list[Share] = []
        held = self._held_back(run)
        model = self._forwards.task.model
        with training_mode(model, self._members.adapted), seeded(run.job.settings.seed):
            try:
                while tokens_of(shares := self._largest(run)) > self._forwards.proven:
                    if self._on_cpu:
                        self._compare_with_free(shares)
                        break
                    if self._forwards.with_room(shares) is not None:
                        break
            except Failed:
                raise
            except Exception:
                if len(shares) <= 1:
                    raise
                logger.debug("a shared forward failed", exc_info=True)  # its round will tell why
            finally:
                del held
                for one in self._members:
                    one.job.clear_gradient()
                give_back_memory(collect=False)

    def _largest(self, run: Run) -> list[Share]:
        members = self._members
        own = run.job.largest_part()
        if self._forwards.task.whole is not None:
            return [Share(run, run.job.window().examples, 1)]
        shares = [Share(run, own, 1)]
        room = self._forwards.budget(members) - num_tokens(own)
        for other in members if members.shares(run) else ():
            together = members.shares(other) and members.kin(other) == members.kin(run)
            if other is not run and together and room > 0:
                try:
                    queue = list(other.job.largest_part())[::-1]
                except Exception:
                    logger.debug("an example cannot be had", exc_info=True)  # its round will tell
                    continue
                examples = taken(queue, other.job, room, first=False)
                room -= num_tokens(examples)
                shares += [Share(other, examples, 1)] if examples else []
        return shares

    def _surely_fits(self, run: Run) -> bool:
        """Whether it does by far, on a CPU, after what was measured of an earlier run."""
        job = run.job
        if not self._on_cpu or not self.bytes_per_token:
            return False
        if self._forwards.task.whole is not None or job.longest > self._longest:
            return False  # what a token needs may depend on how many there are, or on the text
        tokens = max(self._forwards.budget(self._members), job.most_tokens or math.inf)
        free = self._free(run)
        return free is not None and _BEYOND_DOUBT * self.bytes_per_token * tokens <= MARGIN * free

    def _free(self, run: Run) -> int | None:
        """Bytes that this process may take beside the optimizer of a run; ``None``: not known."""
        free = available_bytes()
        if free is None:
            return None
        if self._world.size > 1:  # those of this machine share it
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", self._world.size))
        return max(0, free - run.job.bytes_to_come)

    def _held_back(self, run: Run) -> Tensor | None:
        """Memory that the optimizer takes from its first step on, held during the trial.

        Raises:
            Failed: there is not as much.
        """
        size = run.job.bytes_to_come
        if self._on_cpu:  # where it is subtracted from what is free
            return None
        try:
            return torch.empty(size, dtype=torch.uint8, device=self._forwards.task.device)
        except (RuntimeError, MemoryError) as error:
            if not is_memory_error(error):
                raise
            give_back_memory()
            told = (
                f"Not begun: the memory has no room for the optimizer's averages "
                f"({size / 2**20:,.0f} MB). What would help: --optimizer adamw8bit, or fewer "
                "trained parameters"
            )
            raise Failed(run, TrainingError(told)) from error

    # --- on a CPU --------------------------------------------------------------------------

    def _compare_with_free(self, shares: Sequence[Share]) -> None:
        """Make forwards smaller if a shortened copy of the largest tells that it does not fit.

        If that leaves a doubt, one twice as long is measured too: their difference tells what each
        token needs.
        """
        free = self._free(shares[0].run)
        tokens = tokens_of(shares)
        small = self._smaller(shares, 1 / 8)
        needed = self._measured(small)
        if needed is not None and tokens_of(small) >= _TELLING_TOKENS:
            self.bytes_per_token = max(self.bytes_per_token, needed / tokens_of(small))
            self._longest = max(self._longest, *(share.run.job.longest for share in shares))
        if free is None or needed is None or needed * tokens <= MARGIN * free * tokens_of(small):
            return
        larger, constant = self._smaller(shares, 1 / 4), 0.0
        each = needed / tokens_of(small)
        if tokens_of(larger) > tokens_of(small) and 2 * needed < MARGIN * free:
            more = (self._measured(larger) or 0) - needed
            each = max(more, 0) / (tokens_of(larger) - tokens_of(small))
            constant = max(0.0, needed - each * tokens_of(small))
        fit = int((MARGIN * free - constant) / each) if each else tokens
        if fit >= tokens:
            return
        fit = max(fit, 0)
        why = f"the memory that is free ({free / 2**20:,.0f} MB) has room for about {fit} tokens"
        run, part, divisor = shares[0]
        longest = max(part, key=lambda example: example.size)
        if longest.size > fit:
            shares = [Share(run, [longest], divisor)]
        self._forwards.cut_smaller(shares, fit, why)

    def _smaller(self, shares: Sequence[Share], part: float) -> list[Share]:
        """Shares that need about as much memory for each token."""
        smaller = self._forwards.task.smaller
        return [share._replace(examples=smaller(share.examples, part)) for share in shares]

    def _measured(self, shares: Sequence[Share]) -> int | None:
        """Bytes that a forward and its backward need at their peak; ``None``: not known."""
        proven = self._forwards.proven
        with PeakMemory() as memory:
            if self._forwards.with_room(shares, cut=False) is None:
                return None  # an allocator refuses, which the first step meets and handles
        self._forwards.proven = proven
        return memory.grown
