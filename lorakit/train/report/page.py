"""The page: its frame, its head, and the order of its parts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.core.files import write_atomic
from lorakit.train.record import Record, is_finite, read_run
from lorakit.train.report import change, course, pictures, samples, tables, use
from lorakit.train.report.blocks import framed
from lorakit.train.report.charts import label, smooth
from lorakit.train.report.markup import Html, escape, fill, join
from lorakit.train.report.words import (
    base_ref,
    bytes_text,
    count_text,
    duration_text,
    loss_text,
    megabytes_text,
    perplexity,
    perplexity_text,
    short_count,
    starting_point,
)


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder from what the folder holds.

    Returns:
        The file's path.

    Raises:
        InputError: there is no run in the folder, or it cannot be written to.
        TrainingError: the disk is full.
    """
    path = Path(run_folder)
    page = render(read_run(path))
    write_atomic(path / "report.html", page.encode("utf-8"))
    return path / "report.html"


def render(record: Record) -> Html:
    """The whole page."""
    parts = [
        _tiles(record),
        course.losses(record),
        samples.samples(record),
        pictures.sheets(record),
        change.change(record),
        tables.data(record),
        course.course(record),
        use.use(record),
        tables.settings(record),
        tables.machine(record),
        tables.notes(record),
    ]
    return framed(
        _title(record), _lead(record), parts, kind="LoRA training report", source="the run folder"
    )


def _title(record: Record) -> str:
    return record.folder.resolve().name or "run"


def _base_name(record: Record) -> str:
    ref = base_ref(record)
    if ref is None:
        return "the base"
    return Path(ref).name if os.path.isabs(ref) else ref


def _lead(record: Record) -> Html:
    num_steps = int(record.steps[-1]["step"]) if record.steps else 0
    first = fill(
        "{what} {base}, trained for {steps} step{s}{time}{rows}.",
        what="All weights of" if record.is_full else "An adapter for",
        base=_base_name(record),
        steps=count_text(num_steps),
        s="" if num_steps == 1 else "s",
        time=f" in {duration_text(record.seconds)}" if record.seconds else "",
        rows=_rows_text(record),
    )
    if not record.steps:
        first = fill("A run on {base} that has made no step yet.", base=_base_name(record))
    return join([first, " ", _outcome(record)])


def _rows_text(record: Record) -> str:
    used: Any = record.facts["data_report"].get("used")
    if not is_finite(used):
        return ""
    held: Any = record.at("train", "validation_fraction")
    share = f", {held:.0%} of them held out" if is_finite(held) and held else ""
    return f" on {count_text(used)} rows{share}"


def _outcome(record: Record) -> Html:
    best, start = record.best, record.start_eval
    if best is None:
        _, losses = record.series("loss")
        if len(losses) < 2:
            return Html("")
        return fill(
            "There was no validation; the training loss went from <b>{a} to {b}</b>.",
            a=loss_text(losses[0]),
            b=loss_text(smooth(list(enumerate(losses)))[-1][1]),
        )
    if start is None or not is_finite(start.get("loss")):
        return fill(
            "Its lowest validation loss is <b>{loss}</b>, at step {step}.",
            loss=loss_text(best["loss"]),
            step=count_text(best["step"]),
        )
    if best["step"] == 0:
        return fill(
            "No evaluation was below that of {before}, <b>{loss}</b>: this run did not help.",
            before=starting_point(record),
            loss=loss_text(start["loss"]),
        )
    if "perplexity" not in best:  # no text
        return fill(
            "On what was held out the loss fell from <b>{a} to {b}</b> (best at step {step}).",
            a=loss_text(start["loss"]),
            b=loss_text(best["loss"]),
            step=count_text(best["step"]),
        )
    fewer = 1 - math.exp(float(best["loss"]) - float(start["loss"]))
    return fill(
        "On held-out text the loss fell from <b>{a} to {b}</b> (best at step {step}): each next "
        "token is on average {times} times as likely as under {before}.",
        a=loss_text(start["loss"]),
        b=loss_text(best["loss"]),
        step=count_text(best["step"]),
        times=label(1 / max(1e-12, 1 - fewer)),
        before=starting_point(record),
    )


def _tiles(record: Record) -> Html:
    tiles = []
    best, start = record.best, record.start_eval
    if best is not None:
        is_known = start is not None and start is not best and is_finite(start.get("loss"))
        before = start if is_known else None
        tiles.append(_tile_of("Validation loss", before, best, "loss", f"step {best['step']}"))
        if "perplexity" in best:  # of text alone
            new = {**best, "perplexity": perplexity(best["loss"])}
            old = {**before, "perplexity": perplexity(before["loss"])} if before else None
            tiles.append(_tile_of("Perplexity", old, new, "perplexity", "exp of the loss"))
    if record.adapter is not None:
        adapter = record.adapter
        ranks = sorted({site.rank for site in adapter.low_rank.values()})
        rank = "–".join(map(str, [ranks[0], ranks[-1]][: len(ranks)])) if ranks else ""
        tiles.append(
            _tile(
                "Adapter",
                escape(bytes_text(adapter.num_bytes)),
                f"{short_count(adapter.num_parameters)} parameters"
                + (f", rank {rank}" if rank else ""),
            )
        )
    if record.steps:
        tokens = record.total("tokens")
        pace = (
            f"{count_text(tokens / record.train_seconds)} a second" if record.train_seconds else ""
        )
        tiles.append(_tile("Tokens", escape(short_count(tokens)), pace))
        memory = max((float(r["rss_mb"]) for r in record.steps if is_finite(r.get("rss_mb"))),
                     default=None)  # fmt: skip
        vram = max((float(r["vram_mb"]) for r in record.steps if is_finite(r.get("vram_mb"))),
                   default=None)  # fmt: skip
        where = record.at("base", "device") or ""
        if vram is not None:
            tiles.append(_tile("Peak GPU memory", escape(megabytes_text(vram)), str(where)))
        elif memory is not None:
            tiles.append(_tile("Peak memory", escape(megabytes_text(memory)), str(where)))
    return fill('<div class="tiles">{tiles}</div>', tiles=join(tiles)) if tiles else Html("")


def _tile(name: str, number: Html, more: str) -> Html:
    return fill(
        '<div class="tile"><div class="name">{name}</div><div class="number">{number}</div>'
        '<div class="more">{more}</div></div>',
        name=name,
        number=number,
        more=more,
    )


def _tile_of(
    name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any], key: str, more: str
) -> Html:
    show = loss_text if key == "loss" else perplexity_text
    number = escape(show(float(new[key])))
    if old is not None and is_finite(old.get(key)):
        number = fill(
            '<span class="from">{old} →</span> {new}', old=show(float(old[key])), new=number
        )
    return _tile(name, number, more)
