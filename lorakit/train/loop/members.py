"""The runs that take part in the rounds, and which of them share forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lorakit.tasks.task import Task
from lorakit.train.run import Run


class Failed(Exception):
    """One run cannot go on."""

    def __init__(self, run: Run, error: Exception) -> None:
        self.run = run
        self.error = error


class Members:
    """The runs, in the order in which they came."""

    def __init__(self) -> None:
        self._apart: dict[Run, str | None] = {}
        self._kin: dict[Run, str] = {}
        self._failed: dict[Run, Exception] = {}

    def __iter__(self) -> Iterator[Run]:
        return iter(self._apart)

    def __len__(self) -> int:
        return len(self._apart)

    def add(self, run: Run, task: Task) -> None:
        """Ask the task with whom it can share forwards."""
        adapter = run.job.snapshot()
        self._apart[run] = task.why_apart(adapter)
        self._kin[run] = task.kin(adapter)
        if len(self) > 1:
            for one, reason in self._apart.items():
                if reason is not None and (one is run or len(self) == 2):
                    self._note_apart(one, reason)

    def remove(self, run: Run) -> None:
        """It takes part no more."""
        self._apart.pop(run, None)
        self._kin.pop(run, None)
        self._failed.pop(run, None)

    @property
    def adapted(self) -> list[str]:
        """Paths of all modules that their adapters act on."""
        return [path for run in self for path in run.adapted]

    # --- who shares forwards ---------------------------------------------------------------

    def shares(self, run: Run) -> bool:
        """Whether its forwards may be those of others too."""
        return self._apart[run] is None

    def kin(self, run: Run) -> str:
        """Those that share forwards do so with the ones of the same name."""
        return self._kin[run]

    def keep_apart(self, run: Run, reason: str) -> None:
        """Let its forwards be its own from now on."""
        self._apart[run] = reason
        self._note_apart(run, reason)

    def _note_apart(self, run: Run, reason: str) -> None:
        with self.failing_alone(run):
            run.note(f"its forwards are its own: {reason}")

    # --- who cannot go on ------------------------------------------------------------------

    @property
    def going(self) -> list[Run]:
        """Those that have not failed."""
        return [run for run in self if run not in self._failed]

    def fail(self, run: Run, error: Exception) -> None:
        """It ends with the round."""
        self._failed[run] = error

    def error_of(self, run: Run) -> Exception | None:
        """Why it cannot go on."""
        return self._failed.get(run)

    def take_failed(self) -> dict[Run, Exception]:
        """Those that failed in this round, each with its reason; they are told once."""
        failed, self._failed = self._failed, {}
        return failed

    @contextlib.contextmanager
    def failing_alone(self, run: Run) -> Iterator[None]:
        """What goes wrong inside ends this run with the round, and no other."""
        try:
            yield
        except Exception as error:
            self.fail(run, error)
