"""Names of the modules of picture models: diffusers' paths, and what kohya's files call them.

A kohya name is a path with every dot made an underscore, so it can only be undone by knowing the
paths there are. These tables list them, with ``#`` for a number: Stable Diffusion's UNet under
diffusers' own names, SDXL's under those of Stability's code (``input_blocks``), Flux's under those
of Black Forest Labs, where q, k and v are one matrix, CLIP's and T5's encoders. A name that is not
in a table is nothing that anybody may guess.

Sources: diffusers' ``UNet2DConditionModel``, ``FluxTransformer2DModel`` and their conversion
scripts; sd-scripts' ``networks/lora.py``, ``lora_flux.py`` and ``convert_flux_lora.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# --- a table of names ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """What a file's name stands for."""

    paths: tuple[str, ...]
    """One module's path, or those whose outputs the file joins into one, in their order."""


class Names:
    """Templates of dotted names in a file, and of the paths that they stand for."""

    def __init__(self, templates: Mapping[str, str | tuple[str, ...]]) -> None:
        self._by_flat: dict[str, list[tuple[list[str], tuple[str, ...]]]] = {}
        self._by_path: dict[str, list[tuple[list[str], str, tuple[str, ...]]]] = {}
        for name, target in templates.items():
            paths = (target,) if isinstance(target, str) else target
            flat = name.replace(".", "_")
            shape, numbers = _shape(flat, "_")
            self._by_flat.setdefault(shape, []).append((numbers, paths))
            for path in paths:
                shape, numbers = _shape(path, ".")
                self._by_path.setdefault(shape, []).append((numbers, flat, paths))

    def read(self, flat: str) -> Named | None:
        """The paths that an underscored name stands for; ``None`` if it is not in the table."""
        shape, numbers = _shape(flat, "_")
        for expected, paths in self._by_flat.get(shape, ()) if "#" not in flat else ():
            if (found := _variables(numbers, expected)) is not None:
                return Named(tuple(_filled(path, found, ".") for path in paths))
        return None

    def write(self, path: str) -> tuple[str, Named] | None:
        """The underscored name of a path, with all the paths that share it."""
        shape, numbers = _shape(path, ".")
        for expected, flat, paths in self._by_path.get(shape, ()) if "#" not in path else ():
            if (found := _variables(numbers, expected)) is not None:
                shared = Named(tuple(_filled(p, found, ".") for p in paths))
                return _filled(flat, found, "_"), shared
        return None


def _shape(text: str, separator: str) -> tuple[str, list[str]]:
    """A name with ``#`` for its numbers, and the numbers."""
    parts = text.split(separator)
    numbers = [part for part in parts if part == "#" or _is_number(part)]
    shape = separator.join("#" if part == "#" or _is_number(part) else part for part in parts)
    return shape, numbers


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and (part == "0" or part[0] != "0")


def _variables(numbers: list[str], expected: list[str]) -> list[str] | None:
    """The numbers in the places of ``#``, if the others are as expected."""
    pairs = list(zip(numbers, expected, strict=True))
    if any(wanted not in ("#", number) for number, wanted in pairs):
        return None
    return [number for number, wanted in pairs if wanted == "#"]


def _filled(template: str, numbers: Iterable[str], separator: str) -> str:
    given = iter(numbers)
    parts = template.split(separator)
    return separator.join(next(given) if part == "#" else part for part in parts)


# --- Stable Diffusion's UNet, as diffusers names it ----------------------------------------------

_ATTENTION = tuple(f"attn{i}.{x}" for i in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0"))
_TRANSFORMER = (
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.#.{x}" for x in (*_ATTENTION, "ff.net.0.proj", "ff.net.2")),
)
_RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")

_UNET_PATHS = (
    "conv_in",
    "conv_out",
    *(f"{x}_embedding.linear_{i}" for x in ("time", "add") for i in (1, 2)),
    "down_blocks.#.downsamplers.#.conv",
    "up_blocks.#.upsamplers.#.conv",
    *(
        f"{block}.{kind}.#.{leaf}"
        for block in ("down_blocks.#", "mid_block", "up_blocks.#")
        for kind, leaves in (("attentions", _TRANSFORMER), ("resnets", _RESNET))
        for leaf in leaves
    ),
)
UNET = Names({path: path for path in _UNET_PATHS})

# --- SDXL's UNet, as Stability's code names it ---------------------------------------------------

_SGM_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "emb_layers.1": "time_emb_proj",
}


def _sgm_blocks() -> dict[str, str]:
    """Two resnets a block, three going up, each with its attention: ``input_blocks.#.{0,1}``."""
    places = {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    for i in range(1, 12):
        block, layer = divmod(i - 1, 3)
        if layer < 2:
            places[f"input_blocks.{i}.0"] = f"down_blocks.{block}.resnets.{layer}"
            places[f"input_blocks.{i}.1"] = f"down_blocks.{block}.attentions.{layer}"
    for i in range(12):
        block, layer = divmod(i, 3)
        places[f"output_blocks.{i}.0"] = f"up_blocks.{block}.resnets.{layer}"
        places[f"output_blocks.{i}.1"] = f"up_blocks.{block}.attentions.{layer}"
    names: dict[str, str] = {}
    for sgm, path in places.items():
        if ".resnets." in path:
            names |= {f"{sgm}.{x}": f"{path}.{y}" for x, y in _SGM_RESNET.items()}
        else:
            names |= {f"{sgm}.{x}": f"{path}.{x}" for x in _TRANSFORMER}
    return names


SGM = Names(
    {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        **{
            f"input_blocks.{3 * i + 3}.0.op": f"down_blocks.{i}.downsamplers.0.conv" for i in (0, 1)
        },
        # after the attention; SDXL's last block going up has neither
        **{f"output_blocks.{3 * i + 2}.2.conv": f"up_blocks.{i}.upsamplers.0.conv" for i in (0, 1)},
        **_sgm_blocks(),
    }
)

# --- Flux ----------------------------------------------------------------------------------------

_FLUX_ONE_TO_ONE = {
    "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.net.2",
    "double_blocks.#.img_mod.lin": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.net.2",
    "double_blocks.#.txt_mod.lin": "transformer_blocks.#.norm1_context.linear",
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{bfl}_in.{layer}": f"time_text_embed.{name}_embedder.linear_{i}"
        for bfl, name in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for i, layer in ((1, "in_layer"), (2, "out_layer"))
    },
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_FLUX_FUSED = {
    "double_blocks.#.img_attn.qkv": tuple(
        f"transformer_blocks.#.attn.to_{x}" for x in ("q", "k", "v")
    ),
    "double_blocks.#.txt_attn.qkv": tuple(
        f"transformer_blocks.#.attn.add_{x}_proj" for x in ("q", "k", "v")
    ),
    "single_blocks.#.linear1": (
        *(f"single_transformer_blocks.#.attn.to_{x}" for x in ("q", "k", "v")),
        "single_transformer_blocks.#.proj_mlp",
    ),
}
FLUX = Names({**_FLUX_ONE_TO_ONE, **_FLUX_FUSED})
"""As Black Forest Labs name it, which is what sd-scripts writes."""

FLUX_SPLIT = Names(
    {
        path: path
        for path in (*_FLUX_ONE_TO_ONE.values(), *(p for t in _FLUX_FUSED.values() for p in t))
    }
)
"""As diffusers names it."""

#: whose first half of outputs is the second in Black Forest Labs' order (shift, scale)
SWAPPED = "norm_out.linear"

# --- text encoders -------------------------------------------------------------------------------

_CLIP_LAYERS = tuple(
    f"encoder.layers.#.{x}"
    for x in (*(f"self_attn.{y}_proj" for y in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
)
#: files always have ``text_model``; transformers 5 names a plain CLIP encoder's layers without it
CLIP = Names({f"text_model.{path}": path for path in _CLIP_LAYERS})
CLIP_BARE = Names({path: path for path in _CLIP_LAYERS})
#: one with a projection has it on both sides
CLIP_PROJECTED = Names(
    {
        **{f"text_model.{path}": f"text_model.{path}" for path in _CLIP_LAYERS},
        "text_projection": "text_projection",
    }
)
_CLIP_PROJECTED_BARE = Names({path: f"text_model.{path}" for path in _CLIP_LAYERS})
T5 = Names(
    {
        path: path
        for path in (
            *(f"encoder.block.#.layer.0.SelfAttention.{x}" for x in ("q", "k", "v", "o")),
            *(f"encoder.block.#.layer.1.DenseReluDense.{x}" for x in ("wi", "wi_0", "wi_1", "wo")),
        )
    }
)

# --- whole names ---------------------------------------------------------------------------------

_READ: dict[str, tuple[tuple[str, Names], ...]] = {
    "lora_unet_": (("unet", UNET), ("unet", SGM), ("transformer", FLUX)),
    "lora_transformer_": (("transformer", FLUX_SPLIT),),
    "lora_te_": (("text_encoder", CLIP), ("text_encoder", CLIP_BARE)),
    "lora_te1_": (("text_encoder", CLIP), ("text_encoder", CLIP_BARE)),
    "lora_te2_": (
        ("text_encoder_2", CLIP_PROJECTED),
        ("text_encoder_2", _CLIP_PROJECTED_BARE),
        ("text_encoder_2", T5),
    ),
    "lora_te3_": (("text_encoder_2", T5),),
    "lycoris_": (("unet", UNET), ("unet", SGM), ("transformer", FLUX_SPLIT), ("transformer", FLUX)),
}
PREFIXES = tuple(_READ)
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-diffusers", "flux")

_WRITE_UNET = {"sdxl": SGM}
_WRITE_TEXT = {
    # family → prefix and names of text_encoder and of text_encoder_2
    "sd": {"text_encoder": ("lora_te_", CLIP)},
    "sdxl": {"text_encoder": ("lora_te1_", CLIP), "text_encoder_2": ("lora_te2_", CLIP_PROJECTED)},
    "flux": {"text_encoder": ("lora_te1_", CLIP), "text_encoder_2": ("lora_te3_", T5)},
}


def read_name(name: str) -> tuple[Names, Named] | None:
    """The table that knows a kohya or LyCORIS name, and its paths with the component in front."""
    for prefix, tables in _READ.items():
        if name.startswith(prefix):
            for component, names in tables:
                if found := names.read(name.removeprefix(prefix)):
                    return names, Named(tuple(f"{component}.{path}" for path in found.paths))
    return None


def write_name(path: str, family: str) -> tuple[str, Named] | None:
    """The kohya name of a path with its component, and all the paths that share the name.

    Args:
        path: such as ``"unet.mid_block.attentions.0.proj_in"``.
        family: one of :data:`FAMILIES`.
    """
    component, _, inner = path.partition(".")
    if component == "unet" and family != "flux":
        prefix, names = "lora_unet_", _WRITE_UNET.get(family, UNET)
    elif component == "transformer" and family == "flux":
        prefix, names = "lora_unet_", FLUX
    else:
        texts = _WRITE_TEXT[
            "sdxl"
            if family.startswith("sdxl")
            else family[:2]
            if family.startswith("sd")
            else family
        ]
        if component not in texts:
            return None
        prefix, names = texts[component]
    if (found := names.write(inner)) is None:
        return None
    return prefix + found[0], Named(tuple(f"{component}.{p}" for p in found[1].paths))


def family_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str | None]:
    """What a picture model an adapter is for, by its paths and the shapes of its A.

    Args:
        shapes: path with its component → shape of A.

    Returns:
        The family, and what was assumed where nothing tells.
    """
    if any(path.startswith("transformer.") for path in shapes):
        return "flux", None
    deep = any(
        path.startswith("unet.") and any(f".transformer_blocks.{i}." in path for i in range(1, 10))
        for path in shapes
    )
    if deep or any(p.startswith(("text_encoder_2.", "unet.add_embedding.")) for p in shapes):
        return "sdxl", None
    widths = {s[1] for p, s in shapes.items() if p.endswith(("attn2.to_k", "attn2.to_v"))}
    known = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    if len(widths) == 1 and (width := widths.pop()) in known:
        return known[width], None
    return "sd1", "nothing tells SD1 from SDXL here; the names are SD1's. Say the family otherwise"


def text_path(component: str, path: str, *, projected: bool = False) -> str:
    """A text encoder's path as transformers 5 has it, with ``text_model`` in it or not.

    Args:
        projected: whether the first encoder has a projection too, as SD3's.
    """
    tables = {
        "text_encoder": _CLIP_PROJECTED_BARE if projected else CLIP,
        "text_encoder_2": _CLIP_PROJECTED_BARE,
    }
    names = tables.get(component)
    found = None if names is None else names.read(path.replace(".", "_"))
    return path if found is None else found.paths[0]


def stored_text_path(component: str, path: str) -> str:
    """The same for a file: a CLIP encoder's layers always under ``text_model``."""
    if component == "text_encoder" and CLIP.write(path) is not None:
        return f"text_model.{path}"
    return path
