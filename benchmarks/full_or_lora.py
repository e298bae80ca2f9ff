"""Full fine-tuning beside LoRA, the rate searched for on both sides, then three seeds.

::

    python -m benchmarks full_or_lora --out results/full                  # all that is missing
    python -m benchmarks full_or_lora --out results/full --only 'lora/*'  # a part, elsewhere too
    python -m benchmarks full_or_lora --out results/full --table          # what there is by now

A cell is a run of ``lorakit train`` in a process of its own, named ``SIDE/RATE/SEED``. Of those
with seed 0 the one with the lowest *validation* loss has the rate; where it lies at an end of the
grid, it grows there by a factor of two. At that rate the other seeds follow, and each of these
cells is judged by ``lorakit eval`` on a test file that nobody has seen: loss, BLEU, forgetting.

Every finished cell and every judgement is a line of JSON, so a run that was stopped goes on, and
several processes can share the cells by ``--only``. Steps, batch, schedule, rows and validation are
the same on both sides; time is that of the steps, memory the peak of the training process.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import hardware

RATES = {"lora": (1e-3, 2e-3, 4e-3), "full": (5e-5, 1e-4, 2e-4)}
#: a search that has left the grid this often has lost its way
_MOST_RATES = 8


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared")) / "data"
    parser.add_argument("--out", required=True, help="folder of the numbers and the runs")
    parser.add_argument("--only", default="*", help="cells to run, such as 'full/*' or '*/0'")
    parser.add_argument("--table", action="store_true", help="run nothing")
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
    parser.add_argument("--lora-rates", type=float, nargs="+", default=list(RATES["lora"]))
    parser.add_argument("--full-rates", type=float, nargs="+", default=list(RATES["full"]))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first searches"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", action="store_true", help="leave models and checkpoints there")


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
    (out / "full_or_lora.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _check_same(out: Path, options: argparse.Namespace) -> None:
    """Lines of other settings would be compared as if they were of these."""
    ours = {k: v for k, v in vars(options).items() if k in _DECISIVE}
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != ours:
        raise SystemExit(f"{path} has other settings; give another --out")
    path.write_text(json.dumps(ours, indent=2) + "\n")


_DECISIVE = (
    *("base", "data", "test", "map", "format", "steps", "batch_size", "eval_every", "eval_rows"),
    *("test_items", "metrics", "rank", "seeds", "dtype"),
)


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
            for side in RATES
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
    rates = sorted(getattr(options, f"{side}_rates"))
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
    for side in RATES:
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
    command += ["--full"] if side == "full" else ["--rank", str(options.rank)]
    if (folder / "run.yaml").exists():
        command = ["train", "--resume", str(folder)]
    result, peak = _lorakit([*command, "--json"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    kept = folder / ("model" if side == "full" else "adapter")
    _append(
        out / "cells.jsonl",
        {
            "name": name,
            "validation_loss": result["best_loss"],
            "best_step": result["best_step"],
            "seconds": sum(row["seconds"] for row in steps),
            "tokens": sum(row["tokens"] for row in steps),
            "peak_mb": peak,
            "peak_vram_mb": max((row.get("vram_mb") or 0 for row in steps), default=0) or None,
            "bytes": sum(f.stat().st_size for f in kept.glob("*.safetensors")),
            **hardware(),
        },
    )
    if not options.keep:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _judge(out: Path, name: str, options: argparse.Namespace) -> None:
    side = name.partition("/")[0]
    folder = _folder(out, name)
    kept = folder / ("model" if side == "full" else "adapter")
    command = ["eval", "--base", options.base, "--data", options.test, "--forgetting", "--json"]
    command += ["--full" if side == "full" else "--adapter", f"tuned:{kept}"]
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
    if not options.keep:
        shutil.rmtree(folder / "model", ignore_errors=True)


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


# --- the table ---------------------------------------------------------------------------------


def _table(out: Path, options: argparse.Namespace) -> str:
    done, judged = _lines(out / "cells.jsonl"), _lines(out / "judged.jsonl")
    lines = ["| cell | validation loss | at step | s | peak MB | MB on disk |", "|" + "---|" * 6]
    lines += [
        f"| {name} | {_number(row['validation_loss'])} | {row['best_step']} | "
        f"{row['seconds']:.0f} | {row['peak_mb']:.0f} | {row['bytes'] / 2**20:.1f} |"
        for name, row in sorted(done.items(), key=lambda pair: _order(pair[0]))
    ]
    sides = {
        side: [judged[name] | {"cell": done[name]} for name in names if name in judged]
        for side, names in _finalists(out, options).items()
    }
    sides = {side: rows for side, rows in sides.items() if rows}
    lines += ["", "At the best rate, over seeds: mean (lowest to highest)", ""]
    lines += ["| | rate | seeds | test loss | BLEU | forgetting | s | peak MB | MB on disk |"]
    lines += ["|" + "---|" * 9]
    if sides:
        base = next(iter(sides.values()))[0]["base"]
        bleu = (base["metrics"] or {}).get("bleu")
        lines.append(f"| base | | | {_number(base['loss'])} | {_number(bleu)} | | | | |")
    lines += [_side(side, rows) for side, rows in sides.items()]
    return "\n".join([*lines, "", _verdict(sides), ""])


def _order(name: str) -> tuple[str, float, int]:
    side, rate, seed = name.split("/")
    return side, float(rate), int(seed)


def _side(side: str, rows: Sequence[dict[str, Any]]) -> str:
    cells = [row["cell"] for row in rows]
    columns = [
        [row["loss"] for row in rows],
        [(row["metrics"] or {}).get("bleu") for row in rows],
        [(row["forgetting"] or {}).get("difference") for row in rows],
    ]
    shown = " | ".join(_spread(column) for column in columns)
    work = " | ".join(
        f"{statistics.mean(values):.{digits}f}"
        for values, digits in (
            ([c["seconds"] for c in cells], 0),
            ([c["peak_mb"] for c in cells], 0),
            ([c["bytes"] / 2**20 for c in cells], 1),
        )
    )
    rate = cells[0]["name"].split("/")[1]
    return f"| {side} | {rate} | {len(rows)} | {shown} | {work} |"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = _number(statistics.mean(known))
    return f"{mean} ({_number(min(known))} to {_number(max(known))})"


def _verdict(sides: dict[str, list[dict[str, Any]]]) -> str:
    if set(sides) != set(RATES):
        return "One of the sides is not done yet."
    lora, full = ([row["loss"] for row in sides[side]] for side in ("lora", "full"))
    if None in (*lora, *full):
        return "A loss is not finite."
    mean, bar = statistics.mean(lora), statistics.mean(full)
    spread = max(full) - min(full)
    holds = "holds" if mean <= bar + spread else "does not hold"
    return (
        f"Tuned LoRA {mean:.4f}, tuned full fine-tuning {bar:.4f}, whose seeds are {spread:.4f} "
        f"apart: LoRA <= full + spread {holds} ({mean - bar:+.4f})."
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"
