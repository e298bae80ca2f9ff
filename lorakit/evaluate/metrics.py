"""Generated texts against references: how good they are, in numbers from 0 to 100.

======== ============================ ===========================================================
asked    gives                        what it is
======== ============================ ===========================================================
bleu     ``bleu``                     sacrebleu's corpus BLEU, all references, its own tokenizer
chrf     ``chrf``                     sacrebleu's corpus chrF2, all references
rouge    ``rouge``                    ROUGE-L F1 of lowercased words, the best reference of each,
                                      mean; where no spaces are written, of characters
exact    ``exact``                    share that equals a reference, outer white space aside
json     ``json_valid``               share that is JSON as a whole
         ``json_fields``              share of the references' fields that are there and right
         ``json_record``              share whose whole value equals a reference's
======== ============================ ===========================================================
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorakit.errors import InputError, collected
from lorakit.optional import require

METRICS = ("bleu", "chrf", "rouge", "exact", "json")


def text_metrics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    which: Sequence[str] = METRICS,
) -> dict[str, float]:
    """Compare each prediction with its references.

    Args:
        predictions: one text an item.
        references: the right answers of each item, at least one.
        which: names out of ``METRICS``.

    Returns:
        The values of the table above, from 0 to 100.

    Raises:
        InputError: unknown names, lengths that differ, an item without reference, or, for
            ``json``, a reference that is not JSON; all are listed.
        MissingDependencyError: the package of a metric is not installed.
    """
    problems = [f"{name!r} is no metric; expected {', '.join(METRICS)}" for name in which
                if name not in METRICS]  # fmt: skip
    if len(predictions) != len(references):
        problems.append(f"{len(predictions)} predictions for {len(references)} items")
    if not references:
        problems.append("there is no item")
    problems += [f"item {i + 1} has no reference" for i, r in enumerate(references) if not r]
    if isinstance(which, str):
        problems = [f"which is {which!r}; give a list of names"]
    if problems:
        raise InputError(collected("These texts cannot be judged", problems))
    found: dict[str, float] = {}
    for name in dict.fromkeys(which):
        found.update(_KINDS[name](predictions, references))
    return {name: min(value, 100.0) for name, value in found.items()}  # 100.00000000000004


def _bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    sacrebleu = require("sacrebleu", extra="train", purpose="BLEU")
    return {"bleu": float(sacrebleu.corpus_bleu(list(predictions), _streams(references)).score)}


def _chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    sacrebleu = require("sacrebleu", extra="train", purpose="chrF")
    return {"chrf": float(sacrebleu.corpus_chrf(list(predictions), _streams(references)).score)}


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The k-th references of all items, for each k; ``None`` where an item has fewer."""
    most = max(map(len, references))
    return [[r[k] if k < len(r) else None for r in references] for k in range(most)]


def _rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    rouge = require("rouge_score.rouge_scorer", extra="train", purpose="ROUGE-L")
    scorer = rouge.RougeScorer(["rougeL"], tokenizer=_Words())
    best = [
        max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in these)
        for prediction, these in zip(predictions, references, strict=True)
    ]
    return {"rouge": 100.0 * sum(best) / len(best)}


class _Words:
    """The words of any script, for ``rouge_score``, whose own tokenizer knows a to z and 0 to 9
    alone; of text in these the two give the same."""

    #: Thai to Tibetan, Burmese, Khmer, kana, and Chinese characters: no spaces between words
    _unspaced = re.compile(
        "([\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff"
        "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd])"
    )

    def tokenize(self, text: str) -> list[str]:
        # marks too: vowels of Hindi are no letters, and would split its words
        kept = "".join(
            char if unicodedata.category(char)[0] in "LMN" else " "
            for char in unicodedata.normalize("NFKC", text).lower()
        )
        return self._unspaced.sub(r" \1 ", kept).split()


def _exact(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    right = [
        prediction.strip() in {reference.strip() for reference in these}
        for prediction, these in zip(predictions, references, strict=True)
    ]
    return {"exact": 100.0 * sum(right) / len(right)}


# --- JSON ------------------------------------------------------------------------------------

_INVALID = object()


def _json(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    parsed = [[_parsed(reference) for reference in these] for these in references]
    problems = [
        f"item {i + 1}: {references[i][k][:80]!r}"
        for i, these in enumerate(parsed)
        for k, value in enumerate(these)
        if value is _INVALID
    ]
    if problems:
        raise InputError(
            collected("json compares records, and these references are no JSON", problems, limit=5)
            + "\nLeave json out of the metrics, or give JSON completions."
        )
    valid = right = records = fields = 0
    for prediction, these in zip(predictions, parsed, strict=True):
        value = _parsed(prediction)
        wanted = [dict(_leaves(reference)) for reference in these]
        got = {} if value is _INVALID else dict(_leaves(value))
        # the reference that is met best; an item counts as many fields as that one has
        best = max(wanted, key=lambda leaves: _matches(leaves, got) / len(leaves))
        valid += value is not _INVALID
        right += _matches(best, got)
        fields += len(best)
        records += any(got == leaves for leaves in wanted)
    return {
        "json_valid": 100.0 * valid / len(predictions),
        "json_fields": 100.0 * right / fields,
        "json_record": 100.0 * records / len(predictions),
    }


def _parsed(text: str) -> Any:
    """The value that a text is; ``_INVALID`` if it is not JSON as a whole."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _INVALID


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is Python's, not JSON's")


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Path → value of every field; an empty object or list is a field itself.

    Values carry their kind, so that ``true`` is not 1 (but 1 is 1.0: JSON has one number).
    """
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, i))
    else:
        kind = "number" if type(value) in (int, float) else type(value).__name__
        yield path, (kind, repr(value) if isinstance(value, (dict, list)) else value)


def _matches(wanted: Mapping[Any, Any], got: Mapping[Any, Any]) -> int:
    return sum(path in got and got[path] == value for path, value in wanted.items())


_KINDS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
    "exact": _exact,
    "json": _json,
}
