"""``lorakit train`` for many adapters: a file of jobs, a folder of data, or a folder of runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lorakit.cli.flags import missing
from lorakit.cli.output import plural, say
from lorakit.errors import InputError, Interrupted, LorakitError, TrainingError, collected

if TYPE_CHECKING:
    from lorakit.bases import Base
    from lorakit.train import Callback, Trainer

#: what the jobs of one file share: the base, and how they go through it
SHARED = (
    *("base", "revision", "trust_remote_code", "device", "dtype", "quantize", "allow_other_base"),
    *("max_concurrent", "token_budget"),
)
#: flags that mean nothing in a job
_NOT_IN_A_JOB = ("jobs", "each", "resume", "json", "quiet", "debug", "shard")
#: what a folder of runs keeps, from which it is resumed; a file of jobs may lie beside it
JOBS_FILE = "runs.yaml"
#: endings of files that are read as data, but rather tell about it where they lie in a folder
_ABOUT_DATA = (".md",)
#: trackers whose packages have one current run in a process, which all jobs would share
_ONE_RUN = ("wandb", "trackio")
#: left-out files of a folder that are named
_SHOWN = 5


@dataclass
class Job:
    """One adapter to train."""

    name: str
    keys: dict[str, Any]
    """As the file says, with the defaults."""
    options: argparse.Namespace
    """The same as flags."""
    out: Path
    """The run folder, as its trainer spells it."""
    rows: int | None = None
    first_loss: float | None = None
    outcome: Any = None
    """``RunResult``, the exception that ended it, or ``None`` if it was not reached."""


@dataclass
class Plan:
    """What a command with many adapters is to do."""

    shared: dict[str, Any]
    jobs: list[Job]
    out: Path
    """The folder of all runs."""
    resume: bool = False
    text: dict[str, Any] = field(default_factory=dict)
    """What ``runs.yaml`` in that folder holds."""


# --- from files to plans -------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def plan_of_file(path: Path, options: argparse.Namespace) -> Plan:
    """Read a file of jobs; flags beside it are defaults for all.

    Raises:
        InputError: all that is wrong in it, each with its job and key.
    """
    content = _read(path)
    problems = [
        f"{key}: unknown; the file holds base, out, defaults, jobs and {', '.join(SHARED[1:])}"
        for key in content
        if key not in (*SHARED, "out", "defaults", "jobs")
    ]
    jobs, defaults = content.get("jobs"), content.get("defaults") or {}
    if not isinstance(jobs, list) or not jobs or not all(isinstance(j, dict) for j in jobs):
        problems.append("jobs: must be a list with an entry for each adapter, such as {data: F}")
        jobs = []
    if not isinstance(defaults, dict):
        problems.append("defaults: must hold names of flags with values for all jobs")
        defaults = {}
    flags = _given_flags(options)
    out = options.out or content.get("out")
    if not out:
        problems.append("out: missing; the folder for the runs and their summary")
    shared = {**{k: content[k] for k in SHARED if k in content}}
    shared |= {k: flags.pop(k) for k in SHARED if k in flags}
    if shared.get("base") is None:
        problems.append("base: missing; the model to adapt, such as smollm2, once for all jobs")
    flags.pop("out", None)
    entries = [{**defaults, **flags, **job} for job in jobs]
    return _plan(str(path), shared, entries, _path(out or "."), problems)


def plan_of_folder(options: argparse.Namespace) -> Plan:
    """One job for each data file of ``--each FOLDER``; what else lies there is named.

    Raises:
        InputError: there is none, or flags are missing or wrong.
    """
    from lorakit.data.readers.source import READERS, stem_of, suffix_of

    folder = Path(options.each)
    if not folder.is_dir():
        raise InputError(f"--each {folder} is no folder; give one with a data file per adapter")
    endings = [ending for ending in READERS if ending not in _ABOUT_DATA]
    there = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
    files = [f for f in there if suffix_of(f) in endings and f.is_file()]
    if not files:
        raise InputError(f"--each {folder} holds no data file ({', '.join(endings)})")
    left_out = [f.name for f in there if f not in files]
    if left_out and not options.quiet:
        more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        say(f"--each {folder}: no data files, left out: {', '.join(left_out[:_SHOWN])}{more}")
    flags = _given_flags(options)
    problems = missing(options, {"base": "the model to adapt", "out": "the folder for all runs"})
    if "data" in flags:
        problems.append("--data: --each names the data; give one of them")
    shared = {k: flags.pop(k) for k in SHARED if k in flags}
    for name in ("out", "data"):
        flags.pop(name, None)
    stems = [stem_of(file) for file in files]
    names = [
        stem if stems.count(stem) == 1 else file.name
        for stem, file in zip(stems, files, strict=True)
    ]
    entries = [
        {"samples": 0, **flags, "name": name, "data": str(file)}
        for name, file in zip(names, files, strict=True)
    ]
    return _plan(f"--each {folder}", shared, entries, _path(options.out or "."), problems)


def plan_of_runs(folder: Path, options: argparse.Namespace) -> Plan:
    """What is left to do in a folder of runs.

    Raises:
        InputError: its ``runs.yaml`` cannot be read, or somebody else wrote it.
    """
    content = _read_runs(folder / JOBS_FILE)
    shared = {k: content[k] for k in SHARED if k in content}
    for name in ("max_concurrent", "token_budget"):
        if getattr(options, name) is not None:
            shared[name] = getattr(options, name)
    # the folder may have been moved
    jobs = [{**job, "out": folder / str(job["out"])} for job in content["jobs"]]
    plan = _plan(str(folder / JOBS_FILE), shared, jobs, folder, [])
    plan.resume = True
    return plan


def _read(path: Path) -> dict[str, Any]:
    from lorakit.optional import require

    yaml = require("yaml", extra="train", purpose="reading a file of jobs")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping with base and jobs, not {content!r:.60}")
    return content


def _read_runs(path: Path) -> dict[str, Any]:
    """What :func:`_make_folder` wrote: the base, and each job whole, with its name and folder.

    Raises:
        InputError: somebody else wrote it; what it says beside that would have no effect.
    """
    content = _read(path)
    jobs = content.get("jobs")
    whole = isinstance(jobs, list) and all(
        isinstance(job, dict) and {"name", "out"} <= job.keys() for job in jobs
    )
    if not (jobs and whole and "base" in content and content.keys() <= {*SHARED, "jobs"}):
        raise InputError(
            f"{path} is not the list of runs that lorakit train writes there. Give it another "
            "name; if it is a file of jobs, begin with lorakit train FILE"
        )
    return content


def _given_flags(options: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(options, name)
        for name, default in options.defaults.items()
        if name not in _NOT_IN_A_JOB and getattr(options, name, default) != default
    }


def _plan(
    where: str,
    shared: dict[str, Any],
    entries: list[dict[str, Any]],
    out: Path,
    problems: list[str],
) -> Plan:
    from lorakit.train.folder import RunFolder

    jobs: list[Job] = []
    for number, entry in enumerate(entries, start=1):
        name = _name(entry, number)
        keys = {key: value for key, value in entry.items() if key not in ("name", "out")}
        try:
            options = _options(keys, shared)
        except InputError as error:
            problems.append(f"job {name}: {error}")
            continue
        if not entry.get("out") and not _is_inside(name):
            problems.append(f"job {name}: such a folder is not inside of {out}; give another name")
            continue
        # as its trainer spells it: two spellings are one folder
        place = RunFolder(_path(entry.get("out") or out / name).absolute()).path
        if any(job.out == place for job in jobs):
            problems.append(f"job {name}: another job has the run folder {place} too; give a name")
            continue
        if any(job.name == name for job in jobs):
            problems.append(f"job {name}: another job is called so too; give a name")
            continue
        jobs.append(Job(name, keys, options, place))
    if problems:
        raise InputError(collected(where, problems))
    plan = Plan(shared, jobs, out)
    plan.text = {
        **{key: _absolute(value) if key == "base" else value for key, value in shared.items()},
        "jobs": [
            {"name": job.name, "out": _inside(job.out, out), **_with_absolute_paths(job.keys)}
            for job in jobs
        ],
    }
    return plan


def _path(text: Any) -> Path:
    return Path(os.path.expanduser(str(text)))


def _inside(place: Path, folder: Path) -> str:
    """A run's path as ``runs.yaml`` has it: below the folder, which may be moved, or absolute."""
    from lorakit.train.folder import RunFolder

    root = RunFolder(folder.absolute()).path
    return str(place.relative_to(root) if place.is_relative_to(root) else place)


def _is_inside(name: str) -> bool:
    """Whether a job's name is that of a place below the folder of all runs."""
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _name(entry: Mapping[str, Any], number: int) -> str:
    from lorakit.data.readers.source import stem_of

    if entry.get("name") is not None:
        return str(entry["name"])
    if entry.get("out"):
        return Path(str(entry["out"])).name
    data = entry.get("data")
    first = data[0] if isinstance(data, list) and data else data
    return stem_of(Path(str(first))) if first else str(number)


def _options(keys: Mapping[str, Any], shared: Mapping[str, Any]) -> argparse.Namespace:
    """A job's keys as the flags of ``lorakit train``, checked as those are.

    Raises:
        InputError: names the key.
    """
    from lorakit.cli.train import settings_of, spec_of
    from lorakit.cli.train_arguments import configure
    from lorakit.train.trackers import make_trackers

    parser = _Parser(allow_abbrev=False, add_help=False)
    configure(parser)
    actions = {action.dest: action for action in parser._actions}
    actions |= {
        flag.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        for flag in action.option_strings
    }
    arguments: list[str] = []
    problems = []
    for key, value in keys.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None or not action.option_strings or action.dest in _NOT_IN_A_JOB:
            problems.append(f"{key}: there is no such setting; see lorakit train --help")
        elif action.dest in SHARED:
            problems.append(f"{key}: the jobs share it; give it once, beside jobs")
        elif value is not None:
            arguments += _as_arguments(action, value)
    if "data" not in keys:
        problems.append("data: missing; the file to train on")
    if problems:
        raise InputError("; ".join(problems))
    for key, value in shared.items():
        arguments += _as_arguments(actions[key], value)
    options = parser.parse_args(arguments)
    if options.full:
        raise InputError("full: it trains the base, which the others need as it is; train it alone")
    if single := [tracker for tracker in options.report_to or () if tracker in _ONE_RUN]:
        raise InputError(
            f"report_to: {', '.join(single)} would get the numbers of all jobs as one run's; "
            "report to tensorboard or mlflow, or train it alone"
        )
    make_trackers(options.report_to or ())
    settings_of(options)
    spec_of(options)
    return options


def _as_arguments(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:
        return [flag] if value else []
    if isinstance(value, Mapping):
        pairs = [f"{name}={one}" for name, one in value.items()]
        return [flag, ",".join(pairs)] if action.dest == "map" else [flag, *pairs]
    several = value if isinstance(value, list | tuple) else [value]
    if action.dest == "map":  # as flags give it
        merged = {k: v for one in several if isinstance(one, Mapping) for k, v in one.items()}
        return _as_arguments(action, merged) if merged else [flag, *map(str, several)]
    if action.dest == "lr_pattern":
        several = [_joined(one) for one in several]
    if action.nargs is None and len(several) == 1:
        return [f"{flag}={several[0]}"]
    if type(action).__name__ == "_AppendAction":
        return [f"{flag}={one}" for one in several]
    return [flag, *map(str, several)]


def _with_absolute_paths(keys: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if key in ("data", "valid", "template", "from", "start"):
            key = "from" if key == "start" else key
            value = (
                [_absolute(v) for v in value]
                if isinstance(value, list | tuple)
                else _absolute(value)
            )
        elif isinstance(value, tuple):
            value = list(value)
        if key == "map" and isinstance(value, list):
            value = {k: v for one in value for k, v in one.items()}
        if key == "lr_pattern" and isinstance(value, list):
            value = [_joined(one) for one in value]
        found[key] = value
    return found


def _joined(pair: Any) -> str:
    """``("q_proj", 0.5)`` as it is written."""
    return f"{pair[0]}={pair[1]}" if isinstance(pair, tuple | list) else str(pair)


def _absolute(text: Any) -> Any:
    return os.path.abspath(text) if isinstance(text, str) and os.path.exists(text) else text


# --- doing it ------------------------------------------------------------------------------------


def run(plan: Plan, options: argparse.Namespace) -> int:
    """Train all jobs, print the table, and give the exit code."""
    from lorakit.cli.many_progress import ManyProgress
    from lorakit.cli.train import load_shared_base
    from lorakit.train import train_together

    began = time.monotonic()
    if not plan.resume:
        _make_folder(plan)
    base = load_shared_base(plan.jobs[0].options, quiet=options.quiet)
    progress = ManyProgress(len(plan.jobs), quiet=options.quiet)
    by_out = {job.out: job for job in plan.jobs}
    with progress:
        train_together(
            _trainers(plan, base, progress),
            max_concurrent=plan.shared.get("max_concurrent"),
            token_budget=plan.shared.get("token_budget"),
            on_result=lambda trainer, outcome: _ended(by_out[trainer.out], outcome, progress),
        )
    return _conclude(plan, options, time.monotonic() - began)


def _make_folder(plan: Plan) -> None:
    """``runs.yaml`` in the folder of the runs, none of which may exist yet."""
    import yaml

    from lorakit.core.files import write_atomic
    from lorakit.train.folder import RunFolder

    problems = []
    for job in plan.jobs:
        try:
            RunFolder(job.out).check_new()
        except InputError as error:
            problems.append(f"job {job.name}: {error}")
    if (plan.out / JOBS_FILE).exists():
        _read_runs(plan.out / JOBS_FILE)
        problems.append(
            f"{plan.out / JOBS_FILE} is there already; go on with lorakit train --resume "
            f"{plan.out}, or give another --out"
        )
    if problems:
        raise InputError(collected("These runs cannot begin", problems))
    text = yaml.safe_dump(plan.text, sort_keys=False, allow_unicode=True, width=100)
    write_atomic(plan.out / JOBS_FILE, text.encode())


def _trainers(plan: Plan, base: Base, progress: Any) -> Iterator[Trainer | None]:
    """Those that were interrupted together first, then the others as there is room for them."""
    from lorakit.train import Trainer, finished_run
    from lorakit.train.together import aligned

    begun: list[tuple[Job, Trainer]] = []
    fresh: list[Job] = []
    for job in plan.jobs:
        if not plan.resume or not (job.out / "run.yaml").exists():
            fresh.append(job)
            continue
        with _told(job, progress):
            done = finished_run(job.out)
            if done is not None:
                job.outcome = done
                progress.done(job.name, done, quietly=True)
                continue
            callbacks = _callbacks(job, progress)
            begun.append((job, Trainer.reopened(job.out, base=base, callbacks=callbacks)))
    for job, begun_one in begun:
        job.rows = begun_one.num_rows
    yield from aligned([begun_one for _, begun_one in begun])
    for job in fresh:
        trainer: Trainer | None = None
        with _told(job, progress):
            trainer = _new(job, base, progress)
        if trainer is not None:
            yield trainer


def _new(job: Job, base: Base, progress: Any) -> Trainer:
    from lorakit.cli.train import trainer_on

    trainer = trainer_on(base, job.options, str(job.out), callbacks=_callbacks(job, progress))
    job.rows = trainer.num_rows
    return trainer


def _callbacks(job: Job, progress: Any) -> list[Callback]:
    from lorakit.train.trackers import make_trackers

    return [progress.of(job), *make_trackers(job.options.report_to or ())]


@contextlib.contextmanager
def _told(job: Job, progress: Any) -> Iterator[None]:
    """What is wrong with a job is told, and the others go on."""
    try:
        yield
    except (LorakitError, OSError) as error:
        _ended(job, error, progress)
    except Exception as error:  # nobody foresaw it, and the others' work is not lost for it
        _ended(job, TrainingError(f"{type(error).__name__}: {error}"), progress)


def _ended(job: Job, outcome: Any, progress: Any) -> None:
    job.outcome = outcome
    if isinstance(outcome, Interrupted):
        return
    if isinstance(outcome, Exception):
        progress.failed(job.name, outcome)
    else:
        progress.done(job.name, outcome)


# --- the end -------------------------------------------------------------------------------------


def _conclude(plan: Plan, options: argparse.Namespace, seconds: float) -> int:
    from lorakit.cli.output import emit_json
    from lorakit.core.files import write_atomic

    rows = [summary_row(job) for job in plan.jobs]
    content = {"runs": rows, "seconds": round(seconds, 1)}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomic(plan.out / "summary.json", text.encode())
    if options.json:
        emit_json(content)
    elif not options.quiet:
        print_table(rows)
    failed = [row for row in rows if row["error"] is not None]
    left = [row for row in rows if row["ending"] in ("interrupted", "not begun")]
    again = f"Go on with: lorakit train --resume {plan.out}"
    if left:
        say(
            f"Stopped; the state is saved. {len(rows) - len(left)} of {len(rows)} runs have "
            f"ended. {again}"
        )
        return 130
    if failed:
        what = "\n".join(f"  - {row['name']}: {row['error']}" for row in failed)
        say(f"{plural(len(failed), 'job')} of {len(rows)} failed:\n{what}")
        return 1
    if not options.quiet:
        say(f"{plural(len(rows), 'adapter')} in {seconds:.0f} s, in {plan.out}")
    return 0


def summary_row(job: Job) -> dict[str, Any]:
    """What the table and ``--json`` say of a job."""
    outcome = job.outcome
    data = job.keys.get("data")
    row: dict[str, Any] = {
        "name": job.name,
        "data": data if isinstance(data, str) else " ".join(map(str, data or ())),
        "rows": job.rows,
        "ending": "not begun" if outcome is None else "failed",
        "steps": None,
        "loss_before": None,
        "loss_after": None,
        "loss_on": None,
        "seconds": None,
        "adapter": None,
        "out": str(job.out),
        "error": None,
    }
    if isinstance(outcome, Interrupted):
        return {**row, "ending": "interrupted"}
    if isinstance(outcome, BaseException):
        return {**row, "error": str(outcome) or type(outcome).__name__}
    if outcome is None:
        return row
    measured = outcome.best_loss is not None
    return {
        **row,
        "ending": outcome.ending,
        "steps": outcome.steps,
        "loss_before": outcome.base_loss if measured else job.first_loss,
        "loss_after": outcome.best_loss if measured else outcome.last_loss,
        "loss_on": "validation" if measured else "training",
        "seconds": round(outcome.seconds, 1),
        "adapter": None if outcome.adapter is None else str(outcome.adapter),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The summary, on stderr."""
    heads = ("name", "rows", "steps", "loss before", "after", "of", "seconds", "adapter")
    cells = [
        [
            row["name"],
            _shown(row["rows"]),
            _shown(row["steps"]),
            _shown(row["loss_before"], 3),
            _shown(row["loss_after"], 3),
            {"validation": "valid", "training": "train"}.get(row["loss_on"], ""),
            _shown(row["seconds"], 1),
            row["adapter"] or (row["ending"] if row["error"] is None else _clip(row["error"])),
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    for line in [heads, *cells]:
        padded = [
            text.ljust(width) if i in (0, 5, 7) else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        say("  ".join(padded).rstrip())


def _shown(value: Any, digits: int | None = None) -> str:
    if value is None:
        return "–"
    return str(value) if digits is None else f"{value:.{digits}f}"


def _clip(text: str) -> str:
    first = " ".join(text.split())
    return "failed: " + (first if len(first) <= 60 else first[:59] + "…")
