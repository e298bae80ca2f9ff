"""Train one adapter on a file of data, or go on with one.

The base stays as it is; what is trained is small, and ends up in RUN/adapter as a PEFT folder.
Whatever you leave out is chosen for your data and your machine, and said with its reason.

examples:
  lorakit train --base smollm2 --data mine.jsonl --out runs/mine
  lorakit train --base smollm2 --data F.csv --map prompt=question,completion=answer --out runs/mine
  lorakit train --base B --data F --valid V --steps 200 --lr 1e-3 --rank 16 --out runs/mine
  lorakit train --base B --data new.jsonl --from runs/mine --out runs/more
  lorakit train --resume runs/mine         # after Ctrl-C, a crash or a kill: goes on exactly
  torchrun --nproc-per-node 2 -m lorakit.cli.main train --base B --data F --out runs/mine

Not sure about the data? `lorakit preview` shows what would be trained. A run folder holds
run.yaml, metrics.jsonl, adapter/ (the best), checkpoints/ and report.html.
"""

from __future__ import annotations

import argparse
import dataclasses
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
    non_negative_float,
    plural,
    positive_float,
    positive_int,
    seed,
)
from lorakit.errors import InputError, SpecError, collected

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter
    from lorakit.core.spec import LoRASpec
    from lorakit.train import Callback, RunResult, Trainer, TrainSettings
    from lorakit.train.distributed import World

#: flags that act on a resumed run too; all others are in its run.yaml
_WITH_RESUME = {"resume", "json", "quiet", "debug", "command", "run", "shard"}
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    _add_run_arguments(parser)
    add_base_arguments(parser, required=False)
    add_data_arguments(parser, required=False)
    _add_validation_arguments(parser)
    _add_adapter_arguments(parser)
    _add_training_arguments(parser)
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
    group.add_argument("--out", metavar="RUN", help="run folder to make; it must not exist yet")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with an interrupted run; all its settings are in RUN/run.yaml",
    )
    group.add_argument(
        "--from",
        dest="start",
        metavar="ADAPTER",
        help=f"go on with this adapter ({ADAPTER_HELP}) on new data; it brings rank, "
        "targets and alpha, and the optimizer starts anew",
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
        help="all-linear (default: every linear but the output head), attention, mlp, or names, "
        "name endings and regular expressions of modules",
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
        choices=("none", "lora", "all"),
        help="train biases too: of the adapted modules (lora) or all; default none",
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
        type=positive_float,
        metavar="X",
        help="highest learning rate; default: by the width of the base and the --init",
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
        "--keep-checkpoints", type=positive_int, metavar="N", help="checkpoints kept; default 2"
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

    with signals_as_interrupts(), joined() as world:  # also before the loop begins
        if not world.first:
            options.quiet, options.json = True, False
        if options.shard:
            world = world.sharing()
        if options.resume is not None:
            result = _resume(options, world)
        elif _started_before(options, world):
            result = _resume_exactly(options, options.out, world)
        else:
            result = _start(options, world)
    _print_result(options, result)
    return 0


def _started_before(options: argparse.Namespace, world: World) -> bool:
    """Whether torchrun's agent gives this command once more, after it has made its run folder."""
    from lorakit.train.folder import RunFolder

    if options.out is None:
        return False
    # each machine counts its own, and not those that another machine's failure made
    again = world.any(world.restarts > 0)
    return again and world.share(RunFolder(Path(options.out)).settings.is_file)


def _start(options: argparse.Namespace, world: World) -> RunResult:
    from lorakit.core.spec import LoRASpec
    from lorakit.train.folder import RunFolder
    from lorakit.train.settings import TrainSettings

    missing = [
        f"--{name}: {what}"
        for name, what in (
            ("base", "the model to adapt, such as smollm2"),
            ("data", "the file to train on"),
            ("out", "the run folder to make"),
        )
        if getattr(options, name) is None
    ]
    if missing:
        raise InputError(
            collected("A new run needs more (an old one needs only --resume RUN)", missing)
        )
    # what can be refused without loading anything comes first
    settings = TrainSettings(**_given(options, TrainSettings))
    spec = LoRASpec(**_given(options, LoRASpec))
    if options.valid is not None and settings.validation_fraction:
        raise SpecError(
            f"--validation-fraction is {settings.validation_fraction:g}, but --valid names "
            "validation files; give one of them"
        )
    world.share(RunFolder(Path(options.out)).check_new)
    return _trainer(options, settings, spec, world).run()


def _trainer(
    options: argparse.Namespace, settings: TrainSettings, spec: LoRASpec, world: World
) -> Trainer:
    from functools import partial

    from lorakit.bases import load_base
    from lorakit.cli.common import data_spec, load_base_from
    from lorakit.formats import load_adapter
    from lorakit.train import Origin, Trainer
    from lorakit.workflows.calibrate import calibrate

    options.device = world.device(options.device)
    origin = Origin(
        base=_base_options(options),
        data=data_spec(options),
        validation=None if options.valid is None else data_spec(options, options.valid),
    )
    start: Adapter | None = None
    if options.start is not None:
        start = _with_flags(load_adapter(adapter_path(options.start)), options)
    base = origin.load_base() if options.quiet else load_base_from(options)
    data, validation = origin.load_data(base), origin.load_validation(base)
    _say(options, *data.report.lines())
    if validation is not None:
        _say(options, "Validation:", *validation.report.lines())
    dense = {**_base_options(options), "quantize": None, "device": "cpu"}
    return Trainer(
        base,
        spec if start is None else start,
        data,
        settings,
        options.out,
        validation=validation,
        callbacks=_callbacks(options, options.report_to or ()) if world.first else (),
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
    given = [
        "--" + ("from" if name == "start" else name.replace("_", "-"))
        for name, value in vars(options).items()
        if name in options.defaults and value != options.defaults[name] and name not in _WITH_RESUME
    ]
    if given:
        raise InputError(
            f"{', '.join(sorted(given))} cannot be changed in a run that goes on exactly; its "
            "settings are in run.yaml. Leave them out; or start a new run from its adapter: "
            f"lorakit train --from {options.resume}/adapter …"
        )
    return _resume_exactly(options, options.resume, world)


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
        _say(options, f"Adapter: {result.adapter}")
