"""From a spec's words to the modules of a model.

A target is a keyword, a whole path, the end of a path at a dot, or a regular expression that
matches a whole path. Whatever matches nothing is an error that names close candidates.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.core.spec import LoRASpec
from lorakit.errors import TargetError, collected
from lorakit.layers.kinds import Shape, shape_of

KEYWORDS = ("all-linear", "attention", "mlp")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_REGEX = re.compile(r"[*+?\[\](){}|^$\\]")


@dataclass(frozen=True)
class Target:
    """One module to adapt, with the settings that hold there."""

    path: str
    module: nn.Module
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
    everything = _aliases(model)
    adaptable = {p: s for p, m in everything.items() if (s := shape_of(m)) is not None}
    chosen: set[str] = set()
    for word in wanted:
        found = _match(word, model, everything, adaptable)
        if not found:
            problems.append(_nothing("target", word, everything))
        unsuitable = [p for p in found if p not in adaptable]
        if unsuitable:
            kind = type(everything[unsuitable[0]]).__name__
            problems.append(
                f"target {word!r} matches {unsuitable[0]} ({kind}), which is no linear, "
                "convolution or embedding"
            )
        chosen.update(found)
    for word in spec.exclude:
        out = _match(word, model, everything, adaptable)
        if not out:
            problems.append(_nothing("exclude", word, everything))
        chosen -= set(out)
    inside = list(whole_modules(model, spec.train_modules))
    chosen = {p for p in chosen if not any(p == w or p.startswith(w + ".") for w in inside)}
    if spec.layers is not None:
        chosen = _in_layers(chosen, spec.layers, model, problems)
    if not chosen and not problems and wanted:
        problems.append("the targets, less the excluded, leave nothing to adapt")
    ranks, alphas = (
        _patterned(pattern, name, chosen, default, problems)
        for pattern, name, default in (
            (spec.rank_pattern, "rank_pattern", spec.rank),
            (spec.alpha_pattern, "alpha_pattern", spec.alpha),
        )
    )
    targets, seen = [], set()
    for path, module in everything.items():
        if path not in chosen or path not in adaptable or id(module) in seen:
            continue
        seen.add(id(module))
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
    return targets


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
    everything = _aliases(model)
    adaptable = {p: s for p, m in everything.items() if (s := shape_of(m)) is not None}
    problems: list[str] = []

    def matched(what: str, words: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for word in words:
            paths = {p for p in _match(word, model, everything, adaptable) if p in adaptable}
            if not paths:
                problems.append(_nothing(what, word, everything))
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
            problems.append(_nothing("train_modules entry", word, everything))
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
    selected = {p for p in _aliases(model) if any(_ends(p, end) for end in ends)}
    return tuple(ends) if selected == chosen else tuple(sorted(chosen))


def matches_pattern(pattern: str, path: str) -> bool:
    """Whether a rank or alpha pattern names ``path``: it must match an end of it, at a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None


def _aliases(model: nn.Module) -> dict[str, nn.Module]:
    """Every path of every module; a shared module stands under each of its paths."""
    return {path: m for path, m in model.named_modules(remove_duplicate=False) if path}


def _match(
    word: str,
    model: nn.Module,
    everything: Mapping[str, nn.Module],
    adaptable: Mapping[str, Shape],
) -> list[str]:
    if word in KEYWORDS:
        return _keyword(word, model, everything, adaptable)
    exact = [p for p in everything if _ends(p, word)]
    if exact or not _REGEX.search(word):
        return exact
    try:
        expression = re.compile(word)
    except re.error as error:
        raise TargetError(f"target {word!r} is not a regular expression: {error}") from None
    return [p for p in adaptable if expression.fullmatch(p)]


def _keyword(
    word: str,
    model: nn.Module,
    everything: Mapping[str, nn.Module],
    adaptable: Mapping[str, Shape],
) -> list[str]:
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
    chosen: Iterable[str],
    default: Any,
    problems: list[str],
) -> Callable[[str], Any]:
    paths = list(chosen)
    for key in pattern:
        try:
            if not any(matches_pattern(key, p) for p in paths):
                problems.append(f"{name} {key!r} matches none of the adapted modules")
        except re.error as error:
            problems.append(f"{name} {key!r} is not a regular expression: {error}")
            return lambda path: default

    def value(path: str) -> Any:
        return next((v for k, v in pattern.items() if matches_pattern(k, path)), default)

    return value


def _ends(path: str, word: str) -> bool:
    return path == word or path.endswith("." + word)


def _nothing(what: str, word: str, everything: Mapping[str, nn.Module]) -> str:
    ends = sorted({p.rpartition(".")[2] for p in everything if not p[-1].isdigit()})
    names = [*ends, *everything, *KEYWORDS]
    close = difflib.get_close_matches(word, names, n=4, cutoff=0.5)
    adaptable = sorted(
        {p.rpartition(".")[2] for p, m in everything.items() if shape_of(m) is not None}
    )
    hint = f"close: {', '.join(close)}" if close else f"there are: {', '.join(adaptable[:12])}"
    return f"{what} {word!r} matches nothing; {hint}"
