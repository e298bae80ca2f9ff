"""What is adapted of a pipeline: words for parts of its denoiser, and its text encoders.

=================== =============================================================================
``cross-attention`` linears where the picture meets the prompt (``attn2`` of a UNet)
``attention``       all linears of attention; of transformers, where both meet, the text's too
``all-linear``      every linear of the blocks
``conv``            every linear and every convolution of the blocks
=================== =============================================================================

Anything else is a name, an ending or a regular expression of a module, as in ``LoRASpec``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lorakit.errors import TargetError
from lorakit.images.base import PictureBase
from lorakit.layers.kinds import shape_of

WORDS = ("cross-attention", "attention", "all-linear", "conv")
#: modules of CLIP's layers, under the names of transformers
_TEXT = r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
_LEAVES = r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_BLOCKS = r"(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks)\."


def picture_targets(
    base: PictureBase, words: str | Sequence[str], *, text: bool = False
) -> tuple[str, ...]:
    """Targets of a ``LoRASpec`` for the root module of a base.

    Args:
        words: of the table above, or names as in ``LoRASpec``.
        text: whether the text encoders that can be trained are adapted too.

    Raises:
        TargetError: a word that means nothing here.
    """
    wanted = (words,) if isinstance(words, str) else tuple(words)
    found: list[str] = []
    for word in wanted:
        found += _paths(base, word) if word in WORDS else [word]
    if text:
        for name in base.family.trained_text:
            component = getattr(base.pipe, name, None)
            if component is None:
                continue
            inner = [p for p, _ in component.named_modules() if re.search(rf"\.{_TEXT}$", p)]
            if not inner:  # no CLIP, such as a BERT: its linears in numbered layers
                inner = [p for p in _adaptable(component) if re.search(r"\.\d+\.", p)]
            found += [f"{name}.{path}" for path in inner]
    return tuple(dict.fromkeys(found))


def _paths(base: PictureBase, word: str) -> list[str]:
    denoiser = base.denoiser
    kinds = _adaptable(denoiser)
    blocks = {p: k for p, k in kinds.items() if re.match(_BLOCKS, p)}
    if word == "cross-attention":
        if base.family.denoiser == "transformer":
            raise TargetError(
                "cross-attention: in this base picture and prompt meet in one attention, which has "
                "no part of its own for that. Give --targets attention"
            )
        chosen = [p for p in blocks if re.search(rf"\.attn2\.{_LEAVES}$", p)]
    elif word == "attention":
        chosen = [p for p in blocks if re.search(rf"\.attn[12]?\.{_LEAVES}$", p)]
    elif word == "all-linear":
        chosen = [p for p, kind in blocks.items() if kind == "linear"]
    else:
        chosen = [p for p, kind in blocks.items() if kind in ("linear", "conv")]
    if not chosen:
        raise TargetError(f"{word}: the denoiser has no such module; give names instead")
    return [f"{base.family.denoiser}.{path}" for path in chosen]


def _adaptable(module: nn.Module) -> dict[str, str]:
    """Path → kind."""
    shapes = {path: shape_of(one) for path, one in module.named_modules() if path}
    return {path: shape.kind for path, shape in shapes.items() if shape is not None}
