"""Merging: cycles of merge and undo, its time beside the bare products, what it leaves behind."""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import hardware

#: real text for the logits: rows of the data, one after the other
NUM_TEXTS, NUM_TOKENS = 4, 128


def configure(parser: argparse.ArgumentParser) -> None:
    shared = Path(os.environ.get("LORAKIT_SHARED", "../shared"))
    parser.add_argument("--base", default="smollm2", help="hub id, folder, .gguf, or smollm2")
    parser.add_argument("--adapter", required=True, help="folder of an adapter of that base")
    parser.add_argument("--data", default=str(shared / "data" / "e2e_dev.csv"))
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15, help="timed merges and tokens, in turn")
    parser.add_argument("--skip-nf4", action="store_true")
    parser.add_argument("--out", help="file for the numbers, as JSON")


def run(options: argparse.Namespace) -> int:
    import torch

    from lorakit import load_adapter, load_base

    adapter = load_adapter(options.adapter)
    base = load_base(options.base, device="cpu", dtype="bfloat16")
    model, tokenizer = base.model, base.require_tokenizer()
    texts = _texts(options.data, tokenizer)
    report: dict[str, Any] = {"hardware": hardware(), "sites": len(adapter.sites)}
    work: dict[str, Callable[[], Any]] = {
        "cycles": lambda: _cycles(model, adapter, options.cycles),
        "structure": lambda: _structure(model, adapter),
        "time": lambda: _times(model, adapter, options.rounds),
        "latency": lambda: _latency(model, adapter, texts[0], options.rounds),
    }
    for name, measure in work.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        report[name] = measure()
        print(json.dumps(report[name]), file=sys.stderr, flush=True)
    report["logits"] = {}
    storages = ["float32", "bfloat16"] + ([] if options.skip_nf4 else ["nf4"])
    for storage in storages:
        print(f"logits in {storage} …", file=sys.stderr, flush=True)
        quantize = {"quantize": storage} if storage == "nf4" else {}
        dtype = torch.float32 if storage == "nf4" else getattr(torch, storage)
        loaded = load_base(options.base, device="cpu", dtype=dtype, **quantize).model
        report["logits"][storage] = _logits(loaded, adapter, texts)
        if storage == "float32":
            report["logits"][storage] |= _exact_logits(loaded, adapter, texts)
        print(json.dumps(report["logits"][storage]), file=sys.stderr, flush=True)
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")
    return 0


# --- cycles ------------------------------------------------------------------------------------


def _digest(model: Any) -> str:
    """SHA-256 of every byte of every weight."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        found.update(flat.numpy().data)
    return found.hexdigest()


def _cycles(model: Any, adapter: Any, cycles: int) -> dict[str, Any]:
    from lorakit import merge

    before, started, undo_bytes = _digest(model), time.perf_counter(), 0
    seen = []
    for cycle in range(1, cycles + 1):
        undo = merge(model, adapter)
        undo_bytes = undo.bytes
        if cycle == 1:
            assert _digest(model) != before, "the merge changed nothing"
        undo()
        if cycle % 100 == 0 or cycle == cycles:
            seen.append(_digest(model) == before)
            print(f"  {cycle}: {'unchanged' if seen[-1] else 'CHANGED'}", file=sys.stderr)
    return {
        "cycles": cycles,
        "bitwise_unchanged": all(seen),
        "checks": len(seen),
        "sha256": before,
        "undo_bytes": undo_bytes,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
    }


# --- what it leaves behind ---------------------------------------------------------------------


def _structure(model: Any, adapter: Any) -> dict[str, bool]:
    from lorakit import merge

    def facts() -> dict[str, Any]:
        modules = list(model.named_modules())
        named = list(model.named_parameters(remove_duplicate=False))
        return {
            "modules": [(path, id(m)) for path, m in modules],
            "types": [type(m) for _, m in modules],
            "attributes": [sorted(m.__dict__) for _, m in modules],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for _, m in modules],
            "parameters": [(path, id(p), p.dtype) for path, p in named],
            "strides": [p.stride() for _, p in named],
            "storage": [p.data_ptr() for _, p in named],
        }

    before = facts()
    undo = merge(model, adapter)
    after = facts()
    undo()
    return {name: before[name] == after[name] for name in before}


# --- time --------------------------------------------------------------------------------------


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _times(model: Any, adapter: Any, rounds: int) -> dict[str, Any]:
    """Seconds of one merge beside the bare products of the same sites, taken in turn.

    ``addmm`` is ``W.addmm_(B, A, alpha=s)`` on a float32 copy of W that is there already: what
    the sums alone cost. ``cast_addmm`` starts and ends at the stored dtype, as a merge must:
    ``W.copy_(torch.addmm(W.float(), B, A, alpha=s))``. ``clone_cast_addmm`` also keeps the
    original, as a merge that can be undone must.
    """
    import torch

    from lorakit import merge

    sites = [
        (model.get_submodule(path).weight, site.B.float(), site.A.float(), site.scaling)
        for path, site in adapter.low_rank.items()
    ]
    wide = [weight.detach().float() for weight, *_ in sites]

    @torch.no_grad()
    def addmm() -> None:
        for target, (_, B, A, scaling) in zip(wide, sites, strict=True):
            target.addmm_(B, A, alpha=scaling)

    @torch.no_grad()
    def cast_addmm() -> None:
        for weight, B, A, scaling in sites:
            weight.copy_(torch.addmm(weight.float(), B, A, alpha=scaling))

    @torch.no_grad()
    def clone_cast_addmm() -> list[Any]:
        kept = [weight.detach().clone() for weight, *_ in sites]
        cast_addmm()
        return kept

    originals = [weight.detach().clone() for weight, *_ in sites]
    seconds: dict[str, list[float]] = {}

    def take(name: str, work: Callable[[], Any]) -> None:
        seconds.setdefault(name, []).append(_timed(work))

    def back() -> None:
        with torch.no_grad():
            for (weight, *_), original in zip(sites, originals, strict=True):
                weight.copy_(original)

    for _ in range(rounds + 1):
        take("addmm", addmm)
        take("merge_without_undo", lambda: merge(model, adapter, undo=None))
        back()
        take("cast_addmm", cast_addmm)
        back()
        kept: list[Any] = []
        take("merge", lambda kept=kept: kept.append(merge(model, adapter)))
        take("undo", kept[0])
        take("clone_cast_addmm", clone_cast_addmm)
        back()
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}

    def ratio(ours: str, theirs: str) -> float:
        pairs = zip(seconds[ours][1:], seconds[theirs][1:], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "milliseconds": {name: round(1000 * value, 1) for name, value in median.items()},
        "merge_without_undo / addmm": ratio("merge_without_undo", "addmm"),
        "merge_without_undo / cast_addmm": ratio("merge_without_undo", "cast_addmm"),
        "merge / addmm": ratio("merge", "addmm"),
        "merge / clone_cast_addmm": ratio("merge", "clone_cast_addmm"),
    }


def _latency(model: Any, adapter: Any, ids: Any, rounds: int) -> dict[str, Any]:
    """Seconds of one token with a cache: the base and the same model merged, in turn."""
    import torch

    from lorakit import merge

    @torch.no_grad()
    def prefix() -> Any:
        return model(ids, use_cache=True).past_key_values

    def tokens(cache: Any) -> float:
        token = ids[:, -1:]
        with torch.no_grad():
            return _timed(lambda: [model(token, past_key_values=cache) for _ in range(8)]) / 8

    seconds: dict[str, list[float]] = {"base": [], "merged": []}
    for _ in range(rounds + 1):
        seconds["base"].append(tokens(prefix()))
        undo = merge(model, adapter)
        seconds["merged"].append(tokens(prefix()))
        undo()
    pairs = zip(seconds["merged"][1:], seconds["base"][1:], strict=True)
    return {
        **{f"{k}_ms": round(1000 * statistics.median(v[1:]), 2) for k, v in seconds.items()},
        "merged / base": round(statistics.median(a / b for a, b in pairs), 3),
    }


# --- logits ------------------------------------------------------------------------------------


def _texts(path: str, tokenizer: Any) -> list[Any]:
    import torch

    with open(path, encoding="utf-8") as file:
        rows = [" → ".join(row) for row in csv.reader(file)][1:]
    ids = tokenizer("\n".join(rows[:40]))["input_ids"]
    return [torch.tensor([ids[i * NUM_TOKENS : (i + 1) * NUM_TOKENS]]) for i in range(NUM_TEXTS)]


def _logits(model: Any, adapter: Any, texts: list[Any]) -> dict[str, Any]:
    """Base + adapter, attached, beside the same model merged."""
    import torch

    from lorakit import attach, merge

    @torch.no_grad()
    def logits() -> list[Any]:
        return [model(ids).logits[0].float() for ids in texts]

    bare = logits()
    handle = attach(model, adapter, allow_other_base=True)
    attached = logits()
    handle.detach()
    undo = merge(model, adapter, allow_other_base=True)
    merged = logits()
    undo()
    largest = max(float((a - b).abs().max()) for a, b in zip(attached, merged, strict=True))
    moved = max(float((a - b).abs().max()) for a, b in zip(attached, bare, strict=True))
    again = logits()
    errors = list(undo.errors.values())
    return {
        "largest_difference": largest,
        "adapter_moves_them_by": moved,
        "perplexity_attached": _perplexity(attached, texts),
        "perplexity_merged": _perplexity(merged, texts),
        "perplexity_base": _perplexity(bare, texts),
        "undo_restores_logits": all(torch.equal(a, b) for a, b in zip(bare, again, strict=True)),
        "requantisation_error": [round(min(errors), 4), round(max(errors), 4)] if errors else None,
    }


def _exact_logits(model: Any, adapter: Any, texts: list[Any]) -> dict[str, float]:
    """Weights merged in float32 with activations in float64, which leaves the merge's own error;
    and how far float32 activations alone move the bare base. The model is float64 afterwards."""
    import torch

    from lorakit import attach, merge

    @torch.no_grad()
    def logits() -> list[Any]:
        return [model(ids).logits[0].double() for ids in texts]

    def largest(one: list[Any], other: list[Any]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))

    rounded = logits()
    undo = merge(model, adapter, allow_other_base=True)
    merged = copy.deepcopy(model.state_dict())
    undo()
    model.double()
    bare = logits()
    handle = attach(model, adapter, allow_other_base=True)
    attached = logits()
    handle.detach()
    model.load_state_dict(merged)
    return {
        "largest_difference_run_in_float64": largest(attached, logits()),
        "base_in_float32_from_float64": largest(rounded, bare),
    }


def _perplexity(logits: list[Any], texts: list[Any]) -> float:
    import torch

    losses = [
        torch.nn.functional.cross_entropy(found[:-1].double(), ids[0, 1:])
        for found, ids in zip(logits, texts, strict=True)
    ]
    return round(float(torch.stack(losses).mean().exp()), 4)
