"""PEFT's layout of fused experts and routers: numbers, names, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorakit import Adapter, LoRASpec, load_adapter, save_adapter
from lorakit.core.safetensors_io import read_safetensors, write_safetensors
from lorakit.core.sites import LowRank
from lorakit.errors import FormatError, SpecError
from lorakit.formats.format import Hints
from lorakit.formats.registry import get
from lorakit.formats.runtimes import shape_for

EXPERTS = "model.layers.0.mlp.experts"
PREFIX = "base_model.model."
E, R, D, M = 3, 2, 5, 4


def site(d_out: int, d_in: int, rank: int = R, seed: int = 0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(E, rank, d_in, generator=draw)
    return LowRank(A, torch.randn(E, d_out, rank, generator=draw), 1.5, "experts")


def adapter(**more: LowRank) -> Adapter:
    sites = {
        f"{EXPERTS}.gate_up_proj": site(2 * M, D),
        f"{EXPERTS}.down_proj": site(D, M, seed=1),
        "model.layers.0.mlp.gate": LowRank(torch.randn(R, D), torch.randn(E, R), 1.5, "router"),
        "model.layers.0.self_attn.q_proj": LowRank(torch.randn(R, D), torch.randn(D, R), 1.5),
        **more,
    }
    spec = LoRASpec(rank=R, alpha=3.0, targets=("experts", "router", "q_proj"), dropout=0.1)
    return Adapter(sites, spec)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder: Path, *, config: dict | None = None, tensors: dict | None = None) -> None:
    """Change the config, and replace tensors or (with ``None``) take them out; no header left."""
    path = folder / "adapter_model.safetensors"
    own = {**read_safetensors(path)[0], **(tensors or {})}
    write_safetensors(path, {key: t for key, t in own.items() if t is not None}, {})
    merged = {**config_of(folder), **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(merged))


def test_a_is_laid_out_by_expert_and_b_by_rank(tmp_path):
    """As PEFT's own einsum "o r e, e r i -> e o i" reads them."""
    given = adapter()
    save_adapter(given, tmp_path / "a")
    keys = read_safetensors(tmp_path / "a" / "adapter_model.safetensors")[0]
    for wrapped, name in (("experts.base_layer", "gate_up_proj"), ("experts", "down_proj")):
        A = keys[f"{PREFIX}model.layers.0.mlp.{wrapped}.lora_A.weight"]
        B = keys[f"{PREFIX}model.layers.0.mlp.{wrapped}.lora_B.weight"]
        own = given.low_rank[f"{EXPERTS}.{name}"]
        by_expert, by_rank = A.reshape(E, -1, A.shape[1]), B.reshape(len(B), -1, E)
        found = torch.einsum("o r e, e r i -> e o i", by_rank, by_expert)
        assert torch.allclose(found, own.B @ own.A, atol=1e-6)
        assert not torch.allclose(
            torch.einsum("o e r, e r i -> e o i", B.reshape(len(B), E, -1), by_expert),
            own.B @ own.A,
        )
    config = config_of(tmp_path / "a")
    assert config["target_modules"] == ["q_proj"]
    assert config["target_parameters"] == [
        f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj", "model.layers.0.mlp.gate.weight",
    ]  # fmt: skip
    assert config["lora_dropout"] == 0, "PEFT refuses dropout beside parameters"


def test_round_trip_is_bitwise(tmp_path):
    ranks = {f"{EXPERTS}.down_proj": site(D, M, rank=4)}
    for number, given in enumerate((adapter(), adapter(**ranks))):
        folder = tmp_path / str(number)
        save_adapter(given, folder)
        found = load_adapter(folder)
        assert found.spec == given.spec
        for path, own in given.low_rank.items():
            other = found.low_rank[path]
            assert (own.kind, own.scaling) == (other.kind, other.scaling)
            assert torch.equal(own.A, other.A)
            assert torch.equal(own.B, other.B)
        rewrite(folder)  # without our header the sites are the same
        bare = load_adapter(folder)
        for path, own in given.low_rank.items():
            assert torch.equal(own.B, bare.low_rank[path].B)
        assert bare.spec.targets == (
            f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj", "model.layers.0.mlp.gate", "q_proj",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["mlx", "loralib", "gguf", "kohya", "diffusers", "onnx"])
def test_other_formats_name_what_they_leave_out(name):
    base = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 10}
    base |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 9}
    given, routed = adapter(), {f"{EXPERTS}.down_proj", "model.layers.0.mlp.gate"}
    if name in ("kohya", "diffusers"):  # whose names are those of pipelines
        given = Adapter({f"unet.{path}": own for path, own in given.sites.items()}, given.spec)
        routed = {f"unet.{path}" for path in routed}
    if name in ("kohya", "diffusers", "onnx", "gguf"):  # nothing is left that they could hold
        given = Adapter({path: given.sites[path] for path in routed}, given.spec)
        with pytest.raises(FormatError, match=r"experts|router"):
            get(name).write(given, Hints(base=base))
        return
    lost = get(name).write(given, Hints(base=base)).lost
    assert all("expert" in lost[path] or "router" in lost[path] for path in routed)


def test_programs_that_do_not_apply_them():
    for name in ("vllm", "mistralrs"):
        with pytest.raises(FormatError, match="a site of the kind experts"):
            shape_for(name, adapter(), None, Hints())


def test_from_peft():
    config = {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.down_proj", "gate.weight"],
    }
    spec = LoRASpec.from_peft({"r": 4, "lora_alpha": 8, **config})
    assert spec.targets == ("experts.down_proj", "gate", "q_proj")
    spec = LoRASpec.from_peft({"r": 4, "lora_alpha": 8, **config, "target_modules": []})
    assert spec.targets == ("experts.down_proj", "gate")


REFUSED_CONFIGS = {
    "a single string": ({"target_parameters": "experts.down_proj"}, "a list of parameters"),
    "every weight": ({"target_parameters": ["weight"]}, "a list of parameters"),
    "numbers": ({"target_parameters": [3]}, "a list of parameters"),
    "layers": (
        {"target_parameters": ["down_proj"], "layers_to_transform": [0]},
        "layers_to_transform does not act",
    ),
}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_refused_configs(name):
    fields, words = REFUSED_CONFIGS[name]
    with pytest.raises(SpecError, match=words):
        LoRASpec.from_peft({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **fields})


OUTER, INNER = f"{PREFIX}{EXPERTS}", f"{PREFIX}{EXPERTS}.base_layer"
REFUSED_FILES = {
    "no names of parameters": ({"target_parameters": None}, {}, "name in target_parameters"),
    "too few names": ({"target_parameters": ["experts.down_proj"]}, {}, "cannot be told"),
    "names of others": ({"target_parameters": ["mlp.w1", "mlp.w2"]}, {}, "cannot be told"),
    "names in no known order": (
        {"target_parameters": ["experts.w1", "experts.w2", "gate.weight"]}, {}, "cannot be told",
    ),
    "another rank": ({"r": 4}, {}, r"\[4·E, d_in\]"),
    "A by another number of experts": (
        {}, {f"{OUTER}.lora_A.weight": torch.zeros(R * 4, M)}, "experts need",
    ),
    "B that does not fit": ({}, {f"{OUTER}.lora_B.weight": torch.zeros(D, 7)}, "experts need"),
    "B missing": ({}, {f"{INNER}.lora_B.weight": None}, "lora_B.weight is missing"),
    "the outer level missing": (
        {}, {f"{OUTER}.lora_A.weight": None, f"{OUTER}.lora_B.weight": None}, "cannot be told",
    ),
    "a bias of B": ({}, {f"{OUTER}.lora_B.bias": torch.zeros(D)}, "has a bias"),
    "NaN": ({}, {f"{OUTER}.lora_A.weight": torch.full((R * E, M), float("nan"))}, "NaN"),
    "DoRA": ({"use_dora": True}, {}, "lacks lora_magnitude_vector"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_refused_files(name, tmp_path):
    config, tensors, words = REFUSED_FILES[name]
    save_adapter(adapter(), tmp_path / "a")
    rewrite(tmp_path / "a", config=config, tensors=tensors)
    with pytest.raises(FormatError, match=words):
        load_adapter(tmp_path / "a")


def test_what_peft_has_no_place_for(tmp_path):
    biased = LowRank(torch.randn(R, D), torch.randn(D, R), 1.5, bias=torch.zeros(D))
    with pytest.raises(FormatError, match="refuses parameters"):
        save_adapter(adapter(**{"model.layers.0.self_attn.q_proj": biased}), tmp_path / "a")
    long = LowRank(torch.randn(R, D), torch.randn(D, R), 1.5, magnitude=torch.ones(D))
    with pytest.raises(FormatError, match="one switch"):
        save_adapter(adapter(**{"model.layers.0.self_attn.q_proj": long}), tmp_path / "a")
    with pytest.raises(FormatError, match="apart by their order"):
        save_adapter(adapter(**{f"{EXPERTS}.w3": site(D, M)}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
