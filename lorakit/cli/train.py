"""Train one adapter on a file of data, many at once on one base, or go on with what was begun.

The base stays as it is; what is trained is small, and ends up in RUN/adapter as a PEFT folder.
With --full all weights are trained instead, and RUN/model is a whole model, to compare with.
Whatever you leave out is chosen for your data and your machine, and said with its reason.

examples:
  lorakit train --base smollm2 --data mine.jsonl --out runs/mine
  lorakit train --base smollm2 --data F.csv --map prompt=question,completion=answer --out runs/mine
  lorakit train --base B --data F --valid V --steps 200 --lr 1e-3 --rank 16 --out runs/mine
  lorakit train --base B --data F --targets none --prefix 16 --out runs/p   # prefix tuning alone
  lorakit train --base B --data F --prefix 8 --norms --bias new --out runs/all   # beside LoRA
  lorakit train --base B --data F --full --out runs/full   # all weights; then judge both:
  lorakit eval --base B --adapter runs/mine --full runs/full --data test.jsonl --forgetting
  lorakit train --base B --data new.jsonl --from runs/mine --out runs/more
  lorakit train --resume runs/mine         # after Ctrl-C, a crash or a kill: goes on exactly
  lorakit train jobs.yaml --out runs       # many adapters, each as if alone, in shared steps
  lorakit train --each customers/ --base B --out runs      # a data file each, an adapter each
  torchrun --nproc-per-node 2 -m lorakit.cli.main train --base B --data F --out runs/mine

Not sure about the data? `lorakit preview` shows what would be trained. A run folder holds
run.yaml, metrics.jsonl, adapter/ or model/ (the best), checkpoints/ and report.html.

A file of jobs says what all share and what each has of its own, in the names of these flags:

  base: smollm2
  out: runs
  defaults: {rank: 16, steps: 200}
  jobs:
    - {name: mild, data: a.jsonl, lr: 5.0e-4}
    - {name: bold, data: b.jsonl, lr: 2.0e-3, targets: attention}
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import adapter_path
from lorakit.cli.bases import load_base_from
from lorakit.cli.flags import missing
from lorakit.cli.output import emit_json, plural, say
from lorakit.cli.rows import data_spec
from lorakit.cli.train_arguments import configure
from lorakit.cli.training import check_nothing_changes, given_of, interruptible
from lorakit.errors import InputError, SpecError, collected

if TYPE_CHECKING:
    from lorakit.bases import Base
    from lorakit.cli.jobs import Plan
    from lorakit.core.adapter import Adapter
    from lorakit.core.spec import LoRASpec
    from lorakit.train import Callback, RunResult, Trainer, TrainSettings
    from lorakit.train.distributed import World
    from lorakit.train.full import Full

__all__ = ["configure", "run"]  # what a command is made of

#: flags that act on a resumed run too; all others are in its run.yaml
_WITH_RESUME = {"resume", "json", "quiet", "debug", "command", "run", "shard"}
#: flags of an adapter that are no fields of its spec, by name; and those called otherwise
_OF_ADAPTERS = ("start", "init_examples", "eva_rho", "lora_plus_ratio", "prefix_lr_ratio")
_FLAGS = {"start": "from"}
#: fields of a spec that say nothing where no weight is adapted
_OF_LOW_RANK = (
    *("rank", "alpha", "exclude", "layers", "scaling", "dropout", "init", "variant"),
    *("rank_pattern", "alpha_pattern"),
)
#: flags that act where there are many adapters
_MANY = ("max_concurrent", "token_budget")


def run(options: argparse.Namespace) -> int:
    """Train or resume, then print where the adapter is."""
    from lorakit.train.distributed import joined

    several = "RANK" in os.environ and os.environ["RANK"] != "0"
    with interruptible("train", silent=several), joined() as world:
        if not world.first:
            options.quiet, options.json = True, False
        if options.shard:
            world = world.sharing()
        plan = _plan(options)
        if plan is not None:
            return _train_many(plan, options, world)
        if options.resume is not None:
            result = _resume(options, world)
        elif _started_before(options, world):
            result = _resume_exactly(options, options.out, world)
        elif options.lr == "auto" and not options.full and _is_causal(options):
            from lorakit.cli.tune import train_at_found_rate

            result = train_at_found_rate(options, world)
        else:
            result = _start(options, world)
    _print_result(options, result)
    return 0


def _plan(options: argparse.Namespace) -> Plan | None:
    """What is to be done with many adapters; ``None`` where there is one."""
    from lorakit.cli import jobs

    ways = [name for name in ("jobs", "each", "resume") if getattr(options, name) is not None]
    if len(ways) > 1:
        told = " and ".join("a file of jobs" if w == "jobs" else f"--{w}" for w in ways)
        raise InputError(f"{told} are given; give one of them")
    if options.jobs is not None:
        return jobs.plan_of_file(Path(options.jobs), options)
    if options.each is not None:
        return jobs.plan_of_folder(options)
    if options.resume is not None and (Path(options.resume) / jobs.JOBS_FILE).is_file():
        _check_nothing_changes(options, _MANY)
        return jobs.plan_of_runs(Path(options.resume), options)
    idle = [f"--{n.replace('_', '-')}" for n in _MANY if getattr(options, n) is not None]
    if idle:
        raise SpecError(
            f"{', '.join(idle)}: there is one adapter; it acts with a file of jobs or --each"
        )
    return None


def _train_many(plan: Plan, options: argparse.Namespace, world: World) -> int:
    from lorakit.cli import train_many

    if world.size > 1:
        raise SpecError(
            "several processes train one adapter; many adapters are trained in one process. Start "
            "this without torchrun"
        )
    return train_many.run(plan, options)


def _is_causal(options: argparse.Namespace) -> bool:
    from lorakit.cli import tasks

    return tasks.chosen_task(options, options.data)[0] == tasks.CAUSAL


def _started_before(options: argparse.Namespace, world: World) -> bool:
    """Whether torchrun's agent gives this command once more, after it has made its run folder."""
    from lorakit.train.folder import RunFolder

    if options.out is None:
        return False
    # each machine counts its own, and not those that another machine's failure made
    again = world.any(world.restarts > 0)
    return again and world.share(RunFolder(Path(options.out)).settings.is_file)


def _start(options: argparse.Namespace, world: World) -> RunResult:
    from lorakit.cli import tasks
    from lorakit.train.folder import RunFolder

    needed = {
        "base": "the model to adapt, such as smollm2",
        "data": "the file to train on",
        "out": "the run folder to make",
    }
    if lacking := missing(options, needed):
        raise InputError(
            collected("A new run needs more (an old one needs only --resume RUN)", lacking)
        )
    # what can be refused without loading anything comes first
    what_of(options)
    if options.lr == "auto":
        raise SpecError("--lr auto: the search trains causal language models; give a number")
    settings_of(options)
    world.share(RunFolder(Path(options.out)).check_new)
    options.device = world.device(options.device)
    task, why = tasks.chosen_task(options, options.data)
    if task != tasks.CAUSAL:
        callbacks = _callbacks(options, options.report_to or ()) if world.first else []
        return tasks.trainer_for(options, task, why, world, callbacks).run()
    _say(options, f"Task: {task} ({why})")
    base = load_shared_base(options, quiet=options.quiet)
    callbacks = _callbacks(options, options.report_to or ()) if world.first else []
    return trainer_on(base, options, options.out, callbacks, world, say=not options.quiet).run()


def settings_of(options: argparse.Namespace) -> TrainSettings:
    """How these flags say to train.

    Raises:
        SpecError: settings that are impossible, or of which one switches another off.
    """
    from lorakit.train.settings import TrainSettings

    settings = TrainSettings(**given_of(options, TrainSettings))
    if options.valid is not None and settings.validation_fraction:
        raise SpecError(
            f"--validation-fraction is {settings.validation_fraction:g}, but --valid names "
            "validation files; give one of them"
        )
    return settings


def spec_of(options: argparse.Namespace) -> LoRASpec:
    """The new adapter that these flags describe.

    Raises:
        SpecError: it is impossible.
    """
    from lorakit.core.spec import LoRASpec

    given = given_of(options, LoRASpec)
    spec = LoRASpec(**given)
    idle = [
        f"--{name.replace('_', '-')}"
        for name in (*_OF_LOW_RANK, "lora_plus_ratio", "init_examples", "eva_rho")
        if not spec.targets and getattr(options, name, None) is not None
    ]
    if idle:
        raise SpecError(
            f"{', '.join(idle)}: about the products of LoRA, and --targets none trains none. Leave "
            "out one or the other"
        )
    return spec


def what_of(options: argparse.Namespace) -> LoRASpec | Full:
    """What these flags say to train, where it does not go on with an adapter.

    Raises:
        SpecError: it is impossible, or flags of an adapter are given with ``--full``.
    """
    if not options.full:
        return spec_of(options)
    from lorakit.core.spec import LoRASpec
    from lorakit.train.full import Full

    adapter = [*(field.name for field in dataclasses.fields(LoRASpec)), *_OF_ADAPTERS]
    given = [
        f"--{_FLAGS.get(name, name).replace('_', '-')}"
        for name in adapter
        if getattr(options, name, None) is not None
    ]
    problems = [f"{', '.join(given)}: about an adapter, and there is none"] if given else []
    problems += [
        text
        for is_given, text in (
            (options.quantize, "--quantize: quantised weights have no gradient"),
            (options.lr == "auto", "--lr auto: the search trains adapters; give a number"),
            (options.shard, "--shard: it spreads a base that is frozen"),
        )
        if is_given
    ]
    if problems:
        raise SpecError(collected("--full trains all weights of the base; leave out", problems))
    return Full()


def load_shared_base(options: argparse.Namespace, *, quiet: bool) -> Base:
    """The base of these flags."""
    from lorakit.bases import load_base

    return load_base(**base_options(options)) if quiet else load_base_from(options)


def trainer_on(
    base: Base,
    options: argparse.Namespace,
    out: str,
    callbacks: Sequence[Callback],
    world: World | None = None,
    *,
    say: bool = False,
) -> Trainer:
    """A trainer as these flags say, on a base that is loaded.

    Args:
        say: what was read.
    """
    from functools import partial

    from lorakit.bases import load_base
    from lorakit.train import Origin, Trainer
    from lorakit.workflows.calibrate import calibrate

    given = {"task": options.task, "language": options.language}
    other = [f"--{name} {value}" for name, value in given.items() if value not in (None, "causal")]
    if other:
        raise SpecError(
            f"{', '.join(other)}: many adapters at once are those of causal language models; train "
            "each of them alone"
        )
    settings, what = settings_of(options), what_of(options)
    origin = Origin(
        base=base_options(options),
        data=data_spec(options),
        validation=None if options.valid is None else data_spec(options, options.valid),
    )
    start = None if options.start is None else started_from(options)
    data, validation = origin.load_data(base), origin.load_validation(base)
    if say:
        _say(options, *data.report.lines())
    if say and validation is not None:
        _say(options, "Validation:", *validation.report.lines())
    dense = {**base_options(options), "quantize": None, "device": "cpu"}
    return Trainer(
        base,
        what if start is None else start,
        data,
        settings,
        out,
        validation=validation,
        callbacks=callbacks,
        origin=origin,
        extra={"callbacks": {"report_to": options.report_to}} if options.report_to else None,
        allow_other_base=options.allow_other_base,
        world=world,
        shard=options.shard,
        calibrate=partial(
            calibrate,
            base,
            seed=settings.seed,
            rho=settings.eva_rho,
            dense=lambda: load_base(**dense),
        ),
    )


def _resume(options: argparse.Namespace, world: World) -> RunResult:
    _check_nothing_changes(options)
    return _resume_exactly(options, options.resume, world)


def _check_nothing_changes(options: argparse.Namespace, but: Sequence[str] = ()) -> None:
    anew = f"lorakit train --from {options.resume}/adapter …"
    check_nothing_changes(options, {*_WITH_RESUME, *but}, anew)


def _resume_exactly(options: argparse.Namespace, out: str, world: World) -> RunResult:
    from lorakit.train import Trainer, finished_run
    from lorakit.train.folder import RunFolder

    done = world.share(lambda: finished_run(out))
    if done is not None:
        _say(options, f"{out} is finished already ({plural(done.steps, 'step')}).")
        return done
    stored = RunFolder(Path(out)).read_settings().get("callbacks") or {}
    return Trainer.resume(
        out,
        callbacks=_callbacks(options, stored.get("report_to") or ()) if world.first else (),
        world=world,
        shard=options.shard,
    )


def started_from(options: argparse.Namespace) -> Adapter:
    """The adapter of ``--from``; flags may repeat its settings, and change only the dropout.

    Raises:
        BaseError: it was merged into the base.
        SpecError: a flag contradicts what the adapter is.
    """
    from lorakit.cli.adapters import check_not_merged
    from lorakit.core.spec import LoRASpec
    from lorakit.formats import load_adapter

    adapter = load_adapter(adapter_path(options.start))
    check_not_merged(options.base, {options.start: adapter}, allow_other=options.allow_other_base)
    given = given_of(options, LoRASpec)
    problems = [
        f"--{name.replace('_', '-')} {value}: the adapter has {getattr(adapter.spec, name)}"
        for name, value in given.items()
        if name != "dropout" and value != getattr(adapter.spec, name)
    ]
    if problems:
        raise SpecError(
            collected(f"{options.start} goes on as it is; leave these flags out", problems)
        )
    if "dropout" not in given:
        return adapter
    return adapter.with_(spec=dataclasses.replace(adapter.spec, dropout=given["dropout"]))


def base_options(options: argparse.Namespace) -> dict[str, Any]:
    """The flags of the base, by the names that `load_base` and a run folder have for them."""
    names = ("device", "dtype", "quantize", "revision", "trust_remote_code")
    return {"ref": options.base, **{name: getattr(options, name) for name in names}}


def _callbacks(options: argparse.Namespace, report_to: Any) -> list[Callback]:
    from lorakit.train.trackers import make_trackers

    made: list[Callback] = list(make_trackers(report_to))
    if not options.quiet:
        from lorakit.cli.progress import Progress

        made.insert(0, Progress())
    return made


def _say(options: argparse.Namespace, *lines: str) -> None:
    if not options.quiet:
        for line in lines:
            say(line)


def _print_result(options: argparse.Namespace, result: RunResult) -> None:
    if options.json:
        emit_json(result)
    else:
        kept = f"Model: {result.model}" if result.model else f"Adapter: {result.adapter}"
        _say(options, kept)
