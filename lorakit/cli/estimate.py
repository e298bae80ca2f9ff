"""Predict what a training run takes, before it: peak memory by component, and time.

Takes the flags of `lorakit train` about base, data, adapter and steps. No weights are loaded: the
base's config gives the shapes, and the data is tokenised and cut into forwards as the run would cut
it. This machine's speed is measured once (five seconds) and kept; --measure measures it again.

examples:
  lorakit estimate --base smollm2 --data mine.jsonl
  lorakit estimate --base B --data F --rank 64 --batch-size 16 --quantize nf4
  lorakit estimate --base B --data F --gpu 24GB           # memory alone
  lorakit estimate --base B --data F --gpu "RTX 4090"     # and a rough time
  lorakit estimate --base B --data F --full               # all weights, beside an adapter

If it does not fit, the lines under "What would change it" say what would.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from lorakit.cli.bases import add_base_arguments
from lorakit.cli.output import add_json_argument, emit_json, printable_stdout
from lorakit.cli.rows import add_data_arguments, data_spec
from lorakit.cli.train_arguments import add_adapter_arguments, add_training_arguments
from lorakit.cli.training import given_of
from lorakit.errors import SpecError, collected

if TYPE_CHECKING:
    from lorakit.evaluate.estimate import Estimate
    from lorakit.evaluate.estimate_advice import Option
    from lorakit.workflows.estimate import Answer

#: component → what it is, for a person
_WORDS = {
    "program": "Python, libraries, data",
    "weights": "the base's weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "activations": "activations",
    "loss": "logits of a chunk, loss",
    "workspace": "workspace, allocator",
    "file": "the base's file (can be dropped)",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags: those of training, and a few of its own."""
    add_base_arguments(parser)
    add_data_arguments(parser)
    add_adapter_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("estimate")
    group.add_argument(
        "--full",
        action="store_true",
        help="all weights of the base, as `lorakit train --full` does",
    )
    group.add_argument(
        "--gpu",
        metavar="G",
        help="another device than this machine's: its memory (24GB), or its name (RTX 4090), "
        "which also gives a rough time",
    )
    group.add_argument("--measure", action="store_true", help="measure this machine's speed again")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Estimate and print."""
    from lorakit.core.spec import LoRASpec
    from lorakit.evaluate.estimate_machine import known_gpu
    from lorakit.train.settings import TrainSettings

    settings = TrainSettings(**given_of(options, TrainSettings))
    spec = LoRASpec(**given_of(options, LoRASpec))
    gpu = None if options.gpu is None else known_gpu(options.gpu)
    _check(options)
    from lorakit.bases import base_config, context_length, load_tokenizer
    from lorakit.data import load_data
    from lorakit.workflows.estimate import answer, ask

    where: dict[str, Any] = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
    }
    tokenizer = load_tokenizer(options.base, **where)
    context = context_length(base_config(options.base, **where))
    data = load_data(data_spec(options), tokenizer, context_length=context)
    question = ask(
        options.base,
        data,
        None if options.full else spec,
        settings,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        gpu=gpu,
        fresh=options.measure,
        **where,
    )
    found = answer(question)
    if options.json:
        emit_json(_as_json(found))
    else:
        printable_stdout()
        print("\n".join(_lines(found)))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse flags of which one switches the other off."""
    problems = []
    if options.full:
        from lorakit.core.spec import LoRASpec

        problems += [
            f"--{name.replace('_', '-')} is about an adapter, and --full trains none"
            for name in given_of(options, LoRASpec)
        ]
    if options.gpu is not None and options.device != "auto":
        problems.append("--device is a device here, and --gpu one that is not; give one of them")
    if options.gpu is not None and options.measure:
        problems.append("--measure measures this machine, and --gpu is another")
    if problems:
        raise SpecError(collected("These flags contradict each other", problems))


def _as_json(found: Answer) -> dict[str, Any]:
    now = found.estimate
    step = now.step
    return {
        "device": now.device,
        "fits": now.fits,
        "available_bytes": now.available,
        "peak_bytes": now.memory.total,
        "needed_bytes": now.memory.needed,
        "peak_at": now.memory.when,
        "memory": now.memory.components(),
        "trained_parameters": now.num_trained,
        "steps": now.steps,
        "tokens_per_step": now.tokens_per_step,
        "seconds_per_step": None if step is None else step.total,
        "seconds": now.seconds,
        "tokens_per_second": now.tokens_per_second,
        "time": None if step is None else dataclasses.asdict(step),
        "options": [dataclasses.asdict(one) for one in found.options],
        "warnings": list(found.warnings),
        "notes": list(found.notes),
    }


def _lines(found: Answer) -> list[str]:
    now = found.estimate
    lines = [f"{now.device}: {_verdict(now)}", "", f"Peak memory, in the {now.memory.when}"]
    for name, size in now.memory.components().items():
        if size:
            lines.append(f"  {_WORDS[name]:<34}{_size(size):>10}")
    lines += [f"  {'together':<34}{_size(now.memory.total):>10}", ""]
    lines += _time_lines(now)
    if found.options:
        lines += ["", "What would change it"]
        lines += [_option_line(one, now) for one in found.options]
    lines += [f"Warning: {text}" for text in found.warnings]
    lines += [f"note: {text}" for text in found.notes]
    return lines


def _verdict(now: Estimate) -> str:
    if now.fits is None:
        return f"{_size(now.memory.needed)} at the peak; how much there is, is not known"
    word = "fits" if now.fits else "DOES NOT FIT"
    return f"{word}: {_size(now.memory.needed)} at the peak, {_size(now.available or 0)} there"


def _time_lines(now: Estimate) -> list[str]:
    if now.step is None:
        return [f"Time: not known for {now.device}; {now.steps:,} steps"]
    seconds = now.seconds or 0.0
    lines = [
        f"Time: {now.step.total:.3g} s a step, {now.steps:,} steps: {_duration(seconds)} "
        f"({now.tokens_per_second:,.0f} tokens/s), without loading, evaluations and samples"
    ]
    shares = dataclasses.asdict(now.step).items()
    parts = [f"{name} {value / now.step.total:.0%}" for name, value in shares]
    return [*lines, f"  {', '.join(part for part in parts if not part.endswith(' 0%'))}"]


def _option_line(one: Option, now: Estimate) -> str:
    less = one.needed / now.memory.needed - 1
    line = f"  {one.flags:<34}{_size(one.needed):>10} ({less:+.0%})"
    if one.seconds_per_step is not None and now.step is not None:
        line += f"  {one.seconds_per_step:.3g} s a step ({_change(one, now):+.0%})"
    if now.fits is False:
        line += "  fits" if one.fits else "  does not fit"
    return line if one.same_result else f"{line}  another result"


def _change(one: Option, now: Estimate) -> float:
    assert one.seconds_per_step is not None
    assert now.step is not None
    return one.seconds_per_step / now.step.total - 1


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
