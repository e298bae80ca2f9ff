"""Metrics against the packages called by hand, and against what is plain to see."""

import json
import math

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from lorakit.errors import InputError
from lorakit.evaluate import METRICS, text_metrics

PREDICTIONS = ["The cat sat on the mat.", "a dog", "It rains today, I think."]
REFERENCES = [
    ["The cat is on the mat.", "There is a cat on the mat."],
    ["a dog"],
    ["I think it rains.", "It rains today.", "Rain today, I think."],
]

WORDS = st.lists(st.sampled_from(["red", "blue", "cat", "dog", "."]), min_size=1, max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_bleu_and_chrf_are_sacrebleus_over_all_references(items):
    predictions = [" ".join(p) for p, _ in items]
    references = [[" ".join(r) for r in these] for _, these in items]
    # each item's last reference once more changes neither: best match, closest length
    most = max(map(len, references))
    full = [[(these + [these[-1]] * most)[k] for these in references] for k in range(most)]
    found = text_metrics(predictions, references, ["bleu", "chrf"])
    assert found["bleu"] == pytest.approx(sacrebleu.BLEU().corpus_score(predictions, full).score)
    assert found["chrf"] == pytest.approx(sacrebleu.CHRF().corpus_score(predictions, full).score)


def test_rouge_takes_the_best_reference():
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    best = [
        max(scorer.score(r, p)["rougeL"].fmeasure for r in these)
        for p, these in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    found = text_metrics(PREDICTIONS, REFERENCES, ["rouge"])
    assert found == {"rouge": pytest.approx(100 * sum(best) / 3)}


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("今天下雨", "今天下雨。", 1),
        ("今天下雨", "今天天晴", 0.5),  # two of four characters
        ("Сегодня идёт дождь", "сегодня идёт снег", 2 / 3),
        ("über", "öber", 0),
        ("u\u0308ber", "Über", 1),  # written as two characters, and as one
        ("हिन्दी में", "हिन्दी का", 0.5),  # vowels that are marks stay in their words
        ("snake_case", "case", 2 / 3),
    ],
)
def test_rouge_knows_the_letters_of_other_scripts(prediction, reference, score):
    found = text_metrics([prediction], [[reference]], ["rouge"])
    assert found == {"rouge": pytest.approx(100 * score)}


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_rouge_of_ascii_is_that_of_its_package(prediction, reference):
    theirs = rouge_scorer.RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    found = text_metrics([prediction], [[reference]], ["rouge"])
    assert found == {"rouge": pytest.approx(100 * theirs)}


def test_exact_ignores_outer_white_space_only():
    predictions = [" a dog\n", "A dog", "x"]
    found = text_metrics(predictions, [["cat", "a dog"], ["a dog"], ["x "]], ["exact"])
    assert found == {"exact": pytest.approx(200 / 3)}


@given(st.lists(st.text(), min_size=1), st.lists(st.text(), min_size=1))
def test_a_reference_given_as_the_answer_scores_full(texts, more):
    found = text_metrics(texts, [[text, *more] for text in texts], ["exact"])
    assert found == {"exact": 100.0}


# --- JSON ------------------------------------------------------------------------------------


def judged(prediction, *references):
    return text_metrics([prediction], [list(references)], ["json"])


def scores(valid, fields, record):
    return {
        "json_valid": pytest.approx(valid),
        "json_fields": pytest.approx(fields),
        "json_record": pytest.approx(record),
    }


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1}', (100, 100, 100)),
        ('{"a": 1, "b": "y"}', '{"b": "x", "a": 1}', (100, 50, 0)),
        ('{"a": 1, "c": 2}', '{"a": 1}', (100, 100, 0)),
        ('{"a": 1.0}', '{"a": 1}', (100, 100, 100)),
        ('{"a": true}', '{"a": 1}', (100, 0, 0)),
        ('{"a": "1"}', '{"a": 1}', (100, 0, 0)),
        ('{"a": null}', '{"a": {}}', (100, 0, 0)),
        ("{}", '{"a": null}', (100, 0, 0)),
        ('{"a": {}}', '{"a": {}}', (100, 100, 100)),
        ('{"a": [1, 2, 3]}', '{"a": [1, 3, 3]}', (100, 200 / 3, 0)),
        ('{"a": {"b": {"c": 1}, "d": 2}}', '{"a": {"b": {"c": 1}, "d": 3}}', (100, 50, 0)),
        ("  [1]\n", "[1]", (100, 100, 100)),
        ("{'a': 1}", '{"a": 1}', (0, 0, 0)),
        ('Here: {"a": 1}', '{"a": 1}', (0, 0, 0)),
        ('{"a": 1} {"a": 1}', '{"a": 1}', (0, 0, 0)),
        ("NaN", "1", (0, 0, 0)),
        ("", "1", (0, 0, 0)),
        ("[" * 100_000, "1", (0, 0, 0)),
    ],
)
def test_json(prediction, reference, expected):
    assert judged(prediction, reference) == scores(*expected)


def test_the_reference_that_is_met_best_counts():
    assert judged('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', '{"x": 1}') == scores(100, 50, 0)
    assert judged('{"x": 1}', '{"a": 1, "b": 3}', '{"x": 1}') == scores(100, 100, 100)


def test_fields_are_counted_over_all_items():
    found = text_metrics(
        ['{"a": 1}', "no json"], [['{"a": 1, "b": 2, "c": 3}'], ['{"a": 1}']], ["json"]
    )
    assert found == scores(50, 100 * 1 / 4, 0)


@given(VALUES, VALUES)
def test_json_of_any_values(value, other):
    found = judged(json.dumps(value), json.dumps(value))
    assert found == scores(100, 100, 100)
    found = judged(json.dumps(value), json.dumps(other))
    same = json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert found["json_record"] == (100 if same else 0)
    assert all(0 <= v <= 100 and math.isfinite(v) for v in found.values())


# --- mistakes --------------------------------------------------------------------------------


def test_all_mistakes_are_named():
    with pytest.raises(InputError) as caught:
        text_metrics(["a"], [["b"], []], ["bleu", "blue"])
    for part in ("'blue' is no metric", "1 predictions for 2 items", "item 2 has no reference"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="there is no item"):
        text_metrics([], [], ["bleu"])
    with pytest.raises(InputError, match="give a list"):
        text_metrics(["a"], [["a"]], "bleu")
    with pytest.raises(InputError, match=r"no JSON:\n  - item 1: 'plain text'"):
        text_metrics(["a"], [["plain text"]], ["json"])


def test_every_metric_works_and_is_a_percentage():
    found = text_metrics(['{"a": 1}'], [['{"a": 1}']], METRICS)
    assert set(found) == {
        "bleu", "chrf", "rouge", "exact", "json_valid", "json_fields", "json_record"
    }  # fmt: skip
    assert all(0 <= value <= 100 for value in found.values())
