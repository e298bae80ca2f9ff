"""``lorakit merge``: what it prints, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers

from lorakit import Adapter, LoRASpec, attach, save_adapter
from lorakit.cli.main import main
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank
from tests import models
from tests.bases import tiny


@pytest.fixture
def base(tmp_path):
    return tiny.write_folder(tmp_path / "base", tiny.llama(tie_word_embeddings=True))


@pytest.fixture
def adapter(tmp_path):
    handle = attach(tiny.llama(), LoRASpec(rank=2, alpha=4, targets="all-linear"))
    models.randomize(handle, 0.05)
    return handle.snapshot()


def save(adapter, tmp_path, name="a"):
    return str(save_adapter(adapter, tmp_path / name))


def test_it_merges_and_compares(base, adapter, tmp_path, capfd):
    ref = save(adapter, tmp_path)
    out = tmp_path / "out"
    assert main(["merge", "--base", str(base), "--adapter", f"{ref}=0.7", "--out", str(out),
                 "--json"]) == 0  # fmt: skip
    facts = json.loads(capfd.readouterr().out)
    assert facts["path"] == str(out)
    assert facts["adapters"] == [{"name": "a", "weight": 0.7}]
    assert facts["num_changed"] == 14
    assert 0 < facts["worst_row"] <= 1
    text = facts["text"]
    assert text["dtype"] == "float64"
    assert text["tokens"] > 50
    assert 0 < text["largest_logit_difference"] < 1e-4
    assert text["perplexity_merged"] == pytest.approx(text["perplexity_adapter"], rel=1e-5)
    assert text["same_choice"] > 0.99
    assert transformers.AutoTokenizer.from_pretrained(out)("hi")["input_ids"]


def test_data_is_the_text(base, adapter, tmp_path, capfd):
    ref = save(adapter, tmp_path)
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a b", "completion": "c d e"}\n' * 3)
    arguments = ["merge", "--base", str(base), "--adapter", ref, "--dtype", "bfloat16"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--data", str(data),
                 "--format", "plain"]) == 0  # fmt: skip
    out = capfd.readouterr().out
    assert "14 of " in out
    assert "perplexity" in out
    assert main([*arguments, "--out", str(tmp_path / "two"), "--no-verify"]) == 0
    assert "perplexity" not in capfd.readouterr().out


def test_what_is_merged_already_is_not_used_again(base, adapter, tmp_path, capfd):
    """It would act twice, and the weights of so small a change pass for rounding."""
    ref, out = save(adapter, tmp_path), str(tmp_path / "out")
    arguments = ["--adapter", ref, "--out"]
    assert main(["merge", "--base", str(base), *arguments, out]) == 0
    again = ["merge", "--base", out, *arguments, str(tmp_path / "two")]
    asking = ["generate", "--base", out, "--adapter", ref, "--prompt", "a", "--format", "plain"]
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a b", "completion": "c d e"}\n' * 3)
    rows = ["--data", str(data), "--format", "plain"]
    training = ["train", "--base", out, "--from", ref, *rows, "--out", str(tmp_path / "run")]
    measured = ["compress", ref, "--until-loss", "0.1", "--base", out, *rows]
    measured += ["--out", str(tmp_path / "smaller")]
    for command in (again, asking, training, measured):
        capfd.readouterr()
        assert main(command) == 2
        assert f"was merged into {out} already" in capfd.readouterr().err
    assert main([*again, "--allow-other-base"]) == 0


def test_an_adapter_is_told_of_a_merge_after_another_and_can_be_taken_out(
    base, adapter, tmp_path, capfd
):
    ref = save(adapter, tmp_path)
    weaker = {path: dataclasses.replace(site, A=site.A / 2) for path, site in adapter.sites.items()}
    other = save(adapter.with_(sites=weaker), tmp_path, name="other")
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    assert main(["merge", "--base", str(base), "--adapter", ref, "--out", one]) == 0
    assert main(["merge", "--base", one, "--adapter", other, "--out", two]) == 0
    capfd.readouterr()
    again = ["merge", "--base", two, "--adapter", ref, "--out", three]
    assert main(again) == 2
    assert f"was merged into {two} already" in capfd.readouterr().err
    again[4] = f"{ref}=-1"
    assert main(again) == 0
    capfd.readouterr()
    asking = ["generate", "--base", three, "--prompt", "a", "--format", "plain"]
    assert main([*asking, "--adapter", ref]) == 0
    assert main([*asking, "--adapter", other]) == 2


def test_without_a_tokenizer_the_note_names_no_folder_that_is_gone(base, adapter, tmp_path, capfd):
    ref, out = save(adapter, tmp_path), tmp_path / "out"
    for file in base.glob("*token*"):
        file.unlink()
    assert main(["merge", "--base", str(base), "--adapter", ref, "--out", str(out)]) == 0
    err = capfd.readouterr().err
    assert "not compared on text: the merged model holds no tokenizer" in err
    assert str(out) not in err


def test_the_comparison_can_fail(base, adapter, tmp_path):
    """Another merged model than base + adapter shows in the logits."""
    from lorakit.workflows.merge.check import compare_merged
    from lorakit.workflows.merge.files import merge_files

    merge_files(base, (adapter, 0.5), tmp_path / "half")
    check = compare_merged(base, [(adapter, 1.0)], tmp_path / "half", [list(range(5, 60))],
                           torch.float32)  # fmt: skip
    assert check.largest_logit_difference > 1e-3


def test_bad_inputs_exit_with_2(base, adapter, tmp_path, capfd):
    good = save(adapter, tmp_path, "good")
    path, site = next(iter(adapter.sites.items()))
    other = adapter.with_(base=BaseIdentity("other", "MistralForCausalLM", {"x": (1,)}))
    half = tmp_path / "half"
    tiny.write_folder(half, tiny.llama().half())
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()

    def odd(name, sites):
        return save(Adapter(sites), tmp_path, name)

    tied = LowRank(torch.ones(1, 261), torch.ones(32, 1), 1.0, "embedding")
    cases = {
        "unknown path": (
            base,
            odd("p", {"model.layers.0.nowhere": site}),
            "new",
            "not in this model",
        ),
        "shape": (base, odd("s", {path: LowRank(site.A[:, 1:], site.B, 1.0)}), "new", "has shape"),
        "base": (base, save(other, tmp_path, "o"), "new", "another one"),
        "overflow": (half, odd("n", {path: LowRank(site.A, site.B, 1e9)}), "new", "NaN or Inf"),
        "tied": (base, odd("t", {"model.embed_tokens": tied}), "new", "--untie"),
        "out": (base, good, "full", "not empty"),
        "weight": (base, f"{good}=0", "new", "changes nothing"),
        "missing": (tmp_path / "no", good, "new", "no file or folder"),
    }
    for name, (where, ref, out, message) in cases.items():
        code = main(["merge", "--base", str(where), "--adapter", ref, "--out", str(tmp_path / out)])
        err = capfd.readouterr().err
        assert code == 2, (name, err)
        assert message in err, (name, err)
        assert "Traceback" not in err
        assert not (tmp_path / "new").exists(), name
    assert main(["merge", "--base", str(base), "--out", str(tmp_path / "new")]) == 2
    assert "give --adapter" in capfd.readouterr().err
