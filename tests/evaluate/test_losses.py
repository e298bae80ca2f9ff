"""Mean losses against the model's own cross-entropy, example by example."""

import math

import numpy as np
import pytest
import torch

from lorakit.core.spec import LoRASpec
from lorakit.data import DataSpec, load_data
from lorakit.errors import DataError, RoutingError
from lorakit.evaluate import loss, perplexity
from lorakit.infer import PackedModel
from lorakit.layers import attach
from lorakit.tasks import CausalTask
from tests.models import randomize


def by_hand(model, example):
    """Summed loss and number of supervised tokens of one example."""
    ids = torch.from_numpy(example.ids.astype(np.int64))
    logits = model(ids[None]).logits[0].double()
    p = logits.detach().softmax(-1)
    wanted = np.flatnonzero(example.supervised)
    return -sum(math.log(p[i - 1, ids[i]]) for i in wanted), len(wanted)


@pytest.mark.parametrize("budget", [1, 40, None])
@pytest.mark.parametrize("mix", [None, "a", {"a": 0.5, "b": 1.0}])
def test_every_supervised_token_counts_alike(budget, mix, base, load, all_double):
    base.model.double()
    data = load()
    handle = attach(base.model, LoRASpec(rank=2), "a")
    handle.add(LoRASpec(rank=2), "b", seed=1)
    randomize(handle)
    indices = [3, 0, 2]
    heard = []
    found = loss(
        base.model, handle, mix, data, indices, token_budget=budget,
        on_batch=lambda done, total: heard.append((done, total)),
    )  # fmt: skip
    with handle.use(mix), torch.no_grad():
        expected = [by_hand(base.model, data[i]) for i in indices]
    assert found.tokens == sum(n for _, n in expected)
    assert found.loss == pytest.approx(sum(s for s, _ in expected) / found.tokens, abs=1e-10)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.sums == pytest.approx([s for s, _ in expected], abs=1e-10)
    assert found.counts.tolist() == [n for _, n in expected]
    assert heard[-1] == (3, 3)
    assert len(heard) == (3 if budget == 1 else 1 if budget is None else len(heard))


def test_a_model_in_training_mode_is_judged_without_dropout_and_stays_so(base, load):
    data = load()
    handle = attach(base.model, LoRASpec(rank=2, dropout=0.9), "a")
    randomize(handle)
    expected = loss(base.model, handle, "a", data).loss
    base.model.train()
    assert loss(base.model, handle, "a", data).loss == expected
    assert base.model.training


@pytest.mark.parametrize("mode", ["packed", "padded", "single"])
def test_every_mode_within_the_budget(mode, base, load, monkeypatch):
    data = load()
    packed = PackedModel(base.model, mode=mode)
    widths = []
    plain = packed.per_example_loss

    def counting(batch, routing=None):
        widths.append(len(batch.lengths) * max(batch.lengths) if mode == "padded"
                      else sum(batch.lengths))  # fmt: skip
        return plain(batch, routing)

    monkeypatch.setattr(packed, "per_example_loss", counting)
    longest = int(data.lengths.max())
    found = loss(base.model, None, None, data, token_budget=longest + 8, task=CausalTask(packed))
    assert found.loss == pytest.approx(loss(base.model, None, None, data).loss, rel=1e-5)
    assert max(widths) <= longest + 8
    assert len(widths) > 1


def test_examples_that_are_not_finite_are_named(base, load):
    data = load()
    weight = torch.randn(259, 16)
    weight[base.tokenizer.convert_tokens_to_ids("z")] = math.nan
    base.model.lm_head.weight = torch.nn.Parameter(torch.randn(259, 16))  # no longer tied
    base.model.model.embed_tokens.weight = torch.nn.Parameter(weight)
    packed = PackedModel(base.model, mode="packed")
    found = loss(base.model, None, None, data, task=CausalTask(packed))
    assert math.isnan(found.loss)
    assert math.isnan(found.perplexity)
    with_z = [i for i in range(4) if "z" in data.item(i).prompt + data.item(i).completion]
    assert found.not_finite.tolist() == with_z
    assert 0 < len(with_z) < 4


def test_perplexity_of_any_loss():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    assert perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_nothing_supervised_and_unknown_adapters(base, load, monkeypatch):
    data = load()
    handle = attach(base.model, LoRASpec(rank=2), "a")
    with pytest.raises(DataError, match="none of these 0 examples"):
        loss(base.model, handle, "a", data, [])
    with pytest.raises(RoutingError, match="no adapter 'b'"):
        loss(base.model, handle, "b", data)


def test_plain_text(base, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a line\n\nanother line\n")
    data = load_data(DataSpec(str(path)), base.tokenizer, context_length=64)
    expected = [by_hand(base.model, data[i]) for i in range(len(data))]
    found = loss(base.model, None, None, data)
    # float32: the losses of a few dozen tokens, summed
    assert found.loss == pytest.approx(sum(s for s, _ in expected) / found.tokens, rel=1e-5)
