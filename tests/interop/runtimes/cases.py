"""What a check says about each case: one JSON line on stdout.

Imported by scripts that run in foreign environments: only numpy and the standard library.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

#: a negative must miss the bar by this factor, so that it is no matter of rounding
FAR = 30.0
#: exit code of a check that could not be made
NOT_RUN = 77


class Work:
    """The folder that ``prepare`` has filled, and this check's own folder in it."""

    def __init__(self, check: str, folder: str | Path | None = None) -> None:
        self.check = check
        self.folder = Path(sys.argv[1] if folder is None else folder).resolve()
        self.own = self.folder / check
        self.own.mkdir(parents=True, exist_ok=True)
        self.base = self.folder / "base"
        self.gguf = self.folder / "base.gguf"

    @property
    def prompt(self) -> list[int]:
        """The tokens that every case reads."""
        return list(json.loads((self.folder / "prompt.json").read_text())["ids"])

    def adapter(self, case: str) -> Path:
        """The PEFT folder of a case."""
        return self.folder / "adapters" / case

    def expected(self, case: str) -> np.ndarray:
        """Logits [T, V] of transformers with PEFT; of ``"base"``, without an adapter."""
        return np.load(self.folder / "expected" / f"{case}.npy")

    def continuation(self, case: str) -> tuple[list[int], np.ndarray]:
        """The tokens that follow the prompt greedily, and the logits [N, V] they came from."""
        stored = np.load(self.folder / "expected" / f"{case}.next.npz")
        return [int(token) for token in stored["ids"]], stored["logits"]

    def agrees(self, case: str, got: Any, expected: Any, bar: float, unit: str = "logits") -> None:
        """Report whether all values differ by at most ``bar``."""
        difference = largest_difference(got, expected)
        self._say(case, difference <= bar, difference, bar, unit)

    def differs(self, case: str, got: Any, expected: Any, bar: float, unit: str = "logits") -> None:
        """Report a negative: whether something differs by far more than ``bar``."""
        difference = largest_difference(got, expected)
        self._say(case, not difference <= FAR * bar, difference, bar, unit, negative=True)

    def refuses(self, case: str, error: BaseException | str | None) -> None:
        """Report whether a runtime rejected what it cannot do, with its words."""
        words = "" if error is None else " ".join(str(error).split())
        words = words.replace(str(self.folder), "WORK").partition(" 0: <")[0]  # no backtrace
        self._say(case, error is not None, None, None, "an error", note=words[:200])

    def holds(self, case: str, true: bool, note: str = "") -> None:
        """Report a fact that is either so or not."""
        self._say(case, bool(true), None, None, "fact", note=note)

    def _say(
        self,
        case: str,
        passed: bool,
        difference: float | None,
        bar: float | None,
        unit: str,
        *,
        negative: bool = False,
        note: str = "",
    ) -> None:
        line = {
            "check": self.check,
            "case": case,
            "largest_difference": difference,
            "bar": bar,
            "passed": bool(passed),
            "unit": unit,
            "negative": negative,
            "note": note,
        }
        print(json.dumps(line), flush=True)


def not_run(why: str) -> NoReturn:
    """End a check that cannot get what it is about: it says nothing, for or against."""
    print(json.dumps({"not run": why}), flush=True)
    sys.exit(NOT_RUN)


def largest_difference(got: Any, expected: Any) -> float:
    """The largest absolute difference; infinite where shapes differ or a value is not finite."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        print(f"shapes {got.shape} and {expected.shape} differ", file=sys.stderr)
        return math.inf
    difference = np.abs(got - expected)
    return float(difference.max()) if np.isfinite(difference).all() else math.inf


def log_probs(logits: Any) -> np.ndarray:
    """Log-softmax over the last axis."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
