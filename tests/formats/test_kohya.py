"""kohya's files: round trips, scale, joined projections, metadata, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity
from lorakit.core.safetensors_io import read_safetensors, write_safetensors
from lorakit.core.sites import LowRank, Replace
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError
from lorakit.formats import registry
from lorakit.formats.format import Hints, Source
from lorakit.formats.kohya import FORMAT

from .adapters import assert_equal
from .pictures import adaptable, components, delta, read, round_trip, site_for, write

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
Q_PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="session")
def modules():
    """Family → path → module, of tiny models."""
    return {family: adaptable(components(family)) for family in ("sd1", "sdxl", "flux")}


@st.composite
def drawn_adapters(draw, modules, family):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    known = modules[family]
    paths = draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=12, unique=True))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    # parts of one joined matrix have one scaling; others are in test_scalings_that_differ
    one = draw(st.sampled_from([1.0, 0.5, 2 / 3, -1.0]))
    sites = {}
    for path in paths:
        scaling = one if family == "flux" else draw(st.sampled_from([1.0, 2.0, 0.1, 1 / 3, 1e-9]))
        rank = draw(st.integers(1, 5))
        sites[path] = site_for(known[path], rank, scaling, generator, dtype)
    return Adapter(
        sites,
        LoRASpec(rank=draw(st.integers(1, 64)), targets=("to_q",), dropout=0.1),
        base=draw(st.none() | st.just(BaseIdentity("me/model", "UNet", {"w": (2,)}, {}))),
        provenance=draw(st.sampled_from([{}, {"metrics": {"loss": 1.5}}])),
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl-diffusers", "flux"])
@settings(max_examples=40)
@given(data=st.data())
def test_round_trip(modules, family, data):
    adapter = data.draw(drawn_adapters(modules, family.partition("-")[0]))
    hints = Hints(family=family)
    reading, written, content = round_trip(FORMAT, adapter, hints)
    assert (reading.lost, written.lost) == ({}, {})
    assert_equal(adapter, reading.adapter)
    again = adapter.with_(sites=dict(reversed(adapter.sites.items())))
    assert content == round_trip(FORMAT, again, hints)[2]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_names_and_shapes_are_sd_scripts_own(modules, family, tmp_path):
    """Of one module of each sort, written by hand."""
    expected = {
        "sd1": {
            "lora_unet_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
            "lora_te_text_model_encoder_layers_0_mlp_fc1": "text_encoder.encoder.layers.0.mlp.fc1",
        },
        "sdxl": {
            "lora_unet_middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.encoder.layers.0.mlp.fc1",
            "lora_te2_text_projection": "text_encoder_2.text_projection",
        },
        "flux": {
            "lora_unet_double_blocks_0_img_mlp_0": "transformer.transformer_blocks.0.ff.net.0.proj",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.encoder.layers.0.mlp.fc1",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (
                "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
            ),
        },
    }[family]
    generator = torch.Generator().manual_seed(0)
    sites = {path: site_for(modules[family][path], 4, 0.5, generator) for path in expected.values()}
    path = write(FORMAT.write(Adapter(sites), Hints(family=family)), tmp_path)
    tensors = safetensors.torch.load_file(path)
    assert {key.partition(".")[0] for key in tensors} == set(expected)
    for name, module in expected.items():
        assert torch.equal(tensors[f"{name}.lora_down.weight"], sites[module].A)
        assert torch.equal(tensors[f"{name}.lora_up.weight"], sites[module].B)
        alpha = tensors[f"{name}.alpha"]
        assert (alpha.item(), alpha.shape, alpha.dtype) == (2.0, (), torch.float32)


def file_of(folder, tensors, metadata=None):
    path = folder / "x.safetensors"
    write_safetensors(path, tensors, metadata or {})
    return path


def linear(name=Q, rank=2, **more):
    tensors = {"lora_down.weight": torch.randn(rank, 6), "lora_up.weight": torch.randn(5, rank)}
    return {f"{name}.{part}": value for part, value in {**tensors, **more}.items()}


@pytest.mark.parametrize(
    ("alpha", "scaling"), [(None, 1.0), (torch.tensor(0.0), 1.0), (torch.tensor(1), 0.5)]
)
def test_scale(tmp_path, alpha, scaling):
    more = {} if alpha is None else {"alpha": alpha}
    reading = read(FORMAT, file_of(tmp_path, linear(**more)))
    assert reading.adapter.low_rank[Q_PATH].scaling == scaling


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_what_sd_scripts_skips_is_named(modules, family):
    """Its loader builds modules in blocks and encoders only, and drops all other keys."""
    inside = {
        "sd1": "unet.mid_block.resnets.0.time_emb_proj",
        "sdxl": "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "flux": "transformer.x_embedder",
    }[family]
    outside = {
        "sd1": ["unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"],
        "sdxl": ["text_encoder_2.text_projection", "unet.add_embedding.linear_2", "unet.conv_in"],
        "flux": ["transformer.norm_out.linear", "transformer.proj_out"],
    }[family]
    generator = torch.Generator().manual_seed(0)
    sites = {
        path: site_for(modules[family][path], 2, 1.0, generator) for path in [inside, *outside]
    }
    said = [n for n in FORMAT.write(Adapter(sites), Hints(family=family)).notes if "skips" in n]
    assert f"skips {len(outside)} of the sites" in said[0]
    assert ": " + ", ".join(outside) + "." in said[0]
    only = FORMAT.write(Adapter({inside: sites[inside]}), Hints(family=family))
    assert not any("skips" in note for note in only.notes)


def test_flux_always_has_alphas(modules, tmp_path):
    """sd-scripts' Flux network ends in a KeyError without one."""
    generator = torch.Generator().manual_seed(0)
    path = "transformer.transformer_blocks.0.ff.net.2"
    adapter = Adapter({path: site_for(modules["flux"][path], 3, 1.0, generator)})
    tensors = safetensors.torch.load_file(write(FORMAT.write(adapter, Hints()), tmp_path))
    assert tensors["lora_unet_double_blocks_0_img_mlp_2.alpha"].item() == 3


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("parts", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_names_with_dots(tmp_path, prefix, parts):
    """ComfyUI's and Black Forest Labs': the same modules, the same joined projections."""
    A, B = torch.randn(2, 8), torch.randn(24, 2)
    name = f"{prefix}double_blocks.3.img_attn.qkv"
    tensors = {f"{name}.{parts[0]}.weight": A, f"{name}.{parts[1]}.weight": B}
    path = file_of(tmp_path, tensors | {f"{name}.alpha": torch.tensor(4.0)})
    reading = registry.read(path)
    dense = 2 * B.double() @ A.double()
    for i, part in enumerate(["to_q", "to_k", "to_v"]):
        site = reading.adapter.low_rank[f"transformer.transformer_blocks.3.attn.{part}"]
        torch.testing.assert_close(delta(site), dense[8 * i : 8 * i + 8])
    assert any("names with dots" in note for note in reading.notes)
    other = {f"diffusion_model.blocks.0.q.{part}.weight": torch.ones(2, 2) for part in parts}
    with pytest.raises(
        FormatError, match=rf"diffusion_model\.blocks\.0\.q\.{parts[0]}\.weight: no"
    ):
        registry.read(file_of(tmp_path, other))


def test_modules_without_an_alpha_beside_others_are_said(tmp_path):
    encoders = (
        linear("lora_te1_text_model_encoder_layers_0_mlp_fc1", alpha=torch.tensor(4.0))
        | linear("lora_te2_text_model_encoder_layers_1_self_attn_q_proj", rank=1)
    )  # fmt: skip
    reading = read(FORMAT, file_of(tmp_path, linear(alpha=torch.tensor(1)) | encoders))
    assert {path: site.scaling for path, site in reading.adapter.low_rank.items()} == {
        "text_encoder.encoder.layers.0.mlp.fc1": 2.0,
        "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj": 1.0,
        Q_PATH: 0.5,
    }
    assert "1 of 3 modules say no alpha, such as lora_te2_" in reading.notes[0]


def test_joined_projections_come_apart(tmp_path):
    """Against the slices of the dense change, not against our own join."""
    name = "lora_unet_single_blocks_0_linear1"
    A, B = torch.randn(3, 8), torch.randn(3 * 8 + 20, 3)
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
    tensors[f"{name}.alpha"] = torch.tensor(1.5)
    sites = read(FORMAT, file_of(tmp_path, tensors)).adapter.low_rank
    dense = 0.5 * B.double() @ A.double()
    base = "transformer.single_transformer_blocks.0."
    for i, part in enumerate(["attn.to_q", "attn.to_k", "attn.to_v"]):
        torch.testing.assert_close(delta(sites[base + part]), dense[8 * i : 8 * i + 8])
    torch.testing.assert_close(delta(sites[base + "proj_mlp"]), dense[24:])


def test_the_last_modulation_has_its_halves_exchanged(tmp_path):
    name = "lora_unet_final_layer_adaLN_modulation_1"
    A, B = torch.randn(2, 8), torch.randn(16, 2)
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
    adapter = read(FORMAT, file_of(tmp_path, tensors)).adapter
    site = adapter.low_rank["transformer.norm_out.linear"]
    assert torch.equal(site.B, torch.cat([B[8:], B[:8]]))
    back = read_safetensors(write(FORMAT.write(adapter, Hints()), tmp_path))[0]
    assert torch.equal(back[f"{name}.lora_up.weight"], B)


def test_part_of_a_joined_projection(modules, tmp_path):
    """Only k: the rows of the others are zero in the file, and absent again when it is read."""
    generator = torch.Generator().manual_seed(0)
    path = "transformer.single_transformer_blocks.0.attn.to_k"
    adapter = Adapter({path: site_for(modules["flux"][path], 2, 1.0, generator)})
    reading, written, _ = round_trip(FORMAT, adapter)
    assert "its size is taken as 4 · 32" in written.notes[0]
    assert "does not change" in reading.notes[0]
    assert list(reading.adapter.sites) == [path]
    assert torch.equal(reading.adapter.low_rank[path].A, adapter.low_rank[path].A)


def test_scalings_that_differ_within_a_joined_name(modules):
    generator = torch.Generator().manual_seed(0)
    base = "transformer.transformer_blocks.0.attn."
    sites = {
        base + name: site_for(modules["flux"][base + name], 2, scaling, generator)
        for name, scaling in (("to_q", 1.0), ("to_k", 1 / 3), ("to_v", 0.7))
    }
    reading, written, _ = round_trip(FORMAT, Adapter(sites))
    assert any("several scalings" in note for note in written.notes)
    for path, site in sites.items():
        torch.testing.assert_close(
            delta(reading.adapter.low_rank[path]), delta(site), rtol=1e-6, atol=1e-8
        )


def test_training_metadata_is_kept_and_the_hash_is_new(tmp_path):
    said = {
        "ss_network_dim": "2", "ss_network_alpha": "1.0", "ss_tag_frequency": "{}",
        "ss_base_model_version": "sd_v1", "sshs_model_hash": "old", "modelspec.title": "t",
        "format": "pt",
    }  # fmt: skip
    adapter = read(FORMAT, file_of(tmp_path, linear(alpha=torch.tensor(1.0)), said)).adapter
    assert adapter.provenance["kohya"]["metadata"]["ss_tag_frequency"] == "{}"
    path = write(FORMAT.write(adapter, Hints()), tmp_path)
    metadata = read_safetensors(path)[1]
    for key in ("ss_network_dim", "ss_network_alpha", "ss_tag_frequency", "modelspec.title"):
        assert metadata[key] == said[key]
    # as sd-scripts computes it: the file of the real writer, behind its header
    content = io.BytesIO(safetensors.torch.save(safetensors.torch.load_file(path), {"ss_x": "1"}))
    content.seek(int.from_bytes(content.read(8), "little") + 8)
    assert metadata["sshs_model_hash"] == hashlib.sha256(content.read()).hexdigest()


def test_the_rank_that_is_said_is_the_one_there(modules, tmp_path):
    generator = torch.Generator().manual_seed(0)
    known = modules["sd1"]
    paths = [path for path, m in known.items() if path.endswith(("to_q", "to_k"))][:2]
    sites = {p: site_for(known[p], i + 1, 0.5, generator) for i, p in enumerate(paths)}
    told = {"kohya": {"metadata": {"ss_network_dim": "16", "ss_network_alpha": "8"}}}
    path = write(FORMAT.write(Adapter(sites, provenance=told), Hints()), tmp_path)
    metadata = read_safetensors(path)[1]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_unknown_names_are_listed_one_by_one(tmp_path):
    tensors = linear() | linear("lora_unet_mystery_0") | {"emb_params": torch.ones(1)}
    reading = read(FORMAT, file_of(tmp_path, tensors))
    assert list(reading.adapter.sites) == [Q_PATH]
    assert set(reading.lost) == {
        "emb_params",
        "lora_unet_mystery_0.lora_down.weight",
        "lora_unet_mystery_0.lora_up.weight",
    }


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}.lora_down.weight": torch.ones(1, 2)}, "lacks lora_up.weight"),
        (linear("lora_unet_mystery"), "no module of Stable Diffusion"),
        (linear(alpha=torch.ones(2)), r"its alpha has shape \(2,\)"),
        (linear(dora_scale=torch.ones(1, 6)), "a length of each output's weights"),
        (linear(extra=torch.ones(1)), "has extra, which this format does not know"),
        (linear(alpha=torch.tensor(float("nan"))), "its scaling is nan"),
        (linear() | {f"{Q}.lora_up.weight": torch.ones(5, 3)}, "B has rank 3"),
        (linear() | {f"{Q}.lora_down.weight": torch.ones(3)}, "lora_down has shape"),
        (
            linear("lora_te_text_model_encoder_layers_0_mlp_fc1")
            | linear("lora_te_encoder_layers_0_mlp_fc1"),
            "there twice",
        ),
        (
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(1, 2),
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(7, 1),
            },
            "with 7 outputs is not split",
        ),
        (
            {
                "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(1, 9),
                "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.ones(7, 1),
            },
            "with 7 outputs is not split",
        ),
    ],
)
def test_malformed(tmp_path, tensors, words):
    path = file_of(tmp_path, tensors)
    with pytest.raises(FormatError, match=words):
        FORMAT.read(Source(path, path), Hints())


def test_dora_is_written_and_said(tmp_path):
    site = LowRank(torch.randn(2, 6), torch.randn(5, 2), 1.0, magnitude=torch.rand(5))
    reading, written, _ = round_trip(FORMAT, Adapter({Q_PATH: site}))
    assert torch.equal(reading.adapter.low_rank[Q_PATH].magnitude, site.magnitude)
    assert any("dora_scale" in note for note in written.notes)


def test_what_has_no_place_is_listed():
    ones = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    sites = {
        Q_PATH: ones,
        "unet.conv_norm_out.bias": Replace({"": torch.ones(2)}),
        "unet.mystery": ones,
        "text_encoder.embeddings.token_embedding": LowRank(ones.A, ones.B, 1.0, "embedding"),
        "unet.conv_in": LowRank(torch.ones(2, 1, 3, 3), torch.ones(2, 1, 1, 1), 1.0, "conv"),
        "unet.mid_block.attentions.0.proj_in": LowRank(ones.A, ones.B, 1.0, bias=torch.ones(2)),
    }
    written = FORMAT.write(Adapter(sites, tokenizer_files={"tokenizer.json": b"{}"}), Hints())
    assert set(written.lost) == set(sites) - {Q_PATH} | {"tokenizer_files"}


def test_a_language_model_is_refused():
    site = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(FormatError, match=r"model\.layers\.0\.q_proj: has no name"):
        FORMAT.write(Adapter({"model.layers.0.q_proj": site}), Hints())
    with pytest.raises(FormatError, match="family 'sd9' is unknown"):
        FORMAT.write(Adapter({Q_PATH: site}), Hints(family="sd9"))


def test_no_alpha_where_every_scaling_is_one(modules, tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = sorted(modules["sd1"])[:3]
    sites = {p: site_for(modules["sd1"][p], i + 1, 1.0, generator) for i, p in enumerate(paths)}
    path = write(FORMAT.write(Adapter(sites), Hints()), tmp_path)
    assert not any(key.endswith("alpha") for key in safetensors.torch.load_file(path))


def test_a_scaling_of_zero(tmp_path):
    """An alpha of 0 would mean a scaling of 1 to sd-scripts."""
    site = LowRank(torch.ones(1, 2), torch.ones(2, 1), 0.0)
    reading, written, _ = round_trip(FORMAT, Adapter({Q_PATH: site}))
    assert not delta(reading.adapter.low_rank[Q_PATH]).any()
    assert any("its scaling is 0" in note for note in written.notes)


def test_another_format_is_not_recognised(tmp_path):
    for tensors in (
        {"unet.conv_in.lora_A.weight": torch.ones(1, 2)},
        linear() | {f"{Q}x.hada_w1_a": torch.ones(1, 2)},
        {"a": torch.ones(1)},
    ):
        path = file_of(tmp_path, tensors)
        assert not FORMAT.recognises(Source(path, path))


def test_the_header_is_json(tmp_path):
    site = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    path = write(FORMAT.write(Adapter({Q_PATH: site}), Hints()), tmp_path)
    assert json.loads(read_safetensors(path)[1]["lorakit"])["layout"] == 1
