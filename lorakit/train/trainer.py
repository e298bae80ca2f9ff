"""``Trainer``: one adapter, from settings to a run folder."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.bases import Base, check_base
from lorakit.core.adapter import Adapter
from lorakit.core.spec import LoRASpec
from lorakit.errors import BaseError, DataError, InputError, Interrupted, SpecError
from lorakit.formats import load_adapter, save_adapter
from lorakit.layers.initial import Initial
from lorakit.tasks.causal import CAUSAL
from lorakit.tasks.registry import kind_of, named
from lorakit.tasks.task import Examples, Kind
from lorakit.train.beginning import Beginning, Calibrate
from lorakit.train.callbacks import Callback, CallbackList, Ending, RunInfo, RunResult
from lorakit.train.checkpoint import Checkpoint, latest_checkpoint
from lorakit.train.choices import choose
from lorakit.train.distributed import PeerLost, World, current_world, shard_
from lorakit.train.folder import MetricsFile, RunFolder
from lorakit.train.full import Full, check_full, reidentify, save_model
from lorakit.train.host import Host
from lorakit.train.job import Job
from lorakit.train.loop import check_first_forward
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
from lorakit.train.randomness import seed_all
from lorakit.train.record import environment
from lorakit.train.report import write_report
from lorakit.train.result import finished_run, result_of, result_to_dict
from lorakit.train.run import Run
from lorakit.train.samples import Samples
from lorakit.train.settings import TrainSettings
from lorakit.train.trained import TrainedAdapter

logger = logging.getLogger(__name__)

#: the adapter's name on the model while it trains
NAME = "default"


class Trainer:
    """Trains one adapter on one base; or the base itself, with :class:`~lorakit.train.full.Full`.

    Everything is checked and chosen when it is made; nothing is written before :meth:`run`.

    Args:
        base: the loaded base. It is frozen, and is after the run as it was before; with ``Full()``
            it is what is trained, and stays so.
        what: settings of a new adapter, the values that it begins with, or an adapter to go on
            with (a fresh optimizer); ``Full()`` trains all weights of the base.
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
        world: the processes that train together; by default those that ``torch.distributed``
            knows. Each makes a trainer with the same arguments; the first alone writes, and
            calls its callbacks.
        shard: spread the base over these processes. It stays spread after the run.
        calibrate: for initialisations that look at more than the base's weights; such as
            ``partial(lorakit.workflows.calibrate.calibrate, base)``.
        task: what the examples are, and what is minimised.

    Raises:
        SpecError: settings that are impossible or cannot act.
        DataError: there is nothing to train on.
        BaseError: ``what`` belongs to another base, or its weights cannot be trained.
    """

    def __init__(
        self,
        base: Base,
        what: LoRASpec | Adapter | Initial | Full,
        data: Examples,
        settings: TrainSettings | None = None,
        out: str | os.PathLike[str] = "run",
        *,
        validation: Examples | None = None,
        callbacks: Iterable[Callback] = (),
        origin: Origin | None = None,
        extra: dict[str, Any] | None = None,
        allow_other_base: bool = False,
        world: World | None = None,
        shard: bool = False,
        calibrate: Calibrate | None = None,
        task: Kind = CAUSAL,
    ) -> None:
        self._kind = task
        world = world or current_world()
        self._world = world.sharing() if shard else world
        self._base = base
        self._beginning = Beginning(base, what, calibrate)
        self._data = data
        self._validation_data = validation
        self._callbacks = list(callbacks) if self._world.first else []
        self._origin = origin or Origin.of(base, data, validation, task)
        self._extra = dict(extra or {})
        self._folder = RunFolder(Path(out))
        self._resuming = False
        self._shared_notes: list[str] = []
        self.leaving: str | None = None
        """Why the run is to end after this step, if it is."""
        self.until: int | None = None
        """Of a run that goes on: the last step whose checkpoint is looked at."""
        self._kept: int | None = None
        """The step whose weights were saved last."""
        self._content = content_hashes(base, data, validation)
        self.notes: list[str] = []
        """Choices that were made, each with its reason."""
        if isinstance(what, Adapter):
            self.notes += check_base(what, base.identity, allow_other=allow_other_base)
        if self.is_full:
            self._check_full()
        wanted = settings or TrainSettings()
        chosen = choose(
            base,
            self._beginning,
            data,
            validation,
            wanted,
            processes=self._world.size,
            out=self.out,
        )
        self._settings, self._training = chosen.settings, chosen.training
        self._validation = chosen.validation
        self.notes += chosen.notes
        if not self._folder.settings.exists():  # a run that goes on was checked when it began
            self._beginning.check(wanted)

    @property
    def settings(self) -> TrainSettings:
        """The settings with every choice made."""
        return self._settings

    @property
    def validation(self) -> tuple[Examples, Sequence[int]] | None:
        """The data that is evaluated on, and which of it; ``None`` if there is none."""
        return self._validation

    @property
    def is_full(self) -> bool:
        """Whether it trains the base itself."""
        return self._beginning.is_full

    def _check_full(self) -> None:
        if self._world.sharded:
            raise SpecError(
                "--shard spreads a frozen base over processes, and --full trains it. Leave one of "
                "them out: without --shard each process holds all weights and shares each batch"
            )
        check_full(self._base)

    # --- running ---------------------------------------------------------------------------

    @property
    def out(self) -> Path:
        """The run folder."""
        return self._folder.path

    def run(self) -> RunResult:
        """Train, and leave the adapter in ``out/adapter``; :func:`train_together` of one.

        Raises:
            InputError: ``out`` is taken; nothing in it was touched.
            Interrupted: Ctrl-C or SIGTERM; the state is saved and the run can be resumed.
            TrainingError: a loss that is not finite, a full disk; the last good state is saved.
            TargetError: targets that do not fit the base, or are never called.
        """
        from lorakit.train.together import train_together

        (result,) = train_together([self])
        if isinstance(result, Exception):
            raise result
        return result

    def leave(self, reason: str) -> None:
        """End this run between two steps, with its state saved; it can be resumed.

        For callbacks of this run, or of another that is trained together with it.
        """
        self.leaving = reason

    @property
    def data(self) -> Examples:
        """What it trains on, those held out included."""
        return self._data

    @property
    def num_rows(self) -> int:
        """Examples of the data, those held out included."""
        return len(self._data)

    @property
    def base(self) -> Base:
        """What it trains on."""
        return self._base

    @property
    def kind(self) -> Kind:
        """Of the task."""
        return self._kind

    @property
    def world(self) -> World:
        """The processes that train together."""
        return self._world

    def num_parameters(self) -> int:
        """About how many parameters it trains."""
        return self._beginning.num_parameters()

    def enter(self, host: Host, closing: contextlib.ExitStack) -> Run:
        """Put what is trained on the model, and make or open the run folder.

        Args:
            host: the model, and who else is on it.
            closing: takes what is to be undone when the run ends.

        Raises:
            LorakitError: as :meth:`run`.
        """
        self.leaving = None
        self._check_unchanged()
        events = closing.enter_context(CallbackList(self._callbacks))
        closing.callback(host.generators.forget, self)
        host.generators.hold(self)
        seed_all(self._settings.seed)
        if self._world.sharded:
            # nobody may keep what the handle would otherwise switch on again at the end
            self._base.model.requires_grad_(False)
        begun = self._beginning.make(self._settings, self._data, self._training)
        trained = host.put(begun, NAME, self._settings.seed)
        closing.callback(host.remove, trained)
        job = Job(trained, self._data, self._training, self._settings, world=self._world)
        closing.callback(self._leave_base, job)
        job.share()  # a decomposition may differ by rounding
        task, notes = host.task(self._kind, self._settings.recompute, self._share_base)
        self._check_forwards(task.mode)
        check_first_forward(task, job, self._kind)
        if not self._resuming:
            self.notes += notes
            self._world.share(lambda: self._create(job))
            self._check_seen()
        closing.enter_context(self._owned())
        samples = self._samples()
        if samples is not None and self.is_full:
            samples.of_base()
        checkpoint, damaged = self._world.share(
            lambda: latest_checkpoint(self._folder.checkpoints, until=self.until)
        )
        metrics = closing.enter_context(self._metrics(checkpoint))
        run = Run(
            job,
            task=task,
            kind=self._kind,
            continued=not self._beginning.is_base,
            validation=self._validation,
            events=events,
            folder=self._folder,
            metrics=metrics,
            hold=partial(host.generators.hold, self),
            keep=self._keep,
            decided=decisive(self._folder.read_settings()),
            world=self._world,
        )
        if checkpoint is not None:
            run.load(checkpoint)
        self._tell_start(job, events)
        told = self.notes
        if self._resuming:
            told = [f"the run goes on after step {job.step}", *self._shared_notes]
        for text in [*told, *damaged]:
            events.on_note(text)
        return run

    def _check_unchanged(self) -> None:
        """Refuse a base that was trained, or merged into, since the trainer was made."""
        now = content_hashes(self._base, self._data, None)["base"]
        if now != self._content["base"]:
            raise BaseError(
                f"the weights of {self._base.ref} changed in memory since this run was set up "
                "(all of them were trained). Load the base again for another run"
            )

    def _leave_base(self, job: Job) -> None:
        """Say of a base whose weights have changed what it is now."""
        if self.is_full and job.weights_step:
            reidentify(self._base)

    # --- several processes -----------------------------------------------------------------

    def _share_base(self) -> list[str]:
        """Spread the base if that is wanted; a sentence on the processes, if there are several."""
        self._shared_notes = self._spread_base()
        return self._shared_notes

    def _spread_base(self) -> list[str]:
        world = self._world
        if world.size == 1:
            return []
        text = f"{world.size} processes share each batch of {self._settings.batch_size}"
        if world.sharded:
            found = shard_(self._base.model, self._base.placement.device.type)
            text += (
                f"; the base's {found.whole / 2**20:,.1f} MB are {found.here / 2**20:,.1f} MB "
                "in each process between forwards, of which the embeddings are whole"
            )
        return [text]

    def _check_forwards(self, mode: str) -> None:
        """Where the base is spread, all processes must make the same number of forwards."""
        if self._world.sharded and mode == "single" and self._settings.micro_batch != 1:
            raise BaseError(
                "examples go through this base one at a time, so with --shard the processes would "
                "not make equally many forwards. Give --micro-batch 1"
            )

    def _check_seen(self) -> None:
        if not self._folder.settings.is_file():
            raise InputError(
                f"process {self._world.rank} does not see {self._folder.path}, which process 0 "
                "has made. Give as --out a place on a file system that all machines share."
            )

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        """In the process that writes: nobody else does, and no half-written file lies there."""
        if not self._world.first:
            yield
            return
        with self._folder.locked():
            self._folder.clean()
            yield

    @contextlib.contextmanager
    def _metrics(self, checkpoint: Checkpoint | None) -> Iterator[MetricsFile | None]:
        """The file of metrics as it was at the checkpoint, in the process that writes."""
        if not self._world.first:
            yield None
            return
        metrics = self._folder.open_metrics(
            None if checkpoint is None else checkpoint.state["metrics_length"]
        )
        try:
            yield metrics
        finally:
            metrics.close()

    # --- the end ---------------------------------------------------------------------------

    def interrupted(self, run: Run, why: str) -> Interrupted:
        """Save everything; what tells the user how to go on."""
        job = run.job
        self._save_for_later(run, "interrupted")
        with contextlib.suppress(PeerLost):
            self._world.wait()  # torchrun ends those who are still here when one has left
        stopped = Interrupted(
            f"stopped by {why} after step {job.step} of {job.total_steps}; the state is "
            f"saved. Go on with: {self._folder.resuming(self._kind.command)}"
        )
        stopped.said = not self._world.first
        return stopped

    def left(self, run: Run) -> RunResult:
        """Save everything, for a run that was asked to leave."""
        run.note(f"left after step {run.job.step}: {self.leaving}")
        return self._save_for_later(run, "left")

    def _save_for_later(self, run: Run, ending: Ending) -> RunResult:
        job = run.job
        job.clear_gradient()
        run.save()
        if job.best is None or job.best.step == 0:
            self._keep(job)
        result = result_of(run, self._folder, ending)
        run.events.on_end(result)
        return result

    def finish(self, run: Run, host: Host) -> RunResult:
        """The end of a run that has made its steps: its adapter, samples, report and result."""
        job = run.job
        run.save()
        if job.best is not None and job.best.step == 0 and job.start_loss is not None:
            run.note(
                f"no evaluation was below the one before the first step ({job.start_loss:.4f}), "
                f"so {'the model' if self.is_full else 'the adapter'} kept is the one that the run "
                "began with. Try a lower --lr"
            )
        if host.layers is not None:
            run.note(host.layers)
        run.restore_best()
        self._keep(job)
        samples = self._samples()
        if samples is not None and self.is_full:
            samples.of_full(job.trained.name)
        elif samples is not None:
            samples.of_adapter(host.handle, job.trained.name)
        if self._world.first:
            try:
                write_report(self._folder.path)
            except Exception as error:  # the adapter is there; a page on it is not worth the run
                logger.debug("the report failed", exc_info=True)
                run.note(f"report.html could not be written: {type(error).__name__}: {error}")
        result = result_of(run, self._folder, "early stop" if job.stopped_early else "finished")
        if self._world.first:
            self._folder.write_result(result_to_dict(result))
        self._world.wait()
        run.events.on_end(result)
        return result

    def _create(self, job: Job) -> None:
        spec = self._beginning.spec
        if spec is None and isinstance(job.trained, TrainedAdapter):
            spec = job.trained.spec
        sections = {
            **self._origin.to_dict(self._base),
            "lora": None if spec is None else spec_to_dict(spec),  # None: all weights are trained
            "train": self._settings.to_dict(),
            **({} if self._kind is CAUSAL else {"task": named(self._kind)}),
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
        self._folder.create(
            sections, self._beginning.continued, self.notes, initial=self._beginning.values
        )

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
                adapter=job.trained.name,
                settings=self._folder.read_settings(),
            )
        )

    def _keep(self, job: Job) -> None:
        """Save the adapter, or the model, as it is now."""
        if not self._world.first or self._kept == job.weights_step:
            return
        history = provenance(job, self._data, self._validation_data, self._beginning.continued)
        if self._kind is not CAUSAL:
            history["task"] = plain(named(self._kind))
        if self._beginning.values is not None:
            began = self._beginning.values.spec
            history["init"] = {"method": began.init, "rank": began.rank}
        adapter = job.snapshot()
        if adapter is None:
            history["base"] = self._base.identity.to_dict()
            save_model(self._base, self._folder.model, history)
        else:
            save_adapter(
                adapter.with_(
                    base=self._base.identity, provenance=history, task_type=self._kind.peft_type
                ),
                self._folder.adapter,
            )
        self._kept = job.weights_step

    def _samples(self) -> Samples | None:
        """The answers of the report, if any are wanted, where the model can give them."""
        first = self._world.first
        if self._validation is None or not self._settings.samples:
            return None
        if not first and not self._world.sharded:
            return None
        return Samples(
            self._base, self._kind, self._validation, self._settings, self._folder, writes=first
        )

    # --- resuming --------------------------------------------------------------------------

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike[str],
        *,
        base: Base | None = None,
        data: Examples | None = None,
        validation: Examples | None = None,
        callbacks: Iterable[Callback] = (),
        world: World | None = None,
        shard: bool = False,
        task: Kind | None = None,
    ) -> RunResult:
        """Go on with a run exactly where its last checkpoint is; a finished one gives its result.

        Args:
            out: the run folder.
            base, data, validation: to spare their loading, or where the run's were made by a
                program.
            callbacks: who is told what happens.
            world, shard: as for a new one; neither need be what it was before.
            task: the kind that the run was made with, where that is none of ``lorakit.tasks``.

        Raises:
            InputError: there is no run, another process runs it, or data whose origin the run
                did not record is not given again.
            DataError, BaseError: data or base changed since the run began.
        """
        world = world or current_world()
        done = world.share(lambda: finished_run(out))
        if done is not None:
            return done
        return cls.reopened(
            out,
            base=base,
            data=data,
            validation=validation,
            callbacks=callbacks,
            world=world,
            shard=shard,
            task=task,
        ).run()

    @classmethod
    def reopened(
        cls,
        out: str | os.PathLike[str],
        *,
        base: Base | None = None,
        data: Examples | None = None,
        validation: Examples | None = None,
        callbacks: Iterable[Callback] = (),
        world: World | None = None,
        shard: bool = False,
        task: Kind | None = None,
    ) -> Trainer:
        """A trainer that goes on with a run that has not ended, alone or with others.

        Arguments and errors as those of :meth:`resume`.
        """
        folder = RunFolder(Path(out))
        sections = folder.read_settings()
        world = world or current_world()
        kind = task or kind_of(sections.get("task"))
        origin = Origin.from_dict(sections, kind).on(world.device)
        if base is None:
            base = origin.load_base()
        try:
            data = origin.load_data(base) if data is None else data
            validation = origin.load_validation(base) if validation is None else validation
        except DataError as error:  # it was read when the run began, with the same settings
            raise DataError(
                f"{error}\nThis run began with other data. To go on with it, put the old files "
                "back; or train on the new ones in a run of its own."
            ) from error
        content = sections.get("content") or {}
        if validation is None and content.get("validation") is not None:
            raise InputError(
                "this run did not record where its validation data came from; give it again: "
                "Trainer.resume(out, validation=…)"
            )
        what: LoRASpec | Adapter | Initial | Full
        if sections["lora"] is None:
            what = Full()
        else:
            what = spec_from_dict(sections["lora"])
        if folder.start.is_dir():
            what = load_adapter(folder.start)
        elif isinstance(what, LoRASpec) and folder.initial.is_dir():
            what = Initial(load_adapter(folder.initial).with_(spec=what))
        trainer = cls(
            base,
            what,
            data,
            TrainSettings.from_dict(sections["train"]),
            out,
            validation=validation,
            callbacks=callbacks,
            allow_other_base=True,  # decided when the run began; the base itself is compared here
            world=world,
            shard=shard,
            task=kind,
        )
        check_content(content, trainer._content)
        trainer._resuming = True
        return trainer
