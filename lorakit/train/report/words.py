"""Numbers, settings and names as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.train.record import Record
from lorakit.train.report.charts import label


def base_ref(record: Record) -> str | None:
    ref = record.at("base", "ref") or record.at("base")
    if isinstance(ref, str):
        return ref
    return record.adapter.base.name if record.adapter and record.adapter.base else None


def starting_point(record: Record) -> str:
    """What stood before training: the base, or the adapter that the run went on with."""
    return "the starting adapter" if (record.folder / "start").is_dir() else "the base"


def leaves(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= leaves(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def shown(value: object) -> str:
    """A setting as text; whole numbers as one would type them."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {shown(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return str(value)


def some_of(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def perplexity(value: float) -> float:
    return math.exp(min(float(value), 700.0))


def loss_text(value: float) -> str:
    return f"{float(value):.3f}" if abs(value) < 100 else f"{float(value):.4g}"


def perplexity_text(value: float) -> str:
    return f"{value:.2f}" if value < 100 else label(value)


def count_text(value: float) -> str:
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return count_text(value)


def bytes_text(value: float) -> str:
    return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def megabytes_text(value: float) -> str:
    return f"{value:.0f} MB" if value < 1000 else f"{value / 1024:.1f} GB"


def duration_text(seconds: float) -> str:
    whole = round(seconds)
    if whole < 90:
        return f"{whole} second{'' if whole == 1 else 's'}"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
