"""What is saved is loaded again, value for value, and saved again byte for byte."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Replace
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError
from lorakit.formats import load_adapter, save_adapter

from .adapters import adapters, assert_equal
from .small import MEMORY, contents, small_adapter


@settings(max_examples=100, deadline=None)
@given(adapters())
def test_values_and_bytes(adapter):
    with tempfile.TemporaryDirectory(dir=MEMORY) as parent:
        first = save_adapter(adapter, Path(parent) / "first")
        loaded = load_adapter(first)
        assert_equal(adapter, loaded)
        second = save_adapter(loaded, Path(parent) / "second")
        assert contents(first) == contents(second)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.floats(1e-9, 1e9), st.booleans())
@example(3, 0.1, False)
@example(7, math.pi, True)
def test_every_scaling_is_exact(rank, scaling, rslora):
    """Whether or not an alpha exists whose division gives it."""
    spec = LoRASpec(scaling="alpha/sqrt(r)" if rslora else "alpha/r")
    sites = {"a.q": LowRank(torch.ones(rank, 2), torch.ones(2, rank), scaling)}
    with tempfile.TemporaryDirectory(dir=MEMORY) as parent:
        loaded = load_adapter(save_adapter(Adapter(sites, spec), Path(parent) / "x"))
    assert loaded.low_rank["a.q"].scaling == scaling


HASHES = """
import hashlib, sys
from pathlib import Path
from tests.formats.small import small_adapter, contents
from lorakit.formats import save_adapter
folder = save_adapter(small_adapter(), Path(sys.argv[1]))
print(hashlib.sha256(repr(sorted(contents(folder).items())).encode()).hexdigest())
"""


def test_the_same_bytes_in_every_process(tmp_path):
    """Hash order differs between processes; Python's by its seed, Rust's always."""
    folder = save_adapter(small_adapter(), tmp_path / "here")
    expected = hashlib.sha256(repr(sorted(contents(folder).items())).encode()).hexdigest()
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", HASHES, str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_order_of_the_sites_does_not_count(tmp_path):
    adapter = small_adapter()
    turned = adapter.with_(sites=dict(reversed(adapter.sites.items())))
    assert contents(save_adapter(adapter, tmp_path / "a")) == contents(
        save_adapter(turned, tmp_path / "b")
    )


def test_config_is_short_where_the_words_are_exact(tmp_path):
    folder = save_adapter(small_adapter(), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == {}  # the spec's match nothing, and PEFT would warn
    assert config["base_model_name_or_path"] == "owner/base"
    assert load_adapter(folder).spec.rank_pattern == {"k": 1, "a": 2}


@pytest.mark.parametrize("targets", ["all-linear", "attention", ("q_proj", r".*v_proj")])
def test_words_without_meaning_to_peft_become_paths(tmp_path, targets):
    adapter = small_adapter()
    folder = save_adapter(adapter.with_(spec=LoRASpec(targets=targets)), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(adapter.sites)
    assert load_adapter(folder).spec.targets == targets


def test_paths_of_one_name_become_an_expression(tmp_path):
    """As a list entry, "fc" would also select "block.fc"."""
    site = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    folder = save_adapter(Adapter({"fc": site, "a.b": site}), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == r"a\.b|fc"


def test_different_ranks_become_a_short_pattern(tmp_path):
    sites = {
        f"m.layers.{i}.{name}": LowRank(torch.ones(r, 2), torch.ones(2, r), 2.0)
        for i in range(12)
        for name, r in (("q", 8), ("v", 8), ("down", 2))
    }
    sites["m.layers.11.q"] = LowRank(torch.ones(3, 2), torch.ones(2, 3), 1.0)
    folder = save_adapter(Adapter(sites, LoRASpec(rank=8, alpha=16)), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"down": 2, "m.layers.11.q": 3}
    assert config["alpha_pattern"] == {"down": 4, "m.layers.11.q": 3}


def test_dtype_is_kept_or_cast(tmp_path):
    site = LowRank(torch.randn(2, 3).bfloat16(), torch.randn(4, 2).bfloat16(), 1.0)
    head = Replace({"weight": torch.randn(2, 2).double()})
    folder = save_adapter(Adapter({"a.q": site, "head": head}), tmp_path / "a")
    assert load_adapter(folder).dtypes == {torch.bfloat16, torch.float64}
    loaded = load_adapter(folder, dtype=torch.float32)
    assert loaded.dtypes == {torch.float32}
    assert torch.equal(loaded.low_rank["a.q"].A, site.A.float())


def test_a_cast_that_overflows_is_an_error(tmp_path):
    site = LowRank(torch.full((1, 2), 1e6), torch.ones(2, 1), 1.0)
    folder = save_adapter(Adapter({"a.q": site}), tmp_path / "a")
    with pytest.raises(FormatError, match=r"a\.q: A has 2 of 2 values that are NaN or Inf"):
        load_adapter(folder, dtype=torch.float16)


def test_tensors_that_are_views_are_saved_by_value(tmp_path):
    big = torch.arange(24.0).reshape(4, 6)
    site = LowRank(big[::2, 1:4], big.T[:5, :2], 1.0)
    loaded = load_adapter(save_adapter(Adapter({"a.q": site}), tmp_path / "a"))
    assert torch.equal(loaded.low_rank["a.q"].A, big[::2, 1:4])
    assert torch.equal(loaded.low_rank["a.q"].B, big.T[:5, :2])


def test_infinite_metrics_do_not_lose_an_adapter(tmp_path):
    adapter = small_adapter(provenance={"metrics": {"perplexity": math.inf}})
    loaded = load_adapter(save_adapter(adapter, tmp_path / "a"))
    assert loaded.provenance["metrics"]["perplexity"] == math.inf


def test_a_head_that_peft_cannot_wrap_is_saved_all_the_same(tmp_path):
    """PEFT's "classifier" would cover the adapted pre_classifier; it stays unnamed."""
    sites = {
        "pre_classifier": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0),
        "classifier": Replace({"weight": torch.ones(2, 2)}),
    }
    adapter = Adapter(sites, LoRASpec(train_modules=("classifier",)), task_type="SEQ_CLS")
    folder = save_adapter(adapter, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (None, None)
    assert_equal(adapter, load_adapter(folder))


def test_a_file_beside_its_config_is_loaded_too(tmp_path):
    folder = save_adapter(small_adapter(), tmp_path / "a")
    assert_equal(small_adapter(), load_adapter(folder / "adapter_model.safetensors"))
    assert_equal(small_adapter(), load_adapter(folder / "adapter_config.json"))
    renamed = (folder / "adapter_model.safetensors").rename(folder / "mine.safetensors")
    assert_equal(small_adapter(), load_adapter(str(renamed)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"provenance": {"f": object()}}, "not plain JSON"),
        ({"provenance": {"f": {1: 2}}}, "the key 1 is no string"),
        ({"tokenizer_files": {"../evil": b""}}, "no name of a tokenizer"),
        ({"tokenizer_files": {"adapter_config.json": b""}}, "no name of a tokenizer"),
        ({"task_type": "POETRY"}, "task_type is 'POETRY'"),
    ],
)
def test_what_the_folder_cannot_hold(tmp_path, changes, words):
    with pytest.raises(FormatError, match=words):
        save_adapter(small_adapter(**changes), tmp_path / "a")
    assert not (tmp_path / "a").exists()


LINEAR = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ({"a.q": LowRank(LINEAR.A, LINEAR.B, math.nan)}, "a.q: its scaling is nan"),
        (
            {
                "a.q": LowRank(LINEAR.A, LINEAR.B, 1.0, bias=torch.ones(2)),
                "a.e": LowRank(LINEAR.A, LINEAR.B, 1.0, "embedding"),
            },
            "refuses embeddings",
        ),
        (
            {"a.q": LINEAR, "a.d": LowRank(LINEAR.A, LINEAR.B, 1.0, magnitude=torch.ones(2))},
            "a.q: is plain LoRA, and a.d is DoRA; PEFT has one switch",
        ),
        (
            {
                "a.b": LowRank(LINEAR.A, LINEAR.B, 1.0, bias=torch.ones(2)),
                "a.d": LowRank(LINEAR.A, LINEAR.B, 1.0, magnitude=torch.ones(2)),
            },
            "a.b: has a bias of B, and a.d is DoRA",
        ),
        ({"a.q": LINEAR, "a": Replace({"q.weight": torch.ones(2, 2)})}, "trained whole; keep one"),
        ({"a.lora_A.weight": Replace({"": torch.ones(2, 2)})}, "cannot be told apart"),
        ({"a.base_layer.q": LINEAR}, "cannot be told apart"),
        (
            {"a": Replace({"b.bias": torch.ones(2)}), "a.b.bias": Replace({"": torch.ones(2)})},
            "cannot be told apart",
        ),
    ],
)
def test_sites_that_have_no_place(tmp_path, sites, words):
    with pytest.raises(FormatError, match=words):
        save_adapter(Adapter(sites), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FormatError, match="is a file"):
        save_adapter(small_adapter(), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"
