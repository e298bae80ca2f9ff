"""Find learning rate, rank and targets for your data, and train with them.

Many candidates are trained together on one base. After an eighth to a half of the steps the weaker
half leaves, and the best are trained out; the default settings are always among them. The end is an
adapter in OUT/adapter, a table and a picture of every candidate, and the reasons in plain words.
In runs of 160 steps or more a search takes four to six times the steps of one, in shorter ones up
to twelve times; --quick, of the rate alone, three to seven times.

examples:
  lorakit tune --base smollm2 --data mine.jsonl --steps 200 --out tuned
  lorakit tune --base smollm2 --data mine.jsonl --quick --max-time 30m --out tuned
  lorakit tune --base B --data F --search "rank=4,8,16,64 lr=1e-4..1e-2 dropout=0,0.1" --out tuned
  lorakit tune --base B --data F --search "targets=attention,q_proj+v_proj" --rank 8 --out tuned
  lorakit tune --resume tuned              # after Ctrl-C, a crash or a kill
  lorakit eval --base smollm2 --adapter tuned --data test.jsonl

OUT holds tune.yaml, candidates/ (a run folder each), study.db (Optuna), adapter/, tune.json,
tune.png and report.html.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.bases import add_base_arguments, load_base_from
from lorakit.cli.flags import count, fraction, missing, positive_int
from lorakit.cli.output import add_json_argument, emit_json, plural, printable_stdout, say
from lorakit.cli.rows import add_data_arguments, data_spec
from lorakit.cli.train import base_options
from lorakit.cli.train_arguments import add_adapter_arguments, add_training_arguments
from lorakit.cli.training import given_of, note_defaults
from lorakit.errors import InputError, Interrupted, SpecError, collected

if TYPE_CHECKING:
    from lorakit.train import RunResult
    from lorakit.train.distributed import World
    from lorakit.workflows.tune import TuneResult
    from lorakit.workflows.tuning.field import Watcher

#: flags that act on a search that goes on; all others are in its tune.yaml
_WITH_RESUME = {"resume", "json", "quiet", "debug", "command", "run"}
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("search")
    group.add_argument("--out", metavar="OUT", help="folder to make; it must not exist yet")
    group.add_argument("--resume", metavar="OUT", help="go on with a search that was stopped")
    group.add_argument("--quick", action="store_true", help="search the learning rate alone")
    group.add_argument(
        "--search",
        action="append",
        metavar='"NAME=VALUES …"',
        help="what else to try, or other values: lists (rank=4,16), ranges (lr=1e-4..1e-2); "
        "default lr, rank and targets, less those that a flag below fixes",
    )
    group.add_argument(
        "--candidates",
        type=positive_int,
        metavar="N",
        help="how many are tried, the default settings among them; default 12, with --quick 7",
    )
    group.add_argument(
        "--max-time",
        type=duration,
        metavar="T",
        help="about when to be done, such as 30m or 1h30m: fewer begin and fewer go on",
    )
    group.add_argument(
        "--max-concurrent",
        type=positive_int,
        metavar="N",
        help="candidates at the same time at most; default: as many as fill a forward",
    )
    add_base_arguments(parser, required=False)
    add_data_arguments(parser, required=False)
    group = parser.add_argument_group("validation", "What candidates are compared on.")
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
        help="share of --data to hold out, in whole prompts",
    )
    group.add_argument(
        "--eval-rows",
        type=count,
        metavar="N",
        help="validation rows of each comparison; 0: all; default 64 to 256",
    )
    add_adapter_arguments(parser)
    add_training_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="no progress and no notes")
    add_json_argument(parser)
    note_defaults(parser)


def duration(text: str) -> float:
    """An argparse type: ``90s``, ``30m``, ``1h30m`` as seconds."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected such as 90s, 30m or 1h30m")
    return seconds


def run(options: argparse.Namespace) -> int:
    """Search, and print what was chosen and why."""
    from lorakit.train.interrupt import signals_as_interrupts

    with signals_as_interrupts(), watching(quiet=options.quiet) as watcher:
        if options.resume is not None:
            result = _resume(options, watcher)
        else:
            result = _start(options, watcher)
    if options.json:
        import json

        emit_json(json.loads((result.out / "tune.json").read_text(encoding="utf-8")))
    elif not options.quiet:
        print_result(result)
    return 0


def _start(options: argparse.Namespace, watcher: Watcher) -> TuneResult:
    from lorakit.core.spec import LoRASpec
    from lorakit.train.settings import TrainSettings
    from lorakit.workflows.tuning.folder import TuneFolder
    from lorakit.workflows.tuning.space import parse_search

    needed = {
        "base": "the model to adapt, such as smollm2",
        "data": "the file to train on",
        "out": "the folder to make",
    }
    if lacking := missing(options, needed):
        raise InputError(
            collected("A new search needs more (an old one needs only --resume OUT)", lacking)
        )
    search = parse_search(options.search or ())
    if options.lr == "auto":
        options.lr = None  # it is what a search finds
    given = given_of(options, TrainSettings), given_of(options, LoRASpec)
    settings, spec = TrainSettings(**given[0]), LoRASpec(**given[1])
    both = [name for name in search if name in given[1] and name != "alpha"]
    if both:
        raise SpecError(
            collected(
                "What is searched cannot be fixed too",
                (
                    f"--{name.replace('_', '-')}: --search has {name}={search[name]}"
                    for name in both
                ),
            )
        )
    TuneFolder(options.out).check_new()
    return search_for(
        options, spec, settings, search, fixed=(*given[0], *given[1]), watcher=watcher
    )


def search_for(
    options: argparse.Namespace,
    spec: Any,
    settings: Any,
    search: Mapping[str, Any],
    *,
    fixed: Sequence[str],
    watcher: Watcher,
    resume: bool = False,
) -> TuneResult:
    """Load what the flags name, and search.

    Args:
        resume: go on with a search that the same flags began, if one is there.
    """
    from lorakit.train import Origin
    from lorakit.workflows.tune import Plan, tune

    plan = Plan(
        quick=options.quick,
        candidates=options.candidates,
        max_seconds=options.max_time,
        search=search,
        fixed=tuple(fixed),
    )
    origin = Origin(
        base=base_options(options),
        data=data_spec(options),
        validation=None if options.valid is None else data_spec(options, options.valid),
    )
    base = origin.load_base() if options.quiet else load_base_from(options)
    data, validation = origin.load_data(base), origin.load_validation(base)
    if not options.quiet:
        for line in data.report.lines():
            say(line)
    return tune(
        base,
        data,
        spec,
        settings,
        options.out,
        plan=plan,
        validation=validation,
        watcher=watcher,
        origin=origin,
        calibrate=_calibrate(base, dict(origin.base), settings.eva_rho),
        max_concurrent=options.max_concurrent,
        resume=resume,
    )


def train_at_found_rate(options: argparse.Namespace, world: World) -> RunResult:
    """``lorakit train --lr auto``: a quick search in ``RUN.search``, whose best run becomes RUN.

    Given again after a stop, it goes on with the search.

    Args:
        options: of ``lorakit train``.

    Raises:
        InputError: flags that a search has no use for, or the search there has other settings.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    import shutil

    from lorakit.core.files import atomic_folder
    from lorakit.core.spec import LoRASpec
    from lorakit.train import finished_run
    from lorakit.train.folder import RunFolder
    from lorakit.train.settings import TrainSettings

    problems = [
        f"--{flag}: {why}"
        for flag, given, why in (
            ("from", options.start is not None, "a search begins new adapters"),
            ("report-to", bool(options.report_to), "the candidates report to nobody"),
            ("shard", options.shard, "candidates are trained together in one process"),
            ("nproc-per-node", world.size > 1, "candidates are trained together in one process"),
        )
        if given
    ]
    problems += [
        f"--{name}: {what}"
        for name, what in (("base", "missing"), ("data", "missing"), ("out", "missing"))
        if getattr(options, name) is None
    ]
    if problems:
        raise InputError(collected("With --lr auto this cannot be", problems))
    options.lr = None
    given = given_of(options, TrainSettings), given_of(options, LoRASpec)
    settings, spec = TrainSettings(**given[0]), LoRASpec(**given[1])
    run = RunFolder(Path(options.out))
    run.check_new()
    place = Path(f"{run.path}.search")
    chosen = argparse.Namespace(**vars(options))
    chosen.out, chosen.quick, chosen.candidates, chosen.max_time = str(place), True, None, None
    chosen.max_concurrent = getattr(options, "max_concurrent", None)
    fixed = (*given[0], *given[1])
    try:
        with watching(quiet=options.quiet) as watcher:
            found = search_for(
                chosen, spec, settings, {}, fixed=fixed, watcher=watcher, resume=True
            )
    except Interrupted as error:  # going on with the search alone would not make the run
        stopped = Interrupted(
            f"the search in {place} was stopped, with the state of every candidate saved. Go on "
            "with the same command."
        )
        stopped.said = error.said
        raise stopped from None
    with atomic_folder(run.path) as temporary:
        shutil.copytree(found.run, temporary, dirs_exist_ok=True)
    if not options.quiet:
        for reason in found.choice.reasons:
            say(f"- {reason.text}")
        say(f"The search is in {place}; its best run is {run.path}.")
    result = finished_run(run.path)
    assert result is not None
    return result


def _calibrate(base: Any, base_options: Mapping[str, Any], rho: float) -> Any:
    """Seed → what initialisations ask that look at data."""
    from functools import partial

    from lorakit.bases import load_base
    from lorakit.workflows.calibrate import calibrate

    dense = {**base_options, "quantize": None, "device": "cpu"}
    return lambda seed: partial(
        calibrate, base, seed=seed, rho=rho, dense=lambda: load_base(**dense)
    )


def _resume(options: argparse.Namespace, watcher: Watcher) -> TuneResult:
    from lorakit.workflows.tune import resume_tune
    from lorakit.workflows.tuning.folder import TuneFolder

    given = [
        "--" + name.replace("_", "-")
        for name, value in vars(options).items()
        if name in options.defaults and value != options.defaults[name] and name not in _WITH_RESUME
    ]
    if given:
        raise InputError(
            f"{', '.join(sorted(given))} cannot be changed in a search that goes on; its settings "
            "are in tune.yaml. Leave them out; or begin another search."
        )
    sections = TuneFolder(options.resume).read()
    rho = float(sections["train"].get("eva_rho", 1.0))
    base_options = dict(sections["base"])
    return resume_tune(
        options.resume,
        watcher=watcher,
        calibrate=lambda base, seed: _calibrate(base, base_options, rho)(seed),
    )


# --- what is shown -----------------------------------------------------------------------------


@contextmanager
def watching(*, quiet: bool = False) -> Iterator[Watcher]:
    """Whoever tells on stderr how far a search is."""
    from lorakit.workflows.tuning.field import Watcher

    if quiet:
        yield Watcher()
        return
    from lorakit.cli.meter import meter
    from lorakit.workflows.tuning.space import described

    with meter() as tell:

        class Telling(Watcher):
            """Lines, and a bar for each rung."""

            def __init__(self) -> None:
                self._until = 0
                self._made: dict[int, int] = {}
                self._going = 0

            def on_note(self, text: str) -> None:
                say(f"note: {text}")

            def on_rung(self, step: int, candidates: Sequence[int], steps: int) -> None:
                self._until, self._going, self._made = step, len(candidates), {}
                say(f"{plural(len(candidates), 'candidate')} to step {step} of {steps}")

            def on_step(self, number: int, metrics: Any) -> None:
                self._made[number] = metrics.step
                done = sum(self._made.values())
                tell(f"to step {self._until}", done, self._going * self._until)

            def on_eval(self, number: int, metrics: Any) -> None:
                if metrics.step:
                    say(f"  candidate {number}: {metrics.loss:.4f} after step {metrics.step}")

            def on_end(self, candidate: Any) -> None:
                if candidate.end == "failed":
                    # the title of a list says little without its first entry
                    lines = candidate.reason.splitlines()[:2]
                    what = " ".join(line.strip(" -") for line in lines)
                    say(f"  candidate {candidate.number} ({described(candidate.values)}): {what}")
                elif candidate.end == "left":
                    say(
                        f"  candidate {candidate.number} ({described(candidate.values)}) leaves: "
                        f"{candidate.reason}"
                    )

        yield Telling()


def print_result(result: TuneResult) -> None:
    """The table and the reasons, on stdout."""
    from lorakit.workflows.tuning.report import table

    printable_stdout()
    steps = sorted({step for c in result.candidates for step in c.losses})
    heads, rows = table(result.candidates, result.choice.number, steps)
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    for line in [heads, *rows]:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )
    print()
    for reason in result.choice.reasons:
        print(f"- {reason.text}")
    print()
    print(f"Adapter: {result.adapter}")
    if Path(result.out, "tune.png").is_file():
        print(f"Picture: {result.out / 'tune.png'}")
    print(f"Report:  {result.out / 'report.html'}")
