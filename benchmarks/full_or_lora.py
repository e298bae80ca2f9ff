"""Full fine-tuning beside LoRA, the rate searched for on both sides, then three seeds.

::

    python -m benchmarks full_or_lora --out results/full                  # all that is missing
    python -m benchmarks full_or_lora --out results/full --only 'lora/*'  # a part, elsewhere too
    python -m benchmarks full_or_lora --out results/full --table          # what there is by now

How cells are searched, resumed and judged: :mod:`benchmarks.search`.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks import search
from benchmarks.search import Search, Side

SIDES = {
    "lora": Side(("--rank", "{rank}"), (1e-3, 2e-3, 4e-3)),
    "full": Side(("--full",), (5e-5, 1e-4, 2e-4), keeps="model"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    search.configure(parser, SIDES)
    parser.set_defaults(forgetting=True)


def run(options: argparse.Namespace) -> int:
    cells = Search(SIDES, options)
    cells.run()
    text = f"{cells.table()}\n{_verdict(cells.losses())}\n"
    (cells.out / "full_or_lora.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def _verdict(losses: dict[str, list[float]]) -> str:
    if set(losses) != set(SIDES):
        return "One of the sides is not done yet."
    if None in (*losses["lora"], *losses["full"]):
        return "A loss is not finite."
    mean, bar = statistics.mean(losses["lora"]), statistics.mean(losses["full"])
    spread = max(losses["full"]) - min(losses["full"])
    holds = "holds" if mean <= bar + spread else "does not hold"
    return (
        f"Tuned LoRA {mean:.4f}, tuned full fine-tuning {bar:.4f}, whose seeds are {spread:.4f} "
        f"apart: LoRA <= full + spread {holds} ({mean - bar:+.4f})."
    )
