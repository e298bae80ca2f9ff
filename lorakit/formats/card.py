"""``README.md`` of an adapter: what it is, in plain facts, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from lorakit.formats.folder import CARD_MARK
from lorakit.formats.peft.prefix import is_peft_prefix

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

#: PEFT's task type → (the hub's word for it, transformers' class)
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}


def model_card(adapter: Adapter, base_name: str | None) -> str:
    """The text of the card; a function of the adapter's values alone.

    Args:
        base_name: how the base is called, where that is known.
    """
    base = base_name or "the base that it was trained on"
    parts = [
        _front_matter(adapter, base_name),
        CARD_MARK,
        "",
        "# LoRA adapter" + (f" for {base_name}" if base_name else ""),
        "",
        f"{'A low-rank adapter' if adapter.low_rank else 'An adapter'} of {_summary(adapter)}. "
        "It changes nothing by itself: load it on "
        f"{'`' + base + '`' if base_name else base}.",
        "",
        "## Settings",
        "",
        *_table(_settings(adapter)),
    ]
    for title in ("metrics", "data", "train"):
        facts = adapter.provenance.get(title)
        if isinstance(facts, Mapping) and facts:
            rows = [(str(k), _text(v)) for k, v in sorted(facts.items()) if v not in (None, {}, [])]
            heading = {"metrics": "Results", "data": "Data", "train": "Training"}[title]
            parts += ["", f"## {heading}", "", *_table(rows)]
    parts += ["", "## Use", "", *_usage(adapter, base_name or "BASE")]
    return "\n".join(parts) + "\n"


def _front_matter(adapter: Adapter, base_name: str | None) -> str:
    lines = ["---", "library_name: peft"]
    if base_name is not None and _HUB_ID.fullmatch(base_name):
        # the hub refuses a card whose base is a local folder
        lines.append(f"base_model: {base_name}")
    if adapter.task_type in _TASKS:
        lines.append(f"pipeline_tag: {_TASKS[adapter.task_type][0]}")
    return "\n".join([*lines, "tags:", "- lora", "- lorakit", "---"])


def _summary(adapter: Adapter) -> str:
    low_rank, replaced = len(adapter.low_rank), len(adapter.replaced)
    text = f"{low_rank} module{'s' * (low_rank != 1)}"
    if replaced:
        text += f", with {replaced} module{'s' * (replaced != 1)} or bias trained whole"
    if adapter.prefixes:
        text += f", with a prefix in {len(adapter.prefixes)} layers"
    return f"{text} ({adapter.num_parameters:,} parameters, {adapter.num_bytes / 1e6:.1f} MB)"


def _settings(adapter: Adapter) -> list[tuple[str, str]]:
    spec, low_rank = adapter.spec, adapter.low_rank
    rows = [
        ("base", f"{adapter.base.name} ({adapter.base.architecture})" if adapter.base else None),
        ("revision", adapter.base.revision if adapter.base else None),
        ("rank", _span(site.rank for site in low_rank.values())),
        ("scaling", _span(site.scaling for site in low_rank.values())),
        ("rule", spec.scaling if low_rank else None),
        ("variant", "DoRA" if any(s.magnitude is not None for s in low_rank.values()) else None),
        ("modules", ", ".join(sorted({_last_name(p) for p in low_rank}))),
        ("trained whole", ", ".join(sorted({_last_name(p) for p in adapter.replaced}))),
        ("prefix", _prefix(adapter)),
        ("dropout", f"{spec.dropout:g}" if spec.dropout else None),
        ("kinds", _kinds(low_rank)),
        ("dtype", ", ".join(sorted(str(d).removeprefix("torch.") for d in adapter.dtypes))),
    ]
    return [(name, value) for name, value in rows if value]


def _prefix(adapter: Adapter) -> str | None:
    if not adapter.prefixes:
        return None
    text = f"{adapter.num_virtual_tokens} virtual tokens in {len(adapter.prefixes)} layers"
    return text if is_peft_prefix(adapter) else f"{text}; PEFT has no form for this with the rest"


def _usage(adapter: Adapter, base: str) -> list[str]:
    loader = _TASKS.get(adapter.task_type or "", ("", "AutoModelForCausalLM"))[1]
    if adapter.prefixes and not is_peft_prefix(adapter):
        return _own_usage(base)
    return [
        "```python",
        "# PEFT: ADAPTER is this folder or its id on the hub",
        f"model = transformers.{loader}.from_pretrained({json.dumps(base)})",
        'model = peft.PeftModel.from_pretrained(model, "ADAPTER")',
        "```",
        "",
        *_own_usage(base),
    ]


def _own_usage(base: str) -> list[str]:
    return [
        "```python",
        "# lorakit",
        f"base = lorakit.load_base({json.dumps(base)})",
        'handle = lorakit.attach(base.model, lorakit.load_adapter("ADAPTER"))',
        "```",
    ]


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _text(value: Any) -> str:
    """A fact in one cell of a table."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 200 else text[:199] + "…"


def _span(values: Iterable[float]) -> str:
    distinct = sorted(set(values))
    if not distinct:
        return ""
    if len(distinct) == 1:
        return f"{distinct[0]:g}"
    return f"{distinct[0]:g} to {distinct[-1]:g}"


def _kinds(low_rank: Mapping[str, LowRank]) -> str:
    kinds = sorted({site.kind for site in low_rank.values()})
    return "" if kinds == ["linear"] else ", ".join(kinds)


def _last_name(path: str) -> str:
    """The last name that is no number, such as ``q_proj`` or ``fc1.bias``."""
    names = path.split(".")
    end = names[-2:] if names[-1] == "bias" and len(names) > 1 else names[-1:]
    return ".".join(end)
