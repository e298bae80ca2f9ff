"""Files of mixtures of experts: fused, or an expert a tensor, which transformers joins."""

from __future__ import annotations

import pytest
import torch
import transformers

from lorakit import LoRASpec, attach, load_adapter, save_adapter
from lorakit.cli.inspect_ import site_facts
from lorakit.errors import FormatError
from lorakit.workflows.merge.files import merge_files
from lorakit.workflows.merge.memory import merge_in_memory
from tests import models, moe_models
from tests.bases import tiny


def ids() -> torch.Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(2))


def adapted(family, targets):
    """A model with an adapter, the adapter, and the logits of both."""
    model = moe_models.FAMILIES[family]()
    handle = attach(model, LoRASpec(rank=2, targets=targets))
    models.randomize(handle)
    with torch.no_grad():
        return handle.snapshot(), model(ids()).logits


def saved(family, folder):
    moe_models.FAMILIES[family]().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids()).logits


def test_experts_that_files_hold_fused(tmp_path):
    adapter, expected = adapted("gpt_oss", ("experts", "router", "q_proj"))
    found = merge_files(saved("gpt_oss", tmp_path / "base"), [(adapter, 1.0)], tmp_path / "out")
    assert found.num_changed == 8
    assert found.worst_row <= 1
    # float32 logits of order 1 after two layers
    assert (logits(tmp_path / "out") - expected).abs().max() <= 2e-5
    assert (logits(tmp_path / "base") - expected).abs().max() > 0.1


def test_experts_that_files_hold_one_by_one(tmp_path):
    base = saved("mixtral", tmp_path / "base")
    adapter, expected = adapted("mixtral", "router")
    merge_files(base, [(adapter, 1.0)], tmp_path / "router")
    assert (logits(tmp_path / "router") - expected).abs().max() <= 2e-5
    adapter, expected = adapted("mixtral", ("experts", "v_proj"))
    with pytest.raises(FormatError, match="--in-memory"):
        merge_files(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_in_memory(base, [(adapter, 1.0)], tmp_path / "out")
    assert (logits(tmp_path / "out") - expected).abs().max() <= 2e-5


def test_what_inspect_says_of_experts(tmp_path):
    adapter = load_adapter(save_adapter(adapted("mixtral", "experts")[0], tmp_path / "a"))
    path = "model.layers.1.mlp.experts.down_proj"
    site = adapter.low_rank[path]
    facts = site_facts(path, site)
    assert (facts.kind, facts.shape, facts.rank) == ("experts", (4, 16, 24), 2)
    exact = site.scaling * site.B.double() @ site.A.double()
    assert facts.norm == pytest.approx(float(exact.norm()))
    assert 2 < facts.effective_rank <= 8
