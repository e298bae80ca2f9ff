"""PEFT's rules of which settings hold at a module path, and the settings that a file needs.

The values of an adapter are its sites; the spec beside them may be older (a combined or compressed
adapter) or richer (a keyword, an open range of layers). What is written must make PEFT's rules
give exactly the sites.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from lorakit.core.expressions import Cost, cost_of
from lorakit.core.sites import LowRank
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError

Value = TypeVar("Value", int, float)

_PLAIN_NAME = re.compile(r"[\w.-]+")
#: of an expression's matching; some seconds
MAX_STEPS = 1e9

_KEYWORDS = ("all-linear", "attention", "mlp", "experts", "router")


@dataclass(frozen=True)
class Selection:
    """The three fields by which PEFT selects modules."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None

    def selects(self, path: str) -> bool:
        """Whether PEFT adapts the module at this path, as far as these fields go."""
        if isinstance(self.exclude_modules, str):
            if re.fullmatch(self.exclude_modules, path):
                return False
        elif _ends_with_any(path, self.exclude_modules):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        if path in self.target_modules:
            return True
        if not _ends_with_any(path, self.target_modules):
            return False
        if self.layers_to_transform is None:
            return True
        # the first number that follows two names; a top-level list of blocks is not seen
        block = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return block is not None and int(block[1]) in self.layers_to_transform


def select(spec: LoRASpec, paths: Sequence[str]) -> Selection:
    """Fields that select ``paths``: the spec's own words where they do, else the paths.

    A keyword, or an expression in a list, means nothing to PEFT. Whether a word also matches
    modules outside ``paths`` cannot be known without the model; ``attach`` has put words into the
    spec that do not.
    """
    own = _own_words(spec, paths)
    if own is not None and paths and all(own.selects(path) for path in paths):
        return own
    if any("." not in path for path in paths):
        # as a list entry, a path of one name would also select whatever ends with it
        return Selection("|".join(re.escape(path) for path in sorted(paths)))
    return Selection(tuple(sorted(paths)))


def select_parameters(spec: LoRASpec, names: Sequence[str]) -> tuple[str, ...]:
    """Entries of ``target_parameters`` that select these parameters.

    The spec's own words where each names some and all are named, else the whole names: PEFT knows
    neither exclude_modules nor layers_to_transform for parameters.

    Args:
        names: the parameters' paths.
    """
    words = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    entries = set()
    if spec.layers is None and not spec.exclude:
        for word in words:
            entries |= {
                entry
                for entry in (word, f"{word}.weight")
                if any(_ends_with_any(name, [entry]) for name in names)
            }
    if all(_ends_with_any(name, entries) for name in names):
        return tuple(sorted(entries))
    return tuple(sorted(names))


def parameters_in(module: str, entries: Iterable[str]) -> tuple[set[str], ...]:
    """The parameters of a module that ``target_parameters`` may mean, the likeliest choice first.

    A bare name means the parameter of any module, so it may be another module's.
    """
    known = [entry.rpartition(".") for entry in entries]
    mine = [(inside, name) for inside, _, name in known if _ends_with_any(module, [inside])]
    bare = [("", name) for inside, _, name in known if not inside]
    return {name for _, name in (*mine, *bare)}, {name for _, name in mine}


def selection_in(config: Mapping[str, Any]) -> Selection:
    """What a config of PEFT selects among modules."""
    targets = config.get("target_modules") or ()
    layers = config.get("layers_to_transform")
    exclude = config.get("exclude_modules") or ()
    return Selection(
        targets if isinstance(targets, str) else tuple(targets),
        exclude if isinstance(exclude, str) else tuple(exclude),
        (layers,) if isinstance(layers, int) else (None if layers is None else tuple(layers)),
    )


def _own_words(spec: LoRASpec, paths: Sequence[str]) -> Selection | None:
    """The spec's words as PEFT's fields, if they have a meaning there."""
    layers = None if spec.layers is None else _numbers(spec.layers)
    if (spec.layers is not None and layers is None) or not all(
        _PLAIN_NAME.fullmatch(word) for word in spec.exclude
    ):
        return None
    words = spec.targets
    if isinstance(words, str) and not _PLAIN_NAME.fullmatch(words):
        return Selection(words, spec.exclude) if layers is None else None
    if words in _KEYWORDS:
        return None
    words = (words,) if isinstance(words, str) else words
    # an expression in a list selects nothing, and goes
    used = {word for word in words if any(_ends_with_any(path, [word]) for path in paths)}
    return Selection(tuple(sorted(used)), spec.exclude, layers)


def _numbers(layers: str) -> tuple[int, ...] | None:
    """``"0-2,5"`` as numbers; ``None`` where the end is open, or where no model has as many."""
    found: set[int] = set()
    for part in layers.replace(" ", "").split(","):
        bounds = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if bounds is None:
            return None
        found.update(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return tuple(sorted(found))


def _ends_with_any(path: str, words: Iterable[str]) -> bool:
    return any(path == word or path.endswith("." + word) for word in words)


# --- rank and alpha ----------------------------------------------------------------------------


class Patterned(Generic[Value]):
    """A default and PEFT's patterns: the first that matches the end of a path, at a dot, counts."""

    def __init__(self, default: Value, pattern: Mapping[str, Value]) -> None:
        self._default: Value = default
        # compiled here: with one pattern a layer, Python's own cache is too small
        self._pattern: list[tuple[re.Pattern[str], str, Value]] = [
            (_expression(text), text, value) for text, value in pattern.items()
        ]
        self._costs = [_cost(text) for text in pattern]
        self._steps = 0.0

    def at(self, path: str) -> Value:
        """The value at a module path."""
        for number, (_, _, value) in enumerate(self._pattern):
            if self._matches(number, path):
                return value
        return self._default

    def _matches(self, number: int, path: str) -> bool:
        """Whether a pattern matches; what that may take is known and added up before it is tried.

        Raises:
            FormatError: all together may take minutes.
        """
        cost = self._costs[number]
        self._steps += cost.steps(len(path)) if cost.degree > 1 or cost.ways > 1 else 1
        if self._steps > MAX_STEPS:
            raise FormatError(
                "its rank_pattern or alpha_pattern takes too long on the names of its modules "
                f"(more than {MAX_STEPS:.0e} steps); write simpler expressions"
            )
        return self._pattern[number][0].match(path) is not None

    def used(self, paths: Iterable[str]) -> dict[str, Value]:
        """The patterns that match one of these paths."""
        known = list(paths)
        return {
            text: value
            for number, (_, text, value) in enumerate(self._pattern)
            if any(self._matches(number, path) for path in known)
        }

    def gives(self, values: Mapping[str, Value]) -> bool:
        """Whether this is the value at each of these paths."""
        return all(self.at(path) == value for path, value in values.items())


def scalings(spec: LoRASpec, paths: Iterable[str]) -> dict[str, float]:
    """The factor on B·A that the settings give at each path."""
    ranks = Patterned(spec.rank, spec.rank_pattern)
    alphas = Patterned(spec.alpha, spec.alpha_pattern)
    return {path: spec.scaling_of(ranks.at(path), alphas.at(path)) for path in paths}


def fitting_spec(spec: LoRASpec, sites: Mapping[str, LowRank]) -> LoRASpec:
    """The spec with rank, alpha and their patterns such that they give the sites' values.

    The spec's own stay where they do. An expression that matches no site goes, because PEFT warns
    about it.
    """
    if not sites:
        return replace(spec, rank_pattern={}, alpha_pattern={})
    spec = replace(
        spec,
        rank_pattern=Patterned(spec.rank, spec.rank_pattern).used(sites),
        alpha_pattern=Patterned(spec.alpha, spec.alpha_pattern).used(sites),
    )
    ranks = {path: site.rank for path, site in sites.items()}
    if not Patterned(spec.rank, spec.rank_pattern).gives(ranks):
        rank, rank_pattern = _derive(ranks)
        spec = replace(spec, rank=rank, rank_pattern=rank_pattern)
    if scalings(spec, sites) != {path: site.scaling for path, site in sites.items()}:
        alpha, alpha_pattern = _derive(
            {path: exact_alpha(spec, site.rank, site.scaling) for path, site in sites.items()}
        )
        spec = replace(spec, alpha=alpha, alpha_pattern=alpha_pattern)
    return spec


def exact_alpha(spec: LoRASpec, rank: int, scaling: float) -> float:
    """The alpha whose division gives ``scaling`` to the last bit, where there is one."""
    alpha = spec.alpha_of(rank, scaling)
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if spec.scaling_of(rank, a) == scaling), alpha)


def _cost(text: str) -> Cost:
    try:
        inner = cost_of(text)
    except ValueError:  # the user's own, who may wait for it
        return Cost()
    return Cost(inner.ways, inner.degree + 1)  # what PEFT puts in front repeats too


def _expression(text: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({text})$")


def _derive(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """The commonest value, and a short pattern for the rest.

    Where all modules of one last name agree (every ``down_proj``), the name stands for them.
    """
    counts = Counter(values.values())
    default = min(counts, key=lambda value: (-counts[value], value))
    by_name: dict[str, set[Value]] = {}
    for path, value in values.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(value)
    pattern: dict[str, Value] = {}
    for path, value in sorted(values.items()):
        name = path.rpartition(".")[2]
        # a list of modules has numbers for names, which say nothing
        agreed = len(by_name[name]) == 1 and not name.isdigit()
        if value != default:
            pattern[name if agreed else path] = value
    if all(map(_PLAIN_NAME.fullmatch, pattern)) and Patterned(default, pattern).gives(values):
        return default, pattern
    # a path that is the end of another, or holds characters of an expression
    return default, {f"^{re.escape(p)}": v for p, v in sorted(values.items()) if v != default}
