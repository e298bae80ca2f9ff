"""``write_report``: one run folder as one page that needs nothing else.

No network, no script, no fonts: markup, one style sheet and inline SVG, light or dark as the
reader's system is. Every text from outside is escaped by ``train.markup``; a part that the folder
does not hold is left out, and the page says so at its end. ``train.record`` reads the folder,
``train.charts`` draws.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lorakit import __version__
from lorakit.core.adapter import Adapter
from lorakit.core.files import write_atomic
from lorakit.core.linalg import effective_rank, singular_values
from lorakit.train import report_pictures
from lorakit.train.charts import (
    Frame,
    Grid,
    Points,
    Series,
    bar_chart,
    heat_map,
    label,
    line_chart,
    padded,
    smooth,
)
from lorakit.train.markup import Html, escape, fill, join
from lorakit.train.record import Record, is_finite, read_run

#: longest text of a sample that is shown, in characters, and compared word by word, in words
_LONGEST_TEXT, _MOST_WORDS = 4000, 800
#: prompts shown, and references of each; more would be a file of answers, and that is samples.jsonl
_MOST_SAMPLES, _MOST_REFERENCES = 12, 4
#: rows of a heat map; above, places that differ only in a number are put together
_MOST_ROWS = 40

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · lorakit</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="eyebrow">LoRA training report</p>
<h1>{title}</h1>
<p class="lead">{lead}</p>
</header>
<main>
{body}
</main>
<footer>Written by lorakit {version} from the run folder; nothing on this page is loaded from
elsewhere.</footer>
</body>
</html>
"""


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
        _loss(record),
        _samples(record),
        report_pictures.sheets(record),
        _change(record),
        _data(record),
        _course(record),
        _use(record),
        _settings(record),
        _machine(record),
        _notes(record),
    ]
    return fill(
        _PAGE,
        title=_title(record),
        style=Html(resources.files("lorakit.train").joinpath("report.css").read_text("utf-8")),
        lead=_lead(record),
        body=join((part for part in parts if part), "\n"),
        version=__version__,
    )


# --- the top -----------------------------------------------------------------------------------


def _title(record: Record) -> str:
    return record.folder.resolve().name or "run"


def _base_ref(record: Record) -> str | None:
    ref = record.at("base", "ref") or record.at("base")
    if isinstance(ref, str):
        return ref
    return record.adapter.base.name if record.adapter and record.adapter.base else None


def _base_name(record: Record) -> str:
    ref = _base_ref(record)
    if ref is None:
        return "the base"
    return Path(ref).name if os.path.isabs(ref) else ref


def _before(record: Record) -> str:
    """What stood before training: the base, or the adapter that the run went on with."""
    return "the starting adapter" if (record.folder / "start").is_dir() else "the base"


def _lead(record: Record) -> Html:
    num_steps = int(record.steps[-1]["step"]) if record.steps else 0
    first = fill(
        "{what} {base}, trained for {steps} step{s}{time}{rows}.",
        what="All weights of" if record.is_full else "An adapter for",
        base=_base_name(record),
        steps=_count(num_steps),
        s="" if num_steps == 1 else "s",
        time=f" in {_duration(record.seconds)}" if record.seconds else "",
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
    return f" on {_count(used)} rows{share}"


def _outcome(record: Record) -> Html:
    best, start = record.best, record.start_eval
    if best is None:
        _, losses = record.series("loss")
        if len(losses) < 2:
            return Html("")
        return fill(
            "There was no validation; the training loss went from <b>{a} to {b}</b>.",
            a=_loss_text(losses[0]),
            b=_loss_text(smooth(list(enumerate(losses)))[-1][1]),
        )
    if start is None or not is_finite(start.get("loss")):
        return fill(
            "Its lowest validation loss is <b>{loss}</b>, at step {step}.",
            loss=_loss_text(best["loss"]),
            step=_count(best["step"]),
        )
    if best["step"] == 0:
        return fill(
            "No evaluation was below that of {before}, <b>{loss}</b>: this run did not help.",
            before=_before(record),
            loss=_loss_text(start["loss"]),
        )
    if "perplexity" not in best:  # no text
        return fill(
            "On what was held out the loss fell from <b>{a} to {b}</b> (best at step {step}).",
            a=_loss_text(start["loss"]),
            b=_loss_text(best["loss"]),
            step=_count(best["step"]),
        )
    fewer = 1 - math.exp(float(best["loss"]) - float(start["loss"]))
    return fill(
        "On held-out text the loss fell from <b>{a} to {b}</b> (best at step {step}): each next "
        "token is on average {times} times as likely as under {before}.",
        a=_loss_text(start["loss"]),
        b=_loss_text(best["loss"]),
        step=_count(best["step"]),
        times=label(1 / max(1e-12, 1 - fewer)),
        before=_before(record),
    )


def _tiles(record: Record) -> Html:
    tiles = []
    best, start = record.best, record.start_eval
    if best is not None:
        is_known = start is not None and start is not best and is_finite(start.get("loss"))
        before = start if is_known else None
        tiles.append(_tile_of("Validation loss", before, best, "loss", f"step {best['step']}"))
        if "perplexity" in best:  # of text alone
            new = {**best, "perplexity": _exp(best["loss"])}
            old = {**before, "perplexity": _exp(before["loss"])} if before else None
            tiles.append(_tile_of("Perplexity", old, new, "perplexity", "exp of the loss"))
    if record.adapter is not None:
        adapter = record.adapter
        ranks = sorted({site.rank for site in adapter.low_rank.values()})
        rank = "–".join(map(str, [ranks[0], ranks[-1]][: len(ranks)])) if ranks else ""
        tiles.append(
            _tile(
                "Adapter",
                escape(_bytes(adapter.num_bytes)),
                f"{_short_count(adapter.num_parameters)} parameters"
                + (f", rank {rank}" if rank else ""),
            )
        )
    if record.steps:
        tokens = record.total("tokens")
        pace = f"{_count(tokens / record.train_seconds)} a second" if record.train_seconds else ""
        tiles.append(_tile("Tokens", escape(_short_count(tokens)), pace))
        memory = max((float(r["rss_mb"]) for r in record.steps if is_finite(r.get("rss_mb"))),
                     default=None)  # fmt: skip
        vram = max((float(r["vram_mb"]) for r in record.steps if is_finite(r.get("vram_mb"))),
                   default=None)  # fmt: skip
        where = record.at("base", "device") or ""
        if vram is not None:
            tiles.append(_tile("Peak GPU memory", escape(_mb(vram)), str(where)))
        elif memory is not None:
            tiles.append(_tile("Peak memory", escape(_mb(memory)), str(where)))
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
    show = _loss_text if key == "loss" else _perplexity_text
    number = escape(show(float(new[key])))
    if old is not None and is_finite(old.get(key)):
        number = fill(
            '<span class="from">{old} →</span> {new}', old=show(float(old[key])), new=number
        )
    return _tile(name, number, more)


# --- curves ------------------------------------------------------------------------------------


def _loss(record: Record) -> Html:
    raw = list(zip(*record.series("loss"), strict=True))
    valid = [(float(r["step"]), float(r["loss"])) for r in record.evals if is_finite(r.get("loss"))]
    if not raw and not valid:
        return Html("")
    smoothed = smooth(raw)
    heights = sorted(y for _, y in raw)
    # one wild step must not flatten everything else
    inner = heights[len(heights) // 50 : len(heights) - len(heights) // 50]
    shown = [*inner, *(y for _, y in smoothed), *(y for _, y in valid)]
    frame = Frame(
        960, 380, (0.0, max(x for x, _ in (*raw, *valid)) or 1.0), padded(min(shown), max(shown))
    )
    start, best = record.start_eval, record.best
    levels = []
    if start is not None and is_finite(start.get("loss")):
        levels.append((float(start["loss"]), f"{_before(record)} {_loss_text(start['loss'])}"))
    ring = None
    if best is not None and best["step"] != 0:
        loss = float(best["loss"])
        ring = (float(best["step"]), loss, f"best {_loss_text(loss)}")
    chart = line_chart(
        "Loss over steps",
        [Series(raw, "raw"), Series(smoothed, "train"), Series(valid, "valid", markers=True)],
        frame,
        levels=levels,
        best=ring,
    )
    cut = sum(not frame.y_range[0] <= y <= frame.y_range[1] for y in heights)
    hint = "Mean negative log-likelihood per supervised token; lower is better. Across: steps."
    if cut:
        one = "1 step lies" if cut == 1 else f"{_count(cut)} steps lie"
        hint += f" {one} outside the frame."
    lost = len(record.steps) - len(raw)
    if lost:
        hint += f" {_count(lost)} step(s) had no finite loss."
    if not valid:
        hint += " There was no validation."
    legend = [("--raw", "training, each step"), ("--train", "training, smoothed")] if raw else []
    legend += [("--valid", "validation")] if valid else []
    return _section("Loss", hint, _legend(legend), _wide(chart))


def _course(record: Record) -> Html:
    charts = []
    for name, title, unit, smoothed in (
        ("lr", "Learning rate", "", False),
        ("tokens_per_second", "Tokens per second", "", True),
        ("grad_norm", "Norm of the gradient, before clipping", "", True),
        ("vram_mb", "GPU memory, GB", "gb", False),
        ("rss_mb", "Memory of the process, GB", "gb", False),
    ):
        points: Points = list(zip(*record.series(name), strict=True))
        if len(points) < 2:
            continue
        if unit == "gb":
            points = [(x, y / 1024) for x, y in points]
        low, high = min(y for _, y in points), max(y for _, y in points)
        # memory and rates mean something against zero; a norm needs its own range
        y_range = padded(0.0 if name != "grad_norm" else low, high)
        frame = Frame(470, 190, (0.0, points[-1][0]), (max(0.0, y_range[0]), y_range[1]))
        lines = [Series(points, "raw"), Series(smooth(points), "other")] if smoothed else []
        chart = line_chart(title, lines or [Series(points, "other")], frame, y_ticks=4)
        charts.append(fill("<div><h3>{title}</h3>{chart}</div>", title=title, chart=chart))
    if not charts:
        return Html("")
    pair = fill('<div class="pair">{charts}</div>', charts=join(charts))
    return _section("Course of the run", "Thin: each step; thick: smoothed.", pair)


def _legend(entries: Sequence[tuple[str, str]]) -> Html:
    return fill(
        '<div class="legend">{entries}</div>',
        entries=join(
            fill('<span><i style="--c:var({color})"></i>{text}</span>', color=color, text=text)
            for color, text in entries
        ),
    )


# --- answers -----------------------------------------------------------------------------------


def _samples(record: Record) -> Html:
    if not record.samples:
        return Html("")
    shown = [_sample(sample) for sample in record.samples[:_MOST_SAMPLES]]
    hint = (
        "The same prompts from the validation part, answered by the base and by "
        f"{'the trained model' if record.is_full else 'the adapter'} "
        "(greedy decoding). Marked words are not in the reference; of several references, each "
        "answer is compared with the nearest."
    )
    if len(record.samples) > _MOST_SAMPLES:
        hint += f" {len(record.samples) - _MOST_SAMPLES} more are in samples.jsonl."
    return _section("Answers", hint, *shown)


def _sample(sample: Mapping[str, Any]) -> Html:
    references = sample.get("reference")
    if not isinstance(references, list):
        references = [] if references is None else [references]
    texts = [_short(str(reference).strip()) for reference in references]
    answers = []
    for name, title in (("base", "Base"), ("adapter", "Adapter"), ("full", "Trained model")):
        if sample.get(name) is not None:
            answers.append(_answer(title, _short(str(sample[name]).strip()), texts))
    first = []
    if texts:
        title = "Reference" if len(texts) == 1 else f"{len(texts)} references"
        more = [f"… and {len(texts) - _MOST_REFERENCES} more"] * (len(texts) > _MOST_REFERENCES)
        first = [_box(title, Html(""), escape("\n\n".join([*texts[:_MOST_REFERENCES], *more])))]
    return fill(
        '<div class="sample"><h3>Prompt</h3><div class="text prompt">{prompt}</div>'
        '<div class="answers">{answers}</div></div>',
        prompt=_prompt(_short(str(sample.get("prompt", "")))),
        answers=join([*first, *answers]),
    )


def _answer(title: str, text: str, references: Sequence[str]) -> Html:
    if not text.strip():
        return _box(title, Html(""), Html('<span class="soft">(no text)</span>'))
    if not references:
        return _box(title, Html(""), escape(text))
    if any(_words(text) == _words(reference) for reference in references):
        note = Html('<b class="equal">equal to the reference</b>')
        return _box(title, note, fill('<span class="same">{text}</span>', text=text))
    best = max(
        (_compared(text, reference) for reference in references), key=lambda compared: compared[0]
    )
    return _box(title, fill("{share} alike", share=f"{best[0]:.0%}"), best[1])


def _box(title: str, note: Html, text: Html) -> Html:
    return fill(
        '<div><h3><span>{title}</span><span>{note}</span></h3><div class="text">{text}</div></div>',
        title=title,
        note=note,
        text=text,
    )


def _prompt(text: str) -> Html:
    """The prompt with the signs of a chat template held back."""
    pieces = re.split(r"(<\|[^<>|]{1,40}\|>)", text)
    return join(
        fill("<span>{piece}</span>", piece=piece) if i % 2 else piece
        for i, piece in enumerate(pieces)
    )


def _compared(text: str, reference: str) -> tuple[float, Html]:
    """How much of both is shared (in words, 0 to 1), and ``text`` with the rest marked."""
    words, wanted = _words(text)[:_MOST_WORDS], _words(reference)[:_MOST_WORDS]
    matcher = difflib.SequenceMatcher(None, words, wanted, autojunk=False)
    spans = [match.span() for match in _WORD.finditer(text)]
    kept: set[int] = set()
    for block in matcher.get_matching_blocks():
        kept.update(range(block.a, block.a + block.size))
    pieces: list[Html] = []
    at, i = 0, 0
    while i < len(words):
        stop = i + 1
        while stop < len(words) and (stop in kept) == (i in kept):
            stop += 1
        start, end = spans[i][0], spans[stop - 1][1]
        pieces.append(escape(text[at:start]))
        template = "{piece}" if i in kept else "<mark>{piece}</mark>"
        pieces.append(fill(template, piece=text[start:end]))
        at, i = end, stop
    pieces.append(escape(text[at:]))
    return matcher.ratio(), join(pieces)


_WORD = re.compile(r"\w+|[^\w\s]")


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _short(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}… ({len(text) - _LONGEST_TEXT:,} more characters)"


# --- the adapter -------------------------------------------------------------------------------


def _change(record: Record) -> Html:
    if record.adapter is None:
        return Html("")
    parts = []
    places = _places(record.adapter)
    if places:
        norms, ranks, hint = _grids(record.adapter, places)
        parts += [
            _map_of("Size of the change, ‖ΔW‖ (Frobenius norm)", norms),
            _map_of("Effective rank of the change", ranks),
            fill('<p class="hint">{hint}</p>', hint=hint),
        ]
    whole = [
        f"{path} ({_count(site.num_parameters)})" for path, site in record.adapter.replaced.items()
    ]
    if whole:
        text = f"Trained whole, parameters in brackets: {_some(whole, 12)}."
        parts.append(fill("<p>{text}</p>", text=text))
    if record.adapter.prefixes:
        text = (
            f"In front of every text stand {record.adapter.num_virtual_tokens} virtual tokens, "
            f"whose keys and values were trained in {len(record.adapter.prefixes)} layers."
        )
        parts.append(fill("<p>{text}</p>", text=text))
    return _section(
        "What changed in the model",
        "Each cell is one adapted weight: a layer across, a kind of module down, the row's mean "
        "at the right. Point at a cell for its number.",
        *parts,
    )


def _map_of(title: str, grid: Grid) -> Html:
    low, high = min(grid.values.values()), max(grid.values.values())
    return fill(
        '<h3>{title}</h3>{map}<div class="legend"><span>{low}<i class="scale"></i>{high}</span>'
        "</div>",
        title=title,
        map=_wide(heat_map(title, grid)),
        low=label(low),
        high=label(high),
    )


def _places(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Path → (row, column): what kind of module it is, and in which layer.

    The layer is the first number in the path. What stands before it is named only if there are
    several such places (an encoder and a decoder).
    """
    split = {}
    for path in adapter.low_rank:
        names = path.split(".")
        at = next((i for i, name in enumerate(names) if name.isdigit()), None)
        if at is None:
            split[path] = ("", path, "–")
        else:
            split[path] = (".".join(names[:at]), ".".join(names[at + 1 :]), names[at])
    numbered = {stack for stack, _, layer in split.values() if layer != "–"}
    places = {}
    for path, (stack, kind, layer) in split.items():
        names = [stack if len(numbered) > 1 or not kind else "", kind]
        places[path] = (" · ".join(name for name in names if name) or path, layer)
    if len({row for row, _ in places.values()}) > _MOST_ROWS:
        places = {p: (re.sub(r"\d+", "*", row), layer) for p, (row, layer) in places.items()}
    return places


def _grids(adapter: Adapter, places: Mapping[str, tuple[str, str]]) -> tuple[Grid, Grid, str]:
    """Norms and effective ranks by place, and a sentence about both."""
    rows = list(dict.fromkeys(row for row, _ in places.values()))
    hidden = rows[_MOST_ROWS:]
    rows = rows[:_MOST_ROWS]
    layers = {layer for row, layer in places.values() if row in set(rows)}
    columns = sorted(
        layers, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
    )
    norms: dict[tuple[str, str], list[float]] = {}
    ranks: dict[tuple[str, str], list[float]] = {}
    with _one_thread():
        for path, place in places.items():
            if place[0] not in hidden:
                values = singular_values(adapter.low_rank[path])
                norms.setdefault(place, []).append(float(values.square().sum().sqrt()))
                ranks.setdefault(place, []).append(effective_rank(values))
    spec_ranks = Counter(site.rank for site in adapter.low_rank.values())
    settings = ", ".join(f"{rank}" for rank in sorted(spec_ranks))
    hint = (
        f"{_count(len(places))} adapted weights of rank {settings}. The effective rank is the "
        "exponential of the entropy of the singular values: how many directions really carry the "
        "change. Near the full rank, a higher one may help; far below, a lower one would do."
    )
    shared = max(map(len, norms.values()))
    if shared > 1:
        hint += f" A cell holds the mean of up to {shared} weights whose paths differ in a number."
    if hidden:
        hint += f" {len(hidden)} more kinds of modules are not drawn."

    def grid(found: dict[tuple[str, str], list[float]], what: str) -> Grid:
        means = {place: sum(v) / len(v) for place, v in found.items()}
        titles = {
            (row, column): f"layer {column}, {row}: {what} {label(mean)}"
            for (row, column), mean in means.items()
        }
        return Grid(tuple(rows), tuple(columns), means, titles)

    return grid(norms, "‖ΔW‖"), grid(ranks, "effective rank"), hint


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Rank-sized matrices: on a busy machine, threads that wait for each other cost fifty times
    the work (210 sites with rank 16 and two threads: 5 s against 0.1 s)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- data, settings, machine -------------------------------------------------------------------


def _data(record: Record) -> Html:
    report = record.facts["data_report"]
    if not report:
        return Html("")
    parts = []
    tokens, supervised = report.get("tokens"), report.get("supervised_tokens")
    if is_finite(tokens) and is_finite(supervised) and tokens:
        share = supervised / tokens
        parts.append(
            fill(
                "<h3>Supervised: {share} of {tokens} tokens</h3>"
                '<div class="meter"><div style="width:{width}%"></div></div>',
                share=f"{share:.1%}",
                tokens=_count(tokens),
                width=f"{100 * min(1.0, max(0.0, share)):.2f}",
            )
        )
    bars = report.get("histogram")
    if isinstance(bars, list) and bars and all(_is_bar(bar) for bar in bars):
        heights = [(str(a), float(n), f"{a}–{b - 1} tokens: {n} examples") for a, b, n in bars]
        frame = Frame(470, 190, (0, 1), (0.0, max(1.0, *(n for _, n, _ in heights)) * 1.06))
        chart = bar_chart("Lengths of the examples", heights, frame)
        parts.append(fill("<h3>Examples by length, in tokens</h3>{chart}", chart=chart))
    dropped = report.get("dropped")
    table = [
        (name, value)
        for name, value in report.items()
        if name not in ("histogram", "dropped", "dropped_rows", "notes", "cuts")
        and value not in (None, "", {}, [])
    ]
    rows = [
        _row(name.replace("_", " "), _count(value) if is_finite(value) else value)
        for name, value in table
    ]
    if isinstance(dropped, Mapping) and dropped:
        rows += [_row("dropped", f"{_shown(n)}: {reason}") for reason, n in dropped.items()]
    else:
        rows.append(_row("dropped", "none"))
    lists = [
        (title, report.get(name))
        for name, title in (
            ("dropped_rows", "First dropped rows"),
            ("cuts", "Truncated"),
            ("notes", "Choices"),
        )
    ]
    for title, lines in lists:
        if isinstance(lines, list) and lines:
            parts.append(fill("<h3>{title}</h3>{list}", title=title, list=_list(lines)))
    pair = fill(
        '<div class="pair"><div><table>{rows}</table></div><div>{parts}</div></div>',
        rows=join(rows),
        parts=join(parts),
    )
    return _section("Data", "", pair, _validation(record))


def _validation(record: Record) -> Html:
    report = record.facts["validation_report"]
    if not report:
        return Html("")
    names = ("files", "rows", "used", "tokens", "supervised_tokens")
    rows = [
        _row(n.replace("_", " "), _count(report[n]) if is_finite(report[n]) else report[n])
        for n in names
        if report.get(n) is not None
    ]
    return fill("<h3>Validation data</h3><table>{rows}</table>", rows=join(rows))


def _is_bar(bar: object) -> bool:
    return isinstance(bar, list | tuple) and len(bar) == 3 and all(is_finite(n) for n in bar)


def _settings(record: Record) -> Html:
    if not record.settings:
        return Html("")
    groups = []
    loose = {k: v for k, v in record.settings.items() if not isinstance(v, Mapping)}
    sections = {k: v for k, v in record.settings.items() if isinstance(v, Mapping) and v}
    for name, values in [*sections.items(), *([("other", loose)] if loose else [])]:
        rows = [_row(key, value) for key, value in _leaves(values).items()]
        groups.append(
            fill("<div><h3>{name}</h3><table>{rows}</table></div>", name=name, rows=join(rows))
        )
    body = fill('<div class="settings">{groups}</div>', groups=join(groups))
    return _section("Settings", "Everything that run.yaml holds, choices resolved.", body)


def _machine(record: Record) -> Html:
    tables = []
    for name, title in (("hardware", "Hardware"), ("versions", "Versions")):
        values = _leaves(record.facts[name])
        if values:
            rows = join(_row(key.replace("_", " "), value) for key, value in values.items())
            tables.append(
                fill("<div><h3>{title}</h3><table>{rows}</table></div>", title=title, rows=rows)
            )
    if not tables:
        return Html("")
    return _section("Machine", "", fill('<div class="pair">{tables}</div>', tables=join(tables)))


def _notes(record: Record) -> Html:
    parts = []
    if record.notes:
        parts.append(fill("<h3>Choices and events</h3>{list}", list=_list(record.notes)))
    missing = list(record.missing)
    if not record.evals:
        missing.append("There was no evaluation, so no validation curve.")
    if not record.samples:
        missing.append("samples.jsonl is not there or empty, so no answers are shown.")
    if missing:
        title = "<h3>What this page could not show</h3>{list}"
        parts.append(fill(title, list=_list(missing)))
    return _section("Notes", "", *parts) if parts else Html("")


# --- using it ----------------------------------------------------------------------------------


def _use_model(record: Record) -> Html:
    ref = _base_ref(record) or "BASE"
    model, run = shlex.quote(str(record.folder / "model")), shlex.quote(str(record.folder))
    shell = (
        f'lorakit generate --base {model} --prompt "…"\n'
        f"lorakit eval --base {shlex.quote(ref)} --full {run} --data test.jsonl --forgetting\n"
        f"lorakit extract --base {shlex.quote(ref)} --tuned {model} --rank 32 --out adapter"
    )
    return _section(
        "Using the model",
        "The folder is a whole model, as transformers saves it. The last line makes an adapter of "
        "its difference to the base.",
        fill("<h3>{title}</h3><pre>{code}</pre>", title="In the shell", code=shell),
    )


def _use(record: Record) -> Html:
    if record.is_full and (record.folder / "model").is_dir():
        return _use_model(record)
    if record.adapter is None:
        return Html("")
    ref = _base_ref(record) or "BASE"
    if report_pictures.is_of_pictures(record):
        return _used("The folder is in PEFT's format.", report_pictures.use(record, ref))
    folder = str(record.folder / "adapter")
    base, adapter = shlex.quote(ref), shlex.quote(folder)
    shell = (
        f'lorakit generate --base {base} --adapter {adapter} --prompt "…"\n'
        f"lorakit eval --base {base} --adapter {adapter} --data test.jsonl --metrics bleu,exact\n"
        f"lorakit inspect {adapter}"
    )
    python = (
        "import lorakit\n\n"
        f"base = lorakit.load_base({ref!r})\n"
        f"handle = lorakit.attach(base.model, lorakit.load_adapter({folder!r}), name='mine')\n"
        "# base.model now answers with the adapter; handle.use(None) is the bare base"
    )
    blocks = [("In the shell", shell), ("In Python", python)]
    hub = _transformers_ref(ref)
    if hub is not None:
        blocks.append(
            (
                "With PEFT, without lorakit",
                "from peft import PeftModel\n"
                "from transformers import AutoModelForCausalLM\n\n"
                f"model = AutoModelForCausalLM.from_pretrained({hub!r})\n"
                f"model = PeftModel.from_pretrained(model, {folder!r})",
            )
        )
    told = "The folder is in PEFT's format: vLLM, diffusers and OpenVINO GenAI read it too."
    return _used(told, blocks)


def _used(told: str, blocks: Iterable[tuple[str, str]]) -> Html:
    return _section(
        "Using the adapter",
        told,
        *(
            fill("<h3>{title}</h3><pre>{code}</pre>", title=title, code=code)
            for title, code in blocks
        ),
    )


def _transformers_ref(ref: str) -> str | None:
    """What transformers would load the same base from; ``None`` for a file of another format."""
    from lorakit.bases.source import ALIASES

    if ref in ALIASES:
        return str(ALIASES[ref].hub_id)
    return None if ref == "BASE" or ref.endswith(".gguf") else ref


# --- pieces ------------------------------------------------------------------------------------


def _section(title: str, hint: str, *parts: Html) -> Html:
    return fill(
        "<section><h2>{title}</h2>{hint}{parts}</section>",
        title=title,
        hint=fill('<p class="hint">{hint}</p>', hint=hint) if hint else Html(""),
        parts=join(parts),
    )


def _wide(content: Html) -> Html:
    return fill('<div class="wide">{content}</div>', content=content)


def _row(name: str, value: object) -> Html:
    return fill("<tr><th>{name}</th><td>{value}</td></tr>", name=name, value=_shown(value))


def _list(lines: Iterable[object]) -> Html:
    return fill("<ul>{items}</ul>", items=join(fill("<li>{line}</li>", line=x) for x in lines))


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _leaves(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(value: object) -> str:
    """A setting as text; whole numbers as one would type them."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    return str(value)


def _some(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _exp(value: float) -> float:
    return math.exp(min(float(value), 700.0))


def _loss_text(value: float) -> str:
    return f"{float(value):.3f}" if abs(value) < 100 else f"{float(value):.4g}"


def _perplexity_text(value: float) -> str:
    return f"{value:.2f}" if value < 100 else label(value)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _short_count(value: float) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return _count(value)


def _bytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def _mb(value: float) -> str:
    return f"{value:.0f} MB" if value < 1000 else f"{value / 1024:.1f} GB"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 90:
        return f"{whole} second{'' if whole == 1 else 's'}"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
