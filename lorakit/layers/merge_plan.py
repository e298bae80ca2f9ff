"""What merging adapters would change in a model, checked before anything is touched.

Works on a model whose tensors are only shapes (``meta``) just as well, which is how files are
merged without the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.bases.stored import Packed, packed_weight
from lorakit.core.adapter import Adapter
from lorakit.core.merging import Recipe, Term
from lorakit.core.sites import NOT_MERGED, LowRank, Prefix, Replace
from lorakit.errors import BaseError, FormatError, InputError, collected
from lorakit.layers.places import Places

Weighted = tuple[Adapter, float]
#: what ``merge`` takes: one adapter at weight 1, or several, each with its weight or at 1
MergeLike = Adapter | Weighted | Sequence[Adapter | Weighted]


@dataclass(frozen=True, eq=False)
class Change:
    """One parameter that merging rewrites."""

    name: str
    """The parameter's path in the model: ``"model.layers.0.self_attn.q_proj.weight"``."""
    module: nn.Module
    key: str
    """What the module calls it: ``"weight"``."""
    recipe: Recipe
    packed: Packed | None = None
    """Where it is quantised."""
    untie: bool = False
    """Whether it is shared with another module, and gets a tensor of its own first."""

    @property
    def parameter(self) -> Tensor:
        found: Tensor = getattr(self.module, self.key)
        return found


def weighted(what: MergeLike) -> list[Weighted]:
    """The adapters and their weights.

    Raises:
        InputError: nothing was given, something that is no adapter, or a weight that cannot act.
    """
    if isinstance(what, Adapter):
        return [(what, 1.0)]
    if isinstance(what, tuple) and len(what) == 2 and not isinstance(what[1], (Adapter, tuple)):
        what = [what]
    pairs: list[Weighted] = []
    problems = []
    for place, one in enumerate(what if isinstance(what, Sequence) else [what], start=1):
        adapter, weight = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        if not isinstance(adapter, Adapter):
            problems.append(f"number {place} is a {type(adapter).__name__}; expected an Adapter")
        elif isinstance(weight, bool) or not isinstance(weight, (int, float)):
            problems.append(f"the weight of number {place} is {weight!r}; expected a number")
        elif not math.isfinite(weight) or weight == 0:
            why = "changes nothing; leave it out" if weight == 0 else "is not finite"
            problems.append(f"the weight of number {place} is {weight!r}, which {why}")
        else:
            pairs.append((adapter, float(weight)))
    if not pairs and not problems:
        problems = ["no adapter was given"]
    if problems:
        raise InputError(collected("These adapters cannot be merged", problems))
    return pairs


def plan_merge(
    model: nn.Module, adapters: Sequence[Weighted], *, untie: bool = False
) -> list[Change]:
    """Find, match and check everything that merging would rewrite.

    Raises:
        FormatError: sites that are not in the model, or cannot be merged exactly. All are listed.
    """
    return _Planner(model, untie=untie).plan(adapters)


@dataclass
class _Draft:
    """What is gathered for one parameter."""

    module: nn.Module
    key: str
    path: str
    """Of the module."""
    terms: list[Term] = field(default_factory=list)
    value: Tensor | None = None
    magnitude: Tensor | None = None
    owner: int = -1
    """Number of the adapter that set ``value`` or ``magnitude``."""
    touched: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.path}.{self.key}" if self.path else self.key


class _Planner:
    def __init__(self, model: nn.Module, *, untie: bool) -> None:
        self._untie = untie
        self._places = Places(model)
        self._holders = self._places.holders()
        self._drafts: dict[tuple[int, str], _Draft] = {}
        self._problems: list[str] = []

    def plan(self, adapters: Sequence[Weighted]) -> list[Change]:
        for number, (adapter, weight) in enumerate(adapters):
            owners = self._places.owners(adapter)
            met: dict[tuple[int, str], str] = {}
            for path, site in adapter.sites.items():
                owner_path, owner = owners[path]
                if isinstance(site, LowRank):
                    key = id(owner), _parameter(path, site)
                    if key in met:
                        self._problem(path, f"it is the same module as {met[key]}")
                    met[key] = path
                    self._low_rank(path, owner_path, owner, site, weight, number)
                elif isinstance(site, Prefix):
                    if path == next(iter(adapter.prefixes)):
                        self._problem(path, NOT_MERGED)  # once for all layers
                else:
                    self._replace(path, owner_path, owner, site, weight, number)
        changes = [c for draft in self._drafts.values() if (c := self._change(draft)) is not None]
        if self._problems:
            raise FormatError(
                collected("These adapters cannot be merged into this model", self._problems)
            )
        return changes

    def _problem(self, path: str, text: str) -> None:
        self._problems.append(f"{path}: {text}")

    def _draft(self, path: str, module: nn.Module, key: str) -> _Draft:
        draft = self._drafts.get((id(module), key))
        if draft is None:
            draft = _Draft(module, key, self._places.first_path(path))
            self._drafts[id(module), key] = draft
        return draft

    # --- sites -------------------------------------------------------------------------------

    def _low_rank(
        self, path: str, owner_path: str, owner: Any, site: LowRank, weight: float, number: int
    ) -> None:
        shape = self._places.shape(path, owner)
        assert shape is not None  # Places checked it
        if getattr(owner, "max_norm", None) is not None:
            return self._problem(
                path, "this embedding limits its rows (max_norm) before they are changed; keep "
                "the adapter attached instead",
            )  # fmt: skip
        if shape.groups > 1 and not _stays_in_groups(site, shape.groups):
            return self._problem(
                path, f"this convolution has {shape.groups} groups, and the adapter's change "
                "connects channels of different groups, which its weight has no place for; keep "
                "the adapter attached instead",
            )  # fmt: skip
        factor = weight * site.scaling
        draft = self._draft(owner_path, owner, _parameter(path, site))
        transposed = shape.transposed or _transposed(owner)
        draft.terms.append(_term(site, factor, groups=shape.groups, transposed=transposed))
        draft.touched.add(number)
        if site.magnitude is not None:
            if weight != 1:
                self._problem(
                    path, f"it is a DoRA site, whose length of each output is trained for weight "
                    f"1; it was given {weight:g}. Merge it at weight 1",
                )  # fmt: skip
            draft.magnitude, draft.owner = site.magnitude, number
        if site.bias is not None:
            self._bias(path, owner_path, owner, site.bias, factor, number)
        return None

    def _bias(
        self, path: str, owner_path: str, owner: Any, bias: Tensor, factor: float, number: int
    ) -> None:
        one = torch.ones(1, 1, dtype=bias.dtype)
        if isinstance(owner, nn.Embedding):  # every row gets it
            rows = one.expand(owner.num_embeddings, 1)
            self._draft(owner_path, owner, "weight").terms.append(Term(rows, bias[None, :], factor))
        elif getattr(owner, "bias", None) is None:
            self._problem(
                path, "it has a bias (lora_bias), and the module has none to add it to; keep the "
                "adapter attached, or give the module a bias of zeros first",
            )  # fmt: skip
        else:
            draft = self._draft(owner_path, owner, "bias")
            draft.terms.append(Term(bias[:, None], one, factor))
            draft.touched.add(number)

    def _replace(
        self, path: str, owner_path: str, owner: Any, site: Replace, weight: float, number: int
    ) -> None:
        if weight != 1:
            return self._problem(
                path, f"it was trained whole, and a share of {weight:g} of it is not defined; "
                "merge it at weight 1, or leave the site out of the adapter",
            )  # fmt: skip
        for key, value in site.tensors_by_name.items():
            # under the path of a parameter, what remains of it behind the module's path
            inner, _, own = (key or path.rpartition(".")[2]).rpartition(".")
            whole = ".".join(part for part in (owner_path, inner) if part)
            if getattr(owner.get_submodule(inner), own, None) is None:
                self._problem(
                    path, "it is a new bias, and the module has none to put it into; keep the "
                    "adapter attached, or give the module a bias of zeros first",
                )  # fmt: skip
                continue
            draft = self._draft(whole, owner.get_submodule(inner), own)
            if draft.value is not None:
                self._problem(path, "two of the adapters trained it whole; merge one of them")
            draft.value, draft.owner = value, number
            draft.touched.add(number)
        return None

    # --- parameters ----------------------------------------------------------------------------

    def _change(self, draft: _Draft) -> Change | None:
        name = draft.name
        if not _is_held(draft.module, draft.key):  # nor asked for: that alone may change its state
            self._problem(
                name, "its module holds no such tensor: it is packed, or computed from others at "
                "each forward (weight_norm, spectral_norm, pruning), which would undo the change; "
                "keep the adapter attached, or make it a plain weight first "
                "(torch.nn.utils.parametrize.remove_parametrizations)",
            )  # fmt: skip
            return None
        parameter = getattr(draft.module, draft.key)
        if draft.magnitude is not None and (
            draft.touched != {draft.owner} or draft.value is not None
        ):
            self._problem(
                name, "a DoRA site is merged alone, for its lengths were trained for its own "
                "direction; merge the adapters one at a time, or without this site",
            )  # fmt: skip
        recipe = Recipe(
            tuple(draft.terms), draft.value, draft.magnitude, not _transposed(draft.module)
        )
        packed = None
        try:
            if draft.key == "weight" and not parameter.is_meta:
                packed = packed_weight(draft.module)
        except BaseError as error:
            self._problem(name, str(error))
        if packed is not None and draft.value is not None:
            self._problem(name, "it was trained whole and is quantised here; use a dense base")
        others = sorted(self._holders.get(id(parameter), {name}) - {name})
        if others and not self._untie:
            self._problem(
                name, f"it is tied to {', '.join(others)}, which would change with it although "
                "the adapter does not change it there. Pass untie=True (--untie) to give it a "
                "tensor of its own, or leave the site out of the adapter",
            )  # fmt: skip
        return Change(name, draft.module, draft.key, recipe, packed, bool(others))


def check_in_memory(changes: Iterable[Change]) -> None:
    """Refuse weights that lie elsewhere.

    Raises:
        InputError: weights on ``meta``, as an offloaded model has them.
    """
    away = [c.name for c in changes if c.parameter.is_meta]
    if away:
        raise InputError(
            collected("These weights are not in memory (offloaded, or never loaded)", away, limit=5)
            + "\nLoad the whole model, or merge its files: lorakit merge."
        )


def _is_held(module: nn.Module, key: str) -> bool:
    """Whether what the module calls ``key`` is stored there.

    A parametrization is a property that computes a new tensor, and its older form a hook that sets
    a plain attribute.
    """
    return key in module._parameters or key in module._buffers


def _parameter(path: str, site: LowRank) -> str:
    """What the module calls the parameter that a site changes."""
    return path.rpartition(".")[2] if site.kind == "experts" else "weight"


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def _term(site: LowRank, factor: float, *, groups: int, transposed: bool) -> Term:
    """ΔW as it is stored, [d_out, …] or transposed."""
    if site.kind == "experts":
        left, right = site.B.detach(), site.A.detach()
        return Term(right.mT, left.mT, factor) if transposed else Term(left, right, factor)
    A, B = site.A.detach(), site.B.detach().flatten(1)
    if groups > 1:  # of each group's rows of A, the channels of that group
        rank, channels = A.shape[0] // groups, A.shape[1] // groups
        A = torch.cat(
            [A[g * rank : (g + 1) * rank, g * channels : (g + 1) * channels] for g in range(groups)]
        )
        B = torch.block_diag(*B.chunk(groups, dim=0))  # type: ignore[no-untyped-call]
    A = A.flatten(1)
    return Term(A.T, B.T, factor) if transposed else Term(B, A, factor)


def _stays_in_groups(site: LowRank, groups: int) -> bool:
    """Whether each output of a grouped convolution changes by its own group's channels alone.

    The forward of an adapter runs A over all channels, so in general it does not.
    """
    A = site.A.detach()
    rank, channels = A.shape[0] // groups, A.shape[1] // groups
    outside = A.clone()
    for g in range(groups):
        outside[g * rank : (g + 1) * rank, g * channels : (g + 1) * channels] = 0
    return not bool(outside.any())
