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
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.common import (
    ADAPTER_HELP,
    adapter_path,
    add_base_arguments,
    add_data_arguments,
    add_json_argument,
    count,
    finite_float,
    fraction,
    missing,
    non_negative_float,
    plural,
    positive_float,
    positive_int,
    seed,
)
from lorakit.errors import InputError, SpecError, collected

if TYPE_CHECKING:
    from lorakit.bases import Base
    from lorakit.cli.train_many import Plan
    from lorakit.core.adapter import Adapter
    from lorakit.core.spec import LoRASpec
    from lorakit.train import Callback, RunResult, Trainer, TrainSettings
    from lorakit.train.distributed import World
    from lorakit.train.full import Full

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
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    _add_run_arguments(parser)
    add_base_arguments(parser, required=False, task=True)
    add_data_arguments(parser, required=False)
    _add_validation_arguments(parser)
    _add_adapter_arguments(parser)
    _add_training_arguments(parser)
    _add_many_arguments(parser)
    _add_process_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--report-to",
        action="append",
        choices=_TRACKERS,
        metavar="TRACKER",
        help=f"also send the numbers to {', '.join(_TRACKERS)}; again for several",
    )
    output.add_argument("--quiet", action="store_true", help="no progress and no notes")
    add_json_argument(parser)
    parser.set_defaults(defaults={action.dest: action.default for action in parser._actions})


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "jobs", nargs="?", metavar="jobs.yaml", help="a file of jobs: many adapters on one base"
    )
    group.add_argument(
        "--each",
        metavar="FOLDER",
        help="an adapter for each data file of this folder, with these flags for all; a file that "
        "is broken is named at the end, and the others are done",
    )
    group.add_argument(
        "--out",
        metavar="RUN",
        help="run folder to make; it must not exist yet. Of many: the folder for their runs",
    )
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with an interrupted run, or with all of a folder of runs; the settings are in "
        "RUN/run.yaml",
    )
    group.add_argument(
        "--full",
        action="store_true",
        help="train all weights of the base and no adapter, by the same loop. The weights must be "
        "float32, or bfloat16 (a float32 copy is trained); 16 or 18 bytes of memory for each, and "
        "checkpoints of three times the model, of which one is kept",
    )
    group.add_argument(
        "--from",
        dest="start",
        metavar="ADAPTER",
        help=f"go on with this adapter ({ADAPTER_HELP}) on new data; it brings rank, "
        "targets and alpha, and the optimizer starts anew",
    )


def _add_many_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "many adapters", "They share forwards, and each comes out as if it were alone."
    )
    group.add_argument(
        "--max-concurrent",
        type=positive_int,
        metavar="N",
        help="trained at the same time at most; default: until their batches fill a forward, as "
        "far as the memory has room",
    )
    group.add_argument(
        "--token-budget",
        type=positive_int,
        metavar="N",
        help="tokens of a shared forward at most; default: the largest --micro-batch-tokens",
    )


def _add_validation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "validation", "The adapter with the lowest validation loss is kept."
    )
    group.add_argument(
        "--valid",
        nargs="+",
        metavar="F",
        help="validation files, read like --data; default: some prompts of --data are held out",
    )
    group.add_argument(
        "--validation-fraction",
        type=fraction,
        metavar="X",
        help="share of --data to hold out, in whole prompts; 0: none, and the last step is kept",
    )
    group.add_argument(
        "--eval-every",
        type=count,
        metavar="N",
        help="steps between two evaluations; 0: only at the start and the end",
    )
    group.add_argument(
        "--eval-rows", type=count, metavar="N", help="validation rows of each evaluation; 0: all"
    )
    group.add_argument(
        "--patience",
        type=count,
        metavar="N",
        help="stop after N evaluations in a row without a new best; default 0: never",
    )
    group.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help="items that base and adapter answer at the end for the report; default 4, 0: none",
    )


def _add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    group.add_argument("--rank", type=positive_int, metavar="R", help="default 16")
    group.add_argument(
        "--alpha",
        type=finite_float,
        metavar="A",
        help="numerator of the scaling; default 32. Leave it while you vary the rank: the best "
        "learning rate then hardly moves",
    )
    group.add_argument(
        "--targets",
        nargs="+",
        metavar="T",
        help="all-linear (default: every linear but the output head), attention, mlp, experts and "
        "router (of a mixture of experts), or names, "
        "name endings and regular expressions of modules; none: no LoRA, for --prefix, --bias, "
        "--norms or --train-modules alone",
    )
    group.add_argument("--exclude", nargs="+", metavar="T", help="modules to leave out again")
    group.add_argument("--layers", metavar="RANGE", help="blocks to adapt, such as 0-11, 20- or 3")
    group.add_argument(
        "--dropout",
        type=fraction,
        metavar="P",
        help="probability to drop an input of A; default 0",
    )
    group.add_argument(
        "--scaling",
        choices=("alpha/r", "alpha/sqrt(r)"),
        help="factor on B·A; default alpha/r, alpha/sqrt(r) is rsLoRA",
    )
    group.add_argument(
        "--init",
        choices=("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga", "loftq"),
        help="where A and B begin; default kaiming (A drawn, B zero, as with gaussian and "
        "orthogonal). pissa, olora: inside of the weight; eva, lora-ga: from some of the data; "
        "loftq: with what --quantize loses. Each has its own default learning rate",
    )
    group.add_argument(
        "--init-examples",
        type=positive_int,
        metavar="N",
        help="training examples that --init eva and lora-ga look at; default 64",
    )
    group.add_argument(
        "--eva-rho",
        type=positive_float,
        metavar="X",
        help="--init eva shares the ranks out, up to X times the rank for a module; default 1: "
        "every module keeps the rank",
    )
    group.add_argument(
        "--variant",
        choices=("lora", "dora"),
        help="default lora; dora also trains the length of each output's weights, which takes more "
        "time a step",
    )
    group.add_argument(
        "--bias",
        choices=("none", "lora", "all", "new"),
        help="train biases too (BitFit): of the adapted modules (lora), all, or new: all, and each "
        "linear that has none gets one, from zero (Llama and its kind have none); default none",
    )
    group.add_argument(
        "--norms",
        action="store_true",
        default=None,
        help="train the weights of all norms too, and save them whole",
    )
    group.add_argument(
        "--prefix",
        type=positive_int,
        metavar="N",
        help="prefix tuning: also train the keys and values of N virtual tokens in front of the "
        "text, in every layer",
    )
    group.add_argument(
        "--prefix-lr-ratio",
        type=positive_float,
        metavar="X",
        help="the prefix learns X times faster than the rest; default 10",
    )
    group.add_argument(
        "--train-modules", nargs="+", metavar="M", help="modules to train and save whole"
    )


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive_int, metavar="N", help="optimizer steps")
    group.add_argument(
        "--epochs", type=positive_float, metavar="X", help="passes over the data; default 3"
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="examples per optimizer step, over all processes; default 8",
    )
    group.add_argument(
        "--micro-batch",
        type=positive_int,
        metavar="N",
        help="examples per forward at most; the batch is accumulated, with the same result",
    )
    group.add_argument(
        "--micro-batch-tokens",
        type=positive_int,
        metavar="N",
        help="tokens per forward at most; lower it if memory runs out, the result stays the same",
    )
    group.add_argument(
        "--recompute",
        choices=("none", "mlp", "layers", "offload"),
        help="make again in the backward instead of keeping it: the middle of the MLP (mlp) or the "
        "whole layer (layers; offload also moves its input off the GPU). Less memory, more time, "
        "the same gradient; default none",
    )
    group.add_argument(
        "--lr",
        type=_rate,
        metavar="X",
        help="highest learning rate; default: by the width of the base and the --init, and a tenth "
        "of that with --full; auto: found "
        "by training several together first (lorakit tune --quick), in 4 to 5 times the steps",
    )
    group.add_argument(
        "--lora-plus-ratio",
        type=positive_float,
        metavar="X",
        help="every B learns X times faster than its A, whose rate is --lr (LoRA+; its paper "
        "takes 16); default 1",
    )
    group.add_argument(
        "--lr-pattern",
        nargs="+",
        type=_pattern,
        metavar="PATTERN=X",
        help="factor on the learning rate of modules whose path ends in PATTERN, such as "
        "q_proj=0.5; the first that fits counts",
    )
    group.add_argument(
        "--schedule",
        choices=("constant", "linear", "cosine"),
        help="what the rate does after the warm-up; default linear (to zero)",
    )
    group.add_argument(
        "--warmup",
        type=count,
        metavar="N",
        help="steps in which the rate rises; default: a twentieth, at most 100",
    )
    group.add_argument(
        "--optimizer",
        choices=("adamw", "adamw8bit", "paged-adamw8bit", "sgd"),
        help="default adamw; adamw8bit keeps its averages in 8 bits (bitsandbytes), and the paged "
        "one lets them leave a CUDA GPU that is full",
    )
    group.add_argument(
        "--weight-decay", type=non_negative_float, metavar="X", help="decoupled; default 0"
    )
    group.add_argument(
        "--clip",
        type=non_negative_float,
        metavar="X",
        help="largest norm of the gradient; default 1, 0: no limit",
    )
    group.add_argument(
        "--seed",
        type=seed,
        metavar="N",
        help="of initial weights, order, split and dropout; default 0. One seed, one result",
    )
    group.add_argument(
        "--checkpoint-every",
        type=positive_int,
        metavar="N",
        help="steps between two checkpoints; default: about every minute",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=positive_int,
        metavar="N",
        help="checkpoints kept; default 2, with --full 1",
    )


def _add_process_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Started by torchrun, they share each batch. With --max-restarts, torchrun starts them "
        "again when one dies, and the run goes on from its last checkpoint.",
    )
    group.add_argument(
        "--shard",
        action="store_true",
        help="spread the base's weights over the processes (FSDP2); default: each has them whole",
    )


def _rate(text: str) -> float | str:
    """``auto``, or a number."""
    return text if text == "auto" else float(positive_float(text))


def _pattern(text: str) -> tuple[str, float]:
    """``q_proj=0.5`` → the pattern and its factor."""
    pattern, equals, factor = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=FACTOR, such as q_proj=0.5")
    return pattern, positive_float(factor)


def run(options: argparse.Namespace) -> int:
    """Train or resume, then print where the adapter is."""
    from lorakit.train.distributed import joined
    from lorakit.train.interrupt import signals_as_interrupts

    def tell(text: str) -> None:  # from a signal handler: past all buffers
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"\nlorakit train: {text}\n".encode())

    several = "RANK" in os.environ and os.environ["RANK"] != "0"
    with signals_as_interrupts(None if several else tell), joined() as world:
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
    from lorakit.cli import train_many

    ways = [name for name in ("jobs", "each", "resume") if getattr(options, name) is not None]
    if len(ways) > 1:
        told = " and ".join("a file of jobs" if w == "jobs" else f"--{w}" for w in ways)
        raise InputError(f"{told} are given; give one of them")
    if options.jobs is not None:
        return train_many.plan_of_file(Path(options.jobs), options, configure)
    if options.each is not None:
        return train_many.plan_of_folder(options, configure)
    if options.resume is not None and (Path(options.resume) / train_many.JOBS_FILE).is_file():
        _check_nothing_changes(options, (*_MANY,))
        return train_many.plan_of_runs(Path(options.resume), options, configure)
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

    settings = TrainSettings(**_given(options, TrainSettings))
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

    given = _given(options, LoRASpec)
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
    from lorakit.cli.common import load_base_from

    return load_base(**_base_options(options)) if quiet else load_base_from(options)


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
    from lorakit.cli.common import data_spec
    from lorakit.formats import load_adapter
    from lorakit.train import Origin, Trainer
    from lorakit.workflows.calibrate import calibrate

    if options.task not in (None, "causal"):
        raise SpecError(
            f"--task {options.task}: many adapters at once are those of causal language models; "
            "train each of them alone"
        )
    settings, what = settings_of(options), what_of(options)
    origin = Origin(
        base=_base_options(options),
        data=data_spec(options),
        validation=None if options.valid is None else data_spec(options, options.valid),
    )
    start: Adapter | None = None
    if options.start is not None:
        start = _with_flags(load_adapter(adapter_path(options.start)), options)
    data, validation = origin.load_data(base), origin.load_validation(base)
    if say:
        _say(options, *data.report.lines())
    if say and validation is not None:
        _say(options, "Validation:", *validation.report.lines())
    dense = {**_base_options(options), "quantize": None, "device": "cpu"}
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
    """Refuse settings of a run that goes on."""
    given = [
        "--" + ("from" if name == "start" else name.replace("_", "-"))
        for name, value in vars(options).items()
        if name in options.defaults and value != options.defaults[name]
        if name not in _WITH_RESUME and name not in but
    ]
    if given:
        raise InputError(
            f"{', '.join(sorted(given))} cannot be changed in a run that goes on exactly; its "
            "settings are in run.yaml. Leave them out; or start a new run from its adapter: "
            f"lorakit train --from {options.resume}/adapter …"
        )


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


def _given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The flags that name fields of a dataclass and were given."""
    names = [field.name for field in dataclasses.fields(kind)]
    found: dict[str, Any] = {name: getattr(options, name, None) for name in names}
    targets = found.get("targets")
    if targets is not None and len(targets) == 1:
        found["targets"] = targets[0]
    if found.get("lr_pattern") is not None:
        found["lr_pattern"] = dict(found["lr_pattern"])
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }


def _with_flags(adapter: Adapter, options: argparse.Namespace) -> Adapter:
    """The adapter of ``--from``; flags may repeat its settings, and change only the dropout.

    Raises:
        SpecError: a flag contradicts what the adapter is.
    """
    from lorakit.core.spec import LoRASpec

    given = _given(options, LoRASpec)
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


def _base_options(options: argparse.Namespace) -> dict[str, Any]:
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
    from lorakit.cli.common import say

    if not options.quiet:
        for line in lines:
            say(line)


def _print_result(options: argparse.Namespace, result: RunResult) -> None:
    from lorakit.cli.common import emit_json

    if options.json:
        emit_json(result)
    else:
        kept = f"Model: {result.model}" if result.model else f"Adapter: {result.adapter}"
        _say(options, kept)
