"""What other programs show of a picture adapter: trigger words, resolution, steps, its base.

kohya's ``ss_…`` entries are what A1111's web UI, Forge and Civitai read, ``modelspec.…`` are those
of Stability's model metadata standard, which ComfyUI and SwarmUI read. Only what the adapter itself
says of its making is written, and no hash of the base: those entries are of a checkpoint's file,
and a pipeline is a folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorakit.core.adapter import Adapter

#: family → the standard's architecture, and sd-scripts' version, by which A1111 tells SDXL
_NAMES = {
    "sd1": ("stable-diffusion-v1", "sd_v1"),
    "sd2": ("stable-diffusion-v2-512", "sd_v2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "sdxl-diffusers": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "flux": ("flux-1-dev", "flux1"),
}


def shown(adapter: Adapter, family: str) -> dict[str, str]:
    """Header entries of an adapter that was trained on pictures here; of others, none."""
    about = adapter.provenance.get("data")
    if not isinstance(about, Mapping) or about.get("kind") != "pictures":
        return {}
    train = adapter.provenance.get("train")
    train = train if isinstance(train, Mapping) else {}
    architecture, version = _NAMES[family]
    if about.get("prediction") == "v" and family in ("sd1", "sd2"):
        version += "_v"
        architecture = architecture.replace("v2-512", "v2-768-v")
    found: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "ss_base_model_version": version,
        "ss_v2": family == "sd2",
        "ss_num_train_images": about.get("pictures"),
        "ss_steps": _metric(adapter, "step"),
        "ss_learning_rate": train.get("lr"),
        "ss_seed": train.get("seed"),
    }
    side = about.get("resolution")
    if isinstance(side, int) and side:
        found["ss_resolution"] = f"({side}, {side})"
        found["modelspec.resolution"] = f"{side}x{side}"
    trigger = about.get("trigger")
    if isinstance(trigger, str) and trigger:
        found["modelspec.trigger_phrase"] = trigger
        folder = next(iter(about.get("files") or ()), "data")
        found["ss_tag_frequency"] = json.dumps({str(folder): {trigger: about.get("pictures", 1)}})
    if adapter.base is not None:
        found["ss_sd_model_name"] = adapter.base.name
    return {name: str(value) for name, value in found.items() if value is not None}


def _metric(adapter: Adapter, name: str) -> Any:
    metrics = adapter.provenance.get("metrics")
    return metrics.get(name) if isinstance(metrics, Mapping) else None
