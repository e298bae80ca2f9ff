"""A sharded checkpoint of random bfloat16 weights, merged from file to file: the memory it takes.

Anonymous memory (RssAnon) is what a process has to have; pages of files that are read or written
come and go and are not counted. It is sampled while the merge runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import hardware

WIDTH, INNER, VOCABULARY, RANK = 2048, 8192, 32_000, 16


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint")
    parser.add_argument("--shard-gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", help="where to build it; default: a temporary folder")


def run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="merge-streaming-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 2.2e9 * options.gigabytes:
            print(f"needs {2.2 * options.gigabytes:.0f} GB; {free / 1e9:.0f} are free in {folder}",
                  file=sys.stderr)  # fmt: skip
            return 2
        report = _measure(Path(folder), options.gigabytes, options.shard_gigabytes)
    print(json.dumps(report, indent=1))
    return 0 if report["peak_anonymous_mb"] <= 1500 else 1


def _measure(folder: Path, gigabytes: float, shard_gigabytes: float) -> dict[str, Any]:
    from lorakit.workflows.merge.files import merge_files

    print("building …", file=sys.stderr, flush=True)
    base, adapter = _build(folder / "base", gigabytes, shard_gigabytes)
    before = _anonymous_mb()
    samples: list[float] = []
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(samples, stop))
    watcher.start()
    print("merging …", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        merged = merge_files(base, adapter, folder / "merged")
    finally:
        stop.set()
        watcher.join()
    return {
        "checkpoint_gb": round(merged.num_bytes / 1e9, 2),
        "shards": len(merged.shards),
        "changed_tensors": merged.num_changed,
        "rows_checked": merged.rows_checked,
        "worst_row": round(merged.worst_row, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "anonymous_mb_before": round(before),
        "peak_anonymous_mb": round(max(samples)),
        "samples": len(samples),
        "hardware": hardware(),
    }


def _build(folder: Path, gigabytes: float, shard_gigabytes: float) -> tuple[Path, Any]:
    """A Llama of as many layers as the size asks for, and an adapter on all its linears."""
    import torch
    import transformers

    from lorakit import Adapter
    from lorakit.core.safetensors_io import write_streamed
    from lorakit.core.sites import LowRank

    per_layer = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * WIDTH) / per_layer))
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shards: list[dict[str, Any]] = [{}]
    size = 0.0
    for name, shape in shapes.items():
        size += 2 * torch.Size(shape).numel()
        if size > shard_gigabytes * 1e9 and shards[-1]:
            shards.append({})
            size = 2 * torch.Size(shape).numel()
        shards[-1][name] = (torch.bfloat16, shape)
    where = {}
    for number, plan in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(plan, file)
        write_streamed(
            folder / file,
            plan,
            lambda name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02,
            {"format": "pt"},
        )
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sites = {
        path: LowRank(
            torch.randn(RANK, m.in_features) * 0.02, torch.randn(m.out_features, RANK) * 0.02, 2.0
        )
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and path != "lm_head"
    }
    return folder, Adapter(sites)


def _watch(samples: list[float], stop: threading.Event) -> None:
    while not stop.is_set():
        samples.append(_anonymous_mb())
        time.sleep(0.005)


def _anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon")
