"""What every command that trains has: flags, the way it is interrupted, how it goes on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Collection, Iterator
from typing import Any

from lorakit.cli.flags import count, finite_float, fraction, non_negative_float, positive_int, seed
from lorakit.errors import InputError


def note_defaults(parser: argparse.ArgumentParser) -> None:
    """Keep what every flag is when it is not given; after the last flag."""
    parser.set_defaults(defaults={action.dest: action.default for action in parser._actions})


def add_evaluation_arguments(group: argparse._ArgumentGroup, rows: str) -> None:
    """When it is evaluated, and on how many ``rows``."""
    group.add_argument(
        "--eval-every",
        type=count,
        metavar="N",
        help="steps between two evaluations; 0: only at the start and the end",
    )
    group.add_argument(
        "--eval-rows", type=count, metavar="N", help=f"{rows} of each evaluation; 0: all"
    )
    group.add_argument(
        "--patience",
        type=count,
        metavar="N",
        help="stop after N evaluations in a row without a new best; default 0: never",
    )


def add_low_rank_arguments(group: argparse._ArgumentGroup) -> None:
    """What products an adapter consists of."""
    group.add_argument("--rank", type=positive_int, metavar="R", help="default 16")
    group.add_argument(
        "--alpha",
        type=finite_float,
        metavar="A",
        help="numerator of the scaling; default 32. Leave it while you vary the rank: the best "
        "learning rate then hardly moves",
    )
    group.add_argument("--exclude", nargs="+", metavar="T", help="modules to leave out again")
    group.add_argument(
        "--dropout",
        type=fraction,
        metavar="P",
        help="probability to drop an input of A; default 0",
    )
    group.add_argument(
        "--scaling",
        choices=("alpha/r", "alpha/sqrt(r)"),
        help="factor on B·A; default alpha/r, alpha/sqrt(r) is rsLoRA",
    )
    group.add_argument(
        "--variant",
        choices=("lora", "dora"),
        help="default lora; dora also trains the length of each output's weights, which takes more "
        "time a step",
    )


def add_optimizer_arguments(group: argparse._ArgumentGroup, checkpoints: str) -> None:
    """How steps are made and kept; ``checkpoints`` are how many by default."""
    group.add_argument(
        "--schedule",
        choices=("constant", "linear", "cosine"),
        help="what the rate does after the warm-up; default linear (to zero)",
    )
    group.add_argument(
        "--warmup",
        type=count,
        metavar="N",
        help="steps in which the rate rises; default: a twentieth, at most 100",
    )
    group.add_argument(
        "--optimizer",
        choices=("adamw", "adamw8bit", "paged-adamw8bit", "sgd"),
        help="default adamw; adamw8bit keeps its averages in 8 bits (bitsandbytes), and the paged "
        "one lets them leave a CUDA GPU that is full",
    )
    group.add_argument(
        "--weight-decay", type=non_negative_float, metavar="X", help="decoupled; default 0"
    )
    group.add_argument(
        "--clip",
        type=non_negative_float,
        metavar="X",
        help="largest norm of the gradient; default 1, 0: no limit",
    )
    group.add_argument(
        "--seed",
        type=seed,
        metavar="N",
        help="of initial weights, order, split and dropout; default 0. One seed, one result",
    )
    group.add_argument(
        "--checkpoint-every",
        type=positive_int,
        metavar="N",
        help="steps between two checkpoints; default: about every minute",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=positive_int,
        metavar="N",
        help=f"checkpoints kept; default {checkpoints}",
    )


def pattern(text: str, example: str) -> tuple[str, str]:
    """``PATTERN=X`` → both sides; ``example`` is what an error shows."""
    left, equals, right = text.rpartition("=")
    if not equals or not left:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=X, such as {example}")
    return left, right


@contextlib.contextmanager
def interruptible(command: str, *, silent: bool = False) -> Iterator[None]:
    """Signals become :class:`KeyboardInterrupt` at the end of a step, and say so."""
    from lorakit.train.interrupt import signals_as_interrupts

    def tell(text: str) -> None:  # from a signal handler: past all buffers
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"\nlorakit {command}: {text}\n".encode())

    with signals_as_interrupts(None if silent else tell):
        yield


def check_nothing_changes(options: argparse.Namespace, but: Collection[str], anew: str) -> None:
    """Refuse settings of a run that goes on.

    Args:
        but: flags that act on it all the same.
        anew: how a new run from its adapter begins.
    """
    given = [
        "--" + ("from" if name == "start" else name.replace("_", "-"))
        for name, value in vars(options).items()
        if name in options.defaults and value != options.defaults[name] and name not in but
    ]
    if given:
        raise InputError(
            f"{', '.join(sorted(given))} cannot be changed in a run that goes on exactly; its "
            f"settings are in run.yaml. Leave them out; or start a new run from its adapter: {anew}"
        )


def given_of(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The flags that name fields of a dataclass and were given."""
    names = [field.name for field in dataclasses.fields(kind)]
    found: dict[str, Any] = {name: getattr(options, name, None) for name in names}
    targets = found.get("targets")
    if targets is not None and len(targets) == 1:
        found["targets"] = targets[0]
    if found.get("lr_pattern") is not None:
        found["lr_pattern"] = dict(found["lr_pattern"])
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }
