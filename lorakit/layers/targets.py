"""From a spec's words to the modules of a model.

A target is a keyword, a whole path, the end of a path at a dot, or a regular expression that
matches a whole path. Whatever matches nothing is an error that names close candidates. A parameter
of fused experts has a path as a module has; a module of them stands for all its parameters.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.core.spec import LoRASpec
from lorakit.errors import TargetError, collected
from lorakit.layers.kinds import Shape, expert_shapes, is_product, shapes_in

logger = logging.getLogger(__name__)

KEYWORDS = ("all-linear", "attention", "mlp", "experts", "router")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_REGEX = re.compile(r"[*+?\[\](){}|^$\\]")


@dataclass(frozen=True)
class Target:
    """One module to adapt, with the settings that hold there."""

    path: str
    module: nn.Module
    """What runs it; of fused experts the module that holds the parameter."""
    shape: Shape
    rank: int
    alpha: float


def resolve_targets(model: nn.Module, spec: LoRASpec) -> list[Target]:
    """The modules that ``spec`` adapts, in the model's order; a shared module once.

    Raises:
        TargetError: a target, exclude, layer or pattern matches nothing, or matches a module
            that cannot be adapted; or a rank is above a module's width. All are listed.
    """
    problems: list[str] = []
    wanted = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    everything, adaptable = _places(model)
    chosen: set[str] = set()
    for word in wanted:
        found = _match(word, model, everything, adaptable)
        if not found:
            problems.append(_nothing("target", word, everything, adaptable))
        unsuitable = [p for p in found if p not in adaptable]
        if unsuitable:
            module = everything[unsuitable[0]]
            problems.append(
                f"target {word!r} matches {unsuitable[0]} ({type(module).__name__}), which "
                + (
                    "is no linear, convolution, embedding or fused experts"
                    if is_product(module)
                    else "computes something else than the product with its weight, so that a "
                    "low-rank change of it does not act there; leave it out, or name it in "
                    "train_modules"
                )
            )
        chosen.update(found)
    for word in spec.exclude:
        out = _match(word, model, everything, adaptable)
        if not out:
            problems.append(_nothing("exclude", word, everything, adaptable))
        chosen -= set(out)
    inside = list(whole_modules(model, spec.train_modules))
    chosen = {p for p in chosen if not any(p == w or p.startswith(w + ".") for w in inside)}
    if spec.layers is not None:
        # as in PEFT, a module named by its whole path, such as the head, is meant wherever it lies
        chosen = _in_layers(chosen, spec.layers, model, problems) | (chosen & set(wanted))
    if not chosen and not problems and wanted:
        problems.append("the targets, less the excluded, leave nothing to adapt")
    ranks, alphas = (
        _patterned(pattern, name, _called(chosen, adaptable), default, problems)
        for pattern, name, default in (
            (spec.rank_pattern, "rank_pattern", spec.rank),
            (spec.alpha_pattern, "alpha_pattern", spec.alpha),
        )
    )
    targets, seen = [], set()
    for path, module in everything.items():
        key = id(module), path.rpartition(".")[2] if _is_parameter(path, adaptable) else ""
        if path not in chosen or path not in adaptable or key in seen:
            continue
        seen.add(key)
        shape, rank = adaptable[path], int(ranks(path))
        if rank > shape.max_rank:
            problems.append(
                f"{path}: rank {rank} is above its width {shape.max_rank} "
                f"({shape.d_in} → {shape.d_out}); choose a rank of at most that"
            )
        elif rank % shape.groups:
            problems.append(f"{path}: rank {rank} is not divisible by its {shape.groups} groups")
        targets.append(Target(path, module, shape, rank, alphas(path)))
    if problems:
        raise TargetError(collected("The targets do not fit this model", problems))
    _say_what_linears_leave(wanted, targets, adaptable)
    return targets


def _say_what_linears_leave(
    wanted: Sequence[str], targets: Sequence[Target], adaptable: Mapping[str, Shape]
) -> None:
    """Fused experts are most of a model's weights and none of its linears."""
    experts = [path for path, shape in adaptable.items() if shape.kind == "experts"]
    adapted = any(target.shape.experts for target in targets)
    if experts and not adapted and {"all-linear", "mlp"} & set(wanted):
        logger.info(
            "%d parameters of experts (such as %s) are no linears and stay as they are; name "
            "'experts', and 'router', among the targets to adapt them too",
            len(experts),
            experts[0],
        )


def matching_paths(
    model: nn.Module, targets: Sequence[str] | None, exclude: Sequence[str] | None = None
) -> set[str]:
    """Paths of the adaptable modules that words select; a shared module under each of its paths.

    Args:
        targets: words as in ``LoRASpec.targets``; ``None`` means every adaptable module.
        exclude: words of what is left out again.

    Raises:
        TargetError: a word matches nothing that can be adapted, or nothing is left.
    """
    everything, adaptable = _places(model)
    problems: list[str] = []

    def matched(what: str, words: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for word in words:
            paths = {p for p in _match(word, model, everything, adaptable) if p in adaptable}
            if not paths:
                problems.append(_nothing(what, word, everything, adaptable))
            found |= paths
        return found

    chosen = set(adaptable) if targets is None else matched("target", targets)
    chosen -= matched("exclude", exclude or ())
    if not chosen and not problems:
        problems.append("the targets, less the excluded, leave nothing to adapt")
    if problems:
        raise TargetError(collected("The targets do not fit this model", problems))
    return chosen


def whole_modules(model: nn.Module, words: Sequence[str]) -> dict[str, nn.Module]:
    """The modules named by ``train_modules``: whole paths or ends of paths.

    Raises:
        TargetError: a word matches nothing, or a module without parameters.
    """
    everything = _aliases(model)
    found: dict[str, nn.Module] = {}
    problems = []
    for word in words:
        paths = [p for p in everything if _ends(p, word)]
        if not paths:
            problems.append(_nothing("train_modules entry", word, everything, _places(model)[1]))
        for path in paths:
            if not any(True for _ in everything[path].parameters()):
                problems.append(f"train_modules entry {word!r}: {path} has no parameters")
            found[path] = everything[path]
    if problems:
        raise TargetError(collected("The modules to train whole do not fit this model", problems))
    # a module inside another that is trained whole belongs to it
    return {
        p: m for p, m in found.items() if not any(p.startswith(o + ".") for o in found if o != p)
    }


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that normalise and have a weight of their own, by path; a shared one once.

    They are known by their class's name, as that is all that the many RMS norms of transformers
    have in common; those that keep running statistics are left out.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if path
        and "norm" in type(module).__name__.lower()
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and not any(True for _ in module.children())
        and getattr(module, "running_mean", None) is None
    }


def compact_targets(model: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """The shortest sorted list of path ends that selects exactly ``paths``, else the paths."""
    chosen = set(paths)
    ends = sorted({p.rpartition(".")[2] for p in chosen})
    selected = {p for p in _places(model)[0] if any(_ends(p, end) for end in ends)}
    return tuple(ends) if selected == chosen else tuple(sorted(chosen))


def matches_pattern(pattern: str, path: str) -> bool:
    """Whether a rank or alpha pattern names ``path``: it must match an end of it, at a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None


def _aliases(model: nn.Module) -> dict[str, nn.Module]:
    """Every path of every module; a shared module stands under each of its paths."""
    return {path: m for path, m in model.named_modules(remove_duplicate=False) if path}


def _places(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Shape]]:
    """Every path with the module there, or that holds the parameter, and what can be adapted."""
    everything: dict[str, nn.Module] = {}
    adaptable: dict[str, Shape] = {}
    for path, module in _aliases(model).items():
        everything[path] = module
        for own, shape in shapes_in(path, module).items():
            everything[own], adaptable[own] = module, shape
    return everything, adaptable


def _is_parameter(path: str, adaptable: Mapping[str, Shape]) -> bool:
    return path in adaptable and adaptable[path].experts > 0


def _match(
    word: str,
    model: nn.Module,
    everything: Mapping[str, nn.Module],
    adaptable: Mapping[str, Shape],
) -> list[str]:
    if word in KEYWORDS:
        return _keyword(word, model, everything, adaptable)
    exact = [p for p in everything if _ends(p, word)]
    exact = [own for path in exact for own in _own_places(path, everything)]
    if exact or not _REGEX.search(word):
        return exact
    try:
        expression = re.compile(word)
    except re.error as error:
        raise TargetError(f"target {word!r} is not a regular expression: {error}") from None
    return [p for p in adaptable if expression.fullmatch(p)]


def _own_places(path: str, everything: Mapping[str, nn.Module]) -> list[str]:
    """The path, or those of its parameters where the module there is one of fused experts."""
    inner = [f"{path}.{name}" for name in expert_shapes(everything[path])]
    return inner if inner and inner[0] in everything else [path]


def _keyword(
    word: str,
    model: nn.Module,
    everything: Mapping[str, nn.Module],
    adaptable: Mapping[str, Shape],
) -> list[str]:
    if word == "experts":
        return [p for p, s in adaptable.items() if s.kind == "experts" or _is_in_experts(p, s)]
    if word == "router":
        return [p for p, s in adaptable.items() if _is_router(p, s, everything)]
    heads = output_heads(model)
    linears = [
        p
        for p, s in adaptable.items()
        if s.kind == "linear" and not any(p == h or p.startswith(h + ".") for h in heads)
    ]
    if word == "all-linear":
        return linears
    in_blocks = [p for p in linears if re.search(r"(^|\.)\d+\.", p)]
    attention = [p for p in in_blocks if _ATTENTION.search(p.rpartition(".")[0])]
    # what is in a block and not in its attention is its feed-forward part
    return attention if word == "attention" else [p for p in in_blocks if p not in set(attention)]


def _is_in_experts(path: str, shape: Shape) -> bool:
    """Whether it is a linear of one expert, in models that keep them in a list."""
    return shape.kind == "linear" and "experts" in path.split(".")[:-1]


def _is_router(path: str, shape: Shape, everything: Mapping[str, nn.Module]) -> bool:
    """Whether it chooses among the experts that stand beside it."""
    parent, _, name = path.rpartition(".")
    if f"{parent}.experts" not in everything:
        return False
    return shape.kind == "router" or (shape.kind == "linear" and name in ("gate", "router"))


def output_heads(model: nn.Module) -> list[str]:
    """Paths of the output head: what turns hidden states into logits."""
    getter: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = None
    if getter is not None:
        try:
            head = getter()
        except (NotImplementedError, AttributeError):
            head = None
    if head is not None:
        return [p for p, m in model.named_modules() if m is head and p]
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return [name for name, _ in model.named_children() if name != prefix]
    return []


def _in_layers(chosen: set[str], text: str, model: nn.Module, problems: list[str]) -> set[str]:
    numbered = {p: int(m.group(1)) for p in chosen if (m := re.search(r"(?:^|\.)(\d+)\.", p))}
    if not numbered:
        problems.append(f"layers is {text!r}, but none of the targets lies in a numbered block")
        return chosen
    last = max(numbered.values())
    wanted: set[int] = set()
    for part in text.replace(" ", "").split(","):
        if re.fullmatch(r"-\d+", part):  # up to that one, or counted from the end?
            problems.append(
                f"layers {part!r}: where does it start? Write 0{part} for the first blocks, or "
                f"the last block's number, {last}"
            )
            continue
        bounds = re.fullmatch(r"(\d{1,9})(-?)(\d{0,9})", part)
        if bounds is None:
            problems.append(f'layers is {text!r}; expected numbers and ranges, like "0-11,20-"')
            return chosen
        low, dash, high = bounds.groups()
        first = int(low)
        final = int(high) if high else (last if dash else first)
        if first > final or final > last:
            problems.append(f"layers {part!r}: the blocks are numbered 0 to {last}")
        else:
            wanted.update(range(first, final + 1))
    return {p for p, number in numbered.items() if number in wanted}


def _patterned(
    pattern: Mapping[str, Any],
    name: str,
    names: Mapping[str, Sequence[str]],
    default: Any,
    problems: list[str],
) -> Callable[[str], Any]:
    """What a pattern gives at a path, which it may know under several names."""

    def matches(key: str, path: str) -> bool:
        return any(matches_pattern(key, known) for known in names.get(path, (path,)))

    for key in pattern:
        try:
            if not any(matches(key, path) for path in names):
                problems.append(f"{name} {key!r} matches none of the adapted modules")
        except re.error as error:
            problems.append(f"{name} {key!r} is not a regular expression: {error}")
            return lambda path: default

    def value(path: str) -> Any:
        return next((v for k, v in pattern.items() if matches(k, path)), default)

    return value


def _called(paths: Iterable[str], adaptable: Mapping[str, Shape]) -> dict[str, tuple[str, ...]]:
    """What a pattern may call a site: its path, and a router by its weight too, as PEFT does."""
    routers = {p for p in paths if p in adaptable and adaptable[p].kind == "router"}
    return {p: (p, f"{p}.weight") if p in routers else (p,) for p in paths}


def _ends(path: str, word: str) -> bool:
    return path == word or path.endswith("." + word)


def _nothing(
    what: str, word: str, everything: Mapping[str, nn.Module], adaptable: Mapping[str, Shape]
) -> str:
    if word in ("experts", "router"):
        return f"{what} {word!r} matches nothing; this model is no mixture of experts known here"
    if word == "mlp" and any(shape.kind == "experts" for shape in adaptable.values()):
        return f"{what} 'mlp' matches nothing; this model's feed-forward layers are 'experts'"
    ends = sorted({p.rpartition(".")[2] for p in everything if not p[-1].isdigit()})
    names = [*ends, *everything, *KEYWORDS]
    close = difflib.get_close_matches(word, names, n=4, cutoff=0.5)
    there = sorted({path.rpartition(".")[2] for path in adaptable})
    hint = f"close: {', '.join(close)}" if close else f"there are: {', '.join(there[:12])}"
    return f"{what} {word!r} matches nothing; {hint}"
