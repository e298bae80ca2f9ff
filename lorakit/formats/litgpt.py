"""litgpt's adapters (``lit_model.pth.lora``), read only.

``transformer.h.N.attn.qkv`` holds query, key and value joined: ``lora_A [n·r, d_in]`` for the n of
them that were trained, ``lora_B`` their B one below the other. Older versions call it
``attn.attn`` and keep the base's rows group by group (the queries of a group, its key, its value);
where all three were trained they add the rows of B in that order, though A's parts go by the
joined one, and what they computed is what is read. Alpha is not in the file. Source: litgpt's
``lora.py`` of 0.4 and 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Site
from lorakit.errors import FormatError
from lorakit.formats import phi3
from lorakit.formats.carried import adapter_of
from lorakit.formats.format import Hints, Reading, Source, Written
from lorakit.formats.loralib import LITGPT
from lorakit.formats.pairs import by_module, missing_parts, refuse

_KEY = re.compile(r"(.+)\.(lora_[AB])")
_MODULES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_PARTS = ("q_proj", "k_proj", "v_proj")
_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", phi3.MODEL_TYPE)


@dataclass(frozen=True)
class _Heads:
    """What of the base decides the layout."""

    num_heads: int
    num_groups: int
    head_dim: int

    def sizes(self, enabled: Sequence[bool]) -> list[int]:
        """Rows of B by part; 0 where a part was not trained."""
        q, kv = self.num_heads * self.head_dim, self.num_groups * self.head_dim
        return [size * on for size, on in zip((q, kv, kv), enabled, strict=True)]

    def grouped_rows(self) -> list[Tensor]:
        """Rows of query, key and value in the older order of the joined weight."""
        per_group = self.num_heads // self.num_groups
        rows = torch.arange((self.num_heads + 2 * self.num_groups) * self.head_dim)
        place = (rows // self.head_dim) % (per_group + 2)
        return [rows[place < per_group], rows[place == per_group], rows[place == per_group + 1]]


class _Litgpt:
    name = "litgpt"
    title = "litgpt adapter"
    folder = False

    def recognises(self, source: Source) -> bool:
        """litgpt's names."""
        return source.storage != "gguf" and any(LITGPT.fullmatch(name) for name in source.shapes)

    def read(self, source: Source, hints: Hints) -> Reading:
        """The adapter; the base's config gives the heads, a hint the alpha."""
        problems: list[str] = []
        if hints.alpha is None:
            problems.append("litgpt's files do not hold the alpha: give lora_alpha (--alpha)")
        heads = _heads(hints.base, problems)
        parts = by_module(source.tensors, _KEY, problems)
        problems += missing_parts(parts, ("lora_A", "lora_B"))
        refuse(f"{source.path} cannot be used as an adapter", problems)
        assert heads is not None and hints.alpha is not None  # noqa: PT018
        sites: dict[str, Site] = {}
        notes: set[str] = set()
        for name, own in parts.items():
            scaling = hints.alpha / own["lora_B"].shape[1]
            try:
                for path, A, B in _factors(name, own["lora_A"], own["lora_B"], heads, hints, notes):
                    sites[path] = LowRank(A, B, scaling)
                    problems += [f"{path}: {problem}" for problem in sites[path].problems()]
            except ValueError as error:
                problems.append(f"{name}: {error}")
        sites, said = phi3.joined(sites, hints.base, problems)
        refuse(f"{source.path} cannot be used as an adapter", problems)
        return Reading(adapter_of(sites, {}, {}), (*sorted(notes), *said))

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """Refused."""
        raise FormatError("litgpt's format is read and not written.")


def _heads(config: Mapping[str, Any], problems: list[str]) -> _Heads | None:
    kind = config.get("model_type")
    num_heads = config.get("num_attention_heads")
    num_groups = config.get("num_key_value_heads") or num_heads
    hidden = config.get("hidden_size")
    if not config:
        problems.append(
            "litgpt joins query, key and value: give the base, of which only the config is read "
            "(--base)"
        )
    elif kind not in _KNOWN:
        problems.append(
            f"the base's model_type is {kind!r}; litgpt files are read for {', '.join(_KNOWN)}"
        )
    elif not (type(num_heads) is int and type(num_groups) is int and type(hidden) is int):
        problems.append("the base's config lacks num_attention_heads or hidden_size")
    else:
        return _Heads(num_heads, num_groups, config.get("head_dim") or hidden // num_heads)
    return None


def _factors(
    name: str, A: Tensor, B: Tensor, heads: _Heads, hints: Hints, notes: set[str]
) -> list[tuple[str, Tensor, Tensor]]:
    """Path, A and B of the site or sites of one module.

    Raises:
        ValueError: says what is wrong with it.
    """
    if name == "lm_head":
        return [("lm_head", A, B)]
    block = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    if block is None:
        raise ValueError("a module that is not known here")
    inside = f"model.layers.{block[1]}."
    if block[2] in _MODULES:
        return [(inside + _MODULES[block[2]], A, B)]
    if block[2] not in ("attn.qkv", "attn.attn"):
        raise ValueError("a module that is not known here")
    enabled = hints.enabled or _enabled(A, B, heads, notes)
    sizes = heads.sizes(enabled)
    rank, n = B.shape[1], sum(enabled)
    if sum(sizes) != B.shape[0] or A.shape[0] != n * rank:
        raise ValueError(
            f"A has shape {list(A.shape)} and B {list(B.shape)}; the base's heads and the trained "
            f"parts {[p for p, on in zip(_PARTS, enabled, strict=True) if on]} make "
            f"[{n * rank}, …] and [{sum(sizes)}, …]"
        )
    blocks = zip(A.chunk(n), torch.split(B, [size for size in sizes if size]), strict=True)
    pairs = [(a.contiguous(), b.contiguous()) for a, b in blocks]
    if block[2] == "attn.attn" and all(enabled):
        # the rows were added in the order of the groups, though they were computed part by part
        joined = torch.block_diag(*(b for _, b in pairs))  # type: ignore[no-untyped-call]
        pairs = [(A, joined[rows].contiguous()) for rows in heads.grouped_rows()]
        notes.add(
            "an older litgpt's query, key and value, all trained: each became a site of three "
            "times the rank, which is what that version computed"
        )
    names = [part for part, on in zip(_PARTS, enabled, strict=True) if on]
    return [(f"{inside}self_attn.{part}", a, b) for part, (a, b) in zip(names, pairs, strict=True)]


def _enabled(A: Tensor, B: Tensor, heads: _Heads, notes: set[str]) -> tuple[bool, bool, bool]:
    """Which of query, key and value fit the shapes; litgpt's default where several do.

    Raises:
        ValueError: the shapes leave it open, or nothing fits.
    """
    n = A.shape[0] // B.shape[1]
    choices = [
        choice
        for choice in (
            (q, k, v) for q in (True, False) for k in (True, False) for v in (True, False)
        )
        if sum(choice) == n and sum(heads.sizes(choice)) == B.shape[0]
    ]
    if len(choices) == 1:
        return choices[0]
    if (True, False, True) in choices:
        notes.add("query and value are taken to be what was trained, litgpt's default")
        return (True, False, True)
    if not choices:
        raise ValueError(
            f"A has shape {list(A.shape)} and B {list(B.shape)}, which fit no choice of query, "
            "key and value of the base's heads"
        )
    raise ValueError(
        "the file does not say which of query, key and value were trained; say so, such as "
        "--enabled 0,0,1 for the value"
    )


FORMAT = _Litgpt()
