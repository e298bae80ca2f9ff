"""Train an adapter of a picture model on a folder of pictures and captions.

The base is a diffusers pipeline and stays as it is. Pictures are checked to the last one, sorted by
aspect ratio, and encoded once; what was encoded is kept and found again. The adapter ends up in
RUN/adapter as a PEFT folder; `lorakit convert` makes kohya's or diffusers' file of it.

examples:
  lorakit images train --base B --data photos --trigger "sks style" --out runs/style
  lorakit images train --base B --data photos --targets attention --rank 8 --steps 800 \\
      --sample-prompt "a house" --sample-every 200 --out runs/style
  lorakit images train --base B --data dog --prior-data dogs --text-encoder-lr 5e-5 --out runs/dog
  lorakit images train --resume runs/style      # after Ctrl-C, a crash or a kill: goes on exactly
  lorakit images train --base B --each styles/ --out runs    # an adapter for each folder in it

A picture's caption is in NAME.txt beside NAME.png, or in metadata.jsonl or metadata.csv with the
columns file_name and text; --caption is for pictures that have none. With --masked only what
NAME.mask.png shows white, or what is not transparent, is learnt.

A run folder holds run.yaml, metrics.jsonl, adapter/ (the best), samples/ (sheets of pictures),
checkpoints/ and report.html.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.common import (
    ADAPTER_HELP,
    adapter_path,
    add_json_argument,
    check_text,
    count,
    emit_json,
    finite_float,
    fraction,
    missing,
    non_negative_float,
    plural,
    positive_float,
    positive_int,
    say,
    seed,
)
from lorakit.cli.images_sample import (
    add_pipeline_arguments,
    load_pipeline_from,
    pipeline_options,
)
from lorakit.errors import InputError, SpecError, collected

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter
    from lorakit.core.spec import LoRASpec
    from lorakit.images.base import PictureBase
    from lorakit.images.data import PicturesPlan
    from lorakit.images.training import Sheets
    from lorakit.train import Callback, RunResult, Trainer, TrainSettings

#: flags that act on a run that goes on, too
_WITH_RESUME = {"resume", "json", "quiet", "debug"}
#: text encoders' modules, whatever their number
_TEXT_PATTERN = r"text_encoder(_\d)?\..*"
#: where nobody says how long: passes over the pictures, within these steps
_PASSES, _LEAST_STEPS, _MOST_STEPS = 60, 300, 2000


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="RUN", help="run folder to make; of --each, for all runs")
    group.add_argument(
        "--resume", metavar="RUN", help="go on with an interrupted run, or with all of a folder"
    )
    group.add_argument(
        "--each",
        metavar="FOLDER",
        help="an adapter for each folder of pictures in this one, with these flags for all; they "
        "share forwards, and each comes out as if it were alone",
    )
    group.add_argument(
        "--from", dest="start", metavar="ADAPTER", help=f"go on with this adapter: {ADAPTER_HELP}"
    )
    add_pipeline_arguments(parser, required=False)
    _add_data_arguments(parser)
    _add_validation_arguments(parser)
    _add_adapter_arguments(parser)
    _add_training_arguments(parser)
    _add_sheet_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="no progress and no notes")
    add_json_argument(parser)
    parser.set_defaults(defaults={action.dest: action.default for action in parser._actions})


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument("--data", metavar="FOLDER", help="pictures and their captions")
    group.add_argument("--caption", metavar="TEXT", help="of pictures that have none")
    group.add_argument("--caption-column", metavar="NAME", help="of metadata.jsonl or .csv")
    group.add_argument(
        "--trigger", metavar="WORDS", help="put before every caption; the adapter's name for it"
    )
    group.add_argument(
        "--resolution",
        type=positive_int,
        metavar="PIXELS",
        help="side of the square whose area every picture gets; default: the base's own",
    )
    group.add_argument(
        "--square", action="store_true", help="crop all to squares; default: by aspect ratio"
    )
    group.add_argument("--enlarge", action="store_true", help="scale small pictures up")
    group.add_argument(
        "--bad-pictures",
        choices=("error", "skip"),
        default="error",
        help="what a picture that cannot be used does: error (default) or skip, which counts them",
    )
    group.add_argument("--masked", action="store_true", help="learn only what the masks show")
    group.add_argument(
        "--prior-data",
        metavar="FOLDER",
        help="pictures of a class that the base is to draw as before; half of what is seen",
    )
    group.add_argument("--prior-caption", metavar="TEXT", help="of those that have none")
    group.add_argument(
        "--prior-weight", type=positive_float, metavar="X", help="on their loss; default 1"
    )
    group.add_argument(
        "--cache",
        metavar="FOLDER",
        help="where latents and embeddings are kept; default: $LORAKIT_CACHE/images",
    )


def _add_validation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "validation",
        "The loss at fixed noise and times; the adapter with the lowest is kept. Without "
        "validation it is that of the last step.",
    )
    group.add_argument("--valid", metavar="FOLDER", help="pictures to evaluate on")
    group.add_argument(
        "--validation-fraction",
        type=fraction,
        metavar="X",
        help="share of --data to hold out; default: none of fewer than 40 pictures",
    )
    group.add_argument(
        "--eval-every",
        type=count,
        metavar="N",
        help="steps between two evaluations; 0: only at the start and the end",
    )
    group.add_argument(
        "--eval-rows", type=count, metavar="N", help="pictures of each evaluation; 0: all"
    )
    group.add_argument(
        "--patience", type=count, metavar="N", help="stop after N without a new best; default 0"
    )


def _add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    group.add_argument("--rank", type=positive_int, metavar="R", help="default 16")
    group.add_argument(
        "--rank-pattern",
        nargs="+",
        type=_pattern,
        metavar="PATTERN=R",
        help="another rank for modules whose path ends in PATTERN, such as conv1=4",
    )
    group.add_argument(
        "--alpha", type=finite_float, metavar="A", help="numerator of the scaling; default 32"
    )
    group.add_argument(
        "--targets",
        nargs="+",
        metavar="T",
        help="cross-attention, attention (default), all-linear, conv (linears and convolutions), "
        "or names, name endings and regular expressions of modules",
    )
    group.add_argument("--exclude", nargs="+", metavar="T", help="modules to leave out again")
    group.add_argument(
        "--dropout",
        type=fraction,
        metavar="P",
        help="probability to drop an input of A; default 0",
    )
    group.add_argument(
        "--text-encoder-lr",
        type=positive_float,
        metavar="X",
        help="adapt the CLIP text encoders too, at this learning rate",
    )
    group.add_argument(
        "--scaling", choices=("alpha/r", "alpha/sqrt(r)"), help="factor on B·A; default alpha/r"
    )
    group.add_argument(
        "--init",
        choices=("kaiming", "gaussian", "orthogonal", "pissa", "olora"),
        help="where A and B begin; default kaiming",
    )
    group.add_argument("--variant", choices=("lora", "dora"), help="default lora")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help=f"optimizer steps; default: {_PASSES} passes, within {_LEAST_STEPS} to {_MOST_STEPS}",
    )
    group.add_argument("--epochs", type=positive_float, metavar="X", help="passes over the data")
    group.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="pictures per step; default 4"
    )
    group.add_argument(
        "--micro-batch",
        type=positive_int,
        metavar="N",
        help="pictures per forward at most; the batch is accumulated, with the same result",
    )
    group.add_argument(
        "--lr", type=positive_float, metavar="X", help="highest learning rate; default 1e-4"
    )
    group.add_argument(
        "--schedule", choices=("constant", "linear", "cosine"), help="default linear (to zero)"
    )
    group.add_argument("--warmup", type=count, metavar="N", help="steps in which the rate rises")
    group.add_argument(
        "--optimizer",
        choices=("adamw", "adamw8bit", "paged-adamw8bit", "sgd"),
        help="default adamw",
    )
    group.add_argument("--weight-decay", type=non_negative_float, metavar="X", help="default 0")
    group.add_argument(
        "--clip", type=non_negative_float, metavar="X", help="largest norm; default 1, 0: no limit"
    )
    group.add_argument(
        "--min-snr",
        type=positive_float,
        metavar="G",
        help="weigh times by min-SNR with this γ (usually 5); for bases that learn no flows",
    )
    group.add_argument(
        "--noise-offset",
        type=non_negative_float,
        metavar="X",
        help="add noise to whole channels (0.05 to 0.1), for very dark and bright pictures",
    )
    group.add_argument(
        "--caption-dropout",
        type=fraction,
        metavar="P",
        help="share of the examples that are seen without a caption, for guidance; default 0",
    )
    group.add_argument(
        "--recompute",
        action="store_true",
        help="make the denoiser's blocks again in the backward: less memory, more time",
    )
    group.add_argument("--seed", type=seed, metavar="N", help="default 0. One seed, one result")
    group.add_argument(
        "--checkpoint-every", type=positive_int, metavar="N", help="steps; default: every minute"
    )
    group.add_argument(
        "--keep-checkpoints", type=positive_int, metavar="N", help="checkpoints kept; default 2"
    )
    group.add_argument(
        "--max-concurrent", type=positive_int, metavar="N", help="of --each, at the same time"
    )


def _add_sheet_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sheets", "Pictures with the same prompts and seeds at the start, meanwhile and at the end."
    )
    group.add_argument(
        "--sample-prompt",
        action="append",
        metavar="P",
        help="may be repeated; default: some captions of the data",
    )
    group.add_argument("--sample-negative", metavar="TEXT", help="what they should not show")
    group.add_argument(
        "--sample-every", type=count, metavar="N", help="steps between two; default: a quarter"
    )
    group.add_argument(
        "--sample-seeds", type=positive_int, metavar="N", help="pictures of each prompt; default 2"
    )
    group.add_argument(
        "--sample-steps", type=positive_int, metavar="N", help="denoising steps; default 20"
    )
    group.add_argument("--sample-guidance", type=non_negative_float, metavar="X")
    group.add_argument("--no-samples", action="store_true", help="draw nothing")


def _pattern(text: str) -> tuple[str, int]:
    """``conv1=4`` → the pattern and its rank."""
    pattern, equals, rank = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=RANK, such as conv1=4")
    return pattern, positive_int(rank)


# --- running ---------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Train or resume, then print where the adapters are."""
    from lorakit.train.interrupt import signals_as_interrupts

    def tell(text: str) -> None:  # from a signal handler: past all buffers
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"\nlorakit images train: {text}\n".encode())

    with signals_as_interrupts(tell):
        if options.resume is not None:
            _check_nothing_changes(options)
            return _resume(options)
        if options.each is not None:
            return _each(options)
        return _one(options)


def _one(options: argparse.Namespace) -> int:
    needed = {
        "base": "a folder or hub id of a diffusers pipeline",
        "data": "the folder of pictures",
        "out": "the run folder to make",
    }
    if lacking := missing(options, needed):
        raise InputError(
            collected("A new run needs more (an old one needs only --resume RUN)", lacking)
        )
    if options.max_concurrent is not None:
        raise SpecError("--max-concurrent: there is one adapter; it acts with --each")
    from lorakit.images.training import train_pictures
    from lorakit.train.folder import RunFolder

    _check_early(options)
    RunFolder(Path(options.out)).check_new()
    base = load_pipeline_from(options, quiet=options.quiet)
    trainer = _trainer(base, options, options.data, options.out, _callbacks(options))
    with _encoding(options) as on_item:
        (result,) = train_pictures([trainer], on_item=on_item)
    if isinstance(result, Exception):
        raise result
    return _told(options, [(options.out, result)])


def _each(options: argparse.Namespace) -> int:
    """An adapter for each folder of pictures."""
    needed = {"base": "a folder or hub id of a diffusers pipeline", "out": "a folder for the runs"}
    if lacking := missing(options, needed):
        raise InputError(collected("--each needs more", lacking))
    if options.data is not None:
        raise InputError("--each and --data are both given; give one of them")
    folder = Path(options.each)
    if not folder.is_dir():
        raise InputError(f"--each {folder} is no folder; give one that holds folders of pictures")
    styles = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not styles:
        raise InputError(
            f"--each {folder} holds no folder; it is for several folders of pictures. Of one, give "
            "--data"
        )
    from lorakit.images.training import train_pictures
    from lorakit.train.folder import RunFolder

    _check_early(options)
    outs = [str(Path(options.out) / style.name) for style in styles]
    for out in outs:
        RunFolder(Path(out)).check_new()
    base = load_pipeline_from(options, quiet=options.quiet)
    trainers = [
        _trainer(base, options, str(style), out, _callbacks(options, name=style.name))
        for style, out in zip(styles, outs, strict=True)
    ]
    with _encoding(options) as on_item:
        results = train_pictures(trainers, on_item=on_item, max_concurrent=options.max_concurrent)
    return _all_told(options, outs, results)


def _resume(options: argparse.Namespace) -> int:
    from lorakit.images.training import resume_pictures

    if not (Path(options.resume) / "run.yaml").is_file():
        runs = sorted(p.parent for p in Path(options.resume).glob("*/run.yaml"))
        if runs:
            return _resume_all(options, [str(run) for run in runs])
    with _encoding(options) as on_item:
        result = resume_pictures(options.resume, callbacks=_callbacks(options), on_item=on_item)
    return _told(options, [(options.resume, result)])


def _resume_all(options: argparse.Namespace, outs: list[str]) -> int:
    from lorakit.images.training import resume_all

    with _encoding(options) as on_item:
        results = resume_all(
            outs,
            callbacks=lambda out: _callbacks(options, name=Path(out).name),
            on_item=on_item,
        )
    return _all_told(options, outs, results)


def _check_nothing_changes(options: argparse.Namespace) -> None:
    given = [
        "--" + ("from" if name == "start" else name.replace("_", "-"))
        for name, value in vars(options).items()
        if name in options.defaults and value != options.defaults[name]
        if name not in _WITH_RESUME
    ]
    if given:
        raise InputError(
            f"{', '.join(sorted(given))} cannot be changed in a run that goes on exactly; its "
            "settings are in run.yaml. Leave them out, or start a new run with --from"
        )


# --- from flags to objects -------------------------------------------------------------------


def _check_early(options: argparse.Namespace) -> None:
    """What can be refused without loading anything."""
    for name in ("caption", "trigger", "prior_caption", "sample_negative"):
        check_text(getattr(options, name) or "", f"--{name.replace('_', '-')}")
    for prompt in options.sample_prompt or ():
        check_text(prompt, "--sample-prompt")
    problems = []
    if options.prior_data is None:
        problems += [
            f"--{name.replace('_', '-')}: there is no --prior-data, so it cannot act"
            for name in ("prior_caption", "prior_weight")
            if getattr(options, name) is not None
        ]
    if options.no_samples:
        problems += [
            f"--{name.replace('_', '-')}: --no-samples draws nothing"
            for name in vars(options)
            if name.startswith("sample_") and getattr(options, name) is not None
        ]
    if options.dtype == "float16":
        problems.append("--dtype float16: gradients vanish in it; give bfloat16 or float32")
    if options.valid is not None and options.validation_fraction:
        problems.append("--validation-fraction: --valid names pictures to evaluate on")
    if options.start is not None:
        given = (
            "rank",
            "alpha",
            "targets",
            "exclude",
            "rank_pattern",
            "scaling",
            "init",
            "dropout",
        )
        problems += [
            f"--{name.replace('_', '-')}: the adapter of --from brings it"
            for name in (*given, "variant")
            if getattr(options, name) is not None
        ]
    if problems:
        raise SpecError(collected("These flags cannot act together", problems))
    _plan(options, "")
    _settings(options, 1)


def _plan(options: argparse.Namespace, folder: str, *, valid: bool = False) -> PicturesPlan:
    from lorakit.images.data import PictureSettings, PicturesPlan
    from lorakit.images.pictures import PicturesSpec

    pictures = PicturesSpec(
        path=folder,
        caption=options.caption,
        caption_column=options.caption_column,
        trigger=options.trigger,
        masks=options.masked,
        bad=options.bad_pictures,
    )
    prior = None
    if options.prior_data is not None and not valid:
        prior = PicturesSpec(
            path=options.prior_data, caption=options.prior_caption, bad=options.bad_pictures
        )
    given = {
        "min_snr": options.min_snr,
        "noise_offset": options.noise_offset,
        "caption_dropout": options.caption_dropout,
        "prior_weight": None if valid else options.prior_weight,
    }
    settings = PictureSettings(
        masked=options.masked,
        train_text=options.text_encoder_lr is not None or _adapts_text(options),
        **{name: value for name, value in given.items() if value is not None},
    )
    return PicturesPlan(
        pictures,
        options.resolution,
        settings,
        prior,
        square=options.square,
        enlarge=options.enlarge,
        cache=None if options.cache is None else str(Path(options.cache).expanduser().resolve()),
    )


def _adapts_text(options: argparse.Namespace) -> bool:
    """Whether the adapter that is gone on with has sites in text encoders."""
    if options.start is None:
        return False
    return any(path.startswith("text_encoder") for path in _start(options).sites)


def _start(options: argparse.Namespace) -> Adapter:
    from lorakit.formats import load_adapter

    return load_adapter(adapter_path(options.start))


def _settings(options: argparse.Namespace, num_pictures: int) -> TrainSettings:
    """How to train; the number of steps is chosen by that of the pictures."""
    from lorakit.train import TrainSettings

    names = (
        *("steps", "epochs", "batch_size", "micro_batch", "lr", "schedule", "warmup"),
        *("optimizer", "weight_decay", "clip", "seed", "checkpoint_every", "keep_checkpoints"),
        *("validation_fraction", "eval_every", "eval_rows", "patience"),
    )
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given.setdefault("batch_size", 4)
    if "steps" not in given and "epochs" not in given:
        passes = round(_PASSES * num_pictures / given["batch_size"])
        given["steps"] = max(_LEAST_STEPS, min(_MOST_STEPS, passes))
    if options.text_encoder_lr is not None:
        from lorakit.images.training import LEARNING_RATE

        factor = options.text_encoder_lr / (options.lr or LEARNING_RATE)
        given["lr_pattern"] = {_TEXT_PATTERN: factor}
    recompute = "layers" if options.recompute else "none"
    return TrainSettings(**given, recompute=recompute, samples=0)  # type: ignore[arg-type]


def _spec(base: PictureBase, options: argparse.Namespace) -> LoRASpec:
    from lorakit.core.spec import LoRASpec
    from lorakit.images.targets import picture_targets

    names = ("rank", "alpha", "scaling", "init", "variant", "dropout")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.rank_pattern is not None:
        given["rank_pattern"] = dict(options.rank_pattern)
    if options.exclude is not None:
        given["exclude"] = tuple(options.exclude)
    text = options.text_encoder_lr is not None
    targets = picture_targets(base, options.targets or ["attention"], text=text)
    return LoRASpec(targets=targets, **given)


def _sheets(options: argparse.Namespace, settings: TrainSettings) -> Sheets:
    from lorakit.images.training import Sheets

    every = options.sample_every
    if every is None:
        every = max(1, (settings.steps or 0) // 4)
    given: dict[str, Any] = {
        "negative": options.sample_negative,
        "steps": options.sample_steps,
        "guidance": options.sample_guidance,
    }
    return Sheets(
        prompts=tuple(options.sample_prompt or ()),
        seeds=tuple(range(options.sample_seeds or 2)),
        every=every,
        off=options.no_samples,
        **{name: value for name, value in given.items() if value is not None},
    )


def _trainer(
    base: PictureBase,
    options: argparse.Namespace,
    folder: str,
    out: str,
    callbacks: list[Callback],
) -> Trainer:
    from dataclasses import replace

    from lorakit.images.data import load_pictures
    from lorakit.images.training import picture_trainer

    what: LoRASpec | Adapter = _spec(base, options) if options.start is None else _start(options)
    plan = replace(_plan(options, folder), least=options.batch_size or 4)
    data = load_pictures(plan, base)
    if not options.quiet:
        for line in data.report.lines():
            say(line)
    settings = _settings(options, data.report.pictures.used)
    return picture_trainer(
        base,
        plan,
        what,
        settings,
        out,
        sheets=_sheets(options, settings),
        data=data,
        validation=None if options.valid is None else _plan(options, options.valid, valid=True),
        origin=pipeline_options(options),
        callbacks=callbacks,
        allow_other_base=options.allow_other_base,
    )


def _callbacks(options: argparse.Namespace, name: str | None = None) -> list[Callback]:
    """Who tells of a run; of one among several, with its name in front."""
    if options.quiet:
        return []
    if name is None:
        from lorakit.cli.progress import Progress

        return [Progress()]
    from lorakit.train.callbacks import Callback as Base
    from lorakit.train.callbacks import EvalMetrics

    class Named(Base):
        """Lines with the run's name."""

        def on_note(self, text: str) -> None:
            say(f"{name}: {text}")

        def on_eval(self, metrics: EvalMetrics) -> None:
            say(f"{name}: step {metrics.step}  validation loss {metrics.loss:.4f}")

        def on_end(self, result: RunResult) -> None:
            say(f"{name}: {result.ending} after {plural(result.steps, 'step')}")

    return [Named()]


@contextlib.contextmanager
def _encoding(options: argparse.Namespace) -> Any:
    """What is told while pictures are encoded."""
    if options.quiet:
        yield None
        return
    from lorakit.cli.meter import meter

    with meter() as tell:
        yield lambda done, total: tell("encoded", done, total)


# --- the end ---------------------------------------------------------------------------------


def _all_told(options: argparse.Namespace, outs: list[str], results: list[Any]) -> int:
    """Say what became of each run; the first failure decides the exit code."""
    failed = [
        (out, one) for out, one in zip(outs, results, strict=True) if isinstance(one, Exception)
    ]
    done = [
        (out, one) for out, one in zip(outs, results, strict=True) if not isinstance(one, Exception)
    ]
    _told(options, done)
    if not failed:
        return 0
    for out, error in failed[1:]:
        say(f"{out}: {error}")
    raise failed[0][1]


def _told(options: argparse.Namespace, results: list[tuple[str, RunResult]]) -> int:
    if options.json:
        if len(results) == 1:
            emit_json(results[0][1])
        else:
            emit_json({"runs": [result for _, result in results]})
        return 0
    if not options.quiet:
        for _, result in results:
            say(f"Adapter: {result.adapter}  ({plural(result.steps, 'step')})")
            if (result.out / "samples").is_dir():
                say(f"Pictures: {result.out / 'samples'} and {result.out / 'report.html'}")
    return 0
