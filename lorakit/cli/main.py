"""The command line: finds the command's module, runs it, and turns errors into exit codes.

Only the standard library is imported here, so that ``lorakit --help`` is instant. A command's
module does the same at its top and imports what it needs inside ``run``.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from lorakit import __version__
from lorakit.errors import InputError, Interrupted, LorakitError, MissingDependencyError

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

#: command → (module, line of help), in the order in which somebody meets them
COMMANDS = {
    "preview": ("preview", "show what would be trained: rendered examples, supervised tokens"),
    "estimate": ("estimate", "memory and time of a run, before it; what to change so that it fits"),
    "train": ("train", "train one adapter on a file of data, or go on with one"),
    "tune": ("tune", "find learning rate, rank and targets by training many candidates at once"),
    "eval": ("evaluate", "loss, perplexity and text metrics: base beside adapter"),
    "generate": ("generate", "text from the base and from adapters, side by side"),
    "merge": ("merge", "adapters into their base: a whole model, tensor by tensor, verified"),
    "convert": ("convert", "an adapter in another format, or as a certain program needs it"),
    "inspect": ("inspect_", "what is in an adapter: settings, size, norms per layer"),
    "extract": ("extract", "an adapter from a fully fine-tuned checkpoint and its base"),
    "compare": ("compare", "how alike two adapters are: subspaces, cosine, norms, spectra"),
    "combine": ("combine", "one adapter out of several: exact sums, TIES, DARE, cut by SVD"),
    "compress": ("compress", "a smaller adapter: by rank, energy, parameters, or measured loss"),
    "images": ("images", "the same for pictures: train on a folder of them, and draw"),
    "push": ("push", "upload an adapter folder to the hub"),
}

EPILOG = """\
examples:
  lorakit preview --base smollm2 --data mine.jsonl
  lorakit train --base smollm2 --data mine.jsonl --out runs/mine
  lorakit eval --base smollm2 --adapter runs/mine --data test.jsonl --metrics bleu
  lorakit generate --base smollm2 --adapter runs/mine --prompt "Hello"

`lorakit COMMAND --help` explains each. Exit codes: 0 done, 2 the input is wrong,
130 interrupted (a training with its state saved, once it has begun), 1 anything else.
"""


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the named command's module is imported and filled in."""
    parser = _Parser(
        prog="lorakit",
        description="One frozen base, many LoRA adapters.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lorakit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, line) in COMMANDS.items():
        if name == command:
            home = importlib.import_module(f"lorakit.cli.{module}")
            sub = commands.add_parser(
                name,
                help=line,
                description=home.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
            home.configure(sub)
            sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
            sub.set_defaults(run=home.run)
        else:
            commands.add_parser(name, help=line, add_help=False)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line or two, with what is close to a flag that is unknown."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        options, unknown = super().parse_known_args(args, namespace)
        flags = [one.partition("=")[0] for one in unknown if one.startswith("-")]
        if unknown:
            known = [one for one in self._option_string_actions if one.startswith("--")]
            close = [c for flag in flags for c in difflib.get_close_matches(flag, known, 1, 0.7)]
            hint = f" (close: {', '.join(dict.fromkeys(close))})" if close else ""
            self.error(f"unknown: {' '.join(flags or unknown)}{hint}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n  {self.prog} --help lists the flags\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``lorakit``; returns the exit code."""
    if sys.stderr is None:  # closed; print would then write its lines to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - stays open as long as the process
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if not a.startswith("-")), None)
    parser = build_parser(command)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse: 0 for --help, 2 for an unknown flag
        return int(stop.code or 0)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        with _no_interrupt_lost():
            code = int(options.run(options) or 0)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except LorakitError as error:
        if options.debug:
            raise
        if not error.said:
            print(f"lorakit {options.command}: {error}", file=sys.stderr)
        if isinstance(error, Interrupted):
            return 130
        return 2 if isinstance(error, (InputError, MissingDependencyError)) else 1
    except OSError as error:
        _drop_stdout()
        if options.debug:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        reason = error.strerror or str(error).partition("\n")[0] or type(error).__name__
        print(f"lorakit {options.command}: {where}{reason}", file=sys.stderr)
        given = str(error.filename) in arguments and error.errno == errno.ENOENT
        return 2 if given or error.errno == errno.ENAMETOOLONG else 1


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Raise Ctrl-C again where it met a finaliser or the callback of a weak reference, which Python
    lets no exception out of. Not where the process ignores it, as one behind ``&`` does."""
    before = sys.unraisablehook
    again: threading.Timer | None = None

    def hook(found: UnraisableHookArgs) -> None:
        nonlocal again
        if not issubclass(found.exc_type, KeyboardInterrupt):
            before(found)
            return
        if again is not None:
            again.cancel()
        again = threading.Timer(0.05, _interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
        if again is not None and not again.finished.is_set():
            raise KeyboardInterrupt  # it would come when nobody waits for it any more
    finally:
        if again is not None:
            again.cancel()
        sys.unraisablehook = before


def _interrupt_main() -> None:
    """Ctrl-C, from another thread."""
    if hasattr(signal, "pthread_kill"):  # which also ends the main thread's waiting
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _drop_stdout() -> None:
    """Where stdout takes no more, let what it still holds go, or the exit would fail on it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
