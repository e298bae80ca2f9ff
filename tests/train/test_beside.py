"""A prefix, biases and norms through the same loop: resumed, shared, at their own rate."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit import LoRASpec, load_adapter
from lorakit.bases import load_base
from lorakit.cli.main import main
from lorakit.errors import Interrupted, SpecError
from lorakit.train import Trainer, TrainSettings, train_together
from tests.train import tiny
from tests.train.conftest import open_shop
from tests.train.test_resume import Signal, assert_same, outcome
from tests.train.test_together import assert_close

BOTH = LoRASpec(rank=2, alpha=4, prefix=3, dropout=0.1)
ALONE = LoRASpec(targets="none", prefix=3, norms=True, bias="new")


@pytest.mark.parametrize("what", [BOTH, ALONE], ids=["beside-lora", "without"])
def test_a_run_goes_on_bit_for_bit(shop, what):
    options = {"what": what, "checkpoint_every": 2, "lr": 3e-3}
    shop.trainer("whole", **options).run()
    with pytest.raises(Interrupted):
        shop.trainer("cut", **options, callbacks=[Signal(5)]).run()
    result = Trainer.resume(shop.out / "cut")
    assert_same(shop.out / "cut", outcome(shop.out / "whole"))
    assert result.best_loss is not None
    # the beginning is not the base's, and both were measured
    rows = [json.loads(r) for r in (shop.out / "whole" / "metrics.jsonl").read_text().splitlines()]
    (first,) = [row for row in rows if row["kind"] == "eval" and row["step"] == 0]
    assert abs(first["loss"] - result.base_loss) > 1e-6
    adapter = load_adapter(shop.out / "whole")
    assert (adapter.num_virtual_tokens, adapter.spec.norms) == (3, what.norms)
    assert bool(adapter.low_rank) == bool(what.targets)


def test_runs_with_and_without_a_prefix_share_forwards(tmp_path, base_folder, monkeypatch):
    def forward(self, x):  # in float64 throughout
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    shop = open_shop(base_folder, tmp_path)
    base = load_base(str(base_folder), device="cpu", dtype="float64")
    specs = {
        "prefix": LoRASpec(targets="none", prefix=2),
        "both": LoRASpec(rank=2, prefix=5, dropout=0.2),
        "lora": LoRASpec(rank=3, targets="attention"),
        "norms": LoRASpec(targets="none", norms=True),
    }

    def make(name, folder):
        rows = tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.rows(40, seed=len(name)))
        settings = TrainSettings(
            steps=8, batch_size=3, lr=3e-3, eval_every=4, samples=0, seed=len(name)
        )
        data = shop.data(base, rows)
        return Trainer(base, specs[name], data, settings, tmp_path / folder / name)

    for name in specs:
        make(name, "alone").run()
    results = train_together([make(name, "joint") for name in specs])
    assert not [one for one in results if isinstance(one, Exception)]
    for name in specs:
        assert_close(tmp_path / "joint" / name, tmp_path / "alone" / name)
    told = (tmp_path / "joint" / "both" / "metrics.jsonl").read_text()
    assert "its forwards are its own" not in told


def test_a_prefix_has_a_rate_of_its_own(shop):
    moved = {}
    for ratio in (1.0, 4.0):
        options = {"optimizer": "sgd", "clip": 0.0, "steps": 1, "warmup": 0, "eval_every": 0}
        out = f"at {ratio}"
        shop.trainer(
            out, what=BOTH, prefix_lr_ratio=ratio, validation_fraction=0.0, **options
        ).run()
        start, end = load_adapter(shop.out / out / "initial"), load_adapter(shop.out / out)
        moved[ratio] = {
            f"{path} {name}": tensor - start.sites[path].tensors()[name]
            for path, site in end.sites.items()
            for name, tensor in site.tensors().items()
        }
    for name, change in moved[1.0].items():
        factor = 4.0 if name.endswith((" key", " value")) else 1.0
        assert float(change.abs().max()) > 0 or name.endswith(" A")  # B is zero at first
        # a difference of float32 numbers about as large as 1
        assert torch.allclose(moved[4.0][name], factor * change, rtol=1e-2, atol=2e-6)


def test_the_default_rate_of_a_prefix_is_said(shop):
    trainer = shop.trainer(what=BOTH)
    assert trainer.settings.prefix_lr_ratio == 10
    assert any(note.startswith("prefix_lr_ratio is 10") for note in trainer.notes)
    assert shop.trainer().settings.prefix_lr_ratio is None


def test_what_cannot_act_is_refused(shop):
    with pytest.raises(SpecError, match="there is no prefix"):
        shop.trainer(prefix_lr_ratio=3.0).run()
    with pytest.raises(SpecError, match=r"leaves 14 of the 64 .* --max-length 14"):
        shop.trainer(what=LoRASpec(targets="none", prefix=50))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--targets", "none"], "nothing would be trained"),
        (["--targets", "none", "--prefix", "2", "--rank", "4"], "--rank: about the products"),
        (["--targets", "none", "--bias", "lora"], "no module is adapted"),
        (["--bias", "all", "--rank", "2"], 'bias="new"'),
        (["--full", "--prefix", "2"], "--prefix"),
        (["--prefix-lr-ratio", "3", "--rank", "2"], "there is no prefix"),
        (["--prefix", "0"], "--prefix"),
    ],
)
def test_flags_that_cannot_act_end_with_2(shop, flags, said, capsys):
    command = ["train", "--base", str(shop.base_folder), "--data", str(shop.data_file)]
    try:
        code = main([*command, "--out", str(shop.out / "run"), "--quiet", *flags])
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_the_command_line(shop, capsys):
    out = shop.out / "run"
    command = ["train", "--base", str(shop.base_folder), "--data", str(shop.data_file), "--quiet"]
    command += ["--out", str(out), "--steps", "2", "--samples", "1", "--prefix", "2", "--norms"]
    assert main([*command, "--bias", "new", "--rank", "2"]) == 0
    assert main(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["virtual_tokens"] == 2
    code = main(
        ["generate", "--base", str(shop.base_folder), "--adapter", str(out), "--prompt", "w1 w2",
         "--max-new-tokens", "3", "--json"]
    )  # fmt: skip
    assert code == 0
    code = main(
        ["generate", "--base", str(shop.base_folder), "--adapter", f"{out}=0.5", "--prompt", "w1"]
    )
    assert code == 2
    assert "at weight 0.5 it is not defined" in capsys.readouterr().err
    code = main(["merge", "--base", str(shop.base_folder), "--adapter", str(out), "--out",
                 str(shop.out / "merged")])  # fmt: skip
    assert code == 2
    assert "it is a prefix" in capsys.readouterr().err
