"""Every module of real models has one name, and its name gives it back."""

from __future__ import annotations

import pytest

from lorakit.formats import picture_names as names

from .pictures import adaptable, components


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl-diffusers", "flux"])
def test_names_of_real_models(family):
    paths = list(adaptable(components(family.partition("-")[0])))
    assert len(paths) > 50
    for path in paths:
        name, shared = names.write_name(path, family)
        assert path in shared.paths
        _, back = names.read_name(name)
        assert back == shared


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        (
            "lora_unet_output_blocks_2_1_transformer_blocks_9_attn2_to_out_0",
            "unet.up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_out.0",
        ),
        (
            "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_ff_net_0_proj",
            "unet.down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
        ),
        ("lora_unet_input_blocks_6_0_op", "unet.down_blocks.1.downsamplers.0.conv"),
        ("lora_unet_output_blocks_5_2_conv", "unet.up_blocks.1.upsamplers.0.conv"),
        ("lora_unet_middle_block_2_emb_layers_1", "unet.mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_label_emb_0_2", "unet.add_embedding.linear_2"),
        ("lora_unet_out_2", "unet.conv_out"),
        (
            "lora_te_text_model_encoder_layers_11_mlp_fc1",
            "text_encoder.encoder.layers.11.mlp.fc1",
        ),
        ("lora_te_encoder_layers_3_mlp_fc2", "text_encoder.encoder.layers.3.mlp.fc2"),
        (
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
        ),
        (
            "lora_te3_encoder_block_23_layer_0_SelfAttention_q",
            "text_encoder_2.encoder.block.23.layer.0.SelfAttention.q",
        ),
        (
            "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0",
            "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0",
        ),
        ("lora_unet_single_blocks_37_linear2", "transformer.single_transformer_blocks.37.proj_out"),
        ("lora_unet_final_layer_adaLN_modulation_1", "transformer.norm_out.linear"),
        (
            "lora_transformer_transformer_blocks_0_attn_add_k_proj",
            "transformer.transformer_blocks.0.attn.add_k_proj",
        ),
    ],
)
def test_names_seen_in_files(name, path):
    """From files of sd-scripts and from its conversion scripts, not from our tables."""
    assert names.read_name(name)[1].paths == (path,)


def test_joined_names():
    found = names.read_name("lora_unet_double_blocks_18_img_attn_qkv")[1]
    assert found.paths == tuple(
        f"transformer.transformer_blocks.18.attn.to_{x}" for x in ("q", "k", "v")
    )


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_",
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to",
        "lora_unet_down_blocks_x_resnets_0_conv1",
        "lora_unet_down_blocks_00_resnets_0_conv1",
        "lora_unet_down_blocks_٣_resnets_0_conv1",
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_1",
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "lora_te_text_model_encoder_layers_#_mlp_fc1",
        "lora_te9_text_model_encoder_layers_0_mlp_fc1",
        "unet_conv_in",
    ],
)
def test_an_unknown_name_is_not_guessed(name):
    assert names.read_name(name) is None


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        ({"transformer.x_embedder": (4, 64)}, "flux"),
        ({"unet.conv_in": (4, 4, 3, 3), "text_encoder_2.text_projection": (4, 8)}, "sdxl"),
        ({"unet.mid_block.attentions.0.transformer_blocks.3.attn1.to_q": (4, 8)}, "sdxl"),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (4, 2048)}, "sdxl"),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (4, 1024)}, "sd2"),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (4, 768)}, "sd1"),
    ],
)
def test_family(shapes, family):
    assert names.family_of(shapes) == (family, None)


def test_a_family_that_nothing_tells_is_said():
    family, assumed = names.family_of({"unet.conv_in": (4, 4, 3, 3)})
    assert family == "sd1"
    assert "nothing tells" in assumed
