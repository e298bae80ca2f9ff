"""What can be added without the base: everything wrong with a sum, in one error."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from lorakit.algebra.svd import num_groups
from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity, compare_identities
from lorakit.core.sites import LowRank, Prefix, Replace, Site
from lorakit.errors import BaseError, InputError, collected

logger = logging.getLogger(__name__)

#: an adapter and its weight
Weighted = tuple[Adapter, float]

_DORA = (
    "it is a DoRA site (it has a magnitude), and magnitude·(W + ΔW)/‖W + ΔW‖ is not linear in ΔW: "
    "weights on ΔW or on the magnitude give no weighted sum"
)
DORA_WAY_OUT = (
    "For DoRA: merge each adapter into a dense copy of its base (lorakit merge), and take a plain "
    "low-rank adapter from the difference (lorakit extract)."
)


def check_sum(
    given: Sequence[Weighted], names: Sequence[str], *, linear: bool, allow_other_base: bool
) -> None:
    """Refuse what has no weighted sum.

    Args:
        names: what the adapters are called in messages.
        linear: whether modules trained whole may be averaged; other methods only keep one.

    Raises:
        BaseError: the adapters belong to different bases, and nothing else is wrong.
        InputError: sites that cannot be added. All problems are in the message.
    """
    sites = check_sites(given, names, linear=linear)
    bases = [] if allow_other_base else _base_problems([a for a, _ in given], names)
    facts = _fact_problems([a for a, _ in given], names)
    if not (sites or bases or facts):
        return
    advice = [DORA_WAY_OUT] if any("DoRA" in problem for problem in sites) else []
    if bases:
        advice.append(
            "If you know that the bases are interchangeable, pass allow_other_base=True "
            "(--allow-other-base)."
        )
    error = InputError if sites or facts else BaseError
    raise error(
        "\n".join([collected("These adapters have no sum", [*bases, *facts, *sites]), *advice])
    )


def check_sites(given: Sequence[Weighted], names: Sequence[str], *, linear: bool) -> list[str]:
    """What is wrong, a line a site."""
    problems = []
    whole = {path for adapter, _ in given for path in adapter.replaced if _is_module(adapter, path)}
    for path in dict.fromkeys(path for adapter, _ in given for path in adapter.sites):
        own = [
            (a.sites[path], w, n) for (a, w), n in zip(given, names, strict=True) if path in a.sites
        ]
        problems += [f"{path}: {text}" for text in _site_problems(own, len(given), linear=linear)]
        inside = next((p for p in sorted(whole) if path.startswith(f"{p}.")), None)
        if inside is not None:
            problems.append(f"{path}: lies inside {inside}, which another adapter trained whole")
    return problems


def _is_module(adapter: Adapter, path: str) -> bool:
    site = adapter.sites[path]
    return isinstance(site, Replace) and "" not in site.tensors_by_name


def _site_problems(
    own: Sequence[tuple[Site, float, str]], num_adapters: int, *, linear: bool
) -> list[str]:
    sites = [site for site, _, _ in own]
    low_rank = [site for site in sites if isinstance(site, LowRank)]
    replaced = [site for site in sites if isinstance(site, Replace)]
    if len(low_rank) + len(replaced) < len(sites):
        odd = next(s for s in sites if not isinstance(s, (LowRank, Replace)))
        if isinstance(odd, Prefix):
            return [
                "it is a prefix, and the attention to a sum of keys is no sum; leave it out, or "
                "use one of the adapters beside the others in one routing"
            ]
        return [f"it is of type {type(odd).__name__}, which is not combined"]
    if low_rank and replaced:
        by_type = {type(site).__name__: name for site, _, name in own}
        return [
            f"{by_type['LowRank']} changes it by low rank and {by_type['Replace']} trained it "
            "whole; leave one of the two out"
        ]
    if low_rank:
        return _low_rank_problems(own, num_adapters)
    return _replace_problems(own, linear=linear)


def _low_rank_problems(own: Sequence[tuple[Site, float, str]], num_adapters: int) -> list[str]:
    dora = [n for s, _, n in own if isinstance(s, LowRank) and s.magnitude is not None]
    if dora and (num_adapters > 1 or own[0][1] != 1.0):
        return [f"in {', '.join(dora)} {_DORA}"]
    shapes = {name: _shape(site) for site, _, name in own if isinstance(site, LowRank)}
    if len(set(shapes.values())) > 1:
        return ["its changes have different shapes: " + _listed(shapes)]
    kind, _, m, groups = next(iter(shapes.values()))
    if m % groups:
        return [f"its {m} outputs cannot be cut into {groups} groups (a {kind} site)"]
    return []


def _shape(site: LowRank) -> tuple[str, tuple[int, ...], int, int]:
    groups = num_groups(site)
    if site.kind == "experts":
        return site.kind, (groups, int(site.A.shape[2])), groups * int(site.B.shape[1]), groups
    return site.kind, tuple(site.A.shape[1:]), int(site.B.shape[0]), groups


def _replace_problems(own: Sequence[tuple[Site, float, str]], *, linear: bool) -> list[str]:
    """Σ wᵢ(vᵢ − W) + W is free of the unknown W where the weights sum to 1."""
    total = math.fsum(weight for _, weight, _ in own)
    weights = " + ".join(f"{weight:g}" for _, weight, _ in own)
    if not math.isclose(total, 1.0, rel_tol=1e-9):
        return [
            f"it was trained whole in {', '.join(name for _, _, name in own)}, and its change is "
            f"not known without the base, so the weights of these must sum to 1; they sum to "
            f"{weights} = {total:g}"
        ]
    if len(own) > 1 and not linear:
        return [
            f"it was trained whole in {len(own)} adapters, and only method='linear' averages "
            "values; the others need its change, which is not known without the base"
        ]
    shapes = {
        name: {key: tuple(t.shape) for key, t in site.tensors().items()} for site, _, name in own
    }
    if any(shape != shapes[own[0][2]] for shape in shapes.values()):
        return ["its values have different names or shapes: " + _listed(shapes)]
    return []


def _listed(shapes: Mapping[str, object]) -> str:
    return "; ".join(f"{name} {shape}" for name, shape in shapes.items())


# --- bases and other facts ---------------------------------------------------------------------


def _base_problems(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    """Each adapter's base against the first that is known."""
    known = [(a.base, n) for a, n in zip(adapters, names, strict=True) if a.base is not None]
    if len(known) < len(adapters):
        silent = [n for a, n in zip(adapters, names, strict=True) if a.base is None]
        logger.info("%s: no base is named in the file, so it was not compared", ", ".join(silent))
    known.sort(key=lambda pair: not pair[0].shapes)  # stable: the best known is compared with
    problems = []
    for base, name in known[1:]:
        text = _other_base(known[0][0], base)
        if text is not None:
            problems.append(
                f"base: {known[0][1]} belongs to {known[0][0].name!r}, {name} to {text}"
            )
    return problems


def _other_base(first: BaseIdentity, second: BaseIdentity) -> str | None:
    """The second base and how it differs; ``None`` if it is the same one."""
    if first.shapes and second.shapes:
        try:
            for note in compare_identities(first, second):
                logger.info("%s", note)
        except BaseError as error:
            lines = [line.strip(" -") for line in str(error).split("\n")[1:-1]]
            return f"{second.name!r}: " + "; ".join(lines)
        return None
    if first.architecture and second.architecture and first.architecture != second.architecture:
        return f"{second.name!r}, a {second.architecture} instead of a {first.architecture}"
    if _last(first.name) != _last(second.name):
        return f"{second.name!r}; the files say no more than these names"
    return None


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _fact_problems(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    problems = []
    tasks = {n: a.task_type for a, n in zip(adapters, names, strict=True) if a.task_type}
    if len(set(tasks.values())) > 1:
        problems.append("they were trained for different tasks: " + _listed(tasks))
    texts = {n: a for a, n in zip(adapters, names, strict=True) if a.tokenizer_files}
    first = next(iter(texts.values()), None)
    for name, adapter in texts.items():
        assert first is not None
        if dict(adapter.tokenizer_files) != dict(first.tokenizer_files):
            problems.append(
                f"{name} was trained with another tokenizer or chat template than "
                f"{next(iter(texts))}; drop one: adapter.with_(tokenizer_files={{}})"
            )
    if texts and len(texts) < len(adapters):
        logger.info("the tokenizer files are those of %s", next(iter(texts)))
    return problems
