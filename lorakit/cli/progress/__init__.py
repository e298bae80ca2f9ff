"""The live view of a training run, on stderr: what somebody looks at while waiting.

On a terminal it is a bar, a curve that grows along it, and the numbers that matter, redrawn in
place with rich; notes are printed above it. Anywhere else (a log file, a pipe, a dumb terminal,
or without rich) it is a plain line about every ten seconds. Nothing here touches stdout, which
belongs to the command's result.
"""

from lorakit.cli.progress.showing import LiveProgress, PlainProgress, Progress

__all__ = ["LiveProgress", "PlainProgress", "Progress"]
