"""The adapters of one command: from a file of jobs, a folder of data, or a folder of runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lorakit.cli.flags import missing
from lorakit.cli.output import say
from lorakit.errors import InputError, collected

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
    content = read_runs(folder / JOBS_FILE)
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


def read_runs(path: Path) -> dict[str, Any]:
    """What is in ``runs.yaml``: the base, and each job whole, with its name and folder.

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
