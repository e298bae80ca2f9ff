"""torchtune's adapters (``adapter_model.pt``, ``adapter_0.pt``), read only.

``layers.N.attn.q_proj.lora_a.weight`` is A ``[r, d_in]``, ``.lora_b.weight`` B ``[d_out, r]``,
``.magnitude`` DoRA's ``[d_out]``. Llama's, Mistral's and Gemma's query and key rows are
interleaved by head, since torchtune rotates neighbours; alpha is in the ``adapter_config.json``
that it writes beside, or a hint. Source: torchtune's ``models/convert_weights.py``, which leaves
the magnitude's rows as they are; they are B's, and are put in order here with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorakit.core import gguf_names
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Site
from lorakit.errors import FormatError
from lorakit.formats import phi3
from lorakit.formats.carried import adapter_of
from lorakit.formats.format import Hints, Reading, Source, Written
from lorakit.formats.pairs import by_module, missing_parts, refuse
from lorakit.formats.peft.config import is_number

_KEY = re.compile(r"(.+)\.(lora_[ab]|magnitude)(?:\.weight)?")
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
#: model types whose torchtune model rotates neighbours, and those whose rotates halves
_INTERLEAVED = ("llama", "mistral", "gemma", "gemma2")
_PLAIN = ("qwen2", "qwen3", phi3.MODEL_TYPE)


class _Torchtune:
    name = "torchtune"
    title = "torchtune adapter"
    folder = False

    def recognises(self, source: Source) -> bool:
        """``lora_a.weight`` and ``lora_b.weight`` under torchtune's names."""
        return source.storage != "gguf" and any(
            re.fullmatch(r"(?:layers\.\d+\..+|output)\.lora_[ab]\.weight", name)
            for name in source.shapes
        )

    def read(self, source: Source, hints: Hints) -> Reading:
        """The adapter; the base's config gives the heads."""
        problems: list[str] = []
        alpha = source.config.get("lora_alpha") if hints.alpha is None else hints.alpha
        if not is_number(alpha):
            problems.append("its alpha is not in the file: give it (--alpha)")
            alpha = 0.0
        assert alpha is not None
        heads = _heads(hints.base, problems)
        parts = by_module(source.tensors, _KEY, problems)
        problems += missing_parts(parts, ("lora_a", "lora_b"))
        refuse(f"{source.path} cannot be used as an adapter", problems)
        sites: dict[str, Site] = {}
        for name, own in parts.items():
            path = _path_of(name)
            if path is None:
                problems.append(f"{name}: a module that is not known here")
                continue
            number = heads.get(name.rpartition(".")[2], 0)
            try:
                B = gguf_names.from_gguf_rows(own["lora_b"], number).contiguous()
                magnitude = own.get("magnitude")
                if magnitude is not None:
                    magnitude = gguf_names.from_gguf_rows(magnitude, number).contiguous()
            except ValueError as error:
                problems.append(f"{path}: {error}; the base given has other heads")
                continue
            A = own["lora_a"]
            sites[path] = LowRank(A, B, alpha / A.shape[0], magnitude=magnitude)
            problems += [f"{path}: {problem}" for problem in sites[path].problems()]
        sites, notes = phi3.joined(sites, hints.base, problems)
        refuse(f"{source.path} cannot be used as an adapter", problems)
        return Reading(adapter_of(sites, {}, {}), tuple(notes))

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """Refused."""
        raise FormatError("torchtune's format is read and not written; it loads PEFT's.")


def _heads(config: Mapping[str, Any], problems: list[str]) -> dict[str, int]:
    """Module → heads by which its rows are interleaved."""
    kind = config.get("model_type")
    if not config:
        problems.append(
            "torchtune orders rows by the base's heads: give the base, of which only the config "
            "is read (--base)"
        )
    elif kind not in (*_INTERLEAVED, *_PLAIN):
        known = ", ".join((*_INTERLEAVED, *_PLAIN))
        problems.append(f"the base's model_type is {kind!r}; torchtune files are read for {known}")
    elif kind in _INTERLEAVED:
        q = config.get("num_attention_heads")
        k = config.get("num_key_value_heads") or q
        if type(q) is int and type(k) is int:
            return {"q_proj": q, "k_proj": k}
        problems.append(f"the base's config has num_attention_heads {q!r}; expected a number")
    return {}


def _path_of(name: str) -> str | None:
    block = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if block is None:
        return "lm_head" if name == "output" else None
    module = _MODULES.get(block[2])
    return None if module is None else f"model.layers.{block[1]}.{module}"


FORMAT = _Torchtune()
