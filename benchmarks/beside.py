"""LoRA, a prefix, biases and norms: each alone and together, on E2E, three seeds.

::

    python -m benchmarks beside --out results/beside                     # all that is missing
    python -m benchmarks beside --out results/beside --only 'lora+*'     # a part, elsewhere too
    python -m benchmarks beside --out results/beside --table             # what there is by now

How cells are searched, resumed and judged: :mod:`benchmarks.search`. A prefix beside LoRA learns
ten times faster than it, the default of ``lorakit train``; so the rate of the sides with LoRA is
LoRA's, and that of a prefix alone is the prefix's own divided by ten. SmolLM2 has no biases, so the
biases here are new ones, which begin at zero.
"""

from __future__ import annotations

import argparse

from benchmarks import search
from benchmarks.search import Search, Side

_LORA = (1e-3, 2e-3, 4e-3)
#: they move few numbers, each by itself, and want more
_FEW = (2e-3, 4e-3, 8e-3)

SIDES = {
    "lora": Side(("--rank", "{rank}"), _LORA),
    "prefix": Side(("--targets", "none", "--prefix", "{prefix}"), _LORA),
    "biases": Side(("--targets", "none", "--bias", "new"), _FEW),
    "norms": Side(("--targets", "none", "--norms"), _FEW),
    "lora+prefix": Side(("--rank", "{rank}", "--prefix", "{prefix}"), _LORA),
    "lora+biases": Side(("--rank", "{rank}", "--bias", "new"), _LORA),
    "lora+norms": Side(("--rank", "{rank}", "--norms"), _LORA),
    "lora+all": Side(
        ("--rank", "{rank}", "--prefix", "{prefix}", "--bias", "new", "--norms"), _LORA
    ),
}


def configure(parser: argparse.ArgumentParser) -> None:
    search.configure(parser, SIDES)
    parser.add_argument("--prefix", type=int, default=16, help="virtual tokens")


def run(options: argparse.Namespace) -> int:
    cells = Search(SIDES, options)
    cells.run()
    text = cells.table()
    (cells.out / "beside.md").write_text(text, encoding="utf-8")
    print(text)
    return 0
