"""What base and adapter answered, beside what was wanted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.train.record import Record
from lorakit.train.report.blocks import section
from lorakit.train.report.markup import Html, escape, fill, join

#: longest text of a sample that is shown, in characters, and compared word by word, in words
_LONGEST_TEXT, _MOST_WORDS = 4000, 800

#: prompts shown, and references of each; more would be a file of answers, and that is samples.jsonl
_MOST_SAMPLES, _MOST_REFERENCES = 12, 4

_WORD = re.compile(r"\w+|[^\w\s]")


def samples(record: Record) -> Html:
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
    return section("Answers", hint, *shown)


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


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _short(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}… ({len(text) - _LONGEST_TEXT:,} more characters)"
