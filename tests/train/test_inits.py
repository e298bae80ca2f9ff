"""Runs whose adapter begins in the base's weight or in data; and unequal learning rates."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml

from lorakit.core.spec import LoRASpec
from lorakit.data import pack
from lorakit.errors import Interrupted, SpecError
from lorakit.formats import load_adapter
from lorakit.layers import attach
from lorakit.layers.initial import initial
from lorakit.train import Trainer
from lorakit.train.job import Job
from lorakit.train.settings import RATE_OF_INIT, Facts, TrainSettings
from lorakit.train.trained import TrainedAdapter
from lorakit.workflows.calibrate import calibrate
from tests.train.conftest import SPEC
from tests.train.test_resume import Signal, assert_same, outcome

RUN = {"steps": 9, "eval_every": 4, "checkpoint_every": 3, "lr": None}


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "lora-ga"])
def test_a_run_stopped_and_resumed_ends_as_if_nothing_had_happened(shop, init):
    spec = dataclasses.replace(SPEC, init=init)

    def trainer(out="run", **more):
        base = shop.base()
        return shop.trainer(
            out, what=spec, base=base, calibrate=partial(calibrate, base), **RUN, **more
        )

    base = shop.base()
    before = copy.deepcopy(base.model.state_dict())
    whole = shop.trainer("whole", what=spec, base=base, calibrate=partial(calibrate, base), **RUN)
    result = whole.run()
    assert all(torch.equal(t, before[k]) for k, t in base.model.state_dict().items())
    assert result.best_loss < result.base_loss, "at its default rate it learns"
    expected = outcome(shop.out / "whole")
    with pytest.raises(Interrupted):
        trainer(callbacks=[Signal(4, signal.SIGTERM)]).run()
    Trainer.resume(shop.out / "run")
    assert_same(shop.out / "run", expected)

    adapter = load_adapter(shop.out / "run" / "adapter")
    moves = init in ("pissa", "olora", "lora-ga")
    assert {site.rank for site in adapter.low_rank.values()} == {6 if moves else 3}
    assert adapter.provenance["init"] == {"method": init, "rank": 3}
    config = json.loads((shop.out / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (6 if moves else 3)
    stored = yaml.safe_load((shop.out / "run" / "run.yaml").read_text())
    assert (stored["lora"]["init"], stored["lora"]["rank"]) == (init, 3)


def test_its_file_gives_the_loss_that_the_run_had_and_is_gone_on_with(shop):
    spec = dataclasses.replace(SPEC, init="pissa", dropout=0.0)
    first = shop.trainer("first", what=spec, **RUN).run()
    adapter = load_adapter(first.adapter)
    second = shop.trainer("second", what=adapter, steps=2).run()
    rows = [json.loads(x) for x in (shop.out / "second" / "metrics.jsonl").read_text().splitlines()]
    again = next(row for row in rows if row["kind"] == "eval")
    # the difference of two changes is one product of twice the rank: float32 rounding
    assert again["loss"] == pytest.approx(first.best_loss, rel=1e-5)
    assert {site.rank for site in load_adapter(second.adapter).low_rank.values()} == {6}


def test_the_default_rate_is_that_of_the_init_and_says_why():
    plain, _ = TrainSettings(steps=9).resolve(Facts(100, hidden_size=576))
    for init, (factor, because) in RATE_OF_INIT.items():
        found, notes = TrainSettings(steps=9).resolve(Facts(100, hidden_size=576, init=init))
        assert found.lr == pytest.approx(plain.lr * factor, rel=0.05)
        assert any(note.startswith("lr is") and because in note for note in notes)
    found, notes = TrainSettings(steps=9, lora_plus_ratio=16).resolve(Facts(100, hidden_size=576))
    assert found.lr == pytest.approx(plain.lr / 4, rel=0.05)
    assert any("every B at 16 times" in note for note in notes)
    same, _ = TrainSettings(steps=9).resolve(Facts(100, hidden_size=576, init="eva"))
    assert same.lr == plain.lr


def test_settings_that_cannot_act_are_refused(shop):
    with pytest.raises(SpecError, match="init_examples is 8, but nothing looks at examples"):
        shop.trainer(init_examples=8)
    with pytest.raises(SpecError, match="eva_rho is 2, but no ranks"):
        shop.trainer(eva_rho=2.0)
    with pytest.raises(SpecError, match="init 'eva' needs a few batches of data; give calibrate="):
        shop.trainer(what=dataclasses.replace(SPEC, init="eva"))
    with pytest.raises(SpecError, match="lr_pattern 'nothing' matches none"):
        shop.trainer(lr_pattern={"nothing": 0.5}).run()


# --- rates -----------------------------------------------------------------------------------


def factor_of(name: str) -> float:
    """The expected factor, by hand."""
    factor = 0.5 if "q_proj" in name else 3.0 if "layers.1.mlp" in name else 1.0
    return factor * (16 if name.endswith("lora_B") else 1)


RATES = {"lora_plus_ratio": 16.0, "lr_pattern": {"q_proj": 0.5, r"layers\.1\.mlp\..*": 3.0}}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_each_tensor_moves_at_its_own_rate(shop, optimizer):
    """Five steps, against one torch optimizer per tensor."""
    base = shop.base()
    data = shop.data(base)
    settings, _ = TrainSettings(
        steps=6, batch_size=4, lr=1e-3, schedule="constant", warmup=0, clip=0.0,
        optimizer=optimizer, **RATES,
    ).resolve(Facts(len(data)))  # fmt: skip
    start = initial(base.model, LoRASpec(rank=2), 0)
    theirs = {
        f"{path}.lora_{part}": getattr(site, part).clone().requires_grad_()
        for path, site in start.adapter.low_rank.items()
        for part in "AB"
    }
    made = torch.optim.SGD if optimizer == "sgd" else partial(torch.optim.AdamW, weight_decay=0)
    optimizers = [made([p], lr=1e-3 * factor_of(name)) for name, p in theirs.items()]
    reference = copy.deepcopy(base.model)
    for path, site in start.adapter.low_rank.items():
        module = reference.get_submodule(path)

        def forward(x, module=module, path=path, scaling=site.scaling):
            A, B = theirs[f"{path}.lora_A"], theirs[f"{path}.lora_B"]
            return F.linear(x, module.weight + scaling * B @ A, module.bias)

        module.forward = forward
    handle = attach(base.model, start)
    job = Job(TrainedAdapter("default", handle), data, range(len(data)), settings)
    flat = handle.flat()
    for _ in range(5):
        job.clear_gradient()
        window = job.window()
        for one in optimizers:
            one.zero_grad()
        for example in window.examples:
            batch = pack([example])
            for model in (base.model, reference):
                logits = model(input_ids=batch.input_ids).logits[0, batch.supervised]
                loss = F.cross_entropy(logits, batch.labels, reduction="sum")
                (loss / window.num_supervised).backward()
        job.take_step(1.0, job.gradient_norm())
        for one in optimizers:
            one.step()
    for path, site in handle.snapshot().low_rank.items():
        for part in "AB":
            # float32, and AdamW divides by √v where the gradient is nearly zero
            torch.testing.assert_close(
                getattr(site, part), theirs[f"{path}.lora_{part}"].detach(), rtol=2e-3, atol=2e-4
            )
    assert len(job._optimizer.param_groups) == 6
    assert all(g["params"][0].data_ptr() >= flat.data_ptr() for g in job._optimizer.param_groups)


def test_one_rate_for_all_keeps_one_group(shop):
    base = shop.base()
    handle = attach(base.model, LoRASpec(rank=2))
    settings, _ = TrainSettings(steps=2).resolve(Facts(9))
    job = Job(TrainedAdapter("default", handle), shop.data(base), range(9), settings)
    (group,) = job._optimizer.param_groups
    assert group["params"] == [handle.flat()]


def test_a_run_with_rates_stopped_and_resumed(shop):
    run = {**RUN, **RATES}
    shop.trainer("whole", **run).run()
    expected = outcome(shop.out / "whole")
    with pytest.raises(Interrupted):
        shop.trainer(**run, callbacks=[Signal(5, signal.SIGTERM)]).run()
    Trainer.resume(shop.out / "run")
    assert_same(shop.out / "run", expected)
    plain = shop.trainer("plain", **{**RUN, "lr": 1e-3}).run()
    fast = shop.trainer("fast", **{**run, "lr": 1e-3}).run()
    assert fast.last_loss != plain.last_loss
