"""What a search leaves for people and programs: the table, ``tune.json`` and ``report.html``."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.core.files import write_atomic
from lorakit.errors import MissingDependencyError
from lorakit.train.origin import plain, spec_to_dict
from lorakit.train.report.blocks import framed
from lorakit.train.report.markup import Html, fill, join
from lorakit.workflows.tuning.folder import TuneFolder
from lorakit.workflows.tuning.plot import plot_search
from lorakit.workflows.tuning.space import Space, shown, space_to_dict
from lorakit.workflows.tuning.table import Candidate, difference

if TYPE_CHECKING:
    from lorakit.workflows.tune import TuneResult


def table(
    candidates: Sequence[Candidate], chosen: int, steps: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of all candidates, those that went farthest first.

    Args:
        steps: of the rungs, the last of which is the end.
    """
    taken = candidates[chosen]
    names = list(taken.values)
    heads = ["", *names, *(f"after {step}" for step in steps), "behind the chosen", ""]
    order = sorted(candidates, key=lambda c: (-c.steps, _last(c), c.number))
    return heads, [
        [
            str(c.number),
            *(shown(c.values[name]) for name in names),
            *(_at(c, step) for step in steps),
            _behind(c, taken),
            _ended(c, chosen),
        ]
        for c in order
    ]


def _last(candidate: Candidate) -> float:
    best = candidate.best()
    return float("inf") if best is None else best.mean


def _at(candidate: Candidate, step: int) -> str:
    if step not in candidate.losses:
        return ""
    losses = candidate.losses[step]
    return f"{losses.mean:.4f}" if losses.finite else "not finite"


def _behind(candidate: Candidate, taken: Candidate) -> str:
    """The paired difference at the last step that both have."""
    step = max(set(candidate.losses) & set(taken.losses), default=0)
    losses = candidate.best(step), taken.best(step)
    if candidate is taken or losses[0] is None or losses[1] is None:
        return ""
    apart = difference(losses[0], losses[1])
    return f"{apart.mean:+.4f} ± {apart.error:.4f}"


def _ended(candidate: Candidate, chosen: int) -> str:
    words = {
        "finished": "trained out",
        "left": f"left at {candidate.steps}" if candidate.steps else "not begun",
        "failed": "failed",
        "waiting": "",
    }[candidate.end]
    if candidate.number == chosen:
        words = f"chosen, {words}"
    return f"{words} (the defaults)" if candidate.default else words


def result_to_dict(result: TuneResult, space: Space, steps: Sequence[int]) -> dict[str, Any]:
    """Plain data, as ``tune.json`` and ``--json`` hold it."""
    data: dict[str, Any] = plain(
        {
            "out": str(result.out),
            "adapter": str(result.adapter),
            "run": str(result.run),
            "chosen": result.choice.number,
            "values": dict(result.candidates[result.choice.number].values),
            "equals": list(result.choice.equals),
            "reasons": [reason.to_dict() for reason in result.choice.reasons],
            "space": space_to_dict(space),
            "rungs": list(steps),
            "seconds": result.seconds,
            "lora": spec_to_dict(result.spec),
            "train": result.settings.to_dict(),
            "candidates": [_candidate_to_dict(c) for c in result.candidates],
        }
    )
    return data


def _candidate_to_dict(candidate: Candidate) -> dict[str, Any]:
    kept = candidate.kept
    return {
        "number": candidate.number,
        "values": dict(candidate.values),
        "lr": candidate.lr,
        "rank": candidate.rank,
        "parameters": candidate.parameters,
        "end": candidate.end,
        "reason": candidate.reason,
        "steps": candidate.steps,
        "losses": {step: losses.mean for step, losses in sorted(candidate.losses.items())},
        "best_loss": None if kept is None else kept.mean,
    }


# --- pages -------------------------------------------------------------------------------------


def write_pages(
    folder: TuneFolder, result: TuneResult, space: Space, steps: Sequence[int]
) -> list[str]:
    """Write ``tune.png`` and ``report.html``; a sentence on what could not be made."""
    notes = []
    try:
        plot_search(result.candidates, result.choice.number, steps, folder.plot)
    except MissingDependencyError as error:
        notes.append(f"tune.png is not made: {error}")
    write_atomic(folder.report, render(folder, result, space, steps).encode("utf-8"))
    return notes


def render(folder: TuneFolder, result: TuneResult, space: Space, steps: Sequence[int]) -> Html:
    """The page on a search."""
    first, *others = result.choice.reasons
    parts = [
        fill("<section><h2>Why</h2><ul>{lines}</ul></section>", lines=_lines(others)),
        _picture(folder),
        _table(result, steps),
        fill(
            "<section><h2>What was searched</h2><table>{rows}</table></section>",
            rows=join(
                fill("<tr><td>{name}</td><td>{one}</td></tr>", name=name, one=str(one))
                for name, one in space.items()
            ),
        ),
    ]
    return framed(
        folder.path.name or "tune",
        first.text,
        parts,
        kind="LoRA settings, searched",
        source="the folder of the search",
    )


def _lines(reasons: Sequence[Any]) -> Html:
    return join(fill("<li>{text}</li>", text=reason.text) for reason in reasons)


def _picture(folder: TuneFolder) -> Html:
    if not folder.plot.is_file():
        return Html("")
    data = base64.b64encode(folder.plot.read_bytes()).decode()
    return fill(
        '<section><h2>Loss against rate</h2><img alt="loss of every candidate against its '
        'learning rate" style="max-width:100%" src="data:image/png;base64,{data}"></section>',
        data=data,
    )


def _table(result: TuneResult, steps: Sequence[int]) -> Html:
    heads, rows = table(result.candidates, result.choice.number, steps)

    def cells(tag: str, texts: Sequence[str]) -> Html:
        return join(fill(f"<{tag}>{{text}}</{tag}>", text=text) for text in texts)

    return fill(
        '<section><h2>Every candidate</h2><div style="overflow-x:auto"><table><thead><tr>{heads}'
        "</tr></thead><tbody>{rows}</tbody></table></div></section>",
        heads=cells("th", heads),
        rows=join(fill("<tr>{cells}</tr>", cells=cells("td", row)) for row in rows),
    )


def settings_of(values: Mapping[str, Any]) -> str:
    """The flags of ``lorakit train`` that say these values."""
    flags = []
    for name, value in values.items():
        if name == "alpha/r":
            continue
        text = " ".join(str(value).split("+")) if name == "targets" else shown(value)
        flags.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(flags)
