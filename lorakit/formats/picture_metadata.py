"""What other programs show of a picture adapter: trigger words, resolution, steps, its base.

kohya's ``ss_…`` entries are what A1111's web UI, Forge and Civitai read, ``modelspec.…`` are those
of Stability's model metadata standard, which ComfyUI and SwarmUI read. Only what the adapter itself
says of its making is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lorakit.core.adapter import Adapter

_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-diffusers": "stable-diffusion-xl-v1-base",
    "flux": "flux-1-dev",
}


def shown(adapter: Adapter, family: str) -> dict[str, str]:
    """Header entries of an adapter that was trained on pictures here; of others, none."""
    about = adapter.provenance.get("data")
    if not isinstance(about, Mapping) or about.get("kind") != "pictures":
        return {}
    train = adapter.provenance.get("train")
    train = train if isinstance(train, Mapping) else {}
    found: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_ARCHITECTURES.get(family, family)}/lora",
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
        facts = adapter.base.to_dict()
        found["ss_sd_model_name"] = facts.pop("name")
        # no file's: pipelines are folders. It is of the base's shapes and sampled weights
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        found["ss_sd_model_hash"], found["ss_new_sd_model_hash"] = digest[:8], digest
    return {name: str(value) for name, value in found.items() if value is not None}


def _metric(adapter: Adapter, name: str) -> Any:
    metrics = adapter.provenance.get("metrics")
    return metrics.get(name) if isinstance(metrics, Mapping) else None
