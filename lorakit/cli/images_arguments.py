"""The flags of ``lorakit images train``."""

from __future__ import annotations

import argparse

from lorakit.cli.adapters import ADAPTER_HELP
from lorakit.cli.flags import count, fraction, non_negative_float, positive_float, positive_int
from lorakit.cli.images_sample import add_pipeline_arguments
from lorakit.cli.output import add_json_argument
from lorakit.cli.training import (
    add_evaluation_arguments,
    add_low_rank_arguments,
    add_optimizer_arguments,
    note_defaults,
    pattern,
)

#: where nobody says how long: passes over the pictures, within these steps
PASSES, LEAST_STEPS, MOST_STEPS = 60, 300, 2000


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="RUN", help="run folder to make; of --each, for all runs")
    group.add_argument(
        "--resume", metavar="RUN", help="go on with an interrupted run, or with all of a folder"
    )
    group.add_argument(
        "--each",
        metavar="FOLDER",
        help="an adapter for each folder of pictures in this one, with these flags for all; they "
        "share forwards, and each comes out as if it were alone",
    )
    group.add_argument(
        "--from", dest="start", metavar="ADAPTER", help=f"go on with this adapter: {ADAPTER_HELP}"
    )
    add_pipeline_arguments(parser, required=False)
    _add_data_arguments(parser)
    _add_validation_arguments(parser)
    _add_adapter_arguments(parser)
    _add_training_arguments(parser)
    _add_sheet_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="no progress and no notes")
    add_json_argument(parser)
    note_defaults(parser)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument("--data", metavar="FOLDER", help="pictures and their captions")
    group.add_argument("--caption", metavar="TEXT", help="of pictures that have none")
    group.add_argument("--caption-column", metavar="NAME", help="of metadata.jsonl or .csv")
    group.add_argument(
        "--trigger", metavar="WORDS", help="put before every caption; the adapter's name for it"
    )
    group.add_argument(
        "--resolution",
        type=positive_int,
        metavar="PIXELS",
        help="side of the square whose area every picture gets; default: the base's own",
    )
    group.add_argument(
        "--square", action="store_true", help="crop all to squares; default: by aspect ratio"
    )
    group.add_argument("--enlarge", action="store_true", help="scale small pictures up")
    group.add_argument(
        "--flip",
        action="store_true",
        help="mirror pictures, left to right, in half of the steps that see them (not where a side "
        "matters: writing, hands, captions that say left)",
    )
    group.add_argument(
        "--bad-pictures",
        choices=("error", "skip"),
        default="error",
        help="what a picture that cannot be used does: error (default) or skip, which counts them",
    )
    group.add_argument(
        "--masked",
        action="store_true",
        help="learn only what the masks show, of --prior-data and --valid too",
    )
    group.add_argument(
        "--prior-data",
        metavar="FOLDER",
        help="pictures of a class that the base is to draw as before; half of what is seen",
    )
    group.add_argument("--prior-caption", metavar="TEXT", help="of those that have none")
    group.add_argument(
        "--prior-weight", type=positive_float, metavar="X", help="on their loss; default 1"
    )
    group.add_argument(
        "--cache",
        metavar="FOLDER",
        help="where latents and embeddings are kept; default: $LORAKIT_CACHE/images",
    )


def _add_validation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "validation",
        "The loss at fixed noise and times; the adapter with the lowest is kept. Without "
        "validation it is that of the last step.",
    )
    group.add_argument("--valid", metavar="FOLDER", help="pictures to evaluate on")
    group.add_argument(
        "--validation-fraction",
        type=fraction,
        metavar="X",
        help="share of --data to hold out; default: none of fewer than 40 pictures",
    )
    add_evaluation_arguments(group, "pictures")


def _add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    add_low_rank_arguments(group)
    group.add_argument(
        "--rank-pattern",
        nargs="+",
        type=_rank,
        metavar="PATTERN=R",
        help="another rank for modules whose path ends in PATTERN, such as conv1=4",
    )
    group.add_argument(
        "--targets",
        nargs="+",
        metavar="T",
        help="cross-attention, attention (default), all-linear, conv (linears and convolutions), "
        "or names, name endings and regular expressions of modules",
    )
    group.add_argument(
        "--text-encoder-lr",
        type=positive_float,
        metavar="X",
        help="adapt the CLIP text encoders too, at this learning rate",
    )
    group.add_argument(
        "--init",
        choices=("kaiming", "gaussian", "orthogonal", "pissa", "olora"),
        help="where A and B begin; default kaiming",
    )


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help=f"optimizer steps; default: {PASSES} passes over --data, within {LEAST_STEPS} to "
        f"{MOST_STEPS}",
    )
    group.add_argument(
        "--epochs",
        type=positive_float,
        metavar="X",
        help="passes over the examples: the pictures, their repetitions, and --prior-data",
    )
    group.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="pictures per step; default 4"
    )
    group.add_argument(
        "--micro-batch",
        type=positive_int,
        metavar="N",
        help="pictures per forward at most; the batch is accumulated, with the same result",
    )
    group.add_argument(
        "--lr", type=positive_float, metavar="X", help="highest learning rate; default 1e-4"
    )
    group.add_argument(
        "--min-snr",
        type=positive_float,
        metavar="G",
        help="weigh times by min-SNR with this γ (usually 5); for bases that learn no flows",
    )
    group.add_argument(
        "--noise-offset",
        type=non_negative_float,
        metavar="X",
        help="add noise to whole channels (0.05 to 0.1), for very dark and bright pictures",
    )
    group.add_argument(
        "--caption-dropout",
        type=fraction,
        metavar="P",
        help="share of the examples that are seen without a caption, for guidance; default 0",
    )
    group.add_argument(
        "--recompute",
        action="store_true",
        help="make the denoiser's blocks again in the backward: less memory, more time",
    )
    add_optimizer_arguments(group, checkpoints="2")
    group.add_argument(
        "--max-concurrent", type=positive_int, metavar="N", help="of --each, at the same time"
    )


def _add_sheet_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sheets", "Pictures with the same prompts and seeds at the start, meanwhile and at the end."
    )
    group.add_argument(
        "--sample-prompt",
        action="append",
        metavar="P",
        help="may be repeated; default: some captions of the data",
    )
    group.add_argument("--sample-negative", metavar="TEXT", help="what they should not show")
    group.add_argument(
        "--sample-every",
        type=count,
        metavar="N",
        help="steps between two; default: a quarter of all. 0: only at the start and the end",
    )
    group.add_argument(
        "--sample-seeds", type=positive_int, metavar="N", help="pictures of each prompt; default 2"
    )
    group.add_argument(
        "--sample-steps", type=positive_int, metavar="N", help="denoising steps; default 20"
    )
    group.add_argument(
        "--sample-guidance",
        type=non_negative_float,
        metavar="X",
        help="how strongly their prompts count; default: usual for the family of the base",
    )
    group.add_argument("--no-samples", action="store_true", help="draw nothing")


def _rank(text: str) -> tuple[str, int]:
    """``conv1=4`` → the pattern and its rank."""
    path, rank = pattern(text, "conv1=4")
    return path, positive_int(rank)
