"""One virtual environment for each set of requirements, kept between runs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
_HEADER = re.compile(r"# (requires|without|build): *(.+?)\s*$")


class NotInstalledError(Exception):
    """A runtime that this machine cannot have; the message is the installer's last word."""


@dataclass(frozen=True)
class Needs:
    """What the head of a check names."""

    requires: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    build: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The environment's: the first requirement, and a hash of all."""
        digest = hashlib.sha256("\n".join(sorted(self.requires)).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.requires[0])}-{digest}"


def needs_of(script: Path) -> Needs:
    """Read the comments at the head of a check.

    Raises:
        ValueError: it requires nothing.
    """
    found: dict[str, list[str]] = {"requires": [], "without": [], "build": []}
    for line in script.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            break
        match = _HEADER.match(line)
        if match:
            found[match[1]].append(match[2])
    if not found["requires"]:
        raise ValueError(f"{script} names no package; put '# requires: …' at its head")
    build = tuple((name, value) for name, _, value in (b.partition("=") for b in found["build"]))
    return Needs(tuple(found["requires"]), tuple(found["without"]), build)


def environment(needs: Needs, root: Path, log: Path) -> Path:
    """The Python of an environment that has what a check needs; made where it is missing.

    Raises:
        NotInstalledError: pip could not install it.
    """
    folder = root / "envs" / needs.name
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists() and python.exists():
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, **dict(needs.build)}
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "-c", str(CONSTRAINTS), *needs.requires],
    ]
    if needs.without:
        steps.append([*pip, "uninstall", "-y", *needs.without])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        for step in steps:
            done = subprocess.run(step, env=variables, stdout=file, stderr=subprocess.STDOUT)
            if done.returncode:
                raise NotInstalledError(_last_word(log))
    frozen = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True).stdout
    ready.write_text(frozen)
    return python


def size_of(folder: Path) -> int:
    """Bytes on the disk; hard links are counted once."""
    seen: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        if not path.is_symlink() and path.is_file():
            found = path.stat()
            seen[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(seen.values())


def remove(needs: Needs, root: Path) -> None:
    """Delete an environment, so that the next use installs it anew."""
    shutil.rmtree(root / "envs" / needs.name, ignore_errors=True)


def _last_word(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error"))]
    return (errors or lines or ["no output"])[-1]
