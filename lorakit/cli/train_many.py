"""``lorakit train`` for many adapters: all jobs of a plan, and the table of what came out."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lorakit.cli.jobs import JOBS_FILE, Job, Plan, read_runs
from lorakit.cli.output import emit_json, plural, say
from lorakit.errors import InputError, Interrupted, LorakitError, TrainingError, collected

if TYPE_CHECKING:
    from lorakit.bases import Base
    from lorakit.train import Callback, Trainer


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
        read_runs(plan.out / JOBS_FILE)
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
            _recall(job)
            done = finished_run(job.out)
            if done is not None:
                job.outcome = done
                progress.done(job.name, done, quietly=True)
                continue
            callbacks = _callbacks(job, progress)
            begun.append((job, Trainer.reopened(job.out, base=base, callbacks=callbacks)))
    yield from aligned([begun_one for _, begun_one in begun])
    for job in fresh:
        trainer: Trainer | None = None
        with _told(job, progress):
            trainer = _new(job, base, progress)
        if trainer is not None:
            yield trainer


def _recall(job: Job) -> None:
    """What a run that began earlier has written of what the table says."""
    from lorakit.train.record import read_run

    record = read_run(job.out, with_adapter=False)
    job.rows = record.facts["data_report"].get("used")
    job.first_loss = next((row["loss"] for row in record.steps if row["step"] == 1), None)


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
