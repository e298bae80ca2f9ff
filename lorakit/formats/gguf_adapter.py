"""llama.cpp's adapters: one GGUF beside the GGUF of the base.

========================== ============================================================
``general.type``           ``adapter``
``general.architecture``   the model's, such as ``llama``
``adapter.type``           ``lora``
``adapter.lora.alpha``     scaling = alpha/rank, by each tensor's own rank; 0 means 1
``blk.3.attn_q.weight.lora_a``  A ``[r, d_in]``
``blk.3.attn_q.weight.lora_b``  B ``[d_out, r]``; its rows in llama.cpp's order
========================== ============================================================

Everything is written as float32 with the scale folded into B and alpha 0: one alpha for all sites
cannot say rsLoRA's or a pattern's scale, and llama.cpp multiplies with 16-bit factors in 16 bits.
Source: llama.cpp's ``convert_lora_to_gguf.py`` and ``llama-adapter.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lorakit.core import gguf_names
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Site
from lorakit.errors import FormatError, collected
from lorakit.formats.carried import adapter_of, header_of
from lorakit.formats.format import Hints, Reading, Source, Written
from lorakit.formats.header import KEY
from lorakit.formats.pairs import by_module, left_behind, missing_parts, refuse
from lorakit.formats.portable import fold_sites, plain_sites, plain_spec
from lorakit.optional import require

FILE = "adapter.gguf"

#: model types whose linear layers alone have llama.cpp's usual names; their norms differ
_ADAPTERS_ONLY = {"gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3"}
#: in a block, for architectures with joined projections
_JOINED = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
#: model types whose config ties the head to the embedding unless it says otherwise
_TIED = ("gemma", "gemma2", "gemma3_text")

_KEY = re.compile(r"(.+)\.weight\.(lora_[ab])")
#: our own fields: the heads by which rows were interleaved, so that no config is needed to read
_HEADS, _KV_HEADS = f"{KEY}.head_count", f"{KEY}.head_count_kv"


@dataclass(frozen=True)
class _Layout:
    """What a base's config says about the names and rows of its GGUF."""

    architecture: str
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    num_layers: int | None = None
    tied: bool = False

    def heads_of(self, name: str) -> int:
        """Heads by which the rows of a module are interleaved; 0 where they are not."""
        return gguf_names.interleaved_heads(
            self.architecture, name, self.num_heads, self.num_kv_heads
        )


class _Gguf:
    name = "gguf"
    title = "GGUF adapter (llama.cpp)"
    folder = False

    def recognises(self, source: Source) -> bool:
        """A GGUF that says that it is an adapter."""
        return source.storage == "gguf" and source.gguf.fields.get("general.type") == "adapter"

    def read(self, source: Source, hints: Hints) -> Reading:
        """The adapter; where rows were reordered, the base's heads undo it."""
        fields = source.gguf.fields
        problems: list[str] = []
        if fields.get("adapter.type") != "lora":
            problems.append(f"adapter.type is {fields.get('adapter.type')!r}; expected 'lora'")
        if fields.get("adapter.alora.invocation_tokens"):
            problems.append("aLoRA acts only after certain tokens, which plain LoRA does not")
        alpha = fields.get("adapter.lora.alpha", 0.0)
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            problems.append(f"adapter.lora.alpha is {alpha!r}; expected a number")
        layout = _stored_layout(fields, hints, list(source.shapes), problems)
        tensors = source.tensors
        lost = {
            name: "a norm's new value, which llama.cpp does not use either"
            for name, tensor in tensors.items()
            if name.endswith("_norm.weight") and tensor.dim() == 1
        }
        parts = by_module({n: t for n, t in tensors.items() if n not in lost}, _KEY, problems)
        problems += missing_parts(parts, ("lora_a", "lora_b"))
        refuse(f"{source.path} cannot be used as an adapter", problems)
        sites: dict[str, Site] = {}
        for name, own in parts.items():
            path = _path_of(name, layout.architecture)
            site, problem = _site(name, own, float(alpha), layout)
            if path is None:
                problems.append(f"{name}: a module that is not known here")
            elif problem:
                problems.append(f"{path}: {problem}")
            else:
                sites[path] = site
        refuse(f"{source.path} cannot be used as an adapter", problems)
        text = fields.get(KEY)
        metadata = {KEY: text} if isinstance(text, str) else {}
        base = fields.get("general.base_model.0.name")
        return Reading(
            adapter_of(sites, metadata, {"gguf": {"base": base}} if base else {}), (), lost
        )

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """The file; the base's config gives names and heads."""
        layout = _layout(hints.base, adapter)
        kept, lost = plain_sites(adapter, ("linear", "embedding"))
        for path in list(kept):
            why = _unwritable(path, kept[path], layout)
            if why:
                lost[path] = why
                del kept[path]
        if not kept:
            raise FormatError(
                collected(
                    "Nothing of this adapter fits a GGUF", (f"{p}: {w}" for p, w in lost.items())
                )
            )
        folded, notes = fold_sites(kept)
        if any(t.dtype == torch.float64 for s in kept.values() for t in (s.A, s.B)):
            notes.append("float64 values are rounded to float32, the widest that llama.cpp takes")
        left, losses = left_behind(adapter, header=True)
        tensors = _tensors(folded, layout)
        slim = adapter.with_(sites=folded, spec=plain_spec(adapter.spec, folded))
        fields: dict[str, Any] = {KEY: header_of(slim, dict.fromkeys(folded, 1.0))[KEY]}
        if any(layout.heads_of(_name_of(path) or "") for path in folded):
            fields |= {_HEADS: layout.num_heads, _KV_HEADS: layout.num_kv_heads}
        base = adapter.base.name if adapter.base else None
        write = partial(
            _write, architecture=layout.architecture, fields=fields, tensors=tensors, base=base
        )
        return Written({FILE: write}, (*notes, *left), {**lost, **losses})


# --- names and rows ------------------------------------------------------------------------------


def _name_of(path: str) -> str | None:
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if block is not None and block[2] in _JOINED:
        return f"blk.{block[1]}.{_JOINED[block[2]]}"
    return gguf_names.gguf_name(path)


def _path_of(name: str, architecture: str) -> str | None:
    block = re.fullmatch(r"blk\.(\d+)\.(attn_qkv|ffn_up)", name)
    if block is not None and architecture == "phi3":
        back = {theirs: ours for ours, theirs in _JOINED.items()}
        return f"model.layers.{block[1]}.{back[block[2]]}"
    return gguf_names.module_path(name)


def _layout(config: Mapping[str, Any], adapter: Adapter) -> _Layout:
    """What the config of the base says.

    Raises:
        FormatError: there is no config, llama.cpp has no such architecture here, or the config
            is not that of the adapter's base.
    """
    if not config:
        raise FormatError(
            "A GGUF adapter has its base's names and its rows by the base's heads. Give the base, "
            "of which only the config is read: --base BASE, or hints.base in Python."
        )
    kind = str(config.get("model_type"))
    config = config.get("text_config") or config
    architecture = gguf_names.architecture_of(config) or _ADAPTERS_ONLY.get(kind)
    if architecture is None:
        known = ", ".join([*gguf_names.ARCHITECTURES, *_ADAPTERS_ONLY])
        raise FormatError(
            f"The base's model_type is {kind!r}; a GGUF adapter is written for {known}. Merge the "
            "adapter instead (`lorakit merge`), then convert the merged model."
        )
    num_heads, num_layers = config.get("num_attention_heads"), config.get("num_hidden_layers")
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if not _is_count(num_heads) or not _is_count(num_layers) or not _is_count(num_kv_heads):
        raise FormatError(
            "The base's config lacks what a GGUF adapter needs: num_attention_heads is "
            f"{num_heads!r}, num_hidden_layers {num_layers!r}, num_key_value_heads "
            f"{num_kv_heads!r}. Give the config.json of the base."
        )
    hidden = config.get("hidden_size")
    head_dim = config.get("head_dim") or (hidden // num_heads if hidden else None)
    layout = _Layout(
        architecture,
        num_heads,
        num_kv_heads,
        head_dim,
        num_layers,
        bool(config.get("tie_word_embeddings", kind in _TIED)),
    )
    refuse(
        "The adapter does not fit the base whose config was given",
        [p for path, site in adapter.low_rank.items() for p in _misfits(path, site, layout)],
    )
    return layout


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _misfits(path: str, site: LowRank, layout: _Layout) -> list[str]:
    name = _name_of(path)
    block = re.match(r"blk\.(\d+)\.attn_([qk])$", name or "")
    number = re.match(r"blk\.(\d+)\.", name or "")
    found = []
    if number is not None and layout.num_layers and int(number[1]) >= layout.num_layers:
        found.append(f"{path}: the base has {layout.num_layers} layers")
    if block is not None and layout.head_dim:
        heads = layout.num_heads if block[2] == "q" else layout.num_kv_heads
        if site.B.shape[0] != heads * layout.head_dim:
            found.append(
                f"{path}: has {site.B.shape[0]} outputs; the base's {heads} heads of "
                f"{layout.head_dim} make {heads * layout.head_dim}"
            )
    return found


def _stored_layout(
    fields: Mapping[str, Any], hints: Hints, names: list[str], problems: list[str]
) -> _Layout:
    """Heads for reading: our own fields, the hint, or none where no row was moved."""
    architecture = str(fields.get("general.architecture"))
    config = hints.base.get("text_config") or hints.base
    num_heads = fields.get(_HEADS, config.get("num_attention_heads"))
    num_kv_heads = fields.get(_KV_HEADS, config.get("num_key_value_heads", num_heads))
    moved = [
        name
        for name in names
        if gguf_names.interleaved_heads(architecture, name.rpartition(".lora_")[0], 1, 1)
    ]
    known = _is_count(num_heads) and _is_count(num_kv_heads)
    if moved and not known:
        problems.append(
            f"the rows of {len(moved)} tensors ({moved[0]}, …) are in llama.cpp's order, by the "
            "base's heads; give the base, of which only the config is read (--base)"
        )
    return _Layout(architecture, num_heads if known else 0, num_kv_heads if known else 0)


def _unwritable(path: str, site: LowRank, layout: _Layout) -> str | None:
    """Why llama.cpp would not take a site; ``None`` if it does."""
    if site.kind == "embedding":
        return "an adapted embedding aborts llama.cpp; merge it instead (`lorakit merge`)"
    name = _name_of(path)
    if name is None:
        return "llama.cpp has no module of this name"
    if name == "output" and layout.tied:
        return (
            "the head of this base is its embedding, which llama.cpp cannot adapt; merge it "
            "instead (`lorakit merge`)"
        )
    return None


# --- sites ---------------------------------------------------------------------------------------


def _tensors(sites: Mapping[str, LowRank], layout: _Layout) -> dict[str, Tensor]:
    tensors = {}
    for path, site in sites.items():
        name = _name_of(path)
        assert name is not None
        B = gguf_names.to_gguf_rows(site.B, layout.heads_of(name))
        tensors[f"{name}.weight.lora_a"] = site.A.float()
        tensors[f"{name}.weight.lora_b"] = B.float()
    return tensors


def _site(
    name: str, own: Mapping[str, Tensor], alpha: float, layout: _Layout
) -> tuple[LowRank, str]:
    """The site, and what is wrong with it."""
    embedding = name == "token_embd"
    A = own["lora_a"].T.contiguous() if embedding else own["lora_a"]
    scaling = alpha / A.shape[0] if alpha else 1.0
    site = LowRank(A, own["lora_b"], scaling, "embedding" if embedding else "linear")
    problems = site.problems()
    try:
        B = gguf_names.from_gguf_rows(site.B, layout.heads_of(name))
    except ValueError as error:
        return site, f"{error}; the base given has other heads"
    return LowRank(site.A, B.contiguous(), scaling, site.kind), "; ".join(problems)


def _write(
    path: Path,
    *,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: str | None,
) -> None:
    gguf = require("gguf", extra="train", purpose="writing a .gguf file")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, value in fields.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
    for name in sorted(tensors, key=_order):
        writer.add_tensor(name, tensors[name].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _order(name: str) -> list[Any]:
    """Numbers by value, so that layer 10 follows 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


FORMAT = _Gguf()
