"""Emoji, from packages to style adapters.

python -m examples.emoji data|base|export|curve|styles|judges|evaluate            # each with --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command."""
    options = _parser().parse_args(argv)
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.emoji", description=__doc__)
    commands = parser.add_subparsers(required=True)

    data = commands.add_parser("data", help="fetch the icon sets and draw them")
    data.set_defaults(run=_data)
    base = commands.add_parser("base", help="train the base, or go on with it")
    base.add_argument("--steps", type=int, default=40_000)
    base.add_argument("--batch-size", type=int, default=32)
    base.add_argument("--lr", type=float, default=1e-3)
    base.add_argument("--seed", type=int, default=0)
    base.add_argument("--begin-with", metavar="FILE", help="weights, such as those that ship")
    base.add_argument("--device", default="cpu", help="cpu or cuda")
    base.add_argument("--report", type=int, default=200, help="steps between lines of the log")
    base.add_argument("--sheet", type=int, default=2000, help="steps between sheets of pictures")
    base.add_argument("--save-minutes", type=float, default=3.0, help="between states")
    base.set_defaults(run=_base)
    export = commands.add_parser("export", help="the pipeline of what is trained so far")
    export.set_defaults(run=_export)
    curve = commands.add_parser("curve", help="plot the base's loss")
    curve.set_defaults(run=_curve)
    styles = commands.add_parser("styles", help="train the style adapters, or go on with them")
    styles.add_argument("--base", help="a pipeline; WORK/base where it is not given")
    styles.add_argument("--steps", type=int, help="default 200")
    styles.set_defaults(run=_styles)
    judges = commands.add_parser("judges", help="train what judges style and content")
    judges.set_defaults(run=_judges)
    judge = commands.add_parser("evaluate", help="judge the style adapters, and draw the sheets")
    judge.add_argument("--base", help="a pipeline; WORK/base where it is not given")
    judge.add_argument(
        "--each",
        type=int,
        choices=range(1, 101),
        default=1,
        metavar="N",
        help="pictures of a caption; default 1",
    )
    manners = ("usual", "late")
    judge.add_argument(
        "--manner",
        nargs="+",
        choices=manners,
        default=manners,
        help="weight 1 as any program would; or late, with --against; default: both",
    )
    judge.add_argument(
        "--no-sheets", dest="sheets", action="store_false", help="only judge; numbers.json is all"
    )
    judge.set_defaults(run=_evaluate)
    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
        command.add_argument("--work", default="runs/emoji", help="folder of everything")
    return parser


def _data(options: argparse.Namespace) -> None:
    from pathlib import Path

    from examples.emoji import data

    print(data.make(Path(options.work) / "data"))


def _base(options: argparse.Namespace) -> None:
    from examples.emoji import train_base

    train_base.run(options)


def _export(options: argparse.Namespace) -> None:
    from examples.emoji import train_base

    train_base.export(options)


def _curve(options: argparse.Namespace) -> None:
    from examples.emoji import train_base

    train_base.curve(options)


def _styles(options: argparse.Namespace) -> None:
    from examples.emoji import styles

    styles.run(options)


def _judges(options: argparse.Namespace) -> None:
    from examples.emoji import judge

    judge.run(options)


def _evaluate(options: argparse.Namespace) -> None:
    from examples.emoji import evaluate

    evaluate.run(options)


if __name__ == "__main__":
    sys.exit(main())
