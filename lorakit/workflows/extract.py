"""``extract``: from references to two checkpoints to an adapter that knows its base.

Joins ``bases`` (what a reference means, identity), ``layers`` (what can be adapted) and
``algebra.extract`` (the decompositions).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lorakit.algebra.extract import (
    Choice,
    Extracted,
    Progress,
    Remainder,
    Weight,
    extract_sites,
    pair_tensors,
)
from lorakit.bases.fetch import fetch
from lorakit.bases.load import Located, locate
from lorakit.bases.source import Source, find_source
from lorakit.core.adapter import Adapter
from lorakit.core.checkpoint import Checkpoint, open_checkpoint
from lorakit.core.sites import LowRank, Replace
from lorakit.core.spec import LoRASpec
from lorakit.formats.tokenizer_files import tokenizer_files_in
from lorakit.layers.targets import compact_targets, matching_paths
from lorakit.workflows.skeleton import identity_of, skeleton_of, stored_names, weights_of

logger = logging.getLogger(__name__)

#: end of an architecture's name → PEFT's task type
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def extract(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    *,
    rank: int | Literal["full"] | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    remainder: Remainder = "report",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    model: nn.Module | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Adapter:
    """The adapter that turns a base into a checkpoint fine-tuned from it, as well as it can.

    Each changed weight of a linear, convolution or embedding becomes its best approximation in
    Frobenius norm (Eckart & Young, 1936). One pair of tensors is in memory at a time, so both
    checkpoints may be larger than it.

    Args:
        base: ``"smollm2"``, a hub id, a folder, a ``.gguf`` or a ``.safetensors`` file.
        tuned: the same, fine-tuned from it; shards and dtypes may differ.
        rank: of every site, or ``"full"``; a weight that has less gets its own full rank.
        energy: instead of a rank, the share of each weight's squared change to keep, in (0, 1].
        targets: which modules: words as in ``LoRASpec.targets``; ``None`` means all that can be
            adapted, with embeddings and heads.
        exclude: which of them are left out again.
        remainder: what becomes of changed tensors outside of the sites (norms, biases, what was
            not targeted): ``"report"`` lists them, ``"keep"`` stores their new values whole,
            ``"refuse"`` raises.
        dtype: of the factors.
        device: where the decompositions are computed, in float64.
        revision: branch, tag or commit of a base on the hub.
        model: what the checkpoints are the weights of, where no config.json tells it; any module
            of that structure, whose own weights are not looked at.
        progress: called after each tensor.
        say: called with what takes long; the default logs it.

    Returns:
        The adapter. ``provenance["extract"]`` holds the error of each site beside the best
        possible, and the remainder.

    Raises:
        InputError: neither or both of rank and energy; targets that match nothing; a remainder
            that is refused.
        FormatError: the checkpoints do not belong together; every tensor at fault is listed.
        BaseError: a reference means nothing.
    """
    choice = Choice(rank, energy)
    told = say or logger.info
    source, located, before = _opened(base, revision, told)
    after = _opened(tuned, None, told)[2]
    structure, guessed = (model, None) if model is not None else skeleton_of(before)
    structure = copy.deepcopy(structure)  # it is given views of the base's files below
    if guessed is not None:
        told(f"The modules of {source.name}: {guessed}")
    allowed = None
    if targets is not None or exclude:
        allowed = matching_paths(structure, _words(targets), _words(exclude))
    stored = stored_names(structure, [*before.entries, *after.entries])
    weights = weights_of(structure, lambda path: allowed is None or path in allowed, stored)
    for line in _unstored(structure, weights):
        told(line)
    found = extract_sites(
        before,
        after,
        pair_tensors(before, after, weights),
        choice,
        dtype=dtype,
        remainder=remainder,
        device=device,
        progress=progress,
    )
    paths = [path for path, site in found.sites.items() if isinstance(site, LowRank)]
    identity = None
    if guessed is None:
        identity = identity_of(
            structure,
            before,
            stored,
            source.name,
            storage=located.storage,
            revision=source.revision,
        )
    else:
        told("Its architecture is not known, so the adapter does not say which base it is for")
    return Adapter(
        found.sites,
        _spec(found, compact_targets(structure, paths)),
        identity,
        {"extract": _provenance(found, source, after, choice, remainder)},
        _tokenizer(before, after, told),
        next((t for end, t in _TASKS.items() if type(structure).__name__.endswith(end)), None),
    )


# --- the two checkpoints -----------------------------------------------------------------------


def _opened(
    ref: str | PathLike[str], revision: str | None, say: Callable[[str], None]
) -> tuple[Source, Located, Checkpoint]:
    """A reference as a checkpoint on this machine."""
    path = Path(fspath(ref)).expanduser()
    weights = path.is_file() and path.suffix == ".safetensors"
    if weights or (path.is_dir() and not (path / "config.json").exists() and _has_weights(path)):
        source = Source("folder", str(path.absolute()), path.stem if weights else path.name)
        return source, Located(source.location, None), open_checkpoint(path)
    source = find_source(ref, revision)
    located = locate(source, say)
    folder = Path(located.location)
    if source.kind == "hub":
        folder = fetch(source, say)
    return source, located, open_checkpoint(folder)


def _unstored(structure: nn.Module, weights: Sequence[Weight]) -> list[str]:
    """What to say of parameters that neither checkpoint stores under a name of its own."""
    lost = [path for one in weights for path, names in one.names.items() if not names]
    if not lost:
        return []
    shown = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
    return [
        f"{len(lost)} parameters of {type(structure).__name__} have no tensor of their name in the "
        f"checkpoints ({shown}); tensors that belong to none, such as single experts that "
        "transformers fuses, count as remainder"
    ]


def _has_weights(folder: Path) -> bool:
    names = ("model", "diffusion_pytorch_model", "pytorch_model")
    ends = (".safetensors", ".safetensors.index.json")
    return any((folder / (name + end)).exists() for name in names for end in ends)


def _words(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (value,) if isinstance(value, str) else None if value is None else tuple(value)


def _tokenizer(
    before: Checkpoint, after: Checkpoint, say: Callable[[str], None]
) -> dict[str, bytes]:
    """The tuned checkpoint's tokenizer, where its files are other ones than the base's."""
    old, new = (tokenizer_files_in(c.path) if c.path.is_dir() else {} for c in (before, after))
    changed = sorted(name for name, content in new.items() if old.get(name) != content)
    if not changed or not old:
        return {}
    say(f"The tokenizer's files differ ({', '.join(changed)}); the tuned ones travel along")
    return new


# --- the adapter -------------------------------------------------------------------------------


def _spec(found: Extracted, targets: tuple[str, ...]) -> LoRASpec:
    """Settings that describe the sites; the scaling is 1, so alpha is the rank."""
    ranks = [site.rank for site in found.sites.values() if isinstance(site, LowRank)]
    rank = max(set(ranks), key=ranks.count) if ranks else 1
    biases = any(path.endswith(".bias") for path in found.sites)
    whole = tuple(
        sorted(
            path
            for path, site in found.sites.items()
            if isinstance(site, Replace) and "" not in site.tensors_by_name
        )
    )
    return LoRASpec(
        rank=rank,
        alpha=float(rank),
        targets=targets,
        bias="all" if biases else "none",
        train_modules=whole,
    )


def _provenance(
    found: Extracted, source: Source, after: Checkpoint, choice: Choice, remainder: Remainder
) -> dict[str, Any]:
    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.6g}")

    return {
        "base": source.name,
        "tuned": after.path.name,
        **({"energy": choice.energy} if choice.energy is not None else {"rank": choice.rank}),
        "error": short(found.error),
        "best_error": short(found.best),
        "unchanged_tensors": found.unchanged,
        "sites": {
            path: {
                "rank": one.rank,
                "norm": short(one.norm),
                "error": short(one.error),
                "best_error": short(one.best),
            }
            for path, one in found.errors.items()
        },
        "remainder": {
            "mode": remainder,
            "tensors": {
                path: {
                    "shape": list(one.shape),
                    "norm": short(one.norm),
                    "kept": one.kept,
                    **({"tied_to": one.tied_to} if one.tied_to else {}),
                }
                for path, one in found.remainder.items()
            },
        },
    }
