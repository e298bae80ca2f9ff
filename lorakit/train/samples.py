"""Answers to a few validation items before and after a run, for its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.bases import Base
from lorakit.layers import Handle
from lorakit.tasks.task import Examples, Kind
from lorakit.train.folder import RunFolder
from lorakit.train.settings import TrainSettings


class Samples:
    """Of one run.

    Args:
        validation: where the items are from, and which of it.
        writes: whether this process writes them.
    """

    def __init__(
        self,
        base: Base,
        kind: Kind,
        validation: tuple[Examples, Sequence[int]],
        settings: TrainSettings,
        folder: RunFolder,
        *,
        writes: bool,
    ) -> None:
        self._base, self._kind, self._validation = base, kind, validation
        self._settings, self._folder, self._writes = settings, folder, writes

    def of_base(self) -> None:
        """The base's answers while it is the base: before all its weights are trained."""
        if not self._folder.samples.is_file():
            self._write(self._answered(self._asked(), None, None, "base"))

    def of_full(self, name: str | None) -> None:
        """Those of the trained model, beside the base's from the beginning."""
        self._write(self._answered(self._folder.read_samples(), None, name, "full"))

    def of_adapter(self, handle: Handle | None, name: str | None) -> None:
        """The base's and the adapter's."""
        samples = self._answered(self._asked(), handle, None, "base")
        self._write(self._answered(samples, handle, name, "adapter"))

    def _asked(self) -> list[dict[str, Any]]:
        return self._kind.questions(self._base, *self._validation, self._settings.samples)

    def _answered(
        self, samples: list[dict[str, Any]], handle: Handle | None, name: str | None, key: str
    ) -> list[dict[str, Any]]:
        """The samples, each with one more answer."""
        answers = self._kind.answers(
            self._base, handle, name, *self._validation, len(samples), self._settings.sample_tokens
        )
        return [{**one, key: answer} for one, answer in zip(samples, answers, strict=True)]

    def _write(self, samples: list[dict[str, Any]]) -> None:
        if samples and self._writes:
            self._folder.write_samples(samples)
