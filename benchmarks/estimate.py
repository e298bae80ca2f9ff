"""How near `lorakit estimate` comes: settings drawn by a seed, predicted, then run.

Each setting is a whole training run of a few steps in a process of its own: its peak of resident
memory, from the start of the process to its last file, and its usual step are set beside the
prediction, which was made before from config and data alone. The
second base has random weights and Qwen 3's shape; it is made in the work folder. The settings
that the constants were fitted on are not among the drawn: other lengths and batches.

On a machine that others use too, give --cpu-seconds with one thread: this machine's rates and the
steps are then both measured in processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: what is drawn from; a setting is one of each
RANKS = (4, 8, 16, 32, 64)
LENGTHS = (96, 192, 384, 640)
EXAMPLES = (2, 4, 6)
HOW = ("lora", "lora", "nf4", "mlp", "layers", "full")
#: tokens of a step are kept below this, so that the whole takes minutes
MOST_TOKENS = 1600


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--settings", type=int, default=8, help="how many are drawn")
    parser.add_argument("--steps", type=int, default=10, help="of which the later half counts")
    parser.add_argument("--data", default=str(shared / "data" / "gsm8k_train.jsonl"))
    parser.add_argument("--work", default="runs/estimate", help="folder for the base and the data")
    parser.add_argument("--cpu-seconds", action="store_true", help="processor time on both sides")
    parser.add_argument(
        "--at-a-time", type=int, default=1, help="settings at once; only with --cpu-seconds"
    )
    parser.add_argument("--out", help="folder for estimate.json and estimate.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.one is not None:
        print(json.dumps(_measure(json.loads(options.one))))
        return 0
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    bases = {"smollm2": "smollm2", "qwen3-random": str(_second_base(work / "qwen3"))}
    drawn = draw(options.seed, options.settings, list(bases))
    rows: list[dict[str, Any]] = []

    def judge(setting: dict[str, Any]) -> None:
        task = {
            **setting,
            "ref": bases[setting["base"]],
            "data": str(_texts(Path(options.data), work, setting["length"])),
            "steps": options.steps,
            "runs": str(work / "runs"),
            "cpu_seconds": options.cpu_seconds,
        }
        row = _row(setting, _alone({**task, "what": "predict"}), _alone(task))
        rows.append(row)
        print(_line(row), file=sys.stderr, flush=True)
        if options.out:  # kept as it comes: a long run may be cut short
            _write(Path(options.out), sorted(rows, key=drawn_at))

    def drawn_at(row: dict[str, Any]) -> int:
        return drawn.index({name: row[name] for name in drawn[0]})

    with ThreadPoolExecutor(options.at_a_time) as pool:
        list(pool.map(judge, drawn))
    print(_table(sorted(rows, key=drawn_at)))
    return 0


def draw(seed: int, number: int, bases: list[str]) -> list[dict[str, Any]]:
    """Settings, the bases in turn; every way of training once before one comes again."""
    chance = random.Random(seed)
    ways = [*dict.fromkeys(HOW)]
    chance.shuffle(ways)
    ways += chance.choices(HOW, k=max(0, number - len(ways)))
    found = []
    for i, how in enumerate(ways[:number]):
        while True:
            length, examples = chance.choice(LENGTHS), chance.choice(EXAMPLES)
            if length * examples <= MOST_TOKENS:
                break
        found.append(
            {
                "base": bases[i % len(bases)],
                "how": how,
                "rank": chance.choice(RANKS),
                "length": length,
                "batch_size": examples,
            }
        )
    return found


def _second_base(folder: Path) -> Path:
    """A Qwen 3 of 12 layers with random weights and SmolLM2's tokenizer."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    import transformers

    from lorakit.bases import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    tokenizer.save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def _texts(source: Path, work: Path, length: int) -> Path:
    """Rows of running text, each of about ``length`` tokens; cut at that when they are read."""
    path = work / f"text{length}.jsonl"
    if not path.is_file():
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        words = " ".join(f"{row['question']} {row['answer']}" for row in rows).split()
        texts = [" ".join(words[i : i + length]) for i in range(0, 60 * length, length)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _alone(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "estimate", "--one", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{task}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _measure(task: dict[str, Any]) -> dict[str, Any]:
    return _predicted(task) if task.get("what") == "predict" else _trained(task)


def _data_spec(task: dict[str, Any]) -> Any:
    from lorakit.data import DataSpec

    return DataSpec(path=(task["data"],), max_length=task["length"], truncate=True)


def _settings(task: dict[str, Any]) -> Any:
    from lorakit.train import TrainSettings

    how = task["how"]
    return TrainSettings(
        steps=task["steps"],
        batch_size=task["batch_size"],
        validation_fraction=0.0,
        warmup=0,
        recompute=how if how in ("mlp", "layers") else "none",
    )


def _predicted(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    from lorakit.bases import base_config, context_length, load_tokenizer
    from lorakit.core.spec import LoRASpec
    from lorakit.data import load_data
    from lorakit.evaluate.estimate_machine import calibrate
    from lorakit.workflows.estimate import ask

    tokenizer = load_tokenizer(task["ref"])
    context = context_length(base_config(task["ref"]))
    data = load_data(_data_spec(task), tokenizer, context_length=context)

    def asked(rates: Any) -> Any:
        return ask(
            task["ref"],
            data,
            None if task["how"] == "full" else LoRASpec(rank=task["rank"]),
            _settings(task),
            device="cpu",
            dtype="float32",
            quantize="nf4" if task["how"] == "nf4" else None,
            fresh=True,
            rates=rates,
        )

    if task["cpu_seconds"]:
        # asked first: the process's memory is read before anything is measured
        empty = asked(_no_rates())
        rates = calibrate(torch.float32, torch.device("cpu"), timer=time.process_time)
        import dataclasses

        found = dataclasses.replace(empty, rates=rates).estimate()
    else:
        found = asked(None).estimate()
    return {
        "peak_mb": found.memory.total / 2**20,
        "seconds": found.step.total,
        "components_mb": {n: round(v / 2**20) for n, v in found.memory.components().items()},
        "when": found.memory.when,
        "time": {n: round(v, 3) for n, v in vars(found.step).items()},
    }


def _no_rates() -> Any:
    from lorakit.evaluate.estimate_machine import known_gpu

    return known_gpu("L4").rates


def _trained(task: dict[str, Any]) -> dict[str, Any]:
    from lorakit.bases import context_length, load_base
    from lorakit.core.spec import LoRASpec
    from lorakit.data import load_data
    from lorakit.train import Full, Trainer

    base = load_base(
        task["ref"], device="cpu", dtype="float32",
        quantize="nf4" if task["how"] == "nf4" else None,
    )  # fmt: skip
    data = load_data(_data_spec(task), base.tokenizer, context_length=context_length(base.model))
    times = _Times(time.process_time if task["cpu_seconds"] else time.perf_counter)
    trainer = Trainer(
        base,
        Full() if task["how"] == "full" else LoRASpec(rank=task["rank"]),
        data,
        _settings(task),
        Path(task["runs"]) / uuid.uuid4().hex,
        callbacks=[times.callback()],
    )
    trainer.run()
    shutil.rmtree(trainer.out)
    return {
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        # a virtual machine is given its memory by and by, so the first half of them warm up
        "seconds": statistics.median(times.steps[len(times.steps) // 2 :]),
        "times": times.steps,
    }


class _Times:
    """Seconds of each step by one clock: from the end of the step before to its own."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.steps: list[float] = []
        self._clock = clock
        self._last = clock()

    def callback(self) -> Any:
        from lorakit.train import Callback

        times = self

        class Listener(Callback):
            def on_step(self, metrics: Any) -> None:
                now = times._clock()
                times.steps.append(now - times._last)
                times._last = now

        return Listener()


def _row(
    setting: dict[str, Any], predicted: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    return {
        **setting,
        "predicted": predicted,
        "measured": measured,
        "memory_ratio": measured["peak_mb"] / predicted["peak_mb"],
        "time_ratio": measured["seconds"] / predicted["seconds"],
    }


def _line(row: dict[str, Any]) -> str:
    cells = [row["base"], row["how"], "–" if row["how"] == "full" else row["rank"]]
    cells += [row["batch_size"], row["length"]]
    cells += [f"{row[name]['peak_mb']:.0f}" for name in ("predicted", "measured")]
    cells += [f"{row['memory_ratio'] - 1:+.0%}"]
    cells += [f"{row[name]['seconds']:.2f}" for name in ("predicted", "measured")]
    cells += [f"{row['time_ratio'] - 1:+.0%}"]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _table(rows: list[dict[str, Any]]) -> str:
    names = ["base", "how", "rank", "batch", "length", "predicted MiB", "peak MiB", ""]
    names += ["predicted s", "step s", ""]
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    inside = sum(0.95 <= row["memory_ratio"] <= 1.2 for row in rows)
    near = sum(0.75 <= row["time_ratio"] <= 1.25 for row in rows)
    verdict = f"memory within −5 … +20 %: {inside} of {len(rows)}; time within 25 %: {near}"
    return "\n".join([*head, *map(_line, rows), "", verdict])


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "estimate.json").write_text(json.dumps(rows, indent=1))
    (folder / "estimate.md").write_text(_table(rows) + "\n")
