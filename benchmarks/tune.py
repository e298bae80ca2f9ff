"""``lorakit tune`` beside an exhaustive grid of runs that are trained alone.

Its parts have invocations of their own, so that the long one can be stopped, resumed and split::

    python -m benchmarks tune grid   --out results/tune            # a JSON line for each cell
    python -m benchmarks tune grid   --out results/tune --cells 0/2    # one half of the cells
    python -m benchmarks tune search --out results/tune
    python -m benchmarks tune judge  --out results/tune            # the losses that are compared
    python -m benchmarks tune report --out results/tune

Grid and search have the same steps, batches and seed. A cell of the grid is evaluated at its start
and its end, and the search at its rungs, on as many rows as it chooses. Two losses are compared, on
rows that neither has seen, and their time counts for neither: those of a test file, and those of
prompts of the data file itself that no step has drawn. E2E's files are not alike (its dev file has
two kinds of food, its test file seven), so the first also tells what is lost where the data is
another than what was tuned on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import hardware

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
RANKS = (4, 8, 16, 32, 64)


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared")) / "data"
    parser.add_argument("part", choices=("grid", "search", "judge", "report"))
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
    parser.add_argument("--eval-rows", type=int, default=96, help="of the grid")
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
    parts = {"grid": _grid, "search": _search, "judge": _judge, "report": _report}
    return parts[options.part](options, out)


# --- what is trained and measured --------------------------------------------------------------


class _Task:
    """The base, the data and the test rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        from lorakit.bases import load_base
        from lorakit.cli.rows import column_map
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
        self._origin_of = origin
        self._options = options

    def held_out(self) -> dict[str, tuple[Any, list[int]]]:
        """Rows that no step has drawn and no evaluation has read, by where they are from."""
        options = self._options
        test = self._origin_of(options.test).load_data(self.base)
        everything = range(len(test))
        return {
            "test": (test, self._rows(test, everything)),
            "unseen": (self.data, self._rows(self.data, self._unseen())),
        }

    def _unseen(self) -> list[int]:
        from lorakit.data.ordering import indices_at
        from lorakit.data.splitting import split

        options, data = self._options, self.data
        fraction = _settings(options).held_out(len(data))
        training, validation = split(data, fraction, options.seed)
        drawn = options.steps * options.batch_size
        seen = [*training[indices_at(len(training), options.seed, 0, drawn)], *validation]
        keys = {data.prompt_key(int(row)) for row in seen}
        return [row for row in range(len(data)) if data.prompt_key(row) not in keys]

    def _rows(self, data: Any, rows: Iterable[int]) -> list[int]:
        """The first rows of each of the first prompts."""
        found: dict[bytes, list[int]] = {}
        for row in rows:
            key = data.prompt_key(row)
            if key in found or len(found) < self._options.test_prompts:
                found.setdefault(key, []).append(row)
        return [row for rows in found.values() for row in rows[: self._options.test_rows]]

    def loss(self, adapter: Path, data: Any, rows: list[int]) -> float:
        """Of an adapter, in nats per supervised token."""
        from lorakit.evaluate import loss
        from lorakit.formats import load_adapter
        from lorakit.layers import attach

        handle = attach(self.base.model, load_adapter(adapter), name="judged")
        try:
            return loss(self.base.model, handle, "judged", data, rows).loss
        finally:
            handle.detach()


def _settings(options: argparse.Namespace, **more: Any) -> Any:
    from lorakit.train import TrainSettings

    return TrainSettings(
        steps=options.steps,
        batch_size=options.batch_size,
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


def _name(lr: float, rank: int, **_: object) -> str:
    return f"lr{lr:g}-r{rank}"


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
        folder = out / "grid" / _name(rate, rank)
        shutil.rmtree(folder, ignore_errors=True)  # of a cell that was cut off: it is timed whole
        settings = _settings(
            options,
            lr=rate,
            eval_every=0,
            eval_rows=options.eval_rows,
            samples=0,
            keep_checkpoints=1,
        )
        started = time.perf_counter()
        result = Trainer(
            task.base, LoRASpec(rank=rank), task.data, settings, folder, origin=task.origin
        ).run()
        seconds = time.perf_counter() - started
        row = {
            "lr": rate,
            "rank": rank,
            "validation_loss": result.best_loss,
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
    from lorakit.workflows.tuning.space import parse_search

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
    row = {
        "chosen": result.choice.number,
        "seconds": result.seconds,
        "candidates": {
            c.number: {"end": c.end, "values": dict(c.values)} for c in result.candidates
        },
        "reasons": [reason.text for reason in result.choice.reasons],
    }
    (out / "search.json").write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    return 0


def _judge(options: argparse.Namespace, out: Path) -> int:
    """The losses of all adapters that were trained to the end."""
    adapters = {f"grid/{path.parent.name}": path for path in sorted(out.glob("grid/*/adapter"))}
    if (out / "search.json").exists():
        for number, told in json.loads((out / "search.json").read_text())["candidates"].items():
            if told["end"] == "finished":
                name = f"{int(number):02}"
                adapters[f"search/{name}"] = out / "search" / "candidates" / name / "adapter"
    done = _judged(out)
    waiting = {name: path for name, path in adapters.items() if len(done.get(name, {})) < 2}
    task = _Task(options) if waiting else None
    parts = task.held_out() if task else {}
    for name, path in waiting.items():
        assert task is not None
        for part in parts.keys() - done.get(name, {}).keys():
            _append(out / "judged.jsonl", {"name": name, part: task.loss(path, *parts[part])})
    return 0


def _judged(out: Path) -> dict[str, dict[str, float]]:
    """Adapter → its loss by part."""
    found: dict[str, dict[str, float]] = {}
    for row in _lines(out, "judged.jsonl"):
        found.setdefault(row.pop("name"), {}).update(row)
    return found


def _watcher() -> Any:
    from lorakit.workflows.tuning.field import Watcher

    class Telling(Watcher):
        def on_note(self, text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        def on_eval(self, number: int, metrics: Any) -> None:
            told = f"candidate {number}: {metrics.loss:.4f} after {metrics.step}"
            print(told, file=sys.stderr, flush=True)

    return Telling()


def _report(options: argparse.Namespace, out: Path) -> int:
    """A table for each of the held-out parts, and the numbers that are asked for."""
    cells = _lines(out, "grid*.jsonl")
    judged = _judged(out)
    search = json.loads((out / "search.json").read_text())
    if not cells:
        raise SystemExit("there is no cell of a grid yet")
    seconds = sum(cell["seconds"] for cell in cells)
    summary: dict[str, Any] = {
        "cells": len(cells),
        "grid_seconds": seconds,
        "search_seconds": search["seconds"],
        "share_of_grid_time": search["seconds"] / seconds,
        "chosen": search["candidates"][str(search["chosen"])]["values"],
    }
    text = ""
    for part in ("test", "unseen"):
        found = {(c["lr"], c["rank"]): judged[f"grid/{_name(**c)}"][part] for c in cells}
        by_validation = min(cells, key=lambda cell: cell["validation_loss"])
        ours = judged[f"search/{search['chosen']:02}"][part]
        best = min(found.values())
        usual = found[by_validation["lr"], by_validation["rank"]]
        summary[part] = {
            "search": ours,
            "best_of_grid": best,
            "best_cell": min(found, key=lambda cell: found[cell]),
            "above_best": ours / best - 1,
            "cell_of_lowest_validation_loss": (by_validation["lr"], by_validation["rank"]),
            "its_loss": usual,
            "above_it": ours / usual - 1,
        }
        text += f"{part}\n\n{_table(found)}\n\n"
    print(text)
    print(json.dumps(summary, indent=1))
    (out / "tune.md").write_text(text)
    report = {"hardware": hardware(), "steps": options.steps, **summary, "grid": cells}
    report["judged"] = judged
    (out / "tune_report.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _table(found: Mapping[tuple[float, int], float]) -> str:
    """Losses by rate and rank."""
    rates, ranks = (sorted({cell[i] for cell in found}) for i in (0, 1))
    lines = [
        "| rank | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for rank in ranks:
        losses = (found.get((rate, int(rank))) for rate in rates)
        shown = ("" if loss is None else f"{loss:.4f}" for loss in losses)
        lines.append(f"| {rank} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
