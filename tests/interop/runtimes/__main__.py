"""``make interop``: run the checks, each in its runtime's environment, and write the table.

Exit code: 0 all ran and passed; 1 a case failed or a check broke; 3 all that ran passed, but
something was not run (a runtime that could not be installed or downloaded).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.interop.runtimes import environments, table
from tests.interop.runtimes.cases import NOT_RUN

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]

#: a runtime that hangs is ended after this many seconds
LIMIT = 1500


@dataclass
class Result:
    """What came of one check."""

    name: str
    status: str = "ran"
    """``"ran"``, ``"not run"`` (its runtime cannot be had) or ``"broke"``."""
    why: str = ""
    requires: tuple[str, ...] = ()
    megabytes: int = 0
    seconds: int = 0
    """Of the scripts alone, without installing."""
    date: str = ""
    cases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.status == "broke" or any(not case["passed"] for case in self.cases)


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    known = sorted(path.stem.removeprefix("check_") for path in HERE.glob("check_*.py"))
    unknown = [name for name in args.names if name not in known]
    if unknown:
        print(f"There is no check {', '.join(unknown)}; there are: {', '.join(known)}.")
        return 2
    root = Path(os.environ.get("LORAKIT_INTEROP", REPOSITORY / ".interop")).resolve()
    if args.install:
        return _install(args.names or known, root)
    names = args.names or known
    if not args.keep:
        say(f"preparing the base, adapters and expected logits in {root / 'work'}")
        if _ours(HERE / "prepare.py", root, root / "logs" / "prepare.log"):
            say(f"that failed; see {root / 'logs' / 'prepare.log'}")
            return 1
    results = []
    for name in names:
        result = run(name, root)
        _store(result, root)
        results.append(result)
        say(f"{name}: {_summary(result)}")
    everything = [_read(path) for path in sorted((root / "results").glob("*.json"))]
    page = REPOSITORY / "docs" / "interop.md"
    guides = sorted(path.name for path in (REPOSITORY / "docs" / "runtimes").glob("*.md"))
    shown = [result for result in everything if result.name in known]
    page.write_text(table.page(shown, guides), encoding="utf-8")
    say(f"wrote {page.relative_to(REPOSITORY)}")
    if any(result.failed for result in results):
        return 1
    return 3 if any(result.status == "not run" for result in results) else 0


def run(name: str, root: Path) -> Result:
    """Install what a check needs, and run its scripts."""
    script = HERE / f"check_{name}.py"
    needs = environments.needs_of(script)
    result = Result(name, requires=needs.requires, date=time.strftime("%Y-%m-%d"))
    logs = root / "logs"
    try:
        python = environments.environment(needs, root, logs / f"install_{name}.log")
    except environments.NotInstalledError as error:
        result.status, result.why = "not run", f"could not be installed: {error}"
        return result
    result.megabytes = round(environments.size_of(python.parents[1]) / 1e6)
    log = logs / f"{name}.log"
    log.unlink(missing_ok=True)
    began = time.monotonic()
    steps = [
        (Path(sys.executable), HERE / f"prepare_{name}.py"),
        (python, script),
        (Path(sys.executable), HERE / f"read_{name}.py"),
    ]
    for interpreter, step in steps:
        if not step.exists():
            continue
        code, cases = _script(interpreter, step, root, log)
        result.cases += cases
        if code == NOT_RUN:
            result.status, result.why = "not run", _reason(log)
            break
        if code or (not cases and step == script):
            result.status = "broke"
            result.why = f"{step.name} ended with {code} after {len(cases)} cases; see {log.name}"
            break
    result.seconds = round(time.monotonic() - began)
    return result


def _script(python: Path, script: Path, root: Path, log: Path) -> tuple[int, list[dict[str, Any]]]:
    """Run one script; its exit code, and the cases that it printed."""
    own = python == Path(sys.executable)
    command = [str(python), "-m", f"{__package__}.{script.stem}"] if own else [str(python), script]
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(root / "hf"),
    }
    cases = []
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, str(root / "work")],
            cwd=REPOSITORY if own else root / "work",
            env=variables,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
        assert process.stdout is not None
        watch = threading.Timer(LIMIT, process.kill)
        watch.start()
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                case = _case(line)
                if case is not None:
                    cases.append(case)
                    say(f"  {script.stem}: {_told(case)}")
        finally:
            watch.cancel()
    return process.wait(), cases


def _reason(log: Path) -> str:
    """Why a check says that it could not be made."""
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"not run"')]
    return str(json.loads(lines[-1])["not run"]) if lines else f"see {log.name}"


def _told(case: dict[str, Any]) -> str:
    """A case in a few words, for those who watch."""
    number = case["largest_difference"]
    seen = "" if number is None else f" ({number:.2g})"
    return f"{case['case']}: {'passed' if case['passed'] else 'FAILED'}{seen}"


def _case(line: str) -> dict[str, Any] | None:
    """A line that reports a case; runtimes print other lines too."""
    if not line.startswith('{"check"'):
        return None
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def _ours(script: Path, root: Path, log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    (root / "work").mkdir(parents=True, exist_ok=True)
    return _script(Path(sys.executable), script, root, log)[0]


def _install(names: list[str], root: Path) -> int:
    missing = False
    for name in names:
        needs = environments.needs_of(HERE / f"check_{name}.py")
        try:
            python = environments.environment(needs, root, root / "logs" / f"install_{name}.log")
            say(f"{name}: {environments.size_of(python.parents[1]) / 1e6:.0f} MB in {needs.name}")
        except environments.NotInstalledError as error:
            missing = True
            say(f"{name}: could not be installed: {error}")
    return 3 if missing else 0


def _summary(result: Result) -> str:
    if result.status != "ran":
        return f"{result.status}: {result.why}"
    passed = sum(case["passed"] for case in result.cases)
    failed = [case["case"] for case in result.cases if not case["passed"]]
    tail = f"; failed: {', '.join(failed)}" if failed else ""
    return f"{passed} of {len(result.cases)} cases passed in {result.seconds} s{tail}"


def _store(result: Result, root: Path) -> None:
    path = root / "results" / f"{result.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1))


def _read(path: Path) -> Result:
    return Result(**json.loads(path.read_text()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.interop.runtimes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="checks to run; all by default")
    parser.add_argument("--install", action="store_true", help="only make the environments")
    parser.add_argument(
        "--keep", action="store_true", help="use the work folder as the last run left it"
    )
    return parser


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
