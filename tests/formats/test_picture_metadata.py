"""What other programs read of a picture adapter's header, beside sd-scripts' and A1111's rules."""

from __future__ import annotations

import pytest
import torch

from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank
from lorakit.formats.picture_metadata import shown
from lorakit.formats.picture_names import FAMILIES


def header(family, prediction="epsilon"):
    about = {"kind": "pictures", "pictures": 3, "prediction": prediction, "files": ["x"]}
    site = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    return shown(
        Adapter({"unet.a": site}, provenance={"data": about}, base=BaseIdentity("sd", "UNet")),
        family,
    )


def version_in_a1111(metadata):
    """As its ``detect_version`` decides."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if metadata.get("ss_v2") == "True" else "SD1"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_version(family):
    found = header(family)
    expected = {"sd2": "SD2", "sdxl": "SDXL", "sdxl-diffusers": "SDXL"}.get(family, "SD1")
    assert version_in_a1111(found) == expected
    assert found["ss_sd_model_name"] == "sd"
    assert not [name for name in found if name.endswith("_hash")]  # no file has such a one


@pytest.mark.parametrize(
    ("family", "prediction", "version", "architecture"),
    [
        ("sd1", "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd1", "v", "sd_v1_v", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd2", "v", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "v", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_what_a_base_predicts_is_in_its_version(family, prediction, version, architecture):
    found = header(family, prediction)
    assert found["ss_base_model_version"] == version
    assert found["modelspec.architecture"] == architecture
