"""What the scripts of our own environment share: the command line, run in this process."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

from lorakit.cli.main import main
from tests.interop.runtimes.cases import Work

torch.set_num_threads(1)
logging.disable(logging.WARNING)


def convert(source: Path, out: Path, *flags: str) -> Path:
    """``lorakit convert SOURCE --out OUT …``.

    Raises:
        RuntimeError: it did not end with 0; the message is its own.
    """
    code, said = _command(source, out, *flags)
    if code:
        raise RuntimeError(f"lorakit convert {' '.join(flags)} ended with {code}: {said}")
    return out


def refuses(work: Work, case: str, source: Path, *flags: str) -> None:
    """Report whether ``lorakit convert`` refuses an export and writes nothing, with its words."""
    out = work.own / "refused"
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    code, said = _command(source, out, *flags)
    work.refuses(case, _first(said) if code == 2 and not out.exists() else None)


def peft_logits(base: Path, folder: Path | None, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of a base with a PEFT folder or alone, by transformers and PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
        wrapped = (
            model if folder is None else peft.PeftModel.from_pretrained(model, str(folder)).eval()
        )
    with torch.no_grad():
        return wrapped(input_ids=torch.tensor([ids])).logits[0].numpy()


def _command(source: Path, out: Path, *flags: str) -> tuple[int, str]:
    said = io.StringIO()
    command = ["convert", str(source), "--out", str(out), "--overwrite", *flags]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(command)
    return code, said.getvalue()


def _first(said: str) -> str:
    """The heading and the first problem, without notes."""
    lines = [line for line in said.splitlines() if line and not line.startswith("note:")]
    return " ".join(lines[:2]).removeprefix("lorakit convert: ")
