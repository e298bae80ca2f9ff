"""diffusers' file, ``pytorch_lora_weights.safetensors``, and the older ones that it reads.

``<component>.<path>.lora_A.weight [r, d_in]`` and ``.lora_B.weight [d_out, r]``, where the
component is ``unet``, ``transformer``, ``text_encoder`` or ``text_encoder_2``. Since diffusers
0.35 the header's ``lora_adapter_metadata`` holds a ``LoraConfig`` of PEFT for each component, every
field with the component in front; without it alpha is the rank. Older files have
``lora.down.weight`` and ``lora.up.weight``, or ``lora_linear_layer.down.weight`` in text encoders;
the oldest, of attention processors, ``attn1.processor.to_q_lora.down.weight``, also as a pickle and
without a component.

Source: diffusers' ``loaders/lora_base.py``, ``loaders/peft.py``, ``utils/state_dict_utils.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.safetensors_io import write_safetensors
from lorakit.core.sites import LowRank, Prefix, Replace, Site
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError, collected
from lorakit.formats.carried import adapter_of, header_of
from lorakit.formats.format import Hints, Reading, Source, Written
from lorakit.formats.header import KEY, read_header
from lorakit.formats.peft.config import as_number, read_config
from lorakit.formats.peft.match import fitting_spec, scalings
from lorakit.formats.picture_names import stored_text_path, text_path

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

#: end of a key → which of a site's tensors it is
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_linear_layer.up.bias": "bias",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
}
#: where a training script left PEFT's name of the adapter in the keys
_NAMED = re.compile(r"(.+\.lora_(?:A|B|magnitude_vector))\.[^.]+\.(weight|bias)")
#: first names of paths in a component, for files without it
_ROOTS = {
    **dict.fromkeys(
        ("down_blocks", "mid_block", "up_blocks", "time_embedding", "add_embedding"), "unet"
    ),
    **dict.fromkeys(
        (
            "transformer_blocks",
            "single_transformer_blocks",
            "time_text_embed",
            "x_embedder",
            "context_embedder",
            "norm_out",
        ),
        "transformer",
    ),
}
_PROCESSOR = re.compile(r"(.+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")


# --- reading -------------------------------------------------------------------------------------


def _place(key: str, *, projected: bool = False) -> tuple[str, str, str] | None:
    """Component, path and part of a key; ``None`` if it is not one of the format's.

    Args:
        projected: see :func:`_is_projected`.
    """
    component, _, rest = key.partition(".")
    if component not in COMPONENTS:
        if component not in _ROOTS:
            return None
        component, rest = _ROOTS[component], key
    if named := _NAMED.fullmatch(rest):
        rest = f"{named[1]}.{named[2]}"
    rest = rest.replace(".processor.", ".")
    if old := _PROCESSOR.fullmatch(rest):
        path, which, side = old.groups()
        if component.startswith("text_encoder"):
            leaf = f"{which}_proj"
        else:
            leaf = "to_out.0" if which == "out" else f"to_{which}"
        rest, part = f"{path}.{leaf}", "A" if side == "down" else "B"
        return component, text_path(component, rest, projected=projected), part
    for end, part in _PARTS.items():
        if rest.endswith(end):
            path = rest.removesuffix(end)
            return component, text_path(component, path, projected=projected), part
    return None


def _is_projected(source: Source, configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the first text encoder is a CLIP with a projection, as SD3's: its paths begin with
    ``text_model``, as all files write them.

    The paths that were adapted are in a file of ours. In others a transformer beside two CLIPs is
    SD3's: Flux has a T5 for the second, and SDXL a UNet.
    """
    if KEY in source.metadata:
        return "text_model" in str(configs.get("text_encoder", {}).get("target_modules"))
    return any(key.startswith("transformer.") for key in source.shapes) and any(
        key.startswith("text_encoder_2.text_model.") for key in source.shapes
    )


def _components(
    tensors: Mapping[str, Tensor], projected: bool, lost: dict[str, str], problems: list[str]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Component → path → part → tensor."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key in sorted(tensors):
        place = _place(key, projected=projected)
        if place is None:
            lost[key] = "is no name of diffusers' format"
            continue
        component, path, part = place
        parts = found.setdefault(component, {}).setdefault(path, {})
        if part in parts:
            problems.append(f"{key}: {component}.{path} has two of its {part}")
        parts[part] = tensors[key]
    return found


def _configs(source: Source, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Component → its ``LoraConfig``, of those that the header has one for."""
    if METADATA not in source.metadata:
        return {}
    try:
        raw = json.loads(source.metadata[METADATA])
        items = list(raw.items())
    except (ValueError, AttributeError, RecursionError) as error:
        problems.append(f"its {METADATA} is no JSON object ({error})")
        return {}
    configs: dict[str, dict[str, Any]] = {}
    for name, value in items:
        component, _, setting = name.partition(".")
        if component not in COMPONENTS or not setting:
            problems.append(f"its {METADATA} has {name!r}, which belongs to no component")
            continue
        configs.setdefault(component, {})[setting] = value
    return configs


def _scalings(
    component: str,
    modules: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any] | None,
    problems: list[str],
) -> dict[str, float]:
    """Path → factor on B·A."""
    found = dict.fromkeys(modules, 1.0)
    if config is not None:
        named = config.get("target_modules") or sorted(modules)  # the tensors' names say the same
        spec, wrong = read_config({**config, "target_modules": named}, trained=True)
        problems += [f"{METADATA} of {component}: {problem}" for problem in wrong]
        found = found if spec is None else scalings(spec, modules)
    for path, parts in modules.items():
        rank = parts["A"].shape[0] if "A" in parts and parts["A"].ndim else 0
        alpha = parts.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            shape = tuple(alpha.shape)
            problems.append(f"{component}.{path}: its alpha has shape {shape}; expected one number")
        elif rank and alpha is not None:
            found[path] = float(alpha.item()) / rank
    return found


def _site(parts: Mapping[str, Tensor], scaling: float) -> LowRank | str:
    """The site, or what is wrong."""
    missing = [f"lora_{x}" for x in ("A", "B") if x not in parts]
    if missing:
        return f"lacks {' and '.join(missing)}"
    magnitude = parts.get("magnitude", parts.get("dora_scale"))
    if "dora_scale" in parts and parts["dora_scale"].shape[:1] != parts["B"].shape[:1]:
        return (
            f"its dora_scale has shape {tuple(parts['dora_scale'].shape)}; expected one value an "
            f"output, ({parts['B'].shape[0]}, 1). By input, merge it where it was made"
        )
    kind: Any = "linear" if parts["A"].ndim == 2 else "conv"
    site = LowRank(
        parts["A"],
        parts["B"],
        scaling,
        kind,
        parts.get("bias"),
        None if magnitude is None else magnitude.flatten(),
    )
    return "; ".join(site.problems()) or site


def read_diffusers(source: Source) -> Reading:
    """The adapter of a file of any age.

    Raises:
        FormatError: it is malformed; all problems are in one message.
    """
    lost: dict[str, str] = {}
    problems: list[str] = []
    configs = _configs(source, problems)
    projected = _is_projected(source, configs)
    components = _components(source.tensors, projected, lost, problems)
    sites: dict[str, Site] = {}
    for component, modules in components.items():
        factors = _scalings(component, modules, configs.get(component), problems)
        for path, parts in modules.items():
            site = _site(parts, factors[path])
            if isinstance(site, str):
                problems.append(f"{component}.{path}: {site}")
            else:
                sites[f"{component}.{path}"] = site
    if not problems and not sites:
        problems = [f"{key}: {why}" for key, why in lost.items()] or ["it holds no tensor"]
    if problems:
        raise FormatError(
            collected(f"{source.weights} cannot be used as an adapter", problems)
            + "\nNothing of it was loaded."
        )
    facts = {"diffusers": {"metadata": configs}} if configs else {}
    notes = _notes(source, components, configs)
    return Reading(adapter_of(sites, source.metadata, facts), tuple(notes), lost)


def _notes(
    source: Source,
    components: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    configs: Mapping[str, Any],
) -> list[str]:
    """What was assumed where the file does not tell."""
    notes = []
    bare = {key.partition(".")[0] for key in source.shapes} & set(_ROOTS)
    if bare:
        whose = " and ".join(sorted({_ROOTS[name] for name in bare}))
        notes.append(f"names without a component in front are taken as those of the {whose}")
    if any(_NAMED.fullmatch(key) for key in source.shapes):
        notes.append("the adapter's name in the keys, behind lora_A and lora_B, is left out")
    if read_header(source.metadata) is not None:
        return notes
    for component, modules in components.items():
        silent = [path for path, parts in modules.items() if "alpha" not in parts]
        if component in configs or not silent:
            continue
        where = (
            component
            if len(silent) == len(modules)
            else f"{len(silent)} of {len(modules)} modules of {component} ({silent[0]}, …)"
        )
        notes.append(f"{where}: the file says no alpha, so it is the rank, and the scaling 1")
    return notes


# --- writing -------------------------------------------------------------------------------------


def _unwritable(path: str, site: Site) -> str | None:
    """Why a site has no place in the format."""
    component = path.partition(".")[0]
    if component not in COMPONENTS or "." not in path:
        return f"lies in no component of a pipeline; paths begin with {', '.join(COMPONENTS)}"
    if isinstance(site, Prefix):
        return "is a prefix of keys and values; diffusers' files hold low-rank changes only"
    if isinstance(site, Replace):
        return "was trained whole; diffusers' files hold low-rank changes only"
    if site.kind == "embedding":
        return "is an embedding, which diffusers leaves out"
    if site.kind in ("experts", "router"):
        return "belongs to a mixture of experts, which diffusers does not adapt"
    return None


def _by_component(adapter: Adapter, lost: dict[str, str]) -> dict[str, dict[str, LowRank]]:
    found: dict[str, dict[str, LowRank]] = {}
    for path, site in sorted(adapter.sites.items()):
        if reason := _unwritable(path, site):
            lost[path] = reason
            continue
        assert isinstance(site, LowRank)
        component, _, inner = path.partition(".")
        found.setdefault(component, {})[inner] = site
    for component, sites in found.items():
        with_magnitude = {p for p, s in sites.items() if s.magnitude is not None}
        if 0 < len(with_magnitude) < len(sites):
            for path in sorted(set(sites) - with_magnitude):
                lost[f"{component}.{path}"] = (
                    "is plain beside DoRA sites; diffusers has one kind for a component"
                )
                del sites[path]
    return found


def _config(sites: Mapping[str, LowRank]) -> dict[str, Any]:
    """PEFT's settings that give exactly these ranks and scalings, and no module besides."""
    spec = fitting_spec(LoRASpec(), sites)
    names: Any = sorted(sites)
    if any("." not in path for path in sites):
        # PEFT takes an entry for the end of any path, so "proj_out" would be every block's too
        names = "|".join(re.escape(path) for path in names)
    return {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": as_number(spec.alpha),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {k: as_number(v) for k, v in spec.alpha_pattern.items()},
        "target_modules": names,
        "use_dora": any(site.magnitude is not None for site in sites.values()),
        "lora_bias": any(site.bias is not None for site in sites.values()),
    }


def _tensors(component: str, sites: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors under the names that diffusers' own training scripts write.

    In text encoders those are the middle-aged ones: with ``lora_A``, its loader fails on a file
    that adapts none of the attention there. A magnitude has its parameter's own name there, for
    transformers loads it, which passes over the short one that the denoiser needs.
    """
    down, up, length = ("lora_A", "lora_B", "lora_magnitude_vector")
    if component.startswith("text_encoder"):
        down, up = ("lora_linear_layer.down", "lora_linear_layer.up")
        length = "lora_magnitude_vector.weight"
    tensors: dict[str, Tensor] = {}
    with_bias = any(site.bias is not None for site in sites.values())
    for path, site in sites.items():
        key = f"{component}.{stored_text_path(component, path)}"
        tensors[f"{key}.{down}.weight"] = site.A
        tensors[f"{key}.{up}.weight"] = site.B
        if with_bias:  # PEFT's setting covers all sites
            zeros = torch.zeros(site.B.shape[0], dtype=site.B.dtype)
            tensors[f"{key}.{up}.bias"] = zeros if site.bias is None else site.bias
        if site.magnitude is not None:
            ones = [1] * (site.A.ndim - 2)
            magnitude = site.magnitude.reshape(1, -1, *ones) if ones else site.magnitude
            tensors[f"{key}.{length}"] = magnitude
    return tensors


def write_diffusers(adapter: Adapter) -> Written:
    """The file, with the metadata by which diffusers applies exactly our scaling.

    Raises:
        FormatError: nothing of the adapter can be written.
    """
    lost: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    stored: dict[str, float] = {}
    no_bias: list[str] = []
    for component, sites in _by_component(adapter, lost).items():
        config = _config(sites)
        tensors |= _tensors(component, sites)
        configs |= {f"{component}.{name}": value for name, value in config.items()}
        spec, _ = read_config(config, trained=True)
        given = scalings(spec or LoRASpec(), sites)
        stored |= {f"{component}.{path}": scaling for path, scaling in given.items()}
        if config["lora_bias"]:
            no_bias += [f"{component}.{path}" for path, s in sites.items() if s.bias is None]
    if not tensors:
        raise FormatError(
            collected(
                "Nothing of this adapter fits diffusers' format",
                (f"{path}: {why}" for path, why in lost.items()),
            )
        )
    if adapter.tokenizer_files:
        lost["tokenizer_files"] = "diffusers' format has no place for a tokenizer"
    metadata = header_of(adapter, stored, no_bias) | {
        METADATA: json.dumps(configs, indent=2, sort_keys=True)
    }
    notes = []
    if any(scaling != 1 for scaling in stored.values()):
        notes.append(
            "the scale is in the header, which diffusers reads from 0.35 on; for older ones, "
            "fold it into B"
        )
    if any(p.startswith("transformer.") for p in stored) and any(
        p.startswith("text_encoder_2.encoder.")
        for p in stored  # T5; SD3's second one is a CLIP
    ):
        notes.append(
            "text_encoder_2 of Flux is in the file, but diffusers itself loads no adapter into it"
        )
    content = partial(write_safetensors, tensors=tensors, metadata=metadata)
    return Written({FILE: content}, tuple(notes), lost)


# --- the format ----------------------------------------------------------------------------------


class Diffusers:
    """See the module."""

    name = "diffusers"
    title = "diffusers (pytorch_lora_weights)"
    folder = False

    def recognises(self, source: Source) -> bool:
        """By names such as ``unet.….lora_A.weight``."""
        if "peft_type" in source.config and not any(
            k.startswith(COMPONENTS) for k in source.shapes
        ):
            return False  # PEFT's, of one component; its scale is in that config
        places = [place for place in map(_place, source.shapes) if place is not None]
        return any(part in ("A", "B") for _, _, part in places)

    def read(self, source: Source, hints: Hints) -> Reading:
        """See :class:`~lorakit.formats.format.Format`."""
        return read_diffusers(source)

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """See :class:`~lorakit.formats.format.Format`."""
        return write_diffusers(adapter)


FORMAT = Diffusers()
