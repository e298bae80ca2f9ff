"""LoRA, a prefix, biases and norms: each alone and together, on E2E, three seeds.

::

    python -m benchmarks beside --out results/beside                     # all that is missing
    python -m benchmarks beside --out results/beside --only 'lora+*'     # a part, elsewhere too
    python -m benchmarks beside --out results/beside --table             # what there is by now

A cell is a run of ``lorakit train`` in a process of its own, named ``SIDE/RATE/SEED``. What is
trained (:data:`SIDES`) is all that differs between sides; steps, batch, schedule, rows and
validation are the same, and so is the base. Each side has its own grid of rates. The cells with the
first seed search: the one with the lowest *validation* loss has the rate, and where it lies at an
end of the grid, the grid grows there by a factor of two. At that rate the other seeds follow, and
each of these cells is judged by ``lorakit eval`` on a test file that nobody has seen, by loss and
BLEU.

A prefix beside LoRA learns ten times faster than it, the default of ``lorakit train``; so the rate
of the sides with LoRA is LoRA's, and that of a prefix alone is the prefix's own divided by ten.
SmolLM2 has no biases, so the biases here are new ones, which begin at zero.

Every finished cell and every judgement is a line of JSON, so a run that was stopped goes on, and
several processes can share the cells by ``--only``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.full_or_lora import _append, _lines, _lorakit, _number, _spread
from benchmarks.harness import hardware

#: a search that has left the grid this often has lost its way
_MOST_RATES = 8


@dataclass(frozen=True)
class Side:
    """One thing to train."""

    flags: tuple[str, ...]
    rates: tuple[float, ...]
    """Where its search begins."""


_LORA = (1e-3, 2e-3, 4e-3)
#: they move few numbers, each by itself, and want more
_FEW = (2e-3, 4e-3, 8e-3)

SIDES = {
    "lora": Side(("--rank", "{rank}"), _LORA),
    "prefix": Side(("--targets", "none", "--prefix", "{prefix}"), _LORA),
    "biases": Side(("--targets", "none", "--bias", "new"), _FEW),
    "norms": Side(("--targets", "none", "--norms"), _FEW),
    "lora+prefix": Side(("--rank", "{rank}", "--prefix", "{prefix}"), _LORA),
    "lora+biases": Side(("--rank", "{rank}", "--bias", "new"), _LORA),
    "lora+norms": Side(("--rank", "{rank}", "--norms"), _LORA),
    "lora+all": Side(
        ("--rank", "{rank}", "--prefix", "{prefix}", "--bias", "new", "--norms"), _LORA
    ),
}


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared")) / "data"
    parser.add_argument("--out", required=True, help="folder of the numbers and the runs")
    parser.add_argument("--only", default="*", help="cells to run, such as 'lora+*' or '*/0'")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
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
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=16, help="virtual tokens")
    parser.add_argument(
        "--rate", nargs="+", default=[], metavar="SIDE=X", help="no search there: this rate"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first searches"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    if not options.table:
        _check_same(out, options)
        for name in _missing(out, options):
            _train(out, name, options)
        for name in _unjudged(out, options):
            _judge(out, name, options)
    text = _table(out, options)
    (out / "beside.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


_DECISIVE = (
    *("base", "data", "test", "map", "format", "steps", "batch_size", "eval_every", "eval_rows"),
    *("test_items", "metrics", "rank", "prefix", "seeds", "dtype", "rate"),
)


def _check_same(out: Path, options: argparse.Namespace) -> None:
    """Lines of other settings would be compared as if they were of these."""
    ours = {k: v for k, v in vars(options).items() if k in _DECISIVE}
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != ours:
        raise SystemExit(f"{path} has other settings; give another --out")
    path.write_text(json.dumps(ours, indent=2) + "\n")


# --- which cells -------------------------------------------------------------------------------


def _name(side: str, rate: float, seed: int) -> str:
    return f"{side}/{rate:g}/{seed}"


def _missing(out: Path, options: argparse.Namespace) -> Iterator[str]:
    """Cells that are to be trained next; what is next depends on what was found."""
    tried: set[str] = set()
    while True:
        done = _lines(out / "cells.jsonl")
        wanted = [
            name
            for side in options.sides
            for name in _wanted(side, done, options)
            if name not in done and name not in tried and fnmatch.fnmatch(name, options.only)
        ]
        if not wanted:
            return
        tried.add(wanted[0])
        yield wanted[0]


def _wanted(side: str, done: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """All cells of a side, as far as they are known by now."""
    rates, complete = _rates(side, done, options)
    cells = [_name(side, rate, options.seeds[0]) for rate in rates]
    if complete:
        best = _best(side, rates, done, options)
        cells += [_name(side, best, seed) for seed in options.seeds[1:]]
    return cells


def _rates(
    side: str, done: dict[str, Any], options: argparse.Namespace
) -> tuple[list[float], bool]:
    """The grid with what it grew by, and whether all of it is done and the best lies inside."""
    fixed = dict(pair.split("=") for pair in options.rate)
    rates = [float(fixed[side])] if side in fixed else sorted(SIDES[side].rates)
    while all(_name(side, rate, options.seeds[0]) in done for rate in rates):
        best = _best(side, rates, done, options)
        if rates[0] < best < rates[-1] or len(rates) == 1 or len(rates) >= _MOST_RATES:
            return rates, True
        grown = best * 2 if best == rates[-1] else best / 2
        rates = sorted([*rates, float(f"{grown:g}")])
    return rates, False


def _best(
    side: str, rates: Sequence[float], done: dict[str, Any], options: argparse.Namespace
) -> float:
    def loss(rate: float) -> float:
        found = done[_name(side, rate, options.seeds[0])]["validation_loss"]
        return float("inf") if found is None else float(found)

    return min(rates, key=loss)


def _finalists(out: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """The cells at the best rate, by side; none while the search goes on."""
    done = _lines(out / "cells.jsonl")
    found: dict[str, list[str]] = {}
    for side in options.sides:
        rates, complete = _rates(side, done, options)
        if complete:
            best = _best(side, rates, done, options)
            names = [_name(side, best, seed) for seed in options.seeds]
            found[side] = [name for name in names if name in done]
    return found


def _unjudged(out: Path, options: argparse.Namespace) -> list[str]:
    judged = _lines(out / "judged.jsonl")
    names = [name for names in _finalists(out, options).values() for name in names]
    return [n for n in names if n not in judged and fnmatch.fnmatch(n, options.only)]


# --- what is run -------------------------------------------------------------------------------


def _folder(out: Path, name: str) -> Path:
    return out / "runs" / name.replace("/", "-")


def _train(out: Path, name: str, options: argparse.Namespace) -> None:
    side, rate, seed = name.split("/")
    folder = _folder(out, name)
    flags = {
        "--base": options.base,
        "--data": options.data,
        "--map": options.map,
        "--format": options.format,
        "--steps": options.steps,
        "--batch-size": options.batch_size,
        "--eval-every": options.eval_every,
        "--eval-rows": options.eval_rows,
        "--samples": 0,
        "--lr": rate,
        "--seed": seed,
        "--device": options.device,
        "--dtype": options.dtype,
        "--out": folder,
    }
    command = ["train", *(str(part) for flag in flags.items() if flag[1] != "" for part in flag)]
    numbers = {"rank": options.rank, "prefix": options.prefix}
    command += [flag.format(**numbers) for flag in SIDES[side].flags]
    if (folder / "run.yaml").exists():
        command = ["train", "--resume", str(folder)]
    result, peak = _lorakit([*command, "--json"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    facts, _ = _lorakit(["inspect", str(folder / "adapter"), "--json"])
    _append(
        out / "cells.jsonl",
        {
            "name": name,
            "validation_loss": result["best_loss"],
            "best_step": result["best_step"],
            "parameters": facts["parameters"],
            "seconds": sum(row["seconds"] for row in steps),
            "tokens": sum(row["tokens"] for row in steps),
            "peak_mb": peak,
            **hardware(),
        },
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _judge(out: Path, name: str, options: argparse.Namespace) -> None:
    command = ["eval", "--base", options.base, "--data", options.test, "--json"]
    command += ["--adapter", str(_folder(out, name) / "adapter")]
    command += ["--device", options.device, "--dtype", options.dtype]
    for flag, value in (
        ("--map", options.map),
        ("--format", options.format),
        ("--limit", options.test_items),
        ("--metrics", options.metrics),
    ):
        command += [flag, str(value)] if value else []
    found, _ = _lorakit(command)
    base, tuned = found["models"]
    _append(out / "judged.jsonl", {"name": name, "base": _facts(base), **_facts(tuned)})


def _facts(model: dict[str, Any]) -> dict[str, Any]:
    return {key: model.get(key) for key in ("loss", "metrics")}


# --- the table ---------------------------------------------------------------------------------


def _table(out: Path, options: argparse.Namespace) -> str:
    done, judged = _lines(out / "cells.jsonl"), _lines(out / "judged.jsonl")
    lines = ["| cell | validation loss | at step | s | peak MB |", "|" + "---|" * 5]
    lines += [
        f"| {name} | {_number(row['validation_loss'])} | {row['best_step']} | "
        f"{row['seconds']:.0f} | {row['peak_mb']:.0f} |"
        for name, row in sorted(done.items(), key=lambda pair: _order(pair[0]))
    ]
    sides = {
        side: [judged[name] | {"cell": done[name]} for name in names if name in judged]
        for side, names in _finalists(out, options).items()
    }
    sides = {side: rows for side, rows in sides.items() if rows}
    lines += ["", "At the best rate, over seeds: mean (lowest to highest)", ""]
    lines += ["| trained | numbers | rate | seeds | test loss | BLEU | s |", "|" + "---|" * 7]
    if sides:
        base = next(iter(sides.values()))[0]["base"]
        bleu = (base["metrics"] or {}).get("bleu")
        lines.append(f"| nothing | 0 | | | {_number(base['loss'])} | {_number(bleu)} | |")
    lines += [_row(side, rows) for side, rows in sides.items()]
    return "\n".join([*lines, ""])


def _order(name: str) -> tuple[int, float, int]:
    side, rate, seed = name.split("/")
    return list(SIDES).index(side), float(rate), int(seed)


def _row(side: str, rows: Sequence[dict[str, Any]]) -> str:
    cells = [row["cell"] for row in rows]
    losses = _spread([row["loss"] for row in rows])
    bleu = _spread([(row["metrics"] or {}).get("bleu") for row in rows])
    seconds = statistics.mean(cell["seconds"] for cell in cells)
    rate = cells[0]["name"].split("/")[1]
    numbers = f"{cells[0]['parameters']:,}"
    return f"| {side} | {numbers} | {rate} | {len(rows)} | {losses} | {bleu} | {seconds:.0f} |"
