"""What a base and its adapters say to texts, pictures or recordings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import attach_adapters, use_tokenizer
from lorakit.cli.bases import load_base_from
from lorakit.cli.output import emit_json, printable_stdout, say
from lorakit.cli.tasks.choosing import AS_IT_IS, LABEL, kind_for, refuse
from lorakit.errors import InputError

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter

#: why flags about drawing tokens cannot act
_GREEDY = "answers are the likeliest ones"


def generate(
    options: argparse.Namespace,
    task: str,
    why: str,
    models: Mapping[str, Any],
    prompts: Sequence[str],
    adapters: Mapping[str, Adapter],
) -> int:
    """What a base and adapters say to texts, pictures or recordings.

    Args:
        models: name → mix.
    """
    from lorakit.tasks.registry import kind_class

    named = kind_class(task)
    if named.no_prompts is not None:
        raise InputError(named.no_prompts)
    idle = {
        "system": "there is no chat",
        "format": "there is no chat",
        "raw": "inputs are taken as they are",
        **dict.fromkeys(("temperature", "top_p", "seed"), _GREEDY),
        "stop": "answers end by themselves",
        "parallel": AS_IT_IS,
    }
    if not named.text_metrics:
        idle["max_new_tokens"] = LABEL
    refuse(options, task, idle)
    pairs = [name for name, adapter in adapters.items() if _judges_pairs(adapter)]
    if pairs:
        raise InputError(
            f"{', '.join(pairs)} judges pairs of texts, and a prompt is one text; give rows of "
            "both to lorakit eval --save"
        )
    say(f"Task: {task} ({why})")
    kind = kind_for(options, task, None, adapters)
    base = load_base_from(options, load=kind.load_base)
    use_tokenizer(base, adapters)
    handle = attach_adapters(base, adapters, allow_other=options.allow_other_base)
    length = options.max_new_tokens
    found = {
        name: kind.predict(base, handle, mix, list(prompts), length) for name, mix in models.items()
    }
    if options.json:
        emit_json(
            {
                "base": base.ref,
                "task": task,
                "answers": [
                    {"prompt": prompt, "model": name, "text": found[name][i]}
                    for i, prompt in enumerate(prompts)
                    for name in models
                ],
            }
        )
        return 0
    printable_stdout()
    for i, prompt in enumerate(prompts):
        for name in models:
            start = f"{prompt}\t" if len(prompts) > 1 else ""
            who = f"{name}: " if len(models) > 1 else ""
            sys.stdout.write(f"{start}{who}{found[name][i]}\n")
    return 0


def _judges_pairs(adapter: Adapter) -> bool:
    data = adapter.provenance.get("data")
    return isinstance(data, Mapping) and "text_pair" in (data.get("columns") or {})
