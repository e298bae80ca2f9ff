"""loralib's state dictionaries (the paper's own code): tensors alone, in a ``.pt`` file.

==================== =====================================================================
``<path>.lora_A``    A ``[r, d_in]``; of MergedLinear ``[n·r, d_in]``
``<path>.lora_B``    B ``[d_out, r]``; of MergedLinear the n parts' B, one below the other
``<path>.bias``      the module's bias, where it was trained
==================== =====================================================================

The scaling is alpha/r, and alpha is not in the file. ``MergedLinear`` adapts n of the parts of a
joined projection; which ones is not in the file either. It becomes one site of rank n·r with a
block-diagonal B. Source: loralib's ``layers.py`` and ``utils.py``.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Replace, Site
from lorakit.errors import FormatError, collected
from lorakit.formats.carried import adapter_of
from lorakit.formats.format import Hints, Reading, Source, Written
from lorakit.formats.pairs import EMBEDDINGS, by_module, left_behind, missing_parts, refuse
from lorakit.formats.peft.config import as_number
from lorakit.formats.portable import fold_site, plain_sites

FILE = "lora.pt"
#: of a block-diagonal B; joined projections have three parts, of some ten thousand outputs
MAX_VALUES = 10**8

_KEY = re.compile(r"(.+)\.(lora_[AB])")
#: litgpt's names, whose factors end alike
LITGPT = re.compile(
    r"transformer\.h\.\d+\.(?:attn\.(?:attn|qkv|proj)|mlp\.(?:fc(?:_\d)?|proj))\..*"
)


class _Loralib:
    name = "loralib"
    title = "loralib state dictionary"
    folder = False

    def recognises(self, source: Source) -> bool:
        """``lora_A`` at the end of a key, without ``.weight``, and not litgpt's names."""
        if source.storage == "gguf":
            return False
        names = list(source.shapes)
        return any(_KEY.fullmatch(name) for name in names) and not any(
            LITGPT.fullmatch(name) for name in names
        )

    def read(self, source: Source, hints: Hints) -> Reading:
        """The adapter; its alpha is a hint."""
        problems: list[str] = []
        if hints.alpha is None:
            problems.append(
                "loralib's files do not hold the alpha: give the lora_alpha that the layers had "
                "(--alpha, or hints.alpha in Python)"
            )
        tensors = source.tensors
        biases = {name: t for name, t in tensors.items() if name.endswith(".bias")}
        parts = by_module({n: t for n, t in tensors.items() if n not in biases}, _KEY, problems)
        problems += missing_parts(parts, ("lora_A", "lora_B"))
        refuse(f"{source.path} cannot be used as an adapter", problems)
        assert hints.alpha is not None
        sites: dict[str, Site] = {name: Replace({"": t}) for name, t in biases.items()}
        notes = []
        for path, own in parts.items():
            A, B = own["lora_A"], own["lora_B"]
            if A.shape[0] != B.shape[1]:
                try:
                    A, B, note = _merged(A, B, hints.enabled)
                except ValueError as error:
                    problems.append(f"{path}: {error}")
                    continue
                notes.append(f"{path}: {note}")
            embedding = path.rpartition(".")[2] in EMBEDDINGS
            scaling = hints.alpha / own["lora_B"].shape[1]
            sites[path] = LowRank(A, B, scaling, "embedding" if embedding else "linear")
            problems += [f"{path}: {problem}" for problem in sites[path].problems()]
        refuse(f"{source.path} cannot be used as an adapter", problems)
        return Reading(adapter_of(sites, {}, {}), tuple(notes))

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """The file, at one alpha for all its sites, which a note names."""
        kept, lost = plain_sites(adapter, ("linear", "embedding"))
        biases = {
            path: site.tensors_by_name[""]
            for path, site in adapter.replaced.items()
            if path.endswith(".bias") and "" in site.tensors_by_name
        }
        lost = {path: why for path, why in lost.items() if path not in biases}
        for path in list(kept):
            if (kept[path].kind == "embedding") != (path.rpartition(".")[2] in EMBEDDINGS):
                lost[path] = f"a site of the kind {kept[path].kind}, read as another by its name"
                del kept[path]
        if not kept:
            raise FormatError(
                collected(
                    "Nothing of this adapter fits loralib", (f"{p}: {w}" for p, w in lost.items())
                )
            )
        alpha = _alpha(adapter, kept)
        at_alpha = {path: fold_site(site, alpha / site.rank) for path, site in kept.items()}
        folded = sum(at_alpha[path].scaling != site.scaling for path, site in kept.items())
        notes, losses = left_behind(adapter, header=False)
        shown = as_number(alpha)
        notes.append(f"the file does not hold its alpha: give its layers lora_alpha={shown}")
        if folded:
            notes.append(f"the scale of {folded} sites is folded into B, so that one alpha fits")
        tensors: dict[str, Tensor] = dict(biases)
        for path, site in at_alpha.items():
            tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = site.A, site.B
        return Written({FILE: _pickled(tensors)}, tuple(notes), {**lost, **losses})


def _alpha(adapter: Adapter, sites: Mapping[str, LowRank]) -> float:
    """The alpha that most sites have already, as alpha/r; 1 where all scales are zero."""
    rule = replace(adapter.spec, scaling="alpha/r")
    alphas = Counter(rule.alpha_of(site.rank, site.scaling) for site in sites.values())
    del alphas[0.0]
    return max(alphas, key=lambda a: (alphas[a], -abs(a), a)) if alphas else 1.0


def _merged(A: Tensor, B: Tensor, enabled: Sequence[bool]) -> tuple[Tensor, Tensor, str]:
    """A and B of rank n·r of a joined projection, and what was assumed.

    Args:
        A: ``[n·r, d_in]``.
        B: ``[n·part, r]``, the parts' B one below the other.
        enabled: which parts the n ones are; all n if not given and n is at least 3.

    Raises:
        ValueError: says why it is none.
    """
    rank = B.shape[1]
    n, rest = divmod(A.shape[0], rank)
    if rest or n < 2 or B.shape[0] % n:
        raise ValueError(f"A has shape {list(A.shape)} and B {list(B.shape)}, which do not fit")
    if not enabled and n < 3:
        raise ValueError(
            f"it adapts {n} parts of a joined projection, and the file does not say which; give "
            "its enable_lora, such as --enabled 1,0,1 for q and v of q, k, v"
        )
    chosen = tuple(enabled) if enabled else (True,) * n
    if sum(chosen) != n:
        raise ValueError(f"it adapts {n} parts, but {sum(chosen)} are said to be enabled")
    part = B.shape[0] // n
    if part * len(chosen) * n * rank > MAX_VALUES:
        raise ValueError(f"its {n} parts of rank {rank} make a B beyond any memory")
    whole = B.new_zeros(part * len(chosen), n * rank)
    for number, place in enumerate(i for i, on in enumerate(chosen) if on):
        rows = slice(place * part, (place + 1) * part)
        whole[rows, number * rank : (number + 1) * rank] = B[number * part : (number + 1) * part]
    return (
        A,
        whole,
        f"a MergedLinear of {n} in {len(chosen)} parts, now one site of rank {n * rank}",
    )


def _pickled(tensors: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({name: tensors[name].contiguous().clone() for name in sorted(tensors)}, buffer)
    return buffer.getvalue()


FORMAT = _Loralib()
