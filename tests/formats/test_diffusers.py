"""diffusers' files: round trips, scale, names of every age, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.adapter import Adapter
from lorakit.core.safetensors_io import read_safetensors, write_safetensors
from lorakit.core.sites import LowRank, Replace
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError
from lorakit.formats.diffusers import FORMAT, METADATA
from lorakit.formats.format import Hints, Source

from .adapters import assert_equal, scalings, tensor
from .pictures import read, round_trip, write

PATHS = (
    "unet.conv_in",
    "unet.mid_block.attentions.0.proj_in",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "transformer.proj_out",
    "transformer.single_transformer_blocks.0.proj_out",
    "transformer.single_transformer_blocks.1.proj_out",
    "text_encoder.encoder.layers.1.mlp.fc1",
    "text_encoder.encoder.layers.11.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2.text_projection",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
)


@st.composite
def sites(draw) -> LowRank:
    rank, d_in, d_out = (draw(st.integers(1, 5)) for _ in range(3))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return LowRank(
        tensor(draw, rank, d_in, *kernel, dtype=dtype),
        tensor(draw, d_out, rank, *(1 for _ in kernel), dtype=dtype),
        draw(scalings),
        "conv" if kernel else "linear",
    )


@settings(max_examples=80)
@given(
    st.dictionaries(st.sampled_from(PATHS), sites(), min_size=1),
    st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
)
def test_round_trip(found, scaling):
    adapter = Adapter(found, LoRASpec(scaling=scaling), provenance={"metrics": {"loss": 1.0}})
    reading, written, content = round_trip(FORMAT, adapter)
    assert (reading.lost, written.lost) == ({}, {})
    assert_equal(adapter, reading.adapter)
    again = adapter.with_(sites=dict(reversed(adapter.sites.items())))
    assert content == round_trip(FORMAT, again)[2]


def site(rank=2, **more) -> LowRank:
    return LowRank(torch.randn(rank, 3), torch.randn(4, rank), more.pop("scaling", 1.0), **more)


def test_bias_and_magnitude():
    """A bias of B covers a component in PEFT's settings; ours is absent again where it was."""
    adapter = Adapter(
        {
            "unet.a.b": site(bias=torch.randn(4)),
            "unet.a.c": site(),
            "transformer.a.b": site(magnitude=torch.rand(4)),
            "text_encoder.encoder.layers.0.mlp.fc1": site(bias=torch.randn(4)),
        }
    )
    reading, written, _ = round_trip(FORMAT, adapter)
    assert written.lost == {}
    assert_equal(adapter, reading.adapter)


SD3 = (
    "transformer.transformer_blocks.0.attn.to_q",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
)


@pytest.mark.parametrize("paths", [SD3, SD3[:2], SD3[1:2], (*SD3, "text_encoder.text_projection")])
def test_sd3_keeps_the_names_of_its_first_encoder(paths):
    """It has a projection, and transformers then names its layers as the file does."""
    adapter = Adapter({path: site() for path in paths})
    assert_equal(adapter, round_trip(FORMAT, adapter)[0].adapter)


def test_sd3_of_other_tools(tmp_path):
    tensors = {k: v for path in SD3 for k, v in pair(path).items()}
    reading = read(FORMAT, file_of(tmp_path, tensors))
    assert sorted(reading.adapter.sites) == sorted(SD3)


def file_of(folder, tensors, metadata=None):
    path = folder / "x.safetensors"
    write_safetensors(path, tensors, metadata or {})
    return path


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TE = "encoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("key", "path"),
    [
        (f"unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q"),
        (f"unet.{Q}.to_out.0.lora.down.weight", f"unet.{Q}.to_out.0"),
        (f"unet.{Q}.processor.to_out_lora.down.weight", f"unet.{Q}.to_out.0"),
        (f"{Q}.processor.to_v_lora.down.weight", f"unet.{Q}.to_v"),
        (f"text_encoder.text_model.{TE}.to_out_lora.down.weight", f"text_encoder.{TE}.out_proj"),
        (
            f"text_encoder.text_model.{TE}.q_proj.lora_linear_layer.down.weight",
            f"text_encoder.{TE}.q_proj",
        ),
        (f"text_encoder_2.{TE}.q_proj.lora_A.weight", f"text_encoder_2.text_model.{TE}.q_proj"),
        ("transformer.proj_out.lora_A.weight", "transformer.proj_out"),
        (f"unet.{Q}.to_q.lora_A.default_0.weight", f"unet.{Q}.to_q"),
        (f"{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q"),
        (f"{Q}.to_k.lora.down.weight", f"unet.{Q}.to_k"),
        (
            "single_transformer_blocks.3.attn.to_q.lora_A.weight",
            "transformer.single_transformer_blocks.3.attn.to_q",
        ),
    ],
)
def test_names_of_every_age(tmp_path, key, path):
    up = key.replace("lora_A", "lora_B").replace("down.weight", "up.weight")
    tensors = {key: torch.randn(2, 3), up: torch.randn(4, 2)}
    reading = read(FORMAT, file_of(tmp_path, tensors))
    assert list(reading.adapter.sites) == [path]
    assert torch.equal(reading.adapter.low_rank[path].A, tensors[key])
    assert torch.equal(reading.adapter.low_rank[path].B, tensors[up])
    assert "says no alpha" in reading.notes[-1]
    bare = key.partition(".")[0] != path.partition(".")[0]
    assert bare == any("without a component in front" in note for note in reading.notes)


def test_peft_folders_of_one_component_are_pefts(tmp_path):
    """Their scale is in the config beside, which this format does not look into."""
    path = file_of(tmp_path, pair(f"{Q}.to_q"))
    assert FORMAT.recognises(Source(path, path))
    assert not FORMAT.recognises(Source(path, path, {"peft_type": "LORA"}))


def test_alphas_of_some_modules(tmp_path):
    tensors = pair() | pair("unet.a.to_k") | {"unet.a.to_q.alpha": torch.tensor(4.0)}
    reading = read(FORMAT, file_of(tmp_path, tensors))
    assert reading.adapter.low_rank["unet.a.to_q"].scaling == 2.0
    assert reading.adapter.low_rank["unet.a.to_k"].scaling == 1.0
    assert "1 of 2 modules of unet (a.to_k, …)" in reading.notes[0]
    tensors["unet.a.to_q.alpha"] = torch.ones(2)
    with pytest.raises(FormatError, match=r"unet\.a\.to_q: its alpha has shape \(2,\)"):
        read(FORMAT, file_of(tmp_path, tensors))


def test_dora_under_kohyas_name(tmp_path):
    scale = torch.rand(4, 1)
    tensors = pair() | {"unet.a.to_q.dora_scale": scale}
    site = read(FORMAT, file_of(tmp_path, tensors)).adapter.low_rank["unet.a.to_q"]
    assert torch.equal(site.magnitude, scale.flatten())
    tensors["unet.a.to_q.dora_scale"] = scale.T.contiguous()
    with pytest.raises(FormatError, match=r"its dora_scale has shape \(1, 4\)"):
        read(FORMAT, file_of(tmp_path, tensors))


def pair(path="unet.a.to_q", rank=2):
    return {
        f"{path}.lora_A.weight": torch.randn(rank, 3),
        f"{path}.lora_B.weight": torch.randn(4, rank),
    }


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({}, 1.0),
        ({"unet.r": 2, "unet.lora_alpha": 3}, 1.5),
        ({"unet.r": 2, "unet.lora_alpha": 3, "unet.use_rslora": True}, 3 / 2**0.5),
        ({"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2}}, 2.0),
        ({"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {"a.to_q": 6}}, 3.0),
        ({"text_encoder.r": 2, "text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_scale(tmp_path, metadata, scaling):
    path = file_of(tmp_path, pair(), {METADATA: json.dumps(metadata)} if metadata else None)
    assert read(FORMAT, path).adapter.low_rank["unet.a.to_q"].scaling == scaling


def test_an_alpha_beside_the_tensors(tmp_path):
    path = file_of(tmp_path, pair() | {"unet.a.to_q.alpha": torch.tensor(1.0)})
    assert read(FORMAT, path).adapter.low_rank["unet.a.to_q"].scaling == 0.5


def test_unknown_keys_are_listed(tmp_path):
    more = {"unet.a.to_q.lora_E": torch.ones(1), "vae.x.lora_A.weight": torch.ones(1, 1)}
    assert set(read(FORMAT, file_of(tmp_path, pair() | more)).lost) == set(more)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"unet.a.lora_A.weight": torch.ones(1, 2)}, {}, r"unet\.a: lacks lora_B"),
        (pair() | {"unet.a.to_q.lora.down.weight": torch.ones(2, 3)}, {}, "has two of its A"),
        (pair() | {"unet.a.to_q.lora_B.weight": torch.ones(4, 3)}, {}, "B has rank 3"),
        (pair(), {METADATA: "["}, "is no JSON object"),
        (pair(), {METADATA: "[]"}, "is no JSON object"),
        (pair(), {METADATA: '{"vae.r": 2}'}, "belongs to no component"),
        (pair(), {METADATA: '{"unet.r": "two"}'}, "r "),
        ({"a": torch.ones(1)}, {}, "a: is no name of diffusers' format"),
    ],
)
def test_malformed(tmp_path, tensors, metadata, words):
    path = file_of(tmp_path, tensors, metadata)
    with pytest.raises(FormatError, match=words):
        FORMAT.read(Source(path, path), Hints())


def test_what_has_no_place_is_listed():
    found = {
        "unet.a.q": site(),
        "model.layers.0.q_proj": site(),
        "unet.norm": Replace({"weight": torch.ones(2)}),
        "text_encoder.embeddings.token_embedding": site(kind="embedding"),
        "transformer.a": site(),
        "transformer.b": site(magnitude=torch.ones(4)),
    }
    written = FORMAT.write(Adapter(found, tokenizer_files={"tokenizer.json": b"{}"}), Hints())
    assert set(written.lost) == set(found) - {"unet.a.q", "transformer.b"} | {"tokenizer_files"}
    with pytest.raises(FormatError, match="lies in no component"):
        FORMAT.write(Adapter({"model.layers.0.q_proj": site()}), Hints())


def test_the_scale_in_the_header_is_said(tmp_path):
    """diffusers before 0.35 does not look there."""
    assert FORMAT.write(Adapter({"unet.a.q": site()}), Hints()).notes == ()
    written = FORMAT.write(Adapter({"unet.a.q": site(scaling=2.0)}), Hints())
    assert "diffusers reads from 0.35 on" in written.notes[0]
    config = json.loads(read_safetensors(write(written, tmp_path))[1][METADATA])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (2, 4)
    assert config["unet.target_modules"] == ["a.q"]


def test_another_format_is_not_recognised(tmp_path):
    for key in ("base_model.model.a.lora_A.weight", "lora_unet_conv_in.lora_down.weight", "a"):
        path = file_of(tmp_path, {key: torch.ones(1, 2)})
        assert not FORMAT.recognises(Source(path, path))
