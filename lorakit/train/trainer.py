"""``Trainer``: one adapter, from settings to a run folder."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.bases import Base, check_base
from lorakit.core.adapter import Adapter
from lorakit.core.spec import LoRASpec
from lorakit.data import TokenData, order, split
from lorakit.errors import DataError, InputError, Interrupted
from lorakit.formats import load_adapter, save_adapter
from lorakit.infer import PackedModel
from lorakit.layers import Handle, attach
from lorakit.train.callbacks import Callback, CallbackList, RunInfo, RunResult
from lorakit.train.checkpoint import latest_checkpoint
from lorakit.train.folder import RunFolder
from lorakit.train.interrupt import StopRequest
from lorakit.train.job import Job
from lorakit.train.loop import Loop, Stopped, check_first_forward
from lorakit.train.origin import (
    Origin,
    check_content,
    content_hashes,
    decisive,
    plain,
    spec_from_dict,
    spec_to_dict,
)
from lorakit.train.provenance import provenance
from lorakit.train.randomness import seeded
from lorakit.train.record import environment
from lorakit.train.report import write_report
from lorakit.train.samples import answer_samples
from lorakit.train.settings import Facts, TrainSettings

logger = logging.getLogger(__name__)

#: the adapter's name on the model while it trains
NAME = "default"


class Trainer:
    """Trains one adapter on one base.

    Everything is checked and chosen when it is made; nothing is written before :meth:`run`.

    Args:
        base: the loaded base. It is frozen, and is after the run as it was before.
        what: settings of a new adapter, or an adapter to go on with (a fresh optimizer).
        data: what to train on.
        settings: how; the defaults where nothing is given.
        out: the run folder, which must not exist yet.
        validation: what to evaluate on; otherwise a part of ``data`` is held out by prompt,
            as ``settings.validation_fraction`` says.
        callbacks: who is told what happens.
        origin: how base and data were loaded, where that is more than they know themselves;
            written to run.yaml so that the run can be resumed.
        extra: further sections of run.yaml.
        allow_other_base: go on with an adapter although its base has other weights.

    Raises:
        SpecError: settings that are impossible or cannot act.
        DataError: there is nothing to train on.
        BaseError: ``what`` belongs to another base.
    """

    def __init__(
        self,
        base: Base,
        what: LoRASpec | Adapter,
        data: TokenData,
        settings: TrainSettings | None = None,
        out: str | os.PathLike[str] = "run",
        *,
        validation: TokenData | None = None,
        callbacks: Iterable[Callback] = (),
        origin: Origin | None = None,
        extra: dict[str, Any] | None = None,
        allow_other_base: bool = False,
    ) -> None:
        self._base = base
        self._what = what
        self._data = data
        self._validation_data = validation
        self._callbacks = list(callbacks)
        self._origin = origin or Origin.of(base, data, validation)
        self._extra = dict(extra or {})
        self._folder = RunFolder(Path(out))
        self._resuming = False
        self._content = content_hashes(base, data, validation)
        self.notes: list[str] = []
        """Choices that were made, each with its reason."""
        if isinstance(what, Adapter):
            self.notes += check_base(what, base.identity, allow_other=allow_other_base)
        self._choose(settings or TrainSettings())

    @property
    def settings(self) -> TrainSettings:
        """The settings with every choice made."""
        return self._settings

    # --- choices ---------------------------------------------------------------------------

    def _choose(self, settings: TrainSettings) -> None:
        """Split the data and resolve the settings."""
        if not len(self._data):
            raise DataError("there is no example to train on; see lorakit preview")
        training, held = self._split(settings)
        config = getattr(self._base.model, "config", None)
        facts = Facts(
            num_examples=len(training),
            num_validation=len(held),
            hidden_size=getattr(config, "hidden_size", None),
            device=self._base.placement.device.type,
        )
        if self._validation_data is None:
            fraction = settings.held_out(len(self._data))
            settings = dataclasses.replace(settings, validation_fraction=fraction)
        else:
            settings = dataclasses.replace(settings, validation_fraction=0.0)
        self._settings, notes = settings.resolve(facts)
        self.notes += notes
        self._training = training
        evaluated = _pick(held, self._settings.eval_rows, settings.seed)
        source = self._data if self._validation_data is None else self._validation_data
        self._validation = (source, evaluated) if evaluated else None

    def _split(self, settings: TrainSettings) -> tuple[np.ndarray, np.ndarray]:
        """Indices to train on (of the data) and to evaluate on (of the validation's source)."""
        everything, none = np.arange(len(self._data)), np.arange(0)
        if self._validation_data is not None:
            if settings.validation_fraction:
                raise InputError(
                    f"validation_fraction is {settings.validation_fraction:g}, but there is "
                    "validation data; give one of them"
                )
            if not len(self._validation_data):
                raise DataError("the validation data holds no example that can be used")
            return everything, np.arange(len(self._validation_data))
        fraction = settings.held_out(len(everything))
        if not fraction:
            reason = (
                "as asked"
                if settings.validation_fraction == 0
                else f"{len(everything)} examples, too few to hold some out"
            )
            self.notes.append(
                f"there is no validation ({reason}), so the adapter kept is that of the last step"
            )
            return everything, none
        training, held = split(self._data, fraction, settings.seed)
        if not len(held):
            self.notes.append(
                "there is no validation (all rows share one prompt), so the adapter kept is that "
                "of the last step"
            )
        else:
            self.notes.append(
                f"{len(held)} of {len(everything)} rows are held out for validation, in whole "
                "prompts (no validation data was given)"
            )
        return training, held

    # --- running ---------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Train, and leave the adapter in ``out/adapter``.

        Raises:
            InputError: ``out`` is taken; nothing in it was touched.
            Interrupted: Ctrl-C or SIGTERM; the state is saved and the run can be resumed.
            TrainingError: a loss that is not finite, a full disk; the last good state is saved.
            TargetError: targets that do not fit the base, or are never called.
        """
        with CallbackList(self._callbacks) as events, seeded(self._settings.seed):
            handle = attach(
                self._base.model,
                self._what,
                NAME,
                trainable=True,
                seed=self._settings.seed,
                allow_other_base=True,  # it was checked against the base as it was loaded
            )
            try:
                return self._run(handle, events)
            finally:
                handle.detach()

    def _run(self, handle: Handle, events: CallbackList) -> RunResult:
        spec = handle.snapshot(NAME).spec
        job = Job(NAME, handle, self._data, self._training, self._settings, dropout=spec.dropout)
        packed = PackedModel(self._base.model, handle)
        check_first_forward(packed, job)
        if not self._resuming:
            self.notes += packed.notes
            self._create(spec)
        with self._folder.locked(), StopRequest() as stop:
            self._folder.clean()
            checkpoint, damaged = latest_checkpoint(self._folder.checkpoints)
            metrics = self._folder.open_metrics(
                None if checkpoint is None else checkpoint.state["metrics_length"]
            )
            try:
                loop = Loop(
                    packed,
                    job,
                    continued=isinstance(self._what, Adapter),
                    validation=self._validation,
                    events=events,
                    folder=self._folder,
                    metrics=metrics,
                    stop=stop,
                    keep=self._keep,
                    decided=decisive(self._folder.read_settings()),
                )
                if checkpoint is not None:
                    loop.load(checkpoint)
                self._tell_start(job, events)
                told = [f"the run goes on after step {job.step}"] if self._resuming else self.notes
                for text in [*told, *damaged]:
                    events.on_note(text)
                return self._train(loop, job, handle, events, stop)
            finally:
                metrics.close()

    def _train(
        self, loop: Loop, job: Job, handle: Handle, events: Callback, stop: StopRequest
    ) -> RunResult:
        try:
            loop.run()
        except Stopped:
            if job.best is None or job.best.step == 0:
                self._keep(job)
            events.on_end(self._result(loop, job, "interrupted"))
            name = stop.received.name if stop.received is not None else "a request"
            raise Interrupted(
                f"stopped by {name} after step {job.step} of {job.total_steps}; the state is "
                f"saved. Go on with: lorakit train --resume {self._folder.path}"
            ) from None
        return self._finish(loop, job, handle, events)

    def _finish(self, loop: Loop, job: Job, handle: Handle, events: Callback) -> RunResult:
        if job.best is not None and job.best.step == 0 and job.start_loss is not None:
            loop.note(
                f"no evaluation was below the one before the first step ({job.start_loss:.4f}), "
                "so the adapter kept is the one that the run began with. Try a lower --lr"
            )
        if loop.layers is not None:
            loop.note(loop.layers)
        job.restore_best()
        self._keep(job)
        self._sample(loop, handle)
        try:
            write_report(self._folder.path)
        except Exception as error:  # the adapter is there; a page about it is not worth the run
            logger.debug("the report failed", exc_info=True)
            loop.note(f"report.html could not be written: {type(error).__name__}: {error}")
        result = self._result(loop, job, "early stop" if job.stopped_early else "finished")
        self._folder.write_result(result_to_dict(result))
        events.on_end(result)
        return result

    def _create(self, spec: LoRASpec) -> None:
        start = self._what if isinstance(self._what, Adapter) else None
        sections = {
            **self._origin.to_dict(self._base),
            "lora": spec_to_dict(self._what if isinstance(self._what, LoRASpec) else spec),
            "train": self._settings.to_dict(),
            **plain(self._extra),
            "content": self._content,
            "data_report": plain(self._data.report.to_dict()),
            **(
                {}
                if self._validation_data is None
                else {"validation_report": plain(self._validation_data.report.to_dict())}
            ),
            **environment(),
        }
        self._folder.create(sections, start, self.notes)

    def _tell_start(self, job: Job, events: Callback) -> None:
        events.on_start(
            RunInfo(
                out=self._folder.path,
                total_steps=job.total_steps,
                first_step=job.step,
                base=str(self._base.ref),
                device=str(self._base.placement.device),
                num_trainable=job.num_parameters,
                has_validation=self._validation is not None,
                settings=self._folder.read_settings(),
            )
        )

    def _keep(self, job: Job) -> None:
        """Save the adapter as it is now."""
        save_adapter(
            job.snapshot().with_(
                base=self._base.identity,
                provenance=provenance(
                    job,
                    self._data,
                    self._validation_data,
                    self._what if isinstance(self._what, Adapter) else None,
                ),
                task_type="CAUSAL_LM",
            ),
            self._folder.adapter,
        )

    def _sample(self, loop: Loop, handle: Handle) -> None:
        if self._validation is None or not self._settings.samples:
            return
        samples = answer_samples(
            self._base,
            handle,
            NAME,
            *self._validation,
            count=self._settings.samples,
            max_new_tokens=self._settings.sample_tokens,
        )
        if samples:
            self._folder.write_samples(samples)

    def _result(self, loop: Loop, job: Job, ending: Any) -> RunResult:
        return RunResult(
            out=self._folder.path,
            adapter=self._folder.adapter if self._folder.adapter.is_dir() else None,
            steps=job.step,
            ending=ending,
            last_loss=job.last_loss,
            base_loss=job.base_loss,
            best_loss=None if job.best is None else job.best.loss,
            best_step=None if job.best is None else job.best.step,
            seconds=loop.seconds,
        )

    # --- resuming --------------------------------------------------------------------------

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike[str],
        *,
        base: Base | None = None,
        data: TokenData | None = None,
        validation: TokenData | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> RunResult:
        """Go on with a run exactly where its last checkpoint is; a finished one gives its result.

        Args:
            out: the run folder.
            base, data, validation: to spare their loading, or where the run's were made by a
                program.
            callbacks: who is told what happens.

        Raises:
            InputError: there is no run, another process runs it, or data that did not come from
                files is not given again.
            DataError, BaseError: data or base changed since the run began.
        """
        folder = RunFolder(Path(out))
        sections = folder.read_settings()
        done = finished_run(out)
        if done is not None:
            return done
        origin = Origin.from_dict(sections)
        if base is None:
            base = origin.load_base()
        if data is None:
            data = origin.load_data(base)
        if validation is None:
            validation = origin.load_validation(base)
        content = sections.get("content") or {}
        if validation is None and content.get("validation") is not None:
            raise InputError(
                "this run's validation data did not come from files that lorakit read; give it "
                "again: Trainer.resume(out, validation=…)"
            )
        what = (
            load_adapter(folder.start)
            if folder.start.is_dir()
            else spec_from_dict(sections["lora"])
        )
        trainer = cls(
            base,
            what,
            data,
            TrainSettings.from_dict(sections["train"]),
            out,
            validation=validation,
            callbacks=callbacks,
            allow_other_base=True,  # decided when the run began; the base itself is compared here
        )
        check_content(content, trainer._content)
        trainer._resuming = True
        return trainer.run()


def _pick(indices: np.ndarray, rows: int | None, seed: int) -> list[int]:
    """``rows`` of ``indices``, always the same ones, in their own order; all if 0."""
    if rows and rows < len(indices):
        indices = indices[np.sort(order(len(indices), seed, 0)[:rows])]
    return [int(index) for index in indices]


def finished_run(out: str | os.PathLike[str]) -> RunResult | None:
    """The result of a run that has ended; ``None`` while it can go on.

    Raises:
        InputError: there is no run, or it is damaged.
    """
    folder = RunFolder(Path(out))
    folder.read_settings()
    stored = folder.read_result()
    if stored is None:
        return None
    if not (folder.adapter / "adapter_config.json").is_file():
        raise InputError(
            f"{folder.path} has ended, but its adapter is missing. Delete {folder.result} and "
            "resume the run: it is saved again from the last checkpoint."
        )
    return RunResult(**{**stored, "out": folder.path, "adapter": folder.adapter})


def result_to_dict(result: RunResult) -> dict[str, Any]:
    """Plain data, with paths as text."""
    values: dict[str, Any] = plain(dataclasses.asdict(result))
    return values
