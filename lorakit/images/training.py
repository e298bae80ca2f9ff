"""A run on pictures: the same trainer, loop and run folder as of language models, and the sheets.

::

    base = load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5")
    plan = PicturesPlan(PicturesSpec("photos", trigger="sks style"))
    trainer = picture_trainer(base, plan, LoRASpec(targets=picture_targets(base, "attention")),
                              TrainSettings(steps=500), "runs/style")
    (result,) = train_pictures([trainer])

Beside what every run folder holds there are sheets of pictures in ``samples/``, with the same
prompts and seeds each time: of the base at the start, every so many steps, and of the adapter that
is kept. They are a function of the weights, so a run that was killed and goes on makes the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.core.adapter import Adapter
from lorakit.core.files import write_atomic
from lorakit.core.spec import LoRASpec
from lorakit.errors import InputError
from lorakit.formats import load_adapter
from lorakit.images.base import PictureBase, load_pipeline
from lorakit.images.data import NOTHING, PictureData, PicturesPlan, Read, load_pictures
from lorakit.images.drawing import Cell, check_cells, draw
from lorakit.images.sheets import png, sheet
from lorakit.images.task import PICTURES
from lorakit.layers import Handle, attach
from lorakit.layers.handle import handle_of
from lorakit.train import Callback, Origin, RunInfo, RunResult, StepMetrics, Trainer, TrainSettings
from lorakit.train.folder import RunFolder
from lorakit.train.report import write_report
from lorakit.train.result import finished_run
from lorakit.train.settings import LEAST_TO_HOLD_OUT
from lorakit.train.together import aligned, train_together

logger = logging.getLogger(__name__)

#: a rate that is usual for adapters of picture models
LEARNING_RATE = 1e-4
#: captions of the data that are drawn where nobody said which
_PROMPTS = 4
FOLDER = "samples"
FINAL = "kept.png"


@dataclass(frozen=True)
class Sheets:
    """What is drawn while a run trains."""

    prompts: tuple[str, ...] = ()
    """Empty: some captions of the data."""
    seeds: tuple[int, ...] = (0, 1)
    every: int | None = None
    """Steps between two sheets; ``None``: a quarter of the run's. 0: only at the start and the
    end."""
    steps: int = 20
    """Denoising steps of each picture."""
    guidance: float | None = None
    negative: str | None = None
    resolution: int | None = None
    """Side of each picture; ``None``: as it is trained."""
    off: bool = False
    """Whether none are made."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sheets:
        """The inverse of ``asdict``."""
        lists = {name: tuple(values[name]) for name in ("prompts", "seeds")}
        return cls(**{**values, **lists})

    def cells(self, mix: str | None) -> list[Cell]:
        """Row by row: prompts, and seeds beside one another."""
        return [
            Cell(
                prompt,
                self.negative,
                seed,
                mix,
                self.steps,
                self.guidance,
                self.resolution,
                self.resolution,
            )
            for prompt in self.prompts
            for seed in self.seeds
        ]


def picture_trainer(
    base: PictureBase,
    plan: PicturesPlan,
    what: LoRASpec | Adapter,
    settings: TrainSettings,
    out: str,
    *,
    sheets: Sheets | None = None,
    data: PictureData | None = None,
    read: Read = NOTHING,
    validation: PicturesPlan | None = None,
    origin: dict[str, Any] | None = None,
    callbacks: Iterable[Callback] = (),
    allow_other_base: bool = False,
) -> Trainer:
    """A trainer of one adapter on pictures; everything is checked, nothing is written.

    Args:
        data: of ``plan``, where it was loaded already.
        read: folders that were read already.
        origin: arguments of ``load_pipeline`` beside ``ref``, for a resume.

    Raises:
        LorakitError: as of :class:`~lorakit.train.Trainer` and :func:`load_pictures`.
    """
    plan = replace(plan, least=settings.batch_size)
    data = data or load_pictures(plan, base, read)
    held = None if validation is None else load_pictures(validation, base, read)
    notes = []
    if held is None and settings.validation_fraction is None:
        # of the pictures themselves: neither their repetitions nor a class that is to stay count
        fraction = settings.held_out(data.num_pictures)
        settings = replace(settings, validation_fraction=fraction)
        if not fraction:
            notes.append(
                f"{data.num_pictures} pictures are too few to hold some of them out (from "
                f"{LEAST_TO_HOLD_OUT} on); --valid FOLDER or --validation-fraction 0.2 would"
            )
    if settings.lr is None:
        settings = replace(settings, lr=LEARNING_RATE)
        notes.append(f"lr is {LEARNING_RATE:g}: usual for adapters of picture models")
    sheets = _chosen(sheets or Sheets(), data)
    check_cells(base, sheets.cells(None))
    trainer = Trainer(
        base,
        what,
        data,
        settings,
        out,
        validation=held,
        callbacks=[*callbacks, SheetMaker(base, sheets)],
        origin=Origin(
            base={"ref": base.ref, **(origin or {}), "text_length": base.text_length},
            data=plan,
            validation=validation,
            kind=PICTURES,
        ),
        extra={"sheets": asdict(sheets)},
        allow_other_base=allow_other_base,
        task=PICTURES,
    )
    trainer.notes += [*base.notes, *notes]
    return trainer


def _chosen(sheets: Sheets, data: PictureData) -> Sheets:
    """With prompts, and the size that is trained on."""
    if sheets.off:
        return sheets
    return replace(
        sheets,
        prompts=sheets.prompts or tuple(data.captions[:_PROMPTS]),
        resolution=sheets.resolution or data.report.resolution,
    )


def train_pictures(
    trainers: Sequence[Trainer],
    *,
    on_item: Callable[[int, int], None] | None = None,
    max_concurrent: int | None = None,
    on_result: Callable[[Trainer, Any], None] | None = None,
) -> list[RunResult | Exception]:
    """Encode what was not encoded before, train, and draw the last sheets.

    Args:
        trainers: of one base; several share forwards.
        on_item: called while pictures and captions are encoded, with those done and all.
        max_concurrent, on_result: as of ``train_together``.

    Returns:
        Each one's result, or what stopped it.
    """
    for trainer in trainers:
        for data in _data_of(trainer):
            data.fill(on_item)
    found = train_together(
        trainers, max_concurrent=max_concurrent, on_result=on_result, token_budget=None
    )
    for outcome in found:
        if isinstance(outcome, RunResult) and outcome.ending in ("finished", "early stop"):
            finish(outcome, trainers[0].base)  # type: ignore[arg-type]
    return found


def _data_of(trainer: Trainer) -> list[PictureData]:
    both = [trainer.data, trainer.validation[0] if trainer.validation else None]
    found = [data for data in both if isinstance(data, PictureData)]
    return found if len(found) < 2 or found[0] is not found[1] else found[:1]


def resume_pictures(
    out: str,
    *,
    callbacks: Iterable[Callback] = (),
    on_item: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Go on with a run where its last checkpoint is; of a finished one, draw what is missing.

    Raises:
        InputError: there is no run of pictures there.
        LorakitError: as of ``Trainer.resume``.
    """
    told = list(callbacks)
    (result,) = resume_all([out], callbacks=lambda _: told, on_item=on_item)
    if isinstance(result, Exception):
        raise result
    return result


def resume_all(
    outs: Sequence[str],
    *,
    callbacks: Callable[[str], Iterable[Callback]] = lambda out: (),
    on_item: Callable[[int, int], None] | None = None,
) -> list[RunResult | Exception]:
    """:func:`resume_pictures` of runs on one base, which go on together.

    Args:
        callbacks: who is told of the run in a folder.

    Raises:
        InputError: one is no run on pictures, or their bases were loaded in different ways.
    """
    sections = {out: _sections(out) for out in outs}
    bases = [one["base"] for one in sections.values()]
    if any(one != bases[0] for one in bases):
        raise InputError("these runs have different bases; resume them one by one")
    found: dict[str, RunResult | Exception] = {}
    base: PictureBase | None = None
    left = []
    for out in outs:
        done = finished_run(out)
        sheets = Sheets.from_dict(sections[out]["sheets"])
        if done is None:
            left.append(out)
        elif sheets.off or (Path(out) / FOLDER / FINAL).is_file():
            found[out] = done
        else:
            base = base or load_pipeline(**bases[0])
            found[out] = finish(done, base)
    if left:
        base = base or load_pipeline(**bases[0])
        trainers = aligned([_reopened(out, base, sections[out], callbacks(out)) for out in left])
        outcomes = train_pictures(trainers, on_item=on_item)
        where = {trainer.out: outcome for trainer, outcome in zip(trainers, outcomes, strict=True)}
        found |= {out: where[RunFolder(Path(out)).path] for out in left}
    return [found[out] for out in outs]


def _sections(out: str) -> dict[str, Any]:
    folder = RunFolder(Path(out))
    sections = folder.read_settings()
    if (sections.get("task") or {}).get("name") != PICTURES.name or "sheets" not in sections:
        raise InputError(
            f"{folder.path} is no run on pictures. Go on with it: lorakit train --resume {out}"
        )
    return sections


def _reopened(
    out: str, base: PictureBase, sections: dict[str, Any], callbacks: Iterable[Callback]
) -> Trainer:
    origin = Origin.from_dict(sections, PICTURES)
    return Trainer.reopened(
        out,
        base=base,
        data=origin.load_data(base),
        validation=origin.load_validation(base),
        callbacks=[*callbacks, SheetMaker(base, Sheets.from_dict(sections["sheets"]))],
        task=PICTURES,
    )


# --- sheets --------------------------------------------------------------------------------------


class SheetMaker(Callback):
    """Draws the base at the start, and the adapter every so many steps.

    A sheet that fails is the last one of its run, which goes on.
    """

    name = "sheets"

    def __init__(self, base: PictureBase, sheets: Sheets) -> None:
        self._base, self._sheets = base, sheets
        self._out: Path | None = None
        self._adapter: str | None = None
        self._every = 0

    def on_start(self, run: RunInfo) -> None:
        """Draw the base, unless that was done."""
        self._out, self._adapter = run.out, run.adapter
        every = self._sheets.every
        self._every = max(1, run.total_steps // 4) if every is None else every
        path = sheet_path(run.out, 0)
        if not self._sheets.off and not path.is_file():
            title = f"{Path(self._base.ref).name}, before training"
            self._draw(path, None, title, handle_of(self._base.model))

    def on_step(self, metrics: StepMetrics) -> None:
        """Draw the adapter, if it is time."""
        if self._sheets.off or not self._every or metrics.step % self._every:
            return
        assert self._out is not None
        path = sheet_path(self._out, metrics.step)
        self._draw(path, self._adapter, f"step {metrics.step}", handle_of(self._base.model))

    def survives(self, error: Exception) -> bool:
        """Always: what trains needs no sheets."""
        return True

    def _draw(self, path: Path, mix: str | None, title: str, handle: Handle | None) -> None:
        draw_sheet(self._base, handle, self._sheets, mix, path, title)


def sheet_path(out: Path, step: int) -> Path:
    """Where the sheet of a step lies; names sort by step."""
    return out / FOLDER / f"step-{step:08d}.png"


def draw_sheet(
    base: PictureBase, handle: Handle | None, sheets: Sheets, mix: str | None, path: Path,
    title: str,
) -> None:  # fmt: skip
    """Draw and write one sheet."""
    pictures = draw(base, handle, sheets.cells(mix))
    width = len(sheets.seeds)
    rows = [pictures[start : start + width] for start in range(0, len(pictures), width)]
    columns = [f"seed {seed}" for seed in sheets.seeds]
    facts = {"title": title, "base": base.ref, "sheets": asdict(sheets)}
    write_atomic(path, png(sheet(rows, sheets.prompts, columns, title), facts))


def finish(result: RunResult, base: PictureBase) -> RunResult:
    """Draw the adapter that was kept, and write the report once more, with all sheets.

    The adapter is there: neither is worth the run, so that what fails is logged.
    """
    try:
        _draw_kept(result, base)
    except Exception as error:
        logger.warning(
            "the sheet of the adapter that was kept could not be drawn (%s: %s). Try again: "
            "%s --resume %s",
            *(type(error).__name__, error, PICTURES.command, result.out),
        )
    try:
        write_report(result.out)
    except Exception as error:
        logger.warning("report.html could not be written: %s", error)
    return result


def _draw_kept(result: RunResult, base: PictureBase) -> None:
    sheets = Sheets.from_dict(RunFolder(result.out).read_settings()["sheets"])
    if sheets.off or result.adapter is None:
        return
    handle = attach(base.model, load_adapter(result.adapter), "kept", allow_other_base=True)
    try:
        which = result.best_step if result.best_step is not None else result.steps
        title = f"the adapter that was kept (step {which})"
        draw_sheet(base, handle, sheets, "kept", result.out / FOLDER / FINAL, title)
    finally:
        handle.detach()
