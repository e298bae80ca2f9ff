"""Adapters of picture models: train them on a folder of pictures, and draw with them.

  lorakit images train --base B --data FOLDER --out RUN
  lorakit images sample --base B --adapter RUN --prompt "…" --out pictures

B is a folder or hub id of a diffusers pipeline: Stable Diffusion 1, 2, XL or 3, or Flux. Each has
a --help of its own.
"""

from __future__ import annotations

import argparse

from lorakit.cli import images_sample, images_train
from lorakit.errors import InputError

_COMMANDS = {
    "train": (images_train, "train an adapter on pictures and captions, or go on with one"),
    "sample": (images_sample, "pictures and contact sheets of a base and adapters"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the commands and their flags."""
    commands = parser.add_subparsers(dest="images_command", metavar="COMMAND")
    for name, (module, line) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=line,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.configure(sub)
        sub.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # as it was given before the command
            help="show the traceback of an error",
        )


def run(options: argparse.Namespace) -> int:
    """Run the command that was named."""
    if options.images_command is None:
        raise InputError(
            f"lorakit images needs a command: {' or '.join(_COMMANDS)}. lorakit images train --help"
        )
    module, _ = _COMMANDS[options.images_command]
    return int(module.run(options))
