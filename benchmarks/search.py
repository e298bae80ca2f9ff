"""The best rate of several ways to train, each searched for by itself, then more seeds of it.

A cell is a run of ``lorakit train`` in a process of its own, named ``SIDE/RATE/SEED``. What a side
trains is all that differs; steps, batch, schedule, rows and validation are the same, and so is the
base. The cells with the first seed search: the one with the lowest *validation* loss has the rate,
and where it lies at an end of the grid, the grid grows there by a factor of two. At that rate the
other seeds follow, and each of these cells is judged by ``lorakit eval`` on a test file that nobody
has seen.

Every finished cell and every judgement is a line of JSON, so a run that was stopped goes on, and
several processes can share the cells by ``--only``. Time is that of the steps, memory the peak of
the training process.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.harness import hardware

#: a search that has left the grid this often has lost its way
_MOST_RATES = 8


@dataclass(frozen=True)
class Side:
    """One way to train."""

    flags: tuple[str, ...]
    """Of ``lorakit train``; {rank} and the like stand for options of the benchmark."""

    rates: tuple[float, ...]
    """Where its search begins."""

    keeps: str = "adapter"
    """What it writes, by the name that its folder has in the run's: "adapter" or "model"."""


def configure(parser: argparse.ArgumentParser, sides: Mapping[str, Side]) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared")) / "data"
    parser.add_argument("--out", required=True, help="folder of the numbers and the runs")
    parser.add_argument("--only", default="*", help="cells to run, such as 'lora*' or '*/0'")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--sides", nargs="+", choices=sides, default=list(sides))
    parser.add_argument("--base", default="smollm2", help="hub id, folder, .gguf, or smollm2")
    parser.add_argument("--data", default=str(shared / "e2e_dev.csv"))
    parser.add_argument("--test", default=str(shared / "e2e_test.csv"), help="held out")
    parser.add_argument("--map", default="prompt=mr,completion=ref", help="'' for none")
    parser.add_argument("--format", default="plain", help="as of train")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--eval-rows", type=int, default=96)
    parser.add_argument("--test-items", type=int, default=100, help="prompts; 0: all")
    parser.add_argument("--metrics", default="bleu", help="'' for the loss alone")
    parser.add_argument("--forgetting", action="store_true", help="loss on general text too")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--rates",
        nargs="+",
        default=[],
        metavar="SIDE=X[,X]",
        help="where the search of a side begins; a single rate is not searched for",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first searches"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", action="store_true", help="leave models and checkpoints there")


#: options that do not change what a cell's numbers are
_INDIFFERENT = ("name", "run", "out", "only", "table", "sides", "rates", "device", "keep")


class Search:
    """The cells of all sides in a folder: which are left, and what the finished ones say."""

    def __init__(self, sides: Mapping[str, Side], options: argparse.Namespace) -> None:
        self.sides = {name: sides[name] for name in options.sides}
        self.options = options
        self.out = Path(options.out)
        given = dict(pair.split("=") for pair in options.rates)
        self._grids = {
            name: [float(rate) for rate in given[name].split(",")]
            if name in given
            else list(side.rates)
            for name, side in self.sides.items()
        }

    def run(self) -> None:
        """Train and judge all that is missing, unless only the table is wanted."""
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        if self.options.table:
            return
        self._check_same()
        for name in self._missing():
            self._train(name)
        for names in self._unjudged():
            self._judge(names)

    def _check_same(self) -> None:
        """Lines of other settings would be compared as if they were of these."""
        ours = {k: v for k, v in vars(self.options).items() if k not in _INDIFFERENT}
        path = self.out / "settings.json"
        if path.exists() and json.loads(path.read_text()) != ours:
            raise SystemExit(f"{path} has other settings; give another --out")
        path.write_text(json.dumps(ours, indent=2) + "\n")

    # --- which cells ---------------------------------------------------------------------------

    def _done(self) -> dict[str, dict[str, Any]]:
        return _lines(self.out / "cells.jsonl")

    def _name(self, side: str, rate: float, seed: int | None = None) -> str:
        return f"{side}/{rate:g}/{self.options.seeds[0] if seed is None else seed}"

    def _missing(self) -> Iterator[str]:
        """Cells that are to be trained next; what is next depends on what was found."""
        tried: set[str] = set()
        while True:
            done = self._done()
            wanted = [
                name
                for side in self.sides
                for name in self._wanted(side, done)
                if name not in done
                and name not in tried
                and fnmatch.fnmatch(name, self.options.only)
            ]
            if not wanted:
                return
            tried.add(wanted[0])
            yield wanted[0]

    def _wanted(self, side: str, done: dict[str, Any]) -> list[str]:
        """All cells of a side, as far as they are known by now."""
        rates, best = self._rates(side, done)
        cells = [self._name(side, rate) for rate in rates]
        if best is not None:
            cells += [self._name(side, best, seed) for seed in self.options.seeds[1:]]
        return cells

    def _rates(self, side: str, done: dict[str, Any]) -> tuple[list[float], float | None]:
        """The grid with what it grew by, and the best of it once that is known."""

        def loss(rate: float) -> float:
            found = done[self._name(side, rate)]["validation_loss"]
            return math.inf if found is None else float(found)

        rates = sorted(self._grids[side])
        while all(self._name(side, rate) in done for rate in rates):
            best = min(rates, key=loss)
            if rates[0] < best < rates[-1] or len(rates) in (1, _MOST_RATES):
                return rates, best
            grown = best * 2 if best == rates[-1] else best / 2
            rates = sorted([*rates, float(f"{grown:g}")])
        return rates, None

    def finalists(self) -> dict[str, list[str]]:
        """The finished cells at the best rate, by side; none while a search goes on."""
        done = self._done()
        found: dict[str, list[str]] = {}
        for side in self.sides:
            _, best = self._rates(side, done)
            if best is not None:
                names = [self._name(side, best, seed) for seed in self.options.seeds]
                found[side] = [name for name in names if name in done]
        return found

    def _unjudged(self) -> list[list[str]]:
        """Finalists without a judgement, those of a side together: the base is judged with them."""
        judged = _lines(self.out / "judged.jsonl")
        sides = [
            [n for n in names if n not in judged and fnmatch.fnmatch(n, self.options.only)]
            for names in self.finalists().values()
        ]
        return [names for names in sides if names]

    # --- what is run ---------------------------------------------------------------------------

    def _folder(self, name: str) -> Path:
        return self.out / "runs" / name.replace("/", "-")

    def _kept(self, name: str) -> Path:
        return self._folder(name) / self.sides[name.partition("/")[0]].keeps

    def _train(self, name: str) -> None:
        options, folder = self.options, self._folder(name)
        side, rate, seed = name.split("/")
        command = ["train", *self._data(options.data)]
        command += _flags(
            ("--steps", options.steps),
            ("--batch-size", options.batch_size),
            ("--eval-every", options.eval_every),
            ("--eval-rows", options.eval_rows),
            ("--samples", 0),
            ("--lr", rate),
            ("--seed", seed),
            ("--out", folder),
        )
        command += [flag.format(**vars(options)) for flag in self.sides[side].flags]
        if (folder / "run.yaml").exists():
            command = ["train", "--resume", str(folder)]
        result, peak = _lorakit([*command, "--json"])
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "step"]
        files = list(self._kept(name).glob("*.safetensors"))
        row = {
            "name": name,
            "validation_loss": result["best_loss"],
            "best_step": result["best_step"],
            "numbers": sum(map(_numbers, files)),
            "bytes": sum(file.stat().st_size for file in files),
            "seconds": sum(row["seconds"] for row in steps),
            "tokens": sum(row["tokens"] for row in steps),
            "peak_mb": peak,
            "peak_vram_mb": max((row.get("vram_mb") or 0 for row in steps), default=0) or None,
            **hardware(),
        }
        _append(self.out / "cells.jsonl", row)
        if not options.keep:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _judge(self, names: Sequence[str]) -> None:
        options = self.options
        command = ["eval", *self._data(options.test), "--json"]
        for number, kept in enumerate(map(self._kept, names)):
            command += ["--full" if kept.name == "model" else "--adapter", f"m{number}:{kept}"]
        command += ["--forgetting"] if options.forgetting else []
        command += _flags(
            ("--limit", options.test_items or ""),
            ("--metrics", options.metrics),
        )
        found, _ = _lorakit(command)
        base, *tuned = found["models"]
        for name, one in zip(names, tuned, strict=True):
            row = {"name": name, "base": _facts(base), **_facts(one)}
            _append(self.out / "judged.jsonl", row)
            if self._kept(name).name == "model" and not options.keep:
                shutil.rmtree(self._kept(name), ignore_errors=True)

    def _data(self, path: str) -> list[str]:
        options = self.options
        return _flags(
            ("--base", options.base),
            ("--data", path),
            ("--map", options.map),
            ("--format", options.format),
            ("--device", options.device),
            ("--dtype", options.dtype),
        )

    # --- what came out -------------------------------------------------------------------------

    def losses(self) -> dict[str, list[float]]:
        """On the test file, of all seeds at the best rate, by side."""
        return {side: [row["loss"] for row in rows] for side, rows in self._results().items()}

    def _results(self) -> dict[str, list[dict[str, Any]]]:
        done, judged = self._done(), _lines(self.out / "judged.jsonl")
        found = {
            side: [judged[name] | {"cell": done[name]} for name in names if name in judged]
            for side, names in self.finalists().items()
        }
        return {side: rows for side, rows in found.items() if rows}

    def table(self) -> str:
        """All cells, and the sides at their best rates."""
        lines = ["| cell | validation loss | at step | s | peak MB |", "|---" * 5 + "|"]
        lines += [
            f"| {name} | {_shown(row['validation_loss'])} | {row['best_step']} | "
            f"{row['seconds']:.0f} | {row['peak_mb']:.0f} |"
            for name, row in sorted(self._done().items(), key=lambda pair: self._order(pair[0]))
        ]
        lines += ["", "At the best rate, over seeds: mean (lowest to highest)", ""]
        names = "trained | numbers | rate | seeds | test loss | BLEU | forgetting | s | peak MB"
        lines += [f"| {names} | MB on disk |", "|---" * 10 + "|"]
        results = self._results()
        if results:
            base = next(iter(results.values()))[0]["base"]
            bleu = _shown((base["metrics"] or {}).get("bleu"))
            lines.append(f"| nothing | 0 | | | {_shown(base['loss'])} | {bleu} | | | | |")
        lines += [_row(side, rows) for side, rows in results.items()]
        return "\n".join([*lines, ""])

    def _order(self, name: str) -> tuple[int, float, int]:
        side, rate, seed = name.split("/")
        place = list(self.sides).index(side) if side in self.sides else len(self.sides)
        return place, float(rate), int(seed)


def _flags(*pairs: tuple[str, object]) -> list[str]:
    """As on a command line; '' leaves a flag out."""
    return [str(part) for pair in pairs if pair[1] != "" for part in pair]


def _numbers(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118


def _facts(model: dict[str, Any]) -> dict[str, Any]:
    return {key: model.get(key) for key in ("loss", "metrics", "forgetting")}


def _lorakit(arguments: Sequence[str]) -> tuple[Any, float]:
    """What a command prints as JSON, and the peak of its resident memory in MB of 2^20 bytes."""
    command = [sys.executable, "-m", "lorakit.cli.main", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"lorakit {' '.join(arguments)} ended with {process.returncode}")
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return json.loads(text), usage.ru_maxrss / scale


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr, flush=True)


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines by name; a last one that was cut off counts as not there."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["name"]] = row
    return found


def _row(side: str, rows: Sequence[dict[str, Any]]) -> str:
    cells = [row["cell"] for row in rows]
    forgetting = [(row["forgetting"] or {}).get("difference") for row in rows]
    columns = (
        side,
        f"{cells[0]['numbers']:,}",
        cells[0]["name"].split("/")[1],
        str(len(rows)),
        _spread([row["loss"] for row in rows]),
        _spread([(row["metrics"] or {}).get("bleu") for row in rows]),
        _spread(forgetting),
        f"{statistics.mean(cell['seconds'] for cell in cells):.0f}",
        f"{statistics.mean(cell['peak_mb'] for cell in cells):.0f}",
        f"{statistics.mean(cell['bytes'] for cell in cells) / 2**20:.1f}",
    )
    return f"| {' | '.join(columns)} |"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{_shown(statistics.mean(known))} ({_shown(min(known))} to {_shown(max(known))})"


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"
