"""The real PEFT writes what we read, and reads what we write, with warnings as errors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Replace
from lorakit.formats import load_adapter, save_adapter
from tests.interop.peft_cases import CASES, Case, load_with_peft, logits, train_with_peft

PREFIX = "base_model.model."


@pytest.fixture(params=CASES, scope="module")
def trained(request, tmp_path_factory):
    """A case, PEFT's model of it, and the folder that PEFT saved."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("peft")
    return case, train_with_peft(case, folder), folder


def peft_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    return {
        path.removeprefix(PREFIX): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def low_rank_of(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A, B and bias as PEFT holds them in memory."""
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"], None
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    return down.weight, up.weight, up.bias


def test_reads_what_peft_holds_in_memory(trained):
    case, model, folder = trained
    adapter = load_adapter(folder)
    layers = peft_layers(model)
    assert set(adapter.low_rank) == set(layers)
    for path, layer in layers.items():
        site = adapter.low_rank[path]
        A, B, bias = low_rank_of(layer)
        assert torch.equal(site.A, A)
        assert torch.equal(site.B, B)
        assert (site.bias is None) == (bias is None)
        assert bias is None or torch.equal(site.bias, bias)
        assert (site.magnitude is None) == ("default" not in layer.lora_magnitude_vector)
        if site.magnitude is not None:
            magnitude = layer.lora_magnitude_vector["default"].weight
            assert torch.equal(site.magnitude, magnitude.flatten())
        assert site.scaling == layer.scaling["default"]
        assert site.rank == layer.r["default"]
    assert adapter.task_type == case.config.get("task_type")


def test_reads_every_tensor_of_the_file_once(trained):
    """What is in the file is in the adapter, but for PEFT's copies and the base's own weights."""
    _, _, folder = trained
    adapter = load_adapter(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    ignored = re.compile(r".*\.(base_layer\.weight|original_module\..*|modules_to_save\..*)")
    expected = sum(t.numel() for key, t in stored.items() if not ignored.fullmatch(key))
    assert adapter.num_parameters == expected


def test_replaced_values_are_the_trained_ones(trained):
    _, model, folder = trained
    live = dict(model.named_parameters())
    for path, site in load_adapter(folder).replaced.items():
        for name, tensor in site.tensors_by_name.items():
            full = f"{path}.{name}" if name else path
            module, _, own = full.rpartition(".")
            candidates = [
                f"{PREFIX}{path}.modules_to_save.default.{name}",
                f"{PREFIX}{module}.base_layer.{own}",
                f"{PREFIX}{full}",
            ]
            found = next(live[key] for key in candidates if key in live)
            assert torch.equal(tensor, found), full


def test_peft_loads_ours_and_answers_as_before(trained, tmp_path):
    case, model, folder = trained
    adapter = load_adapter(folder, keep_base_weights=True)
    again = load_with_peft(case, save_adapter(adapter, tmp_path / "ours"))
    before, after = model.state_dict(), again.state_dict()
    assert set(before) == set(after)
    # the base layer of an embedding is there twice where PEFT ties it; all values must agree
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert torch.equal(logits(model, case), logits(again, case))


def test_ours_is_stable(trained, tmp_path):
    _, _, folder = trained
    first = save_adapter(load_adapter(folder), tmp_path / "first")
    second = save_adapter(load_adapter(first), tmp_path / "second")
    assert names(first) == names(second)
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def random_adapter(case: Case, folder: Path, tmp_path: Path) -> Adapter:
    """Values that PEFT did not make, with a rank and a scaling of their own at each site."""
    generator = torch.Generator().manual_seed(3)
    sites = {}
    for number, (path, site) in enumerate(load_adapter(folder).sites.items()):
        if isinstance(site, Replace):
            sites[path] = Replace(
                {k: torch.randn(t.shape, generator=generator) for k, t in site.tensors().items()}
            )
            continue
        groups = site.rank // site.B.shape[1]
        rank = groups * (1 + number % 3)
        A = torch.randn(rank, *site.A.shape[1:], generator=generator)
        B = torch.randn(site.B.shape[0], rank // groups, *site.B.shape[2:], generator=generator)
        bias = None if site.bias is None else torch.randn(site.bias.shape, generator=generator)
        magnitude = site.magnitude
        magnitude = None if magnitude is None else torch.rand(magnitude.shape, generator=generator)
        sites[path] = LowRank(A, B, math.pi / (number + 1), site.kind, bias, magnitude)
    return load_adapter(folder).with_(sites=sites)


def test_peft_takes_every_rank_and_scaling(trained, tmp_path):
    case, _, folder = trained
    adapter = random_adapter(case, folder, tmp_path)
    model = load_with_peft(case, save_adapter(adapter, tmp_path / "ours"))
    layers = peft_layers(model)
    assert set(layers) == set(adapter.low_rank)
    for path, site in adapter.low_rank.items():
        A, B, bias = low_rank_of(layers[path])
        assert torch.equal(A, site.A)
        assert torch.equal(B, site.B)
        assert site.bias is None or torch.equal(bias, site.bias)
        if site.magnitude is not None:
            magnitude = layers[path].lora_magnitude_vector["default"].weight
            assert torch.equal(magnitude.flatten(), site.magnitude)
        assert layers[path].scaling["default"] == site.scaling
    again = load_adapter(tmp_path / "ours")
    assert {p: s.scaling for p, s in again.low_rank.items()} == {
        p: s.scaling for p, s in adapter.low_rank.items()
    }


def test_the_words_for_the_targets_stay(trained, tmp_path):
    """A short list where PEFT had one, not all paths."""
    case, _, folder = trained
    if "layers_pattern" in case.config:
        pytest.skip("becomes one expression")
    theirs = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    ours = json.loads(
        (save_adapter(load_adapter(folder), tmp_path / "a") / "adapter_config.json").read_text()
    )["target_modules"]
    assert ours == (sorted(theirs) if isinstance(theirs, list) else theirs)
