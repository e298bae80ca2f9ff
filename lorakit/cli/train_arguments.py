"""The flags of ``lorakit train``."""

from __future__ import annotations

import argparse

from lorakit.cli.adapters import ADAPTER_HELP
from lorakit.cli.bases import add_base_arguments
from lorakit.cli.flags import count, fraction, positive_float, positive_int
from lorakit.cli.output import add_json_argument
from lorakit.cli.rows import add_data_arguments
from lorakit.cli.training import (
    add_evaluation_arguments,
    add_low_rank_arguments,
    add_optimizer_arguments,
    note_defaults,
    pattern,
)

_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    _add_run_arguments(parser)
    add_base_arguments(parser, required=False, task=True)
    add_data_arguments(parser, required=False)
    _add_validation_arguments(parser)
    add_adapter_arguments(parser)
    add_training_arguments(parser)
    _add_many_arguments(parser)
    _add_process_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--report-to",
        action="append",
        choices=_TRACKERS,
        metavar="TRACKER",
        help=f"also send the numbers to {', '.join(_TRACKERS)}; again for several",
    )
    output.add_argument("--quiet", action="store_true", help="no progress and no notes")
    add_json_argument(parser)
    note_defaults(parser)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "jobs", nargs="?", metavar="jobs.yaml", help="a file of jobs: many adapters on one base"
    )
    group.add_argument(
        "--each",
        metavar="FOLDER",
        help="an adapter for each data file of this folder, with these flags for all; a file that "
        "is broken is named at the end, and the others are done",
    )
    group.add_argument(
        "--out",
        metavar="RUN",
        help="run folder to make; it must not exist yet. Of many: the folder for their runs",
    )
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with an interrupted run, or with all of a folder of runs; the settings are in "
        "RUN/run.yaml",
    )
    group.add_argument(
        "--full",
        action="store_true",
        help="train all weights of the base and no adapter, by the same loop. The weights must be "
        "float32, or bfloat16 (a float32 copy is trained); 16 or 18 bytes of memory for each, and "
        "checkpoints of three times the model, of which one is kept",
    )
    group.add_argument(
        "--from",
        dest="start",
        metavar="ADAPTER",
        help=f"go on with this adapter ({ADAPTER_HELP}) on new data; it brings rank, "
        "targets and alpha, and the optimizer starts anew",
    )


def _add_many_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "many adapters", "They share forwards, and each comes out as if it were alone."
    )
    group.add_argument(
        "--max-concurrent",
        type=positive_int,
        metavar="N",
        help="trained at the same time at most; default: until their batches fill a forward, as "
        "far as the memory has room",
    )
    group.add_argument(
        "--token-budget",
        type=positive_int,
        metavar="N",
        help="tokens of a shared forward at most; default: the largest --micro-batch-tokens",
    )


def _add_validation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "validation", "The adapter with the lowest validation loss is kept."
    )
    group.add_argument(
        "--valid",
        nargs="+",
        metavar="F",
        help="validation files, read like --data; default: some prompts of --data are held out",
    )
    group.add_argument(
        "--validation-fraction",
        type=fraction,
        metavar="X",
        help="share of --data to hold out, in whole prompts; 0: none, and the last step is kept",
    )
    add_evaluation_arguments(group, "validation rows")
    group.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help="items that base and adapter answer at the end for the report; default 4, 0: none",
    )


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    add_low_rank_arguments(group)
    group.add_argument(
        "--targets",
        nargs="+",
        metavar="T",
        help="all-linear (default: every linear but the output head), attention, mlp, experts and "
        "router (of a mixture of experts), or names, "
        "name endings and regular expressions of modules; none: no LoRA, for --prefix, --bias, "
        "--norms or --train-modules alone",
    )
    group.add_argument("--layers", metavar="RANGE", help="blocks to adapt, such as 0-11, 20- or 3")
    group.add_argument(
        "--init",
        choices=("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga", "loftq"),
        help="where A and B begin; default kaiming (A drawn, B zero, as with gaussian and "
        "orthogonal). pissa, olora: inside of the weight; eva, lora-ga: from some of the data; "
        "loftq: with what --quantize loses. Each has its own default learning rate",
    )
    group.add_argument(
        "--init-examples",
        type=positive_int,
        metavar="N",
        help="training examples that --init eva and lora-ga look at; default 64",
    )
    group.add_argument(
        "--eva-rho",
        type=positive_float,
        metavar="X",
        help="--init eva shares the ranks out, up to X times the rank for a module; default 1: "
        "every module keeps the rank",
    )
    group.add_argument(
        "--bias",
        choices=("none", "lora", "all", "new"),
        help="train biases too (BitFit): of the adapted modules (lora), all, or new: all, and each "
        "linear that has none gets one, from zero (Llama and its kind have none); default none",
    )
    group.add_argument(
        "--norms",
        action="store_true",
        default=None,
        help="train the weights of all norms too, and save them whole",
    )
    group.add_argument(
        "--prefix",
        type=positive_int,
        metavar="N",
        help="prefix tuning: also train the keys and values of N virtual tokens in front of the "
        "text, in every layer",
    )
    group.add_argument(
        "--prefix-lr-ratio",
        type=positive_float,
        metavar="X",
        help="the prefix learns X times faster than the rest; default 10",
    )
    group.add_argument(
        "--train-modules", nargs="+", metavar="M", help="modules to train and save whole"
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive_int, metavar="N", help="optimizer steps")
    group.add_argument(
        "--epochs", type=positive_float, metavar="X", help="passes over the data; default 3"
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="examples per optimizer step, over all processes; default 8",
    )
    group.add_argument(
        "--micro-batch",
        type=positive_int,
        metavar="N",
        help="examples per forward at most; the batch is accumulated, with the same result",
    )
    group.add_argument(
        "--micro-batch-tokens",
        type=positive_int,
        metavar="N",
        help="tokens per forward at most; lower it if memory runs out, the result stays the same",
    )
    group.add_argument(
        "--recompute",
        choices=("none", "mlp", "layers", "offload"),
        help="make again in the backward instead of keeping it: the middle of the MLP (mlp) or the "
        "whole layer (layers; offload also moves its input off the GPU). Less memory, more time, "
        "the same gradient; default none",
    )
    group.add_argument(
        "--lr",
        type=_rate,
        metavar="X",
        help="highest learning rate; default: by the width of the base and the --init, and a tenth "
        "of that with --full; auto: found "
        "by training several together first (lorakit tune --quick), in 3 to 7 times the steps "
        "(the longer a run, the fewer)",
    )
    group.add_argument(
        "--lora-plus-ratio",
        type=positive_float,
        metavar="X",
        help="every B learns X times faster than its A, whose rate is --lr (LoRA+; its paper "
        "takes 16); default 1",
    )
    group.add_argument(
        "--lr-pattern",
        nargs="+",
        type=_factor,
        metavar="PATTERN=X",
        help="factor on the learning rate of modules whose path ends in PATTERN, such as "
        "q_proj=0.5; the first that fits counts",
    )
    add_optimizer_arguments(group, checkpoints="2, with --full 1")


def _add_process_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Started by torchrun, they share each batch. With --max-restarts, torchrun starts them "
        "again when one dies, and the run goes on from its last checkpoint.",
    )
    group.add_argument(
        "--shard",
        action="store_true",
        help="spread the base's weights over the processes (FSDP2); default: each has them whole",
    )


def _rate(text: str) -> float | str:
    """``auto``, or a number."""
    return text if text == "auto" else float(positive_float(text))


def _factor(text: str) -> tuple[str, float]:
    """``q_proj=0.5`` → the pattern and its factor."""
    path, factor = pattern(text, "q_proj=0.5")
    return path, positive_float(factor)
