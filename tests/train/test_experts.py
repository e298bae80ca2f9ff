"""Adapters on routers and experts in training: alone, and several runs in shared forwards."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers

from lorakit.bases import load_base
from lorakit.core.spec import LoRASpec
from lorakit.formats import load_adapter
from lorakit.layers import attach
from lorakit.tasks.mixing import why_not_mixed
from lorakit.train import train_together
from lorakit.train.loop.forwards import Forwards
from tests import moe_models
from tests.train import tiny
from tests.train.conftest import open_shop
from tests.train.test_together import state

JOBS = {
    "experts": (LoRASpec(rank=3, targets="experts", dropout=0.2), {"seed": 1}),
    "router": (LoRASpec(rank=2, targets=("router", "attention")), {"lr": 3e-3, "batch_size": 5}),
    "both": (LoRASpec(rank=4, targets=("experts", "router")), {"micro_batch": 2}),
}
#: the same sums in float32 over other rows, through eight steps of Adam
TOLERANCE = 2e-3


def write_base(folder: Path, family: str) -> Path:
    tiny.write_base(folder)  # for its tokenizer
    model = moe_models.FAMILIES[family](bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def folder(request, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def shop(folder, tmp_path):
    return open_shop(folder, tmp_path)


def trainer(shop, base, name, out):
    spec, settings = JOBS[name]
    options = {"steps": 8, "eval_every": 8, "eval_rows": 6, **settings}
    return shop.trainer(f"{out}/{name}", what=spec, base=base, **options)


def test_jobs_that_share_forwards_come_out_as_alone(shop, monkeypatch):
    """Packed rows (Mixtral) and padded ones (gpt-oss, whose attention has sinks)."""
    base = load_base(str(shop.base_folder), device="cpu", dtype="float32")
    for name in JOBS:
        trainer(shop, base, name, "alone").run()
    forwards = []
    backward = Forwards.backward

    def counted(self, shares):
        forwards.append(len(shares))
        return backward(self, shares)

    monkeypatch.setattr(Forwards, "backward", counted)
    results = train_together([trainer(shop, base, name, "joint") for name in JOBS])
    assert [result.ending for result in results] == ["finished"] * 3
    assert max(forwards) == 3, "experts of several runs in one forward"
    for name in JOBS:
        mine, expected = (state(shop.out / out / name) for out in ("joint", "alone"))
        for key, tensor in expected.items():
            assert (mine[key] - tensor).norm() <= TOLERANCE * tensor.norm(), (name, key)
    adapter = load_adapter(shop.out / "joint" / "both" / "adapter")
    assert {site.kind for site in adapter.low_rank.values()} == {"experts", "router"}
    assert all(site.B.abs().max() > 0 for site in adapter.low_rank.values())
    losses = [result.best_loss for result in results]
    assert all(map(math.isfinite, losses))
    handle = attach(base.model, adapter)
    handle.detach()


def test_experts_trained_whole_go_alone():
    from lorakit.infer import PackedModel

    model = moe_models.mixtral()
    spec = LoRASpec(rank=2, targets="q_proj", train_modules=("experts",))
    handle = attach(model, spec)
    packed = PackedModel(model, handle)
    assert "is an expert" in str(why_not_mixed(packed, handle.snapshot()))


def test_balancing_losses_couple_rows_and_are_refused():
    """transformers adds one number of all tokens of the batch to the loss."""
    from lorakit.errors import RoutingError

    model = moe_models.mixtral(output_router_logits=True)
    handle = attach(model, LoRASpec(rank=2, targets="router"), "a")
    handle.add(LoRASpec(rank=2, targets="router"), "b")
    ids = torch.randint(3, 60, (2, 6))
    alone = model(ids, labels=ids)  # one adapter: as the model defines it
    assert alone.aux_loss is not None
    with handle.use(rows=["a", "b"]):
        with pytest.raises(RoutingError, match="load-balancing loss"):
            model(ids, labels=ids)
        assert model(ids, labels=ids, output_router_logits=False).aux_loss is None
        assert model(ids).logits is not None
        with torch.no_grad():
            model(ids, labels=ids)
    assert isinstance(model, transformers.MixtralForCausalLM)
