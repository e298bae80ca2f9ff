"""Dropout keyed by what is dropped: however the batch is cut, the same elements go."""

from __future__ import annotations

import pytest
import torch

from lorakit import LoRASpec
from lorakit.layers import Routing, attach, token_keys
from lorakit.layers.dropout import _mix, keyed_dropout, keys_of, site_number

from .. import models


def splitmix(x: int) -> int:
    """splitmix64's finaliser in Python's integers, as published."""
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def test_the_mixing_is_splitmix64s():
    values = torch.tensor([0, 1, -1, 12345678901234567, -(2**63)])
    expected = [splitmix(int(v)) for v in values]
    assert [int(v) % 2**64 for v in _mix(values)] == expected


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_right_share_is_dropped_and_the_rest_scaled(p):
    keys = token_keys(1, 2, torch.arange(500), torch.arange(500))
    out = keyed_dropout(torch.ones(500, 400), keys, site_number("a"), p)
    dropped = (out == 0).double()
    # 200,000 draws: the standard deviation of the share is below 0.0012
    assert abs(dropped.mean() - p) < 0.005
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - p)))
    # no row or column is special: six standard deviations
    limit = 6 * (p * (1 - p) / 400) ** 0.5
    assert (dropped.mean(dim=1) - p).abs().max() < limit
    assert (dropped.mean(dim=0) - p).abs().max() < limit


def test_each_part_of_the_key_matters():
    def mask(seed=1, step=2, example=3, position=4, site="a"):
        keys = token_keys(seed, step, torch.tensor([example]), torch.tensor([position]))
        return keyed_dropout(torch.ones(1, 256), keys, site_number(site), 0.5)[0] != 0

    reference = mask()
    assert torch.equal(reference, mask())
    for other in (mask(seed=2), mask(step=3), mask(example=4), mask(position=5), mask(site="b")):
        # independent masks agree in half of 256 places, give or take six deviations
        assert abs(int((reference == other).sum()) - 128) < 48


def test_a_split_batch_drops_the_same():
    model = models.llama().double().train()
    handle = attach(model, LoRASpec(rank=4, dropout=0.3))
    models.randomize(handle)
    ids = torch.randint(0, 100, (4, 6))
    keys = token_keys(7, 3, torch.arange(4).unsqueeze(1).expand(4, 6), torch.arange(6).expand(4, 6))

    def run(rows):
        routing = Routing.uniform("default").with_dropout_keys(keys[rows])
        with handle.use(routing):
            return model(ids[rows]).logits

    whole = run(slice(0, 4))
    halves = torch.cat([run(slice(0, 2)), run(slice(2, 4))])
    assert (whole - halves).abs().max() <= 1e-12
    packed_keys = keys.reshape(1, -1)
    with handle.use(Routing.uniform("default").with_dropout_keys(packed_keys)):
        packed = model(
            ids.reshape(1, -1),
            position_ids=torch.arange(6).repeat(4).unsqueeze(0),
            use_cache=False,
        ).logits
    assert (whole.reshape(1, 24, -1) - packed).abs().max() <= 1e-12
    model.eval()
    with handle.use("default"):
        assert (model(ids).logits - whole).abs().max() > 1e-3, "it did drop"


def test_without_keys_it_is_ordinary_dropout():
    model = models.llama().train()
    handle = attach(model, LoRASpec(rank=4, dropout=0.5))
    models.randomize(handle)
    ids = torch.randint(0, 100, (2, 6))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("width", [5, 9])
def test_keys_of_rows_reach_every_position_and_no_padding_changes_them(width):
    """One key a row stands for tokens, patches, and rows that a model multiplies in place."""
    keys = token_keys(7, 3, torch.arange(3), torch.zeros(3, dtype=torch.long))
    wide = keyed_dropout(torch.ones(3, width, 64), keys_of(torch.ones(3, width, 64), keys), 1, 0.5)
    short = torch.ones(3, 5, 64)
    assert torch.equal(keyed_dropout(short, keys_of(short, keys), 1, 0.5), wide[:, :5])
    assert len({tuple(row.tolist()) for row in wide.reshape(-1, 64)}) == 3 * width
    flat = short.reshape(15, 64)
    assert torch.equal(
        keyed_dropout(flat, keys_of(flat, keys), 1, 0.5), wide[:, :5].reshape(15, 64)
    )
    alone = keyed_dropout(short[1:2], keys_of(short[1:2], keys[1:2]), 1, 0.5)
    assert torch.equal(alone, wide[1:2, :5])
