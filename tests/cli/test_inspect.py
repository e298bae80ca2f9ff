"""``lorakit inspect``: norms and ranks against the dense change, and every setting."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit import Adapter, LoRASpec, save_adapter
from lorakit.cli.inspect_ import block_of
from lorakit.cli.main import main
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank, Replace


def low_rank(rank, out, into, scaling, seed):
    random = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, into, generator=random), torch.randn(out, rank, generator=random), scaling
    )


@pytest.fixture
def adapter():
    sites = {
        f"model.layers.{i}.{name}": low_rank(2, 5, 7, 1.5, 10 * i + k)
        for i in (0, 2, 10)
        for k, name in enumerate(("self_attn.q_proj", "mlp.up_proj"))
    }
    sites["score"] = Replace({"weight": torch.ones(3, 5)})
    spec = LoRASpec(
        rank=2, alpha=3.0, targets=("q_proj", "up_proj"), train_modules=("score",), dropout=0.1
    )
    base = BaseIdentity("someone/base", "LlamaForCausalLM", revision="0123456789abcdef")
    return Adapter(
        sites, spec, base, {"data": {"digest": "abc", "files": ["x.csv"]}}, task_type="SEQ_CLS"
    )


@pytest.fixture
def folder(adapter, tmp_path):
    return str(save_adapter(adapter, tmp_path / "run" / "adapter"))


def test_json_holds_everything(adapter, folder, capfd):
    assert main(["inspect", folder, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["parameters"] == 6 * 2 * (5 + 7) + 15
    assert found["bytes"] == 4 * found["parameters"]
    assert found["dtypes"] == ["float32"]
    assert found["ranks"] == [2]
    assert found["task_type"] == "SEQ_CLS"
    assert found["base"]["name"] == "someone/base"
    assert found["settings"]["alpha"] == 3.0
    assert found["settings"]["dropout"] == 0.1
    assert found["provenance"] == {"data": {"digest": "abc", "files": ["x.csv"]}}
    paths = [site["path"] for site in found["sites"]]
    assert [p for p in paths if "up_proj" in p] == [
        f"model.layers.{i}.mlp.up_proj" for i in (0, 2, 10)
    ]
    for site in found["sites"]:
        if site["kind"] == "trained whole":
            assert (site["path"], site["parameters"], site["norm"]) == ("score", 15, None)
            continue
        own = adapter.low_rank[site["path"]]
        dense = own.scaling * own.B.double() @ own.A.double()
        assert site["norm"] == pytest.approx(float(dense.norm()), rel=1e-10)
        values = torch.linalg.svdvals(dense)[:2]
        p = values / values.sum()
        assert site["effective_rank"] == pytest.approx(
            float((-(p * p.log()).sum()).exp()), rel=1e-8
        )
        assert (site["shape"], site["rank"], site["scaling"]) == ([5, 7], 2, 1.5)


def test_blocks_and_sites(folder, capfd):
    assert main(["inspect", folder]) == 0
    out, _ = capfd.readouterr()
    lines = [line.split() for line in out.splitlines() if line.startswith(("model.", "score"))]
    assert [line[0] for line in lines] == [*(f"model.layers.{i}" for i in (0, 2, 10)), "score"]
    for word in ("someone/base@0123456789ab", "SEQ_CLS", "alpha/r", "q_proj", "x.csv", "0.1"):
        assert word in out
    assert "abc" not in out
    assert main(["inspect", folder, "--all"]) == 0
    assert "digest abc" in capfd.readouterr().out
    assert main(["inspect", folder, "--layers"]) == 0
    out, _ = capfd.readouterr()
    assert out.count("self_attn.q_proj") == 3
    assert out.count("mlp.up_proj") == 3


def test_a_run_folder_and_one_site_in_a_block(tmp_path, capfd):
    one = Adapter({"layers.0.fc": low_rank(1, 3, 4, 2.0, 0)})
    save_adapter(one, tmp_path / "adapter")
    for flags in ([], ["--layers"]):
        assert main(["inspect", str(tmp_path), *flags]) == 0
        out, err = capfd.readouterr()
        assert "is a run folder" in err
        assert "layers.0.fc" in out
        assert "not said by the file" in out


def test_an_untrained_adapter_is_called_so(tmp_path, capfd):
    site = LowRank(torch.ones(2, 4), torch.zeros(3, 2), 1.0)
    save_adapter(Adapter({"fc": site}), tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "Every low-rank change is zero" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0"),
        ("transformer.h.11.attn.c_attn", "transformer.h.11"),
        ("encoder.block.3.layer.0.SelfAttention.q", "encoder.block.3"),
        ("lm_head", "lm_head"),
        ("model.embed_tokens", "model"),
        ("0", "0"),
        ("fc1.bias", "fc1"),
    ],
)
def test_block_of(path, block):
    assert block_of(path) == block


@given(st.lists(st.from_regex(r"[a-z]{1,3}|\d{1,2}", fullmatch=True), min_size=1, max_size=5))
def test_a_block_holds_its_module(parts):
    path = ".".join(parts)
    block = block_of(path)
    assert path == block or path.startswith(f"{block}.")


@pytest.mark.parametrize("what", ["nothing-here", "a.safetensors"])
def test_mistakes(what, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    assert main(["inspect", what]) == 2
    out, err = capfd.readouterr()
    assert what in err
    assert (out, "Traceback" in err) == ("", False)
