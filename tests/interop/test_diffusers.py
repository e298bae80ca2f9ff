"""Our files in the real diffusers, and its files here: the outputs of whole components.

Tolerance 1e-5 on outputs of order 1: the same float32 products summed in another order.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from peft.utils import get_peft_model_state_dict

from lorakit.core.adapter import Adapter
from lorakit.core.safetensors_io import read_safetensors, write_safetensors
from lorakit.formats.diffusers import FORMAT as DIFFUSERS
from lorakit.formats.diffusers import METADATA
from lorakit.formats.format import Hints
from lorakit.formats.kohya import FORMAT as KOHYA
from tests.formats.pictures import (
    adapter_for,
    attached,
    components,
    outputs,
    pipeline,
    read,
    site_for,
    write,
)

FAMILIES = ("sd1", "sdxl", "flux")


@pytest.fixture(autouse=True)
def _quiet():
    """diffusers says through logging and warnings what these cases are about."""
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def pipe_of(family, seed=0):
    """Components, and a pipeline around them; Flux' T5 is left out, as its loader does."""
    torch.manual_seed(seed)
    parts = components(family)
    used = {n: m for n, m in parts.items() if (family, n) != ("flux", "text_encoder_2")}
    return used, pipeline(family, parts)


def loaded(pipe, path: Path, weight: float = 1.0):
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="a")
    if weight != 1:
        pipe.set_adapters("a", weight)


def difference(first, second) -> float:
    return max((first[n] - second[n]).abs().max().item() for n in first)


def test_our_file(family, tmp_path):
    """Ranks, alphas and kinds mixed; at weight 1 and 0.5; unloaded again."""
    parts, pipe = pipe_of(family)
    bare = outputs(family, parts)
    adapter = adapter_for(parts, ranks=(2, 4, 5), scalings=(0.25, 1.0, 1.5), share=0.4)
    with attached(parts, adapter):
        ours = outputs(family, parts)
    with attached(parts, adapter, 0.5):
        half = outputs(family, parts)
    assert min(difference(bare, ours), difference(half, ours)) > 1e-2
    path = write(DIFFUSERS.write(adapter, Hints()), tmp_path)
    loaded(pipe, path)
    assert difference(ours, outputs(family, parts)) <= 1e-5
    pipe.set_adapters("a", 0.5)
    assert difference(half, outputs(family, parts)) <= 1e-5
    pipe.unload_lora_weights()
    assert difference(bare, outputs(family, parts)) == 0
    # the same file without its metadata: the check above can fail
    tensors, metadata = read_safetensors(path)
    (tmp_path / "bare").mkdir()
    stripped = tmp_path / "bare" / path.name
    tensors = {k: v for k, v in tensors.items() if "text_projection" not in k}  # it fails on it
    write_safetensors(stripped, tensors, {k: v for k, v in metadata.items() if k != METADATA})
    loaded(pipe, stripped)
    assert difference(ours, outputs(family, parts)) > 1e-2


@pytest.mark.parametrize("family", ["sd1", "flux"], indirect=True)
def test_our_dora(family, tmp_path):
    """Lengths in text encoders too, where diffusers passes over the name that it has elsewhere."""
    parts, pipe = pipe_of(family)
    plain = adapter_for(parts)
    sites = {
        path: dataclasses.replace(site, magnitude=torch.rand(site.B.shape[0]) + 0.5)
        for path, site in plain.low_rank.items()
    }
    adapter = Adapter(sites)
    with attached(parts, adapter):
        ours = outputs(family, parts)
    with attached(parts, plain):
        assert difference(ours, outputs(family, parts)) > 1e-2
    loaded(pipe, write(DIFFUSERS.write(adapter, Hints()), tmp_path))
    assert difference(ours, outputs(family, parts)) <= 1e-5


def test_their_file(family, tmp_path):
    """Written by ``save_lora_weights`` with the metadata that it collects from PEFT."""
    from diffusers.training_utils import _collate_lora_metadata

    parts, pipe = pipe_of(family)
    main = "transformer" if family == "flux" else "unet"
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_out.0"], rank_pattern={"to_out.0": 2},
        alpha_pattern={"to_out.0": 7}, init_lora_weights=False,
    )  # fmt: skip
    pipe_part = getattr(pipe, main)
    pipe_part.add_adapter(config)
    text = peft.LoraConfig(
        r=2, lora_alpha=1, target_modules=["q_proj", "fc1"], init_lora_weights=False
    )
    pipe.text_encoder.add_adapter(text)
    theirs = outputs(family, parts)
    pipe.save_lora_weights(
        tmp_path,
        **{f"{main}_lora_layers": get_peft_model_state_dict(pipe_part)},
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **_collate_lora_metadata({main: pipe_part, "text_encoder": pipe.text_encoder}),
    )
    reading = read(DIFFUSERS, tmp_path / "pytorch_lora_weights.safetensors")
    assert reading.lost == {}
    assert {site.scaling for site in reading.adapter.low_rank.values()} == {5 / 3, 7 / 2, 1 / 2}
    fresh, _ = pipe_of(family)
    bare = outputs(family, fresh)
    with attached(fresh, reading.adapter):
        ours = outputs(family, fresh)
    assert difference(ours, theirs) <= 1e-5
    assert difference(bare, theirs) > 1e-2


@pytest.mark.parametrize("kind", ["folded, mixed ranks", "one alpha"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"], indirect=True)
def test_kohya_in_diffusers(family, kind, tmp_path):
    """What diffusers reads right of kohya's files: no alpha at all, or one rank and alpha."""
    parts, pipe = pipe_of(family)
    settings = (
        {"ranks": (2, 3, 5), "scalings": (1.0,)}
        if kind.startswith("folded")
        else {"ranks": (4,), "scalings": (0.25,)}
    )
    adapter = adapter_for(parts, share=0.3, **settings)
    # sd-scripts adapts no projection, and diffusers does not count its rank
    adapter = adapter.with_(
        sites={p: s for p, s in adapter.sites.items() if not p.endswith("text_projection")}
    )
    with attached(parts, adapter):
        ours = outputs(family, parts)
    loaded(pipe, write(KOHYA.write(adapter, Hints(family=family)), tmp_path))
    assert difference(ours, outputs(family, parts)) <= 1e-5


def test_kohya_with_several_alphas_is_as_we_warn(tmp_path):
    """diffusers takes another scale in attention; if this passes one day, the note may go."""
    parts, pipe = pipe_of("sd1")
    adapter = adapter_for(parts, ranks=(4,), scalings=(0.25, 2.0), share=0.4)
    written = KOHYA.write(adapter, Hints(family="sd1"))
    assert any("diffusers takes another scale" in note for note in written.notes)
    with attached(parts, adapter):
        ours = outputs("sd1", parts)
    loaded(pipe, write(written, tmp_path))
    assert difference(ours, outputs("sd1", parts)) > 1e-3


def test_flux_kohya_file_as_diffusers_converts_it(tmp_path):
    """At the real widths, which its converter has written into it; deltas of a few rows."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    base = "transformer.single_transformer_blocks.3."
    double = "transformer.transformer_blocks.0."
    shapes = {
        **{f"{base}attn.to_{x}": (3072, 3072) for x in "qkv"},
        f"{base}proj_mlp": (12288, 3072),
        f"{base}proj_out": (3072, 15360),
        **{f"{double}attn.add_{x}_proj": (3072, 3072) for x in "qkv"},
        f"{double}norm1_context.linear": (18432, 3072),
    }
    generator = torch.Generator().manual_seed(0)

    class Shaped:
        def __init__(self, shape):
            self.weight = torch.empty(shape, device="meta")

    sites = {p: site_for(Shaped(s), 2, 0.25, generator) for p, s in shapes.items()}
    path = write(KOHYA.write(Adapter(sites), Hints()), tmp_path)
    converted = _convert_kohya_flux_lora_to_diffusers(safetensors.torch.load_file(path))
    ours = read(KOHYA, path).adapter.low_rank
    assert {key.rpartition(".lora_")[0] for key in converted} == set(ours) == set(sites)
    for name, site in sites.items():
        A = converted[f"{name}.lora_A.weight"].double()
        B = converted[f"{name}.lora_B.weight"].double()
        theirs = B[::97] @ A
        some = 0.25 * site.B[::97].double() @ site.A.double()
        torch.testing.assert_close(theirs, some, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours[name].B, site.B)


def test_old_attention_processor_files(tmp_path):
    """The oldest names, as diffusers' own loader still takes them, and as a pickle."""
    parts, pipe = pipe_of("sd1")
    adapter = adapter_for({"unet": parts["unet"]}, ranks=(2,))
    names = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
    old, sites = {}, {}
    for path, site in adapter.low_rank.items():
        for leaf, name in names.items():
            if path.endswith("." + leaf) and ".transformer_blocks." in path:
                stem = f"{path.removesuffix('.' + leaf)}.processor.{name}_lora"
                old[f"{stem}.down.weight"], old[f"{stem}.up.weight"] = site.A, site.B
                sites[path] = site
    with attached(parts, adapter.with_(sites=sites)):
        ours = outputs("sd1", parts)
    (tmp_path / "new").mkdir()
    for path in (tmp_path / "pytorch_lora_weights.bin", tmp_path / "new" / "x.safetensors"):
        if path.suffix == ".bin":
            torch.save({k.removeprefix("unet."): v for k, v in old.items()}, path)
        else:
            safetensors.torch.save_file(old, path)
        reading = read(DIFFUSERS, path)
        assert set(reading.adapter.sites) == set(sites)
        assert all(torch.equal(s.B, sites[p].B) for p, s in reading.adapter.low_rank.items())
    loaded(pipe, path)
    assert difference(ours, outputs("sd1", parts)) <= 1e-5
