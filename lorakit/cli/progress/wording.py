"""Numbers and the end of a run, as people read them."""

from __future__ import annotations

from lorakit.cli.output import plural
from lorakit.cli.progress.view import View
from lorakit.train.callbacks import RunResult


def duration(seconds: float) -> str:
    """``"42 s"``, ``"3:07"`` (minutes) or ``"2:03:07"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory(mb: float) -> str:
    """``"850 MB"`` or ``"1.2 GB"``, from units of 2^20 bytes."""
    return f"{mb:.0f} MB" if mb < 1000 else f"{mb / 1024:.1f} GB"


def count(number: float) -> str:
    """``"1,234"``; below ten with one decimal."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def summary(view: View, result: RunResult) -> str:
    """One sentence on how the run ended."""
    ending = {
        "finished": "Finished",
        "early stop": "Stopped early, validation no longer improved,",
        "interrupted": "Interrupted",
        "left": "Left",
    }[result.ending]
    text = f"{ending} after {plural(result.steps, 'step')} in {duration(result.seconds)}"
    if result.best_loss is not None and result.base_loss is not None:
        text += f": validation loss {result.base_loss:.3f} → {result.best_loss:.3f}"
        text += f", best at step {result.best_step}." if result.best_step is not None else "."
    elif result.last_loss is not None:
        text += f"; training loss {view.smoothed[-1] if view.smoothed else result.last_loss:.3f}."
    else:
        text += "."
    return text
