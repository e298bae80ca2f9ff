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
NAME.mask.png (or another ending of pictures) shows white, or what is not transparent, is learnt.

A run folder holds run.yaml, metrics.jsonl, adapter/ (the best), samples/ (sheets of pictures),
checkpoints/ and report.html.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.cli.adapters import adapter_path
from lorakit.cli.flags import check_text, missing
from lorakit.cli.images_arguments import LEAST_STEPS, MOST_STEPS, PASSES, configure
from lorakit.cli.images_sample import (
    load_pipeline_from,
    pipeline_options,
)
from lorakit.cli.output import emit_json, plural, say
from lorakit.cli.training import check_nothing_changes, interruptible
from lorakit.errors import DataError, InputError, LorakitError, SpecError, collected

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter
    from lorakit.core.spec import LoRASpec
    from lorakit.images.base import PictureBase
    from lorakit.images.data import PicturesPlan, Read
    from lorakit.images.training import Sheets
    from lorakit.train import Callback, RunResult, Trainer, TrainSettings

__all__ = ["configure", "run"]  # what a command is made of

_Key = TypeVar("_Key", bound=Hashable)
_Made = TypeVar("_Made")

#: flags that act on a run that goes on, too
_WITH_RESUME = {"resume", "json", "quiet", "debug"}
#: text encoders' modules, whatever their number
_TEXT_PATTERN = r"text_encoder(_\d)?\..*"


def run(options: argparse.Namespace) -> int:
    """Train or resume, then print where the adapters are."""
    with interruptible("images train"):
        if options.resume is not None:
            check_nothing_changes(
                options, _WITH_RESUME, anew="lorakit images train --from ADAPTER …"
            )
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

    trainers = _trainers(options, {options.data: options.out}, lambda out: _callbacks(options))
    with _encoding(options) as on_item:
        (result,) = train_pictures(trainers, on_item=on_item)
    if isinstance(result, Exception):
        raise result
    return _told(options, [result])


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

    outs = {str(style): str(Path(options.out) / style.name) for style in styles}
    trainers = _trainers(options, outs, lambda out: _callbacks(options, name=Path(out).name))
    with _encoding(options) as on_item:
        results = train_pictures(trainers, on_item=on_item, max_concurrent=options.max_concurrent)
    return _all_told(options, list(outs.values()), results)


def _resume(options: argparse.Namespace) -> int:
    from lorakit.images.training import resume_pictures

    if not (Path(options.resume) / "run.yaml").is_file():
        runs = sorted(p.parent for p in Path(options.resume).glob("*/run.yaml"))
        if runs:
            return _resume_all(options, [str(run) for run in runs])
    with _encoding(options) as on_item:
        result = resume_pictures(options.resume, callbacks=_callbacks(options), on_item=on_item)
    return _told(options, [result])


def _resume_all(options: argparse.Namespace, outs: list[str]) -> int:
    from lorakit.images.training import resume_all

    with _encoding(options) as on_item:
        results = resume_all(
            outs,
            callbacks=lambda out: _callbacks(options, name=Path(out).name),
            on_item=on_item,
        )
    return _all_told(options, outs, results)


# --- from flags to objects -------------------------------------------------------------------


def _check_early(options: argparse.Namespace) -> None:
    """What can be refused without loading anything."""
    from lorakit.images.base import check_text_length

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
        if options.text_encoder_lr is not None and not _adapts_text(options):
            problems.append(
                "--text-encoder-lr: the adapter of --from changes no text encoder, so nothing "
                "learns at this rate"
            )
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
    check_text_length(options.text_tokens)
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
            path=options.prior_data,
            caption=options.prior_caption,
            masks=options.masked,
            bad=options.bad_pictures,
        )
    given = {
        "min_snr": options.min_snr,
        "noise_offset": options.noise_offset,
        "caption_dropout": options.caption_dropout,
        "prior_weight": None if valid else options.prior_weight,
        "flip": options.flip and not valid,
    }
    settings = PictureSettings(
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


def _settings(options: argparse.Namespace, pass_size: int) -> TrainSettings:
    """How to train.

    Args:
        pass_size: examples in which every picture is seen once.
    """
    from lorakit.train import TrainSettings

    names = (
        *("steps", "epochs", "batch_size", "micro_batch", "lr", "schedule", "warmup"),
        *("optimizer", "weight_decay", "clip", "seed", "checkpoint_every", "keep_checkpoints"),
        *("validation_fraction", "eval_every", "eval_rows", "patience"),
    )
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given.setdefault("batch_size", 4)
    if "steps" not in given and "epochs" not in given:
        steps = round(PASSES * pass_size / given["batch_size"])
        given["steps"] = max(LEAST_STEPS, min(MOST_STEPS, steps))
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


def _sheets(options: argparse.Namespace) -> Sheets:
    from lorakit.images.training import Sheets

    given: dict[str, Any] = {
        "negative": options.sample_negative,
        "steps": options.sample_steps,
        "guidance": options.sample_guidance,
    }
    return Sheets(
        prompts=tuple(options.sample_prompt or ()),
        seeds=tuple(range(options.sample_seeds or 2)),
        every=options.sample_every,
        off=options.no_samples,
        **{name: value for name, value in given.items() if value is not None},
    )


def _trainers(
    options: argparse.Namespace,
    outs: Mapping[str, str],
    callbacks: Callable[[str], list[Callback]],
) -> list[Trainer]:
    """A trainer for each folder of pictures.

    All pictures are looked at before the base is loaded, which takes long.

    Args:
        outs: folder of pictures → run folder.
        callbacks: who is told of the run in a folder.
    """
    from lorakit.images.pictures import read_pictures
    from lorakit.train.folder import RunFolder

    _check_early(options)
    for out in outs.values():
        RunFolder(Path(out)).check_new()
    plans = [_plan(options, folder) for folder in outs]
    if options.valid is not None:
        plans.append(_plan(options, options.valid, valid=True))
    specs = [spec for plan in plans for spec in (plan.pictures, plan.prior) if spec is not None]
    read = _of_all(read_pictures, dict.fromkeys(specs))
    base = load_pipeline_from(options, quiet=options.quiet)

    def trainer(folder: str) -> Trainer:
        return _trainer(base, options, folder, outs[folder], read, callbacks(outs[folder]))

    return list(_of_all(trainer, outs).values())


def _of_all(make: Callable[[_Key], _Made], keys: Iterable[_Key]) -> dict[_Key, _Made]:
    """What is made of each.

    Raises:
        DataError: some folders cannot be used; what is wrong with each is told.
    """
    made: dict[_Key, _Made] = {}
    wrong: list[str] = []
    for key in keys:
        try:
            made[key] = make(key)
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError("\n".join(wrong))
    return made


def _trainer(
    base: PictureBase,
    options: argparse.Namespace,
    folder: str,
    out: str,
    read: Read,
    callbacks: list[Callback],
) -> Trainer:
    from dataclasses import replace

    from lorakit.images.data import load_pictures
    from lorakit.images.training import picture_trainer

    what: LoRASpec | Adapter = _spec(base, options) if options.start is None else _start(options)
    plan = replace(_plan(options, folder), least=options.batch_size or 4)
    data = load_pictures(plan, base, read)
    if not options.quiet:
        for line in data.report.lines():
            say(line)
    each = 1 if plan.prior is None else 2  # every second example is of the class that stays
    settings = _settings(options, each * data.report.pictures.used)
    return picture_trainer(
        base,
        plan,
        what,
        settings,
        out,
        sheets=_sheets(options),
        data=data,
        read=read,
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
    _told(options, [one for one in results if not isinstance(one, Exception)], several=True)
    failed = [error for error in results if isinstance(error, Exception)]
    for out, one in zip(outs, results, strict=True):
        if isinstance(one, Exception):
            say(f"{Path(out).name}: {one}")
    if not failed:
        return 0
    if isinstance(failed[0], LorakitError):
        failed[0].said = True
    raise failed[0]


def _told(options: argparse.Namespace, results: list[RunResult], *, several: bool = False) -> int:
    """Say where the adapters are.

    Args:
        several: of a command that may train many, whose JSON has a list, however long.
    """
    if options.json:
        emit_json({"runs": results} if several else results[0])
        return 0
    if not options.quiet:
        for result in results:
            say(f"Adapter: {result.adapter}  ({plural(result.steps, 'step')})")
            if (result.out / "samples").is_dir():
                say(f"Pictures: {result.out / 'samples'} and {result.out / 'report.html'}")
    return 0
