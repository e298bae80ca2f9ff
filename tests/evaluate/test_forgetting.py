"""Loss on general text, before and after, against the model's own probabilities."""

import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit.cli import evaluate as command
from lorakit.core.spec import LoRASpec
from lorakit.errors import DataError, InputError
from lorakit.evaluate import (
    Contestant,
    LossResult,
    compare,
    forgetting,
    general_text,
    loss,
    mean_loss,
)
from lorakit.evaluate.forgetting import PIECE, SHIPPED
from lorakit.evaluate.losses import Losses
from lorakit.layers import attach
from tests.models import randomize

TEXT = "the first one\n\na second,\nof two lines\n\nthird\n"
PASSAGES = ["the first one", "a second,\nof two lines", "third"]


@pytest.fixture
def general(base, tmp_path):
    path = tmp_path / "general.txt"
    path.write_text(TEXT)
    return general_text(base.tokenizer, path)


def by_hand(model, ids):
    """Summed loss of all tokens but the first, and how many these are."""
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    return -sum(math.log(p[i - 1, ids[i]]) for i in range(1, len(ids))), len(ids) - 1


def made_up(m, seed=0):
    """Two losses over m examples that are much alike."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(20, 200, m)
    sums = counts * rng.normal(3.0, 0.5, m)
    change = counts * rng.normal(0.1, 0.2, m)
    return mean_loss(Losses(sums, counts)), mean_loss(Losses(sums + change, counts))


def test_before_and_after_against_float64_sums(base, load, general, all_double):
    base.model.double()
    handle = attach(base.model, LoRASpec(rank=2), "a")
    randomize(handle)
    contestants = [Contestant("base", None), Contestant("a", "a")]
    before, after = compare(base, handle, contestants, load(), general=general.data)
    sums, counts = {}, []
    for name in (None, "a"):
        with handle.use(name):
            found = [by_hand(base.model, base.tokenizer(text).input_ids) for text in PASSAGES]
        sums[name] = [s for s, _ in found]
        counts = [n for _, n in found]
    result = forgetting(before.general, after.general, general.passage_of)
    total = sum(counts)
    assert general.passages == 3
    assert before.general.tokens == total == sum(len(t) for t in PASSAGES) - 3
    assert result.before == pytest.approx(sum(sums[None]) / total, abs=1e-12)
    assert result.loss == pytest.approx(sum(sums["a"]) / total, abs=1e-12)
    d = [a - b for a, b in zip(sums["a"], sums[None], strict=True)]
    mean = sum(d) / total
    squares = sum((x - mean * n) ** 2 for x, n in zip(d, counts, strict=True))
    assert result.difference == pytest.approx(mean, abs=1e-12)
    assert result.standard_error == pytest.approx(math.sqrt(squares * 3 / 2) / total, abs=1e-12)
    assert result.standard_error > 0


def test_the_standard_error_is_what_drawing_passages_again_gives():
    before, after = made_up(300)
    found = forgetting(before, after, np.arange(300))
    rng = np.random.default_rng(1)
    again = []
    for _ in range(4000):
        drawn = rng.integers(0, 300, 300)
        again.append((after.sums - before.sums)[drawn].sum() / before.counts[drawn].sum())
    assert found.standard_error == pytest.approx(np.std(again), rel=0.05)
    # it is paired: the passages' own spread, which is larger, is not in it
    alone = np.std([before.sums[d].sum() / before.counts[d].sum()
                    for d in (rng.integers(0, 300, 300) for _ in range(500))])  # fmt: skip
    assert found.standard_error < 0.6 * alone


def test_pieces_of_one_passage_are_no_independent_passages():
    before, after = made_up(40)
    whole = forgetting(before, after, np.arange(40))

    def twice(one):
        return LossResult(one.loss, one.perplexity, 2 * one.tokens,
                          np.repeat(one.sums, 2), np.repeat(one.counts, 2))  # fmt: skip

    split = forgetting(twice(before), twice(after), np.repeat(np.arange(40), 2))
    assert split.difference == pytest.approx(whole.difference)
    assert split.standard_error == pytest.approx(whole.standard_error)
    naive = forgetting(twice(before), twice(after), np.arange(80))
    assert naive.standard_error < 0.8 * whole.standard_error


def test_nothing_changed_one_passage_and_other_passages():
    before, after = made_up(5)
    same = forgetting(before, before, np.arange(5))
    assert (same.difference, same.standard_error) == (0.0, 0.0)
    assert math.isnan(forgetting(before, after, np.zeros(5, np.int64)).standard_error)
    with pytest.raises(InputError, match="different passages"):
        forgetting(before, made_up(5, seed=1)[1], np.arange(5))


@pytest.mark.parametrize("begins", [False, True])
def test_a_long_passage_is_cut_and_every_token_is_scored_once(base, tmp_path, begins):
    tokenizer = base.tokenizer
    if begins:
        from tokenizers.processors import TemplateProcessing

        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos[0]} $A", special_tokens=[bos]
        )
    path = tmp_path / "long.txt"
    path.write_text("x" * 25 + "\n\n" + "y" * 7 + tokenizer.eos_token + "\n")
    general = general_text(tokenizer, path, context_length=10)
    size = 9 if begins else 10
    lengths = [min(size, 25 - start) for start in range(0, 25, size)] + [7]
    assert general.passage_of.tolist() == [0] * (len(lengths) - 1) + [1]
    for example, length in zip(general.data, lengths, strict=True):
        own = example.ids[1:] if begins else example.ids
        assert len(own) == length  # and no end token
        assert set(own.tolist()) < set(range(256))
        assert example.supervised.tolist() == [False] + [True] * (len(example.ids) - 1)
    expected = 32 if begins else 32 - len(lengths)
    assert int(general.data.supervised_counts.sum()) == expected


def test_it_is_read_as_plain_text_whatever_the_chat_template(base, general, tmp_path):
    base.tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    again = general_text(base.tokenizer, tmp_path / "general.txt")
    assert again.data.digest == general.data.digest
    tokens = sum(map(len, PASSAGES)) - 3
    assert loss(base.model, None, None, again.data).tokens == tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n', "prompt/completion; general text"),
        ("short.txt", "a\n\nb\n", "no passage has two tokens"),
        ("empty.txt", "", "it is empty"),
        ("absent.txt", None, "absent.txt"),
    ],
)
def test_what_is_no_general_text(base, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        general_text(base.tokenizer, tmp_path / name)


def test_the_text_that_ships(base):
    found = general_text(base.tokenizer)
    texts = SHIPPED.read_text(encoding="utf-8").strip("\n").split("\n\n")
    assert found.passages == len(texts) == len(set(texts)) >= 60
    assert f"ships is {len(texts)} short passages" in re.sub(r"\s+", " ", command.__doc__)
    assert all(100 < len(text.encode()) < PIECE for text in texts)
    assert 20_000 < sum(map(len, texts)) < 30_000


def test_the_text_is_part_of_the_package():
    root = Path(command.__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["lorakit"]
    assert SHIPPED in [file for p in patterns for file in (root / "lorakit").glob(p)]
