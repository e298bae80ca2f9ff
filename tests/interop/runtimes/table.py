"""The page ``docs/interop.md``, made of the results of every check's last run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.interop.runtimes.__main__ import Result

HEAD = """\
# Our files in other programs

Written by `make interop`, which installs each runtime into an environment of its own and compares
numbers, not text: the logits or log-probabilities of a runtime with our adapter file beside those
of transformers and PEFT with the same adapter, in float32 on a CPU. Adapters are random, of rank
around 8 over all linear layers of SmolLM2-135M, and move the logits by more than 1. The trainers
(litgpt, loralib, LyCORIS, sd-scripts, torchtune) work on tiny random models. A
*negative* is a case that has to be far off (30 times the bar at least): it shows that the check
would notice.

A check needs gigabytes and minutes, so the default tests hold only PEFT, mistral.rs and diffusers.
`make interop ARGS="xllamacpp mlx"` runs some of them; `LORAKIT_INTEROP=/some/folder` says where
environments are kept (`.interop/` by default). It exits with 0 if all passed, 1 if something
failed, 3 if something could not be installed and the rest passed. sd-scripts is in no index:
`SD_SCRIPTS` names a folder that has it, or the two files of it that are used here are downloaded
at a pinned commit.
"""


def page(results: list[Result], guides: list[str]) -> str:
    """The whole page; ``guides`` are the names of the files in ``docs/runtimes``."""
    links = ", ".join(f"[{name.removesuffix('.md')}](runtimes/{name})" for name in guides)
    parts = [HEAD, f"How to load an adapter there: {links}.\n", _overview(results)]
    parts += [_details(result) for result in results if result.cases or result.status != "ran"]
    return "\n".join(parts)


def _overview(results: list[Result]) -> str:
    rows = [
        "| check | installed | size | ran | largest difference | bar | cases | negatives |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        positive = [case for case in result.cases if not case["negative"]]
        negative = [case for case in result.cases if case["negative"]]
        measured = [c for c in positive if c["largest_difference"] is not None]
        worst = max(measured, key=_share, default=None)
        size = f"{result.megabytes} MB" if result.megabytes else "–"
        if result.status == "not run":
            ran = "not run"
        else:
            ran = f"{result.date}, {result.seconds} s"
        installed = ", ".join(result.requires[:2])
        rows.append(
            f"| [{result.name}](#{result.name}) | {installed} | {size} | {ran} "
            f"| {_number(worst)} | {'–' if worst is None else _bar(worst)} "
            f"| {_passed(positive)} | {_passed(negative)} |"
        )
    return "\n".join(rows) + "\n"


def _details(result: Result) -> str:
    lines = [f"## {result.name}", ""]
    if result.status != "ran":
        lines += [f"**{result.status}**: {result.why}", ""]
    if result.cases:
        lines += ["| case | expected | seen | |", "|---|---|---|---|"]
        lines += [_row(case) for case in result.cases]
        lines.append("")
    return "\n".join(lines)


def _row(case: dict[str, Any]) -> str:
    name = case["case"].replace("|", "\\|")
    if case["largest_difference"] is None:
        expected = case["unit"] if case["unit"] != "fact" else "true"
        seen = case["note"].replace("|", "\\|") or ("yes" if case["passed"] else "no")
    else:
        sign = "≫" if case["negative"] else "≤"
        expected = f"{sign} {_bar(case)} {case['unit']}"
        seen = _number(case)
    return f"| {name} | {expected} | {seen} | {'passed' if case['passed'] else '**failed**'} |"


def _share(case: dict[str, Any]) -> float:
    return float(case["largest_difference"]) / float(case["bar"] or 1e-300)


def _number(case: dict[str, Any] | None) -> str:
    return "–" if case is None else f"{case['largest_difference']:.2g}"


def _bar(case: dict[str, Any]) -> str:
    return f"{case['bar']:.2g}"


def _passed(cases: list[dict[str, Any]]) -> str:
    return f"{sum(case['passed'] for case in cases)} of {len(cases)}" if cases else "–"
