"""From a file in one format to a file in another: read, plan, and only then write.

What a format has no place for is listed under ``lost``, and nothing is written unless that is
allowed. What an adapter knows about its making (recipe, metrics, the base's identity) changes
nothing of what it does: where a format has no place for it, a note says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.core.adapter import Adapter
from lorakit.core.files import atomic_file, atomic_folder, clear_disk_errors
from lorakit.core.sites import Site
from lorakit.errors import FormatError, collected
from lorakit.formats.format import Content, Format, Hints, Reading
from lorakit.formats.opening import open_source
from lorakit.formats.registry import READ_ONLY, get, identify, read_with, writable


@dataclass(frozen=True)
class Plan:
    """What a conversion would write, and what it would lose."""

    source: str
    """Name of the format that was read."""
    target: Format
    adapter: Adapter
    """As it is written: folded where that was asked for."""
    files: Mapping[str, Content]
    notes: tuple[str, ...]
    lost: Mapping[str, str]

    @property
    def sites(self) -> dict[str, Site]:
        """Path → site, of those that the files hold."""
        return {p: site for p, site in self.adapter.sites.items() if p not in self.lost}

    def write(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the files; a crash leaves all of them or none.

        Args:
            out: the folder, or the file, of the format; into an existing folder, a file goes
                under its usual name.
            overwrite: replace what this format wrote there before.

        Raises:
            FormatError: something is there already, or the name does not fit the format.
            InputError: the place cannot be written to.
        """
        path = Path(os.path.expanduser(out))
        if self.target.folder:
            _write_folder(path, self.files, overwrite=overwrite)
            return path
        ((name, content),) = self.files.items()
        if path.is_dir():
            path = path / name
        if path.suffix != Path(name).suffix:
            raise FormatError(
                f"{path} has the wrong suffix: a file of the format {self.target.name} ends in "
                f"{Path(name).suffix}. Give a path such as {path.with_suffix(Path(name).suffix)}."
            )
        if os.path.exists(path) and not overwrite:
            raise FormatError(
                f"{path} exists already. Give another path, or overwrite=True (--overwrite)."
            )
        with atomic_file(path) as temporary:
            _write(temporary, content)
        return path


def plan(
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    source: str | None = None,
    hints: Hints | None = None,
    portable: bool = False,
    runtime: str | None = None,
) -> Plan:
    """Read an adapter and lay out its files in another format; nothing is written.

    Args:
        path: the file or folder to read.
        to: name of the format to write; may be left out where ``runtime`` decides it.
        source: name of the format to read; detected if left out.
        hints: what the files do not say.
        portable: fold every scale into B first (see :mod:`lorakit.formats.portable`).
        runtime: shape the adapter for a program (see :mod:`lorakit.formats.runtimes`).

    Raises:
        FormatError: it cannot be read, or nothing of it can be written.
    """
    hints = Hints() if hints is None else hints
    opened = open_source(path)
    form = identify(opened) if source is None else get(source)
    reading = read_with(form, opened, hints)
    return plan_reading(
        reading, source=form.name, to=to, hints=hints, portable=portable, runtime=runtime
    )


def plan_reading(
    reading: Reading,
    *,
    source: str,
    to: str | None = None,
    hints: Hints | None = None,
    portable: bool = False,
    runtime: str | None = None,
) -> Plan:
    """The same for an adapter that was read already; arguments as in :func:`plan`."""
    hints = Hints() if hints is None else hints
    adapter, notes = reading.adapter, list(reading.notes)
    if runtime is not None:
        from lorakit.formats.runtimes import shape_for

        adapter, to, said = shape_for(runtime, adapter, to, hints)
        notes += said
    elif portable:
        from lorakit.formats.portable import fold, one_rank

        # PEFT's config says rank and alpha once; what differs needs patterns, which some skip
        adapter, said = fold(adapter, rank=one_rank(adapter) if to == "peft" else None)
        notes += said
    if to is None:
        raise FormatError(f"no format to write is given; there are {', '.join(writable())}")
    target = get(to)
    if to in READ_ONLY:
        raise FormatError(
            f"{target.title} is read and not written; the formats that are written are "
            + ", ".join(writable())
        )
    written = target.write(adapter, hints)
    return Plan(
        source=source,
        target=target,
        adapter=adapter,
        files=written.files,
        notes=(*notes, *written.notes),
        lost={**reading.lost, **written.lost},
    )


def check_nothing_lost(plan: Plan) -> None:
    """Refuse a plan that would drop something.

    Raises:
        FormatError: lists every key and setting that would not be carried over, and why.
    """
    if plan.lost:
        raise FormatError(
            collected(
                f"The format {plan.target.name} does not take all of this adapter",
                (f"{name}: {why}" for name, why in plan.lost.items()),
                limit=1000,
            )
            + "\nNothing was written. Allow the loss (--allow-loss, allow_loss=True), or choose a "
            "format that holds it."
        )


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str | None = None,
    source: str | None = None,
    hints: Hints | None = None,
    portable: bool = False,
    runtime: str | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Read an adapter in one format and write it in another; the same input gives the same bytes.

    Args:
        allow_loss: write although something is not carried over; see the plan's ``lost``.
        overwrite: replace what lies at ``out``.

    Raises:
        FormatError: it cannot be read or written, or something would be lost. Nothing is written.
    """
    planned = plan(path, to=to, source=source, hints=hints, portable=portable, runtime=runtime)
    if not allow_loss:
        check_nothing_lost(planned)
    planned.write(out, overwrite=overwrite)
    return planned


def _write_folder(path: Path, files: Mapping[str, Content], *, overwrite: bool) -> None:
    """A new folder by one rename, or one that changes places with what this format wrote."""
    if path.exists() and not path.is_dir():
        raise FormatError(f"{path} is a file. Give the path of a folder.")
    there = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    tops = {Path(name).parts[0] for name in files}
    foreign = [name for name in there if name not in tops]
    if there and (foreign or not overwrite):
        what = ", ".join((foreign or there)[:4])
        raise FormatError(
            f"{path} is not empty; it holds {what}. Give a new folder"
            + ("." if foreign else ", or overwrite=True (--overwrite).")
        )
    with clear_disk_errors(path), atomic_folder(path) as temporary:
        for name, content in files.items():
            inside = temporary / name
            inside.parent.mkdir(parents=True, exist_ok=True)
            _write(inside, content)


def _write(path: Path, content: Content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
