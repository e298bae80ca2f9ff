"""Runs of every kind through the same trainer: resume, files of the run, the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lorakit.cli import tasks as command
from lorakit.cli.main import main
from lorakit.core.spec import LoRASpec
from lorakit.errors import DataError, Interrupted, SpecError
from lorakit.formats import load_adapter, save_adapter
from lorakit.tasks.names import TASKS
from lorakit.train import Full, Trainer, TrainSettings, train_together
from lorakit.train.host import hosting
from tests.train.test_resume import Signal

from . import small

CLASSES = {
    "classify": "AutoModelForSequenceClassification",
    "vision": "AutoModelForImageClassification",
}
SETTINGS = {"steps": 6, "batch_size": 4, "lr": 0.01, "samples": 1, "validation_fraction": 0.2}


def trainer(bench, out, *, rank=2, dropout=0.2, callbacks=(), base=None, **settings):
    base = base or bench.base()
    spec, _ = bench.kind.adapter_spec(LoRASpec(rank=rank, alpha=4, dropout=dropout), base)
    return Trainer(
        base, spec, bench.data(base), TrainSettings(**{**SETTINGS, **settings}), out,
        callbacks=callbacks, task=bench.kind,
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_that_was_stopped_goes_on_to_the_bit(bench, tmp_path):
    whole = trainer(bench, tmp_path / "whole", steps=3).run()
    with pytest.raises(Interrupted):
        trainer(bench, tmp_path / "cut", steps=3, callbacks=[Signal(2)]).run()
    resumed = Trainer.resume(tmp_path / "cut")  # base, data and kind from run.yaml alone
    assert resumed.steps == whole.steps == 3
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    rows = [
        json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    ]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    told = set(last.get("metrics", {})) | ({"perplexity"} if "perplexity" in last else set())
    expected_names = {
        "classify": {"accuracy", "macro_f1"},
        "vision": {"accuracy", "macro_f1"},
        "embed": {"accuracy", "mrr"},
    }
    assert told == expected_names.get(bench.name, {"perplexity"})
    assert (tmp_path / "cut" / "report.html").stat().st_size > 5000
    adapter = load_adapter(tmp_path / "cut" / "adapter")
    assert adapter.provenance["task"]["name"] == bench.kind.name
    assert adapter.task_type == bench.kind.peft_type


def test_runs_of_one_kind_share_forwards_and_come_out_as_alone(benches, tmp_path):
    bench = benches["classify"]
    base = bench.base()
    alone = [trainer(bench, tmp_path / f"alone{r}", rank=r).run() for r in (2, 3)]
    both = train_together(
        [trainer(bench, tmp_path / f"both{r}", rank=r, base=base) for r in (2, 3)]
    )
    for rank, one, other in zip((2, 3), alone, both, strict=True):
        assert other.best_loss == pytest.approx(one.best_loss, rel=1e-5)
        expected = weights(tmp_path / f"alone{rank}")
        found = weights(tmp_path / f"both{rank}")
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-5), name


def test_contrast_couples_runs_and_is_refused(benches, tmp_path):
    bench = benches["embed"]
    base = bench.base()
    first, second = train_together(
        [trainer(bench, tmp_path / name, base=base) for name in ("one", "two")]
    )
    assert first.steps == 6
    assert isinstance(second, SpecError)
    assert "contrasts it with the other pairs of its batch" in str(second)
    with pytest.raises(SpecError, match="micro_batch would cut it"):
        trainer(bench, tmp_path / "three", micro_batch=2).run()


def test_runs_of_two_kinds_do_not_share_a_model(benches, tmp_path):
    """But one behind the other they do."""
    bench = benches["classify"]
    base, labels = bench.base(), bench.kind.labels
    other = replace(bench, kind=replace(bench.kind, labels=labels[::-1]))

    def made(name):
        pairs = ((bench, "one"), (other, "other"))
        more = {"base": base, "steps": 2, "samples": 0}
        return [trainer(who, tmp_path / name / out, **more) for who, out in pairs]

    first, second = train_together(made("at once"))
    assert first.steps == 2
    with pytest.raises(SpecError, match="or they differ in their settings"):
        raise second
    first, second = train_together(made("behind"), max_concurrent=1)
    assert (first.steps, second.steps) == (2, 2)
    assert first.best_loss != second.best_loss


def test_what_one_lets_a_model_make_again_no_later_one_finds(benches):
    """The model's own gradient checkpointing is turned on for whoever asks, and for nobody else."""
    bench = benches["classify"]
    model, found = bench.base().model, []
    with hosting(model) as host:
        for recompute in ("layers", "layers", "none"):
            found.append(host.task(bench.kind, recompute, list)[0])
            assert is_checkpointed(model) == (recompute == "layers")
        host.task(bench.kind, "layers", list)
    assert found[0] is found[1] is not found[2]
    assert not is_checkpointed(model)


def is_checkpointed(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_all_weights_of_a_classifier(benches, tmp_path):
    bench = benches["classify"]
    base = bench.base()
    result = Trainer(
        base, Full(), bench.data(base), TrainSettings(**{**SETTINGS, "lr": 1e-3}),
        tmp_path / "full", task=bench.kind,
    ).run()  # fmt: skip
    assert result.model is not None
    config = json.loads((result.model / "config.json").read_text())
    assert [config["id2label"][str(i)] for i in range(3)] == ["a", "b", "c"]
    assert result.best_loss < result.base_loss


@pytest.mark.parametrize(
    ("name", "own"),
    [("classify", None), ("classify", "vwxyz"), ("bart", "vwxyz"), ("vision", "vwxyz")],
)
def test_a_base_without_the_head_of_the_data(benches, tmp_path, capsys, name, own):
    """A bare body, or a head of other labels: trained, gone on with to the bit, judged, and merged
    into a model that is as good and names the labels."""
    bench = benches[name]
    folder = shutil.copytree(bench.folder, tmp_path / "base")
    task = "vision" if name == "vision" else "classify"
    if own is not None:
        config = transformers.AutoConfig.from_pretrained(folder)
        config.id2label = dict(enumerate(own))
        getattr(transformers, CLASSES[task])._model_mapping[type(config)](config).save_pretrained(
            folder
        )
    rows = benches["vision" if name == "vision" else "classify"].file
    flags = ["--base", str(folder), "--data", str(rows), "--task", task]
    more = ["--steps", "3", "--rank", "2", "--checkpoint-every", "1", "--batch-size", "3"]
    out, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    assert main(["train", *flags, "--out", out, *more]) == 0
    err = capsys.readouterr().err
    assert "is new, is trained whole" in err
    assert ("its own head has 5 classes (v, w, x, y, z)" in err) is (own is not None)
    expected = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "checkpoints" / "step-00000003.safetensors").unlink()
    (tmp_path / "run" / "result.json").unlink()
    assert main(["train", "--resume", out]) == 0
    assert "goes on after step 2" in capsys.readouterr().err
    assert all(torch.equal(expected[k], v) for k, v in weights(tmp_path / "run").items())
    capsys.readouterr()
    assert main(["eval", *flags, "--adapter", out, "--no-base", "--json"]) == 0
    [one] = json.loads(capsys.readouterr().out)["models"]
    assert main(["merge", *flags[:2], "--adapter", out, "--out", merged]) == 0
    assert "note: merged in memory" in capsys.readouterr().err
    assert main(["eval", "--base", merged, *flags[2:], "--json"]) == 0
    [two] = json.loads(capsys.readouterr().out)["models"]
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)  # of float32 sums


def test_the_command_line(benches, tmp_path, capsys):
    bench = benches["classify"]
    arguments = ["--base", str(bench.folder), "--data", str(bench.file)]
    out = str(tmp_path / "run")
    flags = ["--steps", "3", "--rank", "2", "--lr", "0.01", "--validation-fraction", "0.2"]
    assert main(["train", *arguments, "--out", out, *flags]) == 0
    err = capsys.readouterr().err
    assert "Task: classify (BertModel reads a text whole, and the rows have text and label)" in err
    assert "the head (classifier) is new, is trained whole and is saved in the adapter" in err
    assert main(["eval", *arguments, "--adapter", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in told["models"]] == ["base", "run"]
    assert set(told["models"][1]["metrics"]) == {"accuracy", "macro_f1"}
    base = ["--base", str(bench.folder)]
    assert main(["generate", *base, "--adapter", out, "--prompt", "w1 w2", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["answers"][0]["text"]
    assert text.split(" ")[0] in ("a", "b", "c")
    assert main(["preview", *arguments, "--rows", "1"]) == 0
    assert "Labels: a" in capsys.readouterr().out


def test_data_that_got_another_label_is_not_that_of_the_run(benches, tmp_path):
    """Its labels are those of the run, and no flag can leave rows out of it any more."""
    file = small.write_rows(tmp_path / "rows.jsonl", small.texts(12))
    bench = replace(benches["classify"], file=file)
    with pytest.raises(Interrupted):
        trainer(bench, tmp_path / "run", callbacks=[Signal(1)]).run()
    small.write_rows(file, [*small.texts(12), {"text": "w1", "label": "new"}])
    with pytest.raises(DataError, match="'new' is none of a, b, c") as told:
        Trainer.resume(tmp_path / "run")
    assert "This run began with other data. To go on with it, put the old" in str(told.value)


def test_judging_answers(benches, tmp_path, capsys):
    """Rows that share a prompt are one item, and answers may be as long as their references."""
    bench = benches["t5"]
    long = " ".join(["w1"] * 70)
    rows = [("w1 w2", "w3"), ("w4", long), ("w1 w2", "w5"), ("w1 w2", "w3"), ("w6", "w7")]
    data = [{"prompt": prompt, "completion": answer} for prompt, answer in rows]
    file = small.write_rows(tmp_path / "rows.jsonl", data)
    flags = ["--base", str(bench.folder), "--data", str(file), "--metrics", "exact", "--json"]
    flags += ["--save", str(tmp_path / "saved"), "--limit"]
    assert main(["eval", *flags, "2"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["data"]["items"] == 2
    assert json.loads(told.out)["data"]["rows"] == 4
    size = len(bench.base().tokenizer(long, add_special_tokens=False)["input_ids"])
    assert f"Answers of at most {size + 16} tokens, greedy" in told.err
    saved = [json.loads(line) for line in (tmp_path / "saved").read_text().splitlines()]
    assert [(one["prompt"], one["references"]) for one in saved] == [
        ("w1 w2", ["w3", "w5"]), ("w4", [long])
    ]  # fmt: skip
    assert main(["eval", *flags, "3", "--max-new-tokens", "2"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["data"]["rows"] == 5
    assert "Answers of at most 2 tokens, greedy" in told.err


def test_the_row_whose_loss_is_not_finite_is_named(benches, tmp_path, capsys):
    bench = benches["t5"]
    base = bench.base()
    adapter = bench.attached(base).snapshot("a")
    with torch.no_grad():
        for site in adapter.low_rank.values():
            site.B.mul_(1e38)
    save_adapter(adapter.with_(base=base.identity), tmp_path / "huge")
    flags = ["--base", str(bench.folder), "--adapter", str(tmp_path / "huge"), "--json"]
    assert main(["eval", *flags, "--data", str(bench.file), "--limit", "2"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["models"][1]["loss"] is None
    where = bench.data(base).where(0)
    assert f"huge: the loss of 2 of 2 rows is not a finite number, first at {where}" in told.err


def test_the_names_of_tasks_are_repeated_in_the_command_line():
    assert command.TASKS == TASKS
