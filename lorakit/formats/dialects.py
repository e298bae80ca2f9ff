"""Recognising what an adapter file is when it is not PEFT's, to say so instead of doing nothing.

Readers of this field skip keys that they do not know, so that a file in another dialect loads with
a warning at best and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: expression on a key → what such a file is
_DIALECTS = {
    r"lora_(unet|te\d?)_.*\.(lora_(down|up)\.weight|alpha)": "kohya's names (sd-scripts)",
    r".*\.(hada_w|lokr_w|lora_mid)": "LyCORIS's names (LoHa, LoKr, …)",
    r"(unet|transformer|text_encoder\w*)\..*lora": "diffusers' names",
    r".*\.lora\.(down|up)\.weight": "diffusers' older names",
    r".*\.lora_[ab](\.weight)?": "names of MLX or torchtune (lora_a, lora_b)",
    r".*\.lora_[AB]": "loralib's names (no .weight, and the scale is not in the file)",
    r"(.*\.)?prompt_embeddings|.*\.ia3_l|.*\.oft_|.*\.vera_": "another PEFT method, not LoRA",
}


def describe_keys(keys: Iterable[str]) -> str:
    """What keys without PEFT's prefix look like, and an example."""
    names = sorted(keys)
    if not names:
        return "the file holds no tensor"
    example = f"for example {names[0]!r}"
    for name in names:
        if re.search(r"\.lora_(A|B)\.weight$|\.lora_embedding_(A|B)$", name):
            return f"PEFT's names without the prefix 'base_model.model.', for example {name!r}"
    for expression, what in _DIALECTS.items():
        match = next((name for name in names if re.fullmatch(rf"(?:{expression}).*", name)), None)
        if match is not None:
            return f"{what}, for example {match!r}"
    if not any("lora" in name for name in names):
        return f"a model's own weights rather than an adapter's, {example}"
    return f"names of no dialect known here, {example}"
