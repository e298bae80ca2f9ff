"""A base beside its adapters."""

import pytest
import torch

from lorakit.core.spec import LoRASpec
from lorakit.data import items
from lorakit.errors import DataError, InputError
from lorakit.evaluate import Contestant, answer_length, compare, loss, text_metrics
from lorakit.infer import generate
from lorakit.layers import attach
from tests.models import randomize


def contestants(*mixes):
    return [Contestant("base" if m is None else str(m), m) for m in mixes]


def test_each_is_judged_on_the_rows_and_prompts_of_the_items(base, load):
    data = load()
    handle = attach(base.model, LoRASpec(rank=2), "a")
    randomize(handle)
    chosen = items(data)[:2]  # "one", with two references, and "two"
    assert [item.references for item in chosen] == [["eins", "ein einziges"], ["zwei"]]
    heard, seen = [], []
    found = compare(
        base,
        handle,
        contestants(None, "a"),
        data,
        items=chosen,
        metrics=["chrf", "exact"],
        on_progress=heard.append,
        on_judged=lambda one: seen.append(one.name),
    )
    assert seen == ["base", "a"]
    prompts = [item.prompt_ids.tolist() for item in chosen]
    for one, mix in zip(found, (None, "a"), strict=True):
        assert one.loss.loss == loss(base.model, handle, mix, data, [0, 2, 1]).loss
        texts = generate(
            base, handle, prompts, adapter=mix, max_new_tokens=answer_length(data, chosen)
        )
        assert [answer.text for answer in one.answers] == texts
        expected = text_metrics(texts, [item.references for item in chosen], ["chrf", "exact"])
        assert one.metrics == expected
    assert found[0].loss.loss != found[1].loss.loss
    assert {(p.contestant, p.stage) for p in heard} == {
        (name, stage) for name in ("base", "a") for stage in ("loss", "answers")
    }
    assert all(0 < p.done <= p.total for p in heard)


def test_without_metrics_nothing_is_generated(base, load, monkeypatch):
    monkeypatch.setattr("lorakit.evaluate.comparison.answers", None)
    data = load()
    [one] = compare(base, None, contestants(None), data)
    assert one.answers == []
    assert one.metrics == {}
    assert one.loss.tokens == int(data.supervised_counts.sum())


def test_what_cannot_be_judged_is_refused_before_any_forward(base, load):
    data = load()
    base.model.forward = None
    with pytest.raises(InputError, match="no JSON"):
        compare(base, None, contestants(None), data, items=items(data), metrics=["json"])
    with pytest.raises(DataError, match="no item"):
        compare(base, None, contestants(None), data, metrics=["bleu"])


def test_answers_may_be_a_little_longer_than_the_longest_reference(base, load):
    data = load()
    longest = len("ein einziges") + 1  # bytes, and the end token
    assert answer_length(data, items(data)) == longest + 16
    assert answer_length(data, items(data)[1:]) == len("zwei") + 1 + 16


def test_an_answer_ends_where_training_ends_it(base, load):
    data = load()
    eos = base.tokenizer.eos_token_id
    assert eos in data.stop_ids
    with torch.no_grad():  # a model that always ends at once
        base.model.lm_head.weight = torch.nn.Parameter(torch.zeros(259, 16))
        base.model.lm_head.bias = torch.nn.Parameter(torch.zeros(259))
        base.model.lm_head.bias[eos] = 1.0
    base.model.generation_config.eos_token_id = None
    chosen = items(data)
    [one] = compare(base, None, contestants(None), data, items=chosen, metrics=["exact"])
    assert {(a.text, a.finish) for a in one.answers} == {("", "stop")}
