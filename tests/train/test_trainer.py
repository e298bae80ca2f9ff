"""A run from end to end on a tiny base: what it leaves behind, and what it keeps."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from lorakit.core.spec import LoRASpec
from lorakit.errors import BaseError, InputError, SpecError, TargetError
from lorakit.formats import load_adapter
from lorakit.layers import handle_of
from lorakit.train import Callback, Trainer, TrainSettings, finished_run
from tests.train import tiny
from tests.train.conftest import SPEC


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def on_start(self, run):
        self.events.append(("start", run))

    def on_step(self, metrics):
        self.events.append(("step", metrics))

    def on_eval(self, metrics):
        self.events.append(("eval", metrics))

    def on_checkpoint(self, path):
        self.events.append(("checkpoint", path))

    def on_note(self, text):
        self.events.append(("note", text))

    def on_end(self, result):
        self.events.append(("end", result))

    def close(self, error):
        self.events.append(("close", error))

    def of(self, kind):
        return [event for name, event in self.events if name == kind]


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_end_to_end(shop):
    seen = Recorder()
    result = shop.trainer(steps=30, eval_every=10, callbacks=[seen]).run()
    out = shop.out / "run"
    assert result.ending == "finished"
    assert result.steps == 30
    assert result.best_loss < result.base_loss

    rows = metrics_of(out)
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 31))
    assert set(steps[0]) >= {
        *("kind", "step", "loss", "lr", "grad_norm", "tokens", "supervised"),
        *("seconds", "tokens_per_second", "rss_mb"),
    }
    evals = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evals] == [0, 10, 20, 30]
    best = min(evals, key=lambda row: row["loss"])
    assert [row["best"] for row in evals][evals.index(best) :].count(True) == 1
    assert (best["step"], best["loss"]) == (result.best_step, result.best_loss)
    assert any("held out" in row["text"] for row in rows if row["kind"] == "note")

    # callbacks were told the same
    assert [m.step for m in seen.of("step")] == list(range(1, 31))
    assert [m.loss for m in seen.of("eval")] == [row["loss"] for row in evals]
    assert [row["text"] for row in rows if row["kind"] == "note"] == seen.of("note")
    assert seen.of("start")[0].total_steps == 30
    assert seen.of("end") == [result]
    assert seen.events[-1] == ("close", None)

    # the folder
    settings = yaml.safe_load((out / "run.yaml").read_text())
    assert settings["train"]["steps"] == 30
    assert all(settings["train"][name] is not None for name in ("lr", "warmup", "eval_rows"))
    assert settings["lora"]["rank"] == 3
    assert settings["data"]["path"] == [str(shop.data_file.resolve())]
    assert "versions" in settings
    assert "data_report" in settings
    adapter = load_adapter(out / "adapter")
    assert adapter.spec.rank == 3
    assert adapter.base.architecture == "LlamaForCausalLM"
    assert adapter.provenance["metrics"]["validation_loss"] == result.best_loss
    assert adapter.provenance["data"]["files"] == ["data.jsonl"]
    assert str(shop.out) not in json.dumps(dict(adapter.provenance))
    assert finished_run(out) == result
    assert Trainer.resume(out) == result


def test_one_seed_one_result(shop):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shop.trainer(name, seed=seed).run()
    files = [
        {path.name: path.read_bytes() for path in (shop.out / name / "adapter").iterdir()}
        for name in "abc"
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_the_base_is_as_it_was(shop):
    base = shop.base()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    wanted = [p.requires_grad for p in base.model.parameters()]
    modes = [module.training for module in base.model.modules()]
    shop.trainer(base=base, steps=20).run()
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [p.requires_grad for p in base.model.parameters()] == wanted
    assert [module.training for module in base.model.modules()] == modes
    assert not any("forward" in module.__dict__ for module in base.model.modules())


def test_the_best_is_kept(shop):
    """A rate that is far too high at the end: the last weights are worse than earlier ones."""

    class Shake(Callback):
        def on_step(self, metrics):
            if metrics.step > 4:
                with torch.no_grad():
                    for parameter in handle_of(base.model).parameters():
                        parameter.add_(torch.sign(parameter))

    base = shop.base()
    result = shop.trainer(base=base, steps=12, eval_every=4, callbacks=[Shake()]).run()
    evals = {r["step"]: r["loss"] for r in metrics_of(shop.out / "run") if r["kind"] == "eval"}
    assert result.best_step == 4
    assert evals[12] > evals[4]
    kept = load_adapter(result.adapter)
    again = shop.trainer("again", what=kept, base=base, steps=1, eval_every=0)
    again.run()
    first = next(r for r in metrics_of(shop.out / "again") if r["kind"] == "eval")
    assert first["loss"] == pytest.approx(evals[4], abs=1e-6)


def test_early_stop(shop):
    result = shop.trainer(steps=40, lr=1e-12, eval_every=2, patience=3).run()
    # float32 cannot see steps this small, so no evaluation is below the first
    assert result.ending == "early stop"
    assert result.steps == 6
    notes = [row["text"] for row in metrics_of(shop.out / "run") if row["kind"] == "note"]
    assert any("no evaluation was below the one before the first step" in note for note in notes)


def test_without_validation_the_last_is_kept_and_said(shop):
    result = shop.trainer(validation_fraction=0.0, eval_every=None).run()
    rows = metrics_of(shop.out / "run")
    assert result.best_loss is None
    assert not [row for row in rows if row["kind"] == "eval"]
    assert any("the adapter kept is that of the last step" in row.get("text", "") for row in rows)
    kept = load_adapter(result.adapter)
    assert kept.provenance["metrics"]["step"] == 12


def test_too_few_rows_to_hold_some_out_says_how_many_and_what_to_do(shop):
    base = shop.base()
    few = shop.data(base, tiny.write_rows(shop.out / "few.jsonl", tiny.rows(20)))
    trainer = shop.trainer(base=base, data=few, eval_every=None)
    [note] = [text for text in trainer.notes if "no validation" in text]
    assert all(word in note for word in ("40", "20", "--valid F", "--validation-fraction"))


def test_a_validation_file(shop):
    base = shop.base()
    path = tiny.write_rows(shop.out / "valid.jsonl", tiny.rows(9, seed=5))
    trainer = shop.trainer(base=base, validation=shop.data(base, path))
    assert not [note for note in trainer.notes if "held out" in note]
    assert trainer.settings.eval_rows == 0
    trainer.run()
    with pytest.raises(InputError, match="there is validation data; give one of them"):
        shop.trainer("b", base=base, validation=shop.data(base, path), validation_fraction=0.1)


def test_a_validation_loss_that_is_not_finite_is_said(shop, monkeypatch):
    from lorakit.infer import PackedModel

    original = PackedModel.per_example_loss

    def poison(self, batch, *args, **kwargs):
        sums, counts = original(self, batch, *args, **kwargs)
        sums[batch.example_ids == 3] = float("nan")
        return sums, counts

    monkeypatch.setattr(PackedModel, "per_example_loss", poison)
    base = shop.base()
    trainer = shop.trainer(base=base, validation=shop.data(base), eval_rows=0)
    result = trainer.run()
    rows = metrics_of(shop.out / "run")
    assert [row["loss"] for row in rows if row["kind"] == "eval"] == [None] * 4
    notes = [row["text"] for row in rows if row["kind"] == "note"]
    assert any("after step 4 is nan" in note and "data.jsonl line 4" in note for note in notes)
    assert result.best_loss is None
    assert load_adapter(result.adapter).provenance["metrics"]["step"] == 12


def test_going_on_with_an_adapter(shop):
    base = shop.base()
    first = shop.trainer("first", base=base, steps=20).run()
    kept = load_adapter(first.adapter)
    second = shop.trainer("second", base=base, what=kept, steps=8).run()
    began = next(row for row in metrics_of(shop.out / "second") if row["kind"] == "eval")
    assert began["loss"] == pytest.approx(first.best_loss, abs=1e-6)
    assert second.base_loss == pytest.approx(first.base_loss, abs=1e-6)
    after = load_adapter(second.adapter)
    assert after.spec.rank == 3
    assert set(after.sites) == set(kept.sites)
    assert after.provenance["continued_from"]["metrics"]["step"] == first.best_step
    stored = load_adapter(shop.out / "second" / "start")
    for path, site in kept.sites.items():
        assert torch.equal(stored.sites[path].A, site.A)


def test_an_adapter_of_another_base(shop, tmp_path_factory):
    kept = load_adapter(shop.trainer("first").run().adapter)
    other = shop.base()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    from lorakit.bases import identify

    other.identity = identify(other.model, "other")
    with pytest.raises(BaseError, match="is another one"):
        shop.trainer("second", base=other, what=kept)
    shop.trainer("second", base=other, what=kept, allow_other_base=True)


# --- what is refused, with nothing written -------------------------------------------------------


def refused(shop, kind, message, **options):
    with pytest.raises(kind, match=message):
        shop.trainer(**options).run()
    assert not (shop.out / "run").exists()


def test_impossible_runs_leave_nothing(shop):
    refused(shop, TargetError, "nope", what=LoRASpec(targets=("nope",)))
    refused(shop, SpecError, "warmup", steps=None, epochs=1.0, warmup=500)
    refused(shop, SpecError, "no validation", validation_fraction=0.0, patience=2)


def test_a_folder_that_is_taken(shop):
    shop.trainer().run()
    before = {p: p.stat().st_mtime_ns for p in (shop.out / "run").rglob("*")}
    with pytest.raises(InputError, match="holds a run already"):
        shop.trainer().run()
    assert {p: p.stat().st_mtime_ns for p in (shop.out / "run").rglob("*")} == before


def test_a_site_that_is_never_called_is_known_before_anything_is_written(shop):
    base = shop.base()
    base.model.add_module("unused", torch.nn.Linear(4, 4))
    refused(
        shop, TargetError, "never called", base=base, what=LoRASpec(rank=2, targets=("unused",))
    )


def test_settings_of_the_default_run_are_all_said(shop):
    base = shop.base()
    trainer = Trainer(base, SPEC, shop.data(base), TrainSettings(), shop.out / "run")
    said = " ".join(trainer.notes)
    for name in ("steps", "lr", "micro_batch_tokens", "eval_every", "eval_rows"):
        assert f"{name} is " in said
    assert trainer.settings.warmup == 0  # as always under 20 steps
    assert "warmup" not in said
    longer = Trainer(base, SPEC, shop.data(base), TrainSettings(steps=40), shop.out / "longer")
    assert "warmup is 2: " in " ".join(longer.notes)
