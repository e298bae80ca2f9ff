"""The parts of a report that only a run on pictures has: its sheets, and how its adapter is used.

A sheet is a PNG of the run's ``samples/``, named after its step, and ``kept.png`` of the adapter
that was kept; each is put into the page whole.
"""

from __future__ import annotations

import base64
import re
import shlex
from pathlib import Path

from lorakit.train.record import Record
from lorakit.train.report.markup import Html, fill, join

#: sheets shown beside the first and the last; of more, some evenly over the run
_MOST = 6
_STEP = re.compile(r"step-(\d+)")


def is_of_pictures(record: Record) -> bool:
    """Whether a run was on pictures."""
    return bool(record.at("task", "name") == "pictures")


def sheets(record: Record) -> Html:
    """The sheets, in the order of the run; nothing without any."""
    paths = sorted((record.folder / "samples").glob("*.png"), key=_place)
    if not paths:
        return Html("")
    shown = [paths[place] for place in _some(len(paths))]
    figures = [
        fill(
            '<figure><figcaption>{title}</figcaption><img alt="{title}" src="{source}" '
            'style="max-width:100%;height:auto"></figure>',
            title=_title(path),
            source="data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        )
        for path in shown
    ]
    hint = "The same prompts and seeds each time."
    if len(shown) < len(paths):
        hint += f" {len(paths) - len(shown)} more are in the run's folder samples."
    return fill(
        '<section><h2>Pictures</h2><p class="hint">{hint}</p>{figures}</section>',
        hint=hint,
        figures=join(figures),
    )


def use(record: Record, base: str) -> list[tuple[str, str]]:
    """Titles and code: how the adapter is used."""
    folder = str(record.folder / "adapter")
    ref, adapter = shlex.quote(base), shlex.quote(folder)
    shell = (
        f'lorakit images sample --base {ref} --adapter {adapter} --prompt "…" --out pictures\n'
        f"lorakit convert {adapter} --to kohya --out mine.safetensors      # ComfyUI, sd-scripts\n"
        f"lorakit convert {adapter} --to diffusers --out pytorch_lora_weights.safetensors"
    )
    python = (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({base!r})\n"
        'pipe.load_lora_weights("pytorch_lora_weights.safetensors")'
    )
    return [("In the shell", shell), ("With diffusers, without lorakit", python)]


def _place(path: Path) -> tuple[int, str]:
    """Sheets of steps by step, and that of the adapter that was kept behind them."""
    found = _STEP.fullmatch(path.stem)
    return (int(found[1]), "") if found else (10**12, path.stem)


def _title(path: Path) -> str:
    found = _STEP.fullmatch(path.stem)
    if found is None:
        return "The adapter that was kept"
    return f"Step {int(found[1])}" if int(found[1]) else "The base, before training"


def _some(count: int) -> list[int]:
    """Places of the first, the last, and some between them."""
    if count <= _MOST + 2:
        return list(range(count))
    return sorted({round(i * (count - 1) / (_MOST + 1)) for i in range(_MOST + 2)})
