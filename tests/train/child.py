"""A run in a process that can be killed, slowed down inside its writes on request."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

PRELOADED = ("torch", "transformers", "lorakit.train.trainer", "lorakit.formats", __name__)


def context() -> Any:
    """Processes that start from one with everything imported, in a moment."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(PRELOADED))
    return made


def work(make: Any, out: Path, slow: Path | None) -> None:
    """Start or resume a run.

    Args:
        make: called without arguments for a new trainer.
        slow: if given, every checkpoint stops in the middle of its file, creates this file and
            waits there for a while.
    """
    import torch

    from lorakit.train import Trainer, checkpoint

    torch.set_num_threads(1)
    if slow is not None:
        whole = checkpoint.save_file

        def save_slowly(tensors: Any, path: Path, metadata: Any) -> None:
            whole(tensors, path, metadata)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            slow.touch()
            time.sleep(0.5)
            path.write_bytes(content)

        checkpoint.save_file = save_slowly
    if (out / "run.yaml").exists():
        Trainer.resume(out)
    else:
        make().run()


def write_too_much(folder: Path) -> None:
    """A checkpoint, then one that is larger than the system lets a file be."""
    import resource
    import signal

    import pytest
    import torch

    from lorakit.errors import TrainingError
    from lorakit.train.checkpoint import Checkpoint, write_checkpoint

    write_checkpoint(folder, Checkpoint(1, {"x": torch.zeros(10)}), keep=2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(TrainingError, match="larger than the system allows"):
        write_checkpoint(folder, Checkpoint(2, {"x": torch.zeros(100_000)}), keep=2)
