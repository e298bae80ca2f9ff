"""Draw the pictures of the README from a real run: its terminal, and the top of its report.

    python docs/make_pictures.py runs/mine --command "lorakit train --base smollm2 …"

Writes ``docs/pictures/terminal.svg``, the progress view replayed from ``metrics.jsonl``, and
``docs/pictures/report.png``, if a Chromium or Chrome is installed to take it.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lorakit.cli.progress.drawing import drawing
from lorakit.cli.progress.view import view_of_rows
from lorakit.cli.progress.wording import duration, summary
from lorakit.train.callbacks import RunInfo, RunResult
from lorakit.train.record import Record, read_run
from lorakit.train.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip


def terminal_svg(record: Record, command: str, *, width: int = 92, most_notes: int = 6) -> str:
    """The terminal at the end of a run, as an SVG that loads nothing."""
    total = int(record.at("train", "steps") or (record.steps[-1]["step"] if record.steps else 0))
    run = RunInfo(
        out=Path("runs") / record.folder.resolve().name,
        total_steps=total,
        base=Path(str(record.at("base", "ref") or "")).name,
        device=str(record.at("base", "device") or "cpu"),
        num_trainable=record.adapter.num_parameters if record.adapter else 0,
    )
    rows = sorted(
        [*record.steps, *record.evals], key=lambda row: (row["step"], row["kind"] == "eval")
    )
    view, now = view_of_rows(run, [dict(row) for row in rows])
    best, start = record.best, record.start_eval
    result = RunResult(
        out=run.out,
        adapter=run.out / "adapter",
        steps=view.step,
        last_loss=view.last.loss if view.last else None,
        base_loss=start["loss"] if start else None,
        best_loss=best["loss"] if best else None,
        best_step=best["step"] if best else None,
        seconds=now,
    )
    if view.step >= total:
        view.ending = f"finished, {duration(now)}"
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(Text.assemble(("$ ", "bold green"), command), soft_wrap=False)
    for note in record.notes[:most_notes]:
        console.print(Text(f"• {note}", style="dim"))
    console.print()
    console.print(drawing(view, now, width=width))
    console.print(Text(summary(view, result), style="bold"))
    svg = console.export_svg(title="lorakit train")
    # rich names a font on a server; a picture must not fetch anything
    svg = re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")


def screenshot(page: Path, png: Path, *, width: int, height: int, scale: float, dark: bool) -> bool:
    """Photograph the top of a page; ``False`` if there is no browser to do it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return False
    png.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        theme = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0") if dark else ()
        subprocess.run(
            [
                browser, *FLAGS, *theme, f"--user-data-dir={profile}",
                f"--window-size={width},{height}", f"--force-device-scale-factor={scale:g}",
                f"--screenshot={png.resolve()}", page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )  # fmt: skip
    return png.is_file()


def main(argv: list[str] | None = None) -> int:
    """Parse, draw, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--command", help="the command line that the picture shows")
    parser.add_argument("--height", type=int, default=1180, help="pixels of the report's top")
    parser.add_argument("--width", type=int, default=1120, help="pixels")
    parser.add_argument("--scale", type=float, default=1.5, help="pixels of the file per pixel")
    parser.add_argument("--dark", action="store_true", help="the report in its dark colours")
    options = parser.parse_args(argv)
    record = read_run(options.run)
    command = options.command or f"lorakit train … --out runs/{options.run.resolve().name}"
    options.out.mkdir(parents=True, exist_ok=True)
    terminal = options.out / "terminal.svg"
    terminal.write_text(terminal_svg(record, command), encoding="utf-8")
    print(terminal)
    page, png = write_report(options.run), options.out / "report.png"
    size = {"width": options.width, "height": options.height}
    if screenshot(page, png, **size, scale=options.scale, dark=options.dark):
        print(png)
        return 0
    print(
        f"report.png was not made: none of {', '.join(BROWSERS)} is installed. Install one, or "
        f"photograph {page} by hand.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
