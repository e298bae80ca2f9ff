"""Spoiled files by the thousand: ``python -m tests.formats.mutation --count 20000``.

Each file is made from a seed, its format and its number, half of them with edited headers, and is
read. What may happen: a ``LorakitError``, or an adapter whose every site is sound and that a
writer takes or refuses. What may not: another exception, a process that dies, more than
``MAX_SECONDS`` of the processor's time, a pickle's code being run, memory that grows.

The reading is done by a process of its own, whose address space is limited; the system ends it
when one file takes too long, whatever it is busy with. The one that started it names the file,
and goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

#: processor time for one file
MAX_SECONDS = 5.0
#: by the clock, for a reader that waits for something: a busy machine is slow
MAX_WAIT = 300.0
#: address space above what the libraries take
MAX_SPACE = 2 * 2**30
#: growth of resident memory over all files
MAX_GROWTH = 100_000_000


@dataclass
class Report:
    """What came of the files of a run."""

    read: Counter[str] = field(default_factory=Counter)
    """Format and kind of change → files that were read."""
    rejected: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    """One for each file that broke the rules; names its number."""
    grown: int = 0
    """Bytes by which the resident memory grew, of the process where it grew most."""
    slowest: tuple[float, str] = (0.0, "")

    def table(self) -> str:
        """The share that was rejected, per format."""
        rows = [
            "| format | files | rejected: bytes changed | rejected: header edited |",
            "|---|---|---|---|",
        ]
        for name in sorted({key.partition(" / ")[0] for key in self.read + self.rejected}):
            shares, total = [], 0
            for kind in ("bytes", "header"):
                key = f"{name} / {kind}"
                all_files = self.read[key] + self.rejected[key]
                total += all_files
                shares.append(f"{self.rejected[key] / all_files:.1%}" if all_files else "–")
            rows.append(f"| {name} | {total} | {shares[0]} | {shares[1]} |")
        total, rejected = sum((self.read + self.rejected).values()), sum(self.rejected.values())
        rows.append(f"| all | {total} | {rejected / max(total, 1):.1%} together | |")
        return "\n".join(rows)


def run(
    *,
    count: int,
    seed: int,
    formats: tuple[str, ...] = (),
    start: int = 0,
    reader: str | None = None,
    seconds: float = MAX_SECONDS,
) -> Report:
    """Read ``count`` spoiled files in processes of their own.

    Args:
        formats: only these.
        start: the number of the first file.
        reader: ``module:function`` that takes the place of every reader, to see that the rules
            are kept.
        seconds: processor time that a file may take.
    """
    report = Report()
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        state = Path(folder) / "state.json"
        at, end = start, start + count
        while at < end:
            state.write_text("{}")
            done = subprocess.run(
                [sys.executable, "-m", "tests.formats.mutation", "--worker", str(state),
                 "--seed", str(seed), "--start", str(at), "--count", str(end - at),
                 *(f"--format={name}" for name in formats),
                 f"--seconds={seconds}", *([f"--reader={reader}"] if reader else [])],
                stderr=subprocess.PIPE, text=True, check=False, cwd=Path(__file__).parents[2],
            )  # fmt: skip
            said = json.loads(state.read_text())
            _add(report, said)
            if done.returncode == 0:
                break
            if "at" not in said:
                raise RuntimeError(f"the reading process did not begin:\n{done.stderr[-3000:]}")
            what = {-signal.SIGVTALRM: f"took more than {seconds} s of processor time",
                    -signal.SIGALRM: f"waited for more than {MAX_WAIT} s"}  # fmt: skip
            why = what.get(done.returncode, f"ended the process ({done.returncode})")
            report.failures.append(f"{said['name']}: {why}\n{done.stderr[-1500:]}")
            at = said["at"] + 1
    return report


def _add(report: Report, said: dict[str, Any]) -> None:
    report.read.update(said.get("read", {}))
    report.rejected.update(said.get("rejected", {}))
    report.failures += said.get("failures", [])
    report.grown = max(report.grown, said.get("grown", 0))
    report.slowest = max(report.slowest, tuple(said.get("slowest", (0.0, ""))))


def file_of(samples: list[Any], seed: int, number: int) -> tuple[Any, str, dict[str, bytes]]:
    """The sample, the kind of change, and the files, of a number."""
    from .mutation_edits import mutated

    sample = samples[number % len(samples)]
    edit = number // len(samples) % 2 == 1
    draw = Random(f"{seed} {sample.format} {number}")
    return sample, "header" if edit else "bytes", mutated(sample, draw, edit=edit)


# --- in the process that reads -------------------------------------------------------------------


def _work(
    state: Path,
    *,
    seed: int,
    start: int,
    count: int,
    formats: list[str],
    reader: str | None,
    seconds: float,
) -> None:
    from . import mutation_edits
    from .mutation_files import samples

    logging.disable(logging.CRITICAL)
    folder = state.parent / f"work{os.getpid()}"
    folder.mkdir()
    mutation_edits.MARK = str(folder / "code-was-run")
    given = [s for s in samples(folder) if not formats or s.format in formats]
    place = folder / "place"
    said: dict[str, Any] = {"read": {}, "rejected": {}, "failures": [], "slowest": [0.0, ""]}
    if reader is not None:
        module, _, name = reader.partition(":")
        given = [replace(s, read=getattr(importlib.import_module(module), name)) for s in given]
    for number in range(0 if reader else 6 * len(given)):  # every import and every buffer once
        _guarded(lambda n=number: _one(given, -seed - 1, n, place, Counter(), Counter()))
    (folder / "code-was-run").unlink(missing_ok=True)
    space = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (space + MAX_SPACE, space + MAX_SPACE))
    before, peak = _status("VmRSS"), _reset_peak()
    read: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    handle = os.open(state, os.O_WRONLY)
    for number in range(start, start + count):
        name = f"{given[number % len(given)].format}, seed {seed}, number {number}"
        said |= {"at": number, "name": name, "read": read, "rejected": rejected}
        text = json.dumps(said).encode()
        os.pwrite(handle, text, 0)
        os.ftruncate(handle, len(text))
        began = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        signal.setitimer(signal.ITIMER_REAL, MAX_WAIT)
        problem = _guarded(lambda n=number: _one(given, seed, n, place, read, rejected))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        said["slowest"] = max(said["slowest"], [time.process_time() - began, name])
        if problem is None and os.path.exists(mutation_edits.MARK):
            os.unlink(mutation_edits.MARK)
            problem = "the code of a pickle was run"
        if problem is not None:
            said["failures"].append(f"{name}: {problem}")
        grown = _status("VmHWM" if peak else "VmRSS") - before
        said["grown"] = max(said.get("grown", 0), grown)
    text = json.dumps(said | {"read": read, "rejected": rejected}).encode()
    os.pwrite(handle, text, 0)
    os.ftruncate(handle, len(text))


def _guarded(action: Any) -> str | None:
    try:
        action()
    except BaseException:
        return "".join(traceback.format_exc(limit=-8))
    return None


def _one(
    given: list[Any],
    seed: int,
    number: int,
    place: Path,
    read: Counter[str],
    rejected: Counter[str],
) -> None:
    """Make, read and check one file.

    Raises:
        AssertionError: the adapter is not sound, or an error does not name the file.
    """
    from lorakit.errors import LorakitError

    sample, kind, files = file_of(given, seed, number)
    _lay(place, files)
    key = f"{sample.format} / {kind}"
    try:
        adapter = sample.read(place / sample.named)
    except LorakitError as error:
        rejected[key] += 1
        check_message(str(error), place)
        return
    read[key] += 1
    if adapter is not None:
        check_sound(adapter)


def check_message(text: str, place: Path) -> None:
    """An error names the file, fits a screen or a few, and holds nothing that steers a terminal."""
    assert str(place) in text, f"the file is not named: {text[:300]}"
    assert len(text) <= 20_000, f"a message of {len(text)} characters"
    odd = sorted({c for c in text if c not in "\n\t" and not c.isprintable()})
    assert not odd, f"the message holds {odd[:5]!r}"


def check_sound(adapter: Any) -> None:
    """Its sites are sound, and a writer writes or refuses it."""
    from lorakit.core.adapter import Adapter
    from lorakit.errors import LorakitError
    from lorakit.formats.peft.write import plan_files

    assert isinstance(adapter, Adapter)
    assert adapter.sites
    for path, site in adapter.sites.items():
        fresh = type(site)(**{f: getattr(site, f) for f in site.__dataclass_fields__})
        assert isinstance(path, str)
        assert fresh.problems() == [], path
        assert all(t.device.type == "cpu" for t in site.tensors().values())
    repr(adapter.spec)
    with contextlib.suppress(LorakitError):
        plan_files(adapter)


def _lay(place: Path, files: dict[str, bytes]) -> None:
    """Write the files over those of the last time, and remove what is left of those."""
    place.mkdir(exist_ok=True)
    for old in place.iterdir():
        if old.name not in files:
            old.unlink()
    for name, content in files.items():
        (place / name).write_bytes(content)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def _reset_peak() -> bool:
    """Forget the peak of the memory so far; ``False`` where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> int:
    parser = argparse.ArgumentParser(description="Reads spoiled files of every format.")
    parser.add_argument("--count", type=int, default=20_000, help="files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first file")
    parser.add_argument("--format", action="append", default=[], help="only this one")
    parser.add_argument("--seconds", type=float, default=MAX_SECONDS, help="for one file")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        _work(given.worker, seed=given.seed, start=given.start, count=given.count,
              formats=given.format, reader=given.reader, seconds=given.seconds)  # fmt: skip
        return 0
    report = run(count=given.count, seed=given.seed, formats=tuple(given.format), start=given.start)
    for failure in report.failures:
        print(failure, end="\n\n")
    print(report.table())
    print(f"failures: {len(report.failures)}; memory grew by {report.grown / 1e6:.1f} MB; slowest: "
          f"{report.slowest[0]:.2f} s ({report.slowest[1]})")  # fmt: skip
    return 1 if report.failures or report.grown > MAX_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
