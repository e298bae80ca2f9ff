"""``lorakit tune`` beside an exhaustive grid of runs that are trained alone.

Three parts, each with its own invocation, so that the long one can be stopped, resumed and split::

    python -m benchmarks tune grid   --out results/tune            # a JSON line for each cell
    python -m benchmarks tune grid   --out results/tune --cells 0/2    # one half of the cells
    python -m benchmarks tune search --out results/tune
    python -m benchmarks tune report --out results/tune

Grid and search have the same steps, rows, validation rows and seed. The loss that is compared is on
a test file that neither has seen; its time counts for neither.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import hardware

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
RANKS = (4, 8, 16, 32, 64)


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared")) / "data"
    parser.add_argument("part", choices=("grid", "search", "report"))
    parser.add_argument("--out", required=True, help="folder of the numbers and the runs")
    parser.add_argument("--base", default="smollm2", help="hub id, folder, .gguf, or smollm2")
    parser.add_argument("--data", default=str(shared / "e2e_dev.csv"))
    parser.add_argument("--test", default=str(shared / "e2e_test.csv"), help="held out")
    parser.add_argument("--map", default="prompt=mr,completion=ref", help="'' for none")
    parser.add_argument("--format", default="plain", help="as of train")
    parser.add_argument("--test-prompts", type=int, default=128, help="of the test file")
    parser.add_argument("--test-rows", type=int, default=2, help="of each test prompt, at most")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-rows", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="of the grid")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="of the grid")
    parser.add_argument("--cells", default="0/1", help="K/N: every Nth cell, from the Kth on")
    parser.add_argument("--candidates", type=int, help="of the search")
    parser.add_argument("--search", nargs="*", default=[], help="as of lorakit tune --search")
    parser.add_argument("--max-seconds", type=float, help="of the search")
    parser.add_argument("--quick", action="store_true", help="search the rate alone")


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    return {"grid": _grid, "search": _search, "report": _report}[options.part](options, out)


# --- what is trained and measured --------------------------------------------------------------


class _Task:
    """The base, the data and the test rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        from lorakit.bases import load_base
        from lorakit.cli.common import column_map
        from lorakit.data import DataSpec
        from lorakit.train import Origin

        self.base = load_base(options.base, dtype="float32")
        columns = column_map(options.map) if options.map else {}

        def origin(path: str) -> Any:
            path = str(Path(path).resolve())
            spec = DataSpec(path=(path,), map=columns, format=options.format)
            return Origin(base={"ref": options.base, "dtype": "float32"}, data=spec)

        self.origin = origin(options.data)
        self.data = self.origin.load_data(self.base)
        self.test = origin(options.test).load_data(self.base)
        self.rows = self._rows(options.test_prompts, options.test_rows)

    def _rows(self, prompts: int, each: int) -> list[int]:
        """The first rows of each of the first prompts."""
        found: dict[bytes, list[int]] = {}
        for row in range(len(self.test)):
            key = self.test.prompt_key(row)
            if key in found or len(found) < prompts:
                found.setdefault(key, []).append(row)
        return [row for rows in found.values() for row in rows[:each]]

    def test_loss(self, adapter: Path) -> float:
        """Of an adapter, on rows that it has not seen."""
        from lorakit.evaluate import loss
        from lorakit.formats import load_adapter
        from lorakit.layers import attach

        handle = attach(self.base.model, load_adapter(adapter), name="tested")
        try:
            return loss(self.base.model, handle, "tested", self.test, self.rows).loss
        finally:
            handle.detach()


def _settings(options: argparse.Namespace, **more: Any) -> Any:
    from lorakit.train import TrainSettings

    return TrainSettings(
        steps=options.steps,
        batch_size=options.batch_size,
        eval_rows=options.eval_rows,
        seed=options.seed,
        **more,
    )


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr, flush=True)


def _lines(out: Path, names: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(out.glob(names))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


# --- the parts ---------------------------------------------------------------------------------


def _grid(options: argparse.Namespace, out: Path) -> int:
    """Every cell that has no line yet; each is a run alone, evaluated before and after."""
    from lorakit.core.spec import LoRASpec
    from lorakit.train import Trainer

    first, every = (int(part) for part in options.cells.split("/"))
    cells = [(rate, rank) for rate in options.rates for rank in options.ranks][first::every]
    done = {(row["lr"], row["rank"]) for row in _lines(out, "grid*.jsonl")}
    waiting = [cell for cell in cells if cell not in done]
    print(f"{len(waiting)} of {len(cells)} cells are left", file=sys.stderr)
    task = _Task(options) if waiting else None
    for rate, rank in waiting:
        assert task is not None
        folder = out / "grid" / f"lr{rate:g}-r{rank}"
        shutil.rmtree(folder, ignore_errors=True)  # of a cell that was cut off: it is timed whole
        settings = _settings(options, lr=rate, eval_every=0, samples=0, keep_checkpoints=1)
        started = time.perf_counter()
        result = Trainer(
            task.base, LoRASpec(rank=rank), task.data, settings, folder, origin=task.origin
        ).run()
        seconds = time.perf_counter() - started
        assert result.adapter is not None
        row = {
            "lr": rate,
            "rank": rank,
            "validation_loss": result.best_loss,
            "test_loss": task.test_loss(result.adapter),
            "seconds": seconds,
            "steps": result.steps,
            "load": os.getloadavg(),
        }
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        _append(out / f"grid-{first}-{every}.jsonl", row)
    return 0


def _search(options: argparse.Namespace, out: Path) -> int:
    """One search, or what is left of it."""
    from lorakit.workflows.tune import Plan, resume_tune, tune
    from lorakit.workflows.tune_space import parse_search

    task = _Task(options)
    folder = out / "search"
    if (folder / "tune.yaml").exists():
        result = resume_tune(folder, base=task.base, data=task.data, watcher=_watcher())
    else:
        plan = Plan(
            quick=options.quick,
            candidates=options.candidates,
            max_seconds=options.max_seconds,
            search=parse_search(options.search),
        )
        result = tune(
            task.base,
            task.data,
            settings=_settings(options),
            out=folder,
            plan=plan,
            origin=task.origin,
            watcher=_watcher(),
        )
    finished = [c for c in result.candidates if c.end == "finished"]
    row = {
        "chosen": result.choice.number,
        "values": dict(result.candidates[result.choice.number].values),
        "test_loss": task.test_loss(result.adapter),
        "seconds": result.seconds,
        "trained_out": {
            c.number: {
                "values": dict(c.values),
                "test_loss": task.test_loss(folder / "candidates" / f"{c.number:02}" / "adapter"),
            }
            for c in finished
        },
        "reasons": [reason.text for reason in result.choice.reasons],
    }
    (out / "search.json").write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    return 0


def _watcher() -> Any:
    from lorakit.workflows.tune_field import Watcher

    class Telling(Watcher):
        def on_note(self, text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        def on_eval(self, number: int, metrics: Any) -> None:
            told = f"candidate {number}: {metrics.loss:.4f} after {metrics.step}"
            print(told, file=sys.stderr, flush=True)

    return Telling()


def _report(options: argparse.Namespace, out: Path) -> int:
    """The table, and the two numbers that are asked for."""
    cells = _lines(out, "grid*.jsonl")
    search = json.loads((out / "search.json").read_text())
    if not cells:
        raise SystemExit("there is no cell of a grid yet")
    best = min(cells, key=lambda cell: cell["test_loss"])
    seconds = sum(cell["seconds"] for cell in cells)
    rates = sorted({cell["lr"] for cell in cells})
    found = {(cell["lr"], cell["rank"]): cell["test_loss"] for cell in cells}
    lines = [
        "| rank | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for rank in sorted({cell["rank"] for cell in cells}):
        losses = (found.get((rate, rank)) for rate in rates)
        shown = ("" if loss is None else f"{loss:.4f}" for loss in losses)
        lines.append(f"| {rank} | " + " | ".join(shown) + " |")
    summary = {
        "best_of_grid": best,
        "cells": len(cells),
        "grid_seconds": seconds,
        "search_values": search["values"],
        "search_loss": search["test_loss"],
        "search_seconds": search["seconds"],
        "loss_above_best": search["test_loss"] / best["test_loss"] - 1,
        "share_of_grid_time": search["seconds"] / seconds,
    }
    text = "\n".join(lines)
    print(text)
    print(json.dumps(summary, indent=1))
    (out / "tune.md").write_text(text + "\n")
    report = {"hardware": hardware(), "steps": options.steps, **summary, "grid": cells}
    (out / "tune_report.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0
