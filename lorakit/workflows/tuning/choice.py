"""Which candidate is taken, and why, in sentences with the numbers behind them.

Nothing here trains or reads: a table goes in, a choice comes out. What lies within one standard
error of a difference counts as equal, and among equals the smaller rank wins (the one-standard-
error rule, Breiman et al., 1984, on paired differences).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.rows import plural
from lorakit.errors import TrainingError, clipped
from lorakit.workflows.tuning.space import Choices, Range, Space, described, shown
from lorakit.workflows.tuning.table import Candidate, Difference, Losses, difference

#: a rate nearer to an end of its range than this share of it is at the edge
EDGE = 0.1
#: rates that are at most so many times apart show what another setting does
NEAR = 1.5
#: prompts of the validation rows below which their spread says too little of the noise: of three,
#: the standard error itself is off by half
LEAST_PROMPTS = 8


@dataclass(frozen=True)
class Reason:
    """A sentence, and what it rests on."""

    about: str
    """``chosen``, ``start``, ``few``, ``equal``, ``default``, ``rank``, ``rate``, ``failed``, or
    a setting's name."""
    says: str
    """What is found, as one word for programs, such as ``"more rank buys nothing"``."""
    text: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "about": self.about,
            "says": self.says,
            "text": self.text,
            "numbers": dict(self.numbers),
        }


@dataclass(frozen=True)
class Choice:
    """What is taken, and the reasons in the order in which to read them."""

    number: int
    reasons: tuple[Reason, ...]
    equals: tuple[int, ...] = ()
    """Candidates that are as good as the best, the chosen one among them."""


def choose(candidates: Sequence[Candidate], space: Space, steps: int) -> Choice:
    """Take one of those that are trained out.

    Args:
        candidates: every one that was tried.
        space: what was searched.
        steps: of a whole run.

    Raises:
        TrainingError: none came to a finite loss.
    """
    finished = [c for c in candidates if c.end == "finished" and c.best() is not None]
    if not finished:
        raise TrainingError(_none_left(candidates))
    # an adapter that no step made better adds nothing, however small its rank
    able = [c for c in finished if c.improved] or finished
    best = min(able, key=lambda c: (_kept(c).mean, c.number))
    equals = [c for c in able if c is best or difference(_kept(c), _kept(best)).equal]
    chosen = min(equals, key=lambda c: (c.rank, _kept(c).mean, c.number))
    prompts = len(_kept(chosen).counts)
    found: Iterable[Reason]
    if chosen.improved and prompts < LEAST_PROMPTS:
        few = Reason("few", "too few prompts", too_few(prompts), {"prompts": prompts})
        found = [few, *_about_equals(chosen, best, equals)]
    elif chosen.improved:
        found = [
            *_about_equals(chosen, best, equals),
            *_about_default(chosen, candidates),
            *_about_rank(chosen, candidates, space),
            *_about_rate(chosen, candidates, space),
            *_about_others(chosen, candidates, space),
        ]
    else:  # what sets the others apart is of adapters that nobody keeps
        found = _about_start(chosen, candidates)
    reasons = (
        _about_chosen(chosen, len(candidates), len(finished)),
        *found,
        *_about_failures(candidates),
    )
    return Choice(chosen.number, reasons, tuple(c.number for c in equals))


def too_few(prompts: int) -> str:
    """What is said of fewer than :data:`LEAST_PROMPTS`."""
    return (
        f"{plural(prompts, 'prompt')} of validation rows cannot tell whether a difference is more "
        f"than noise, so nothing is said of the settings; it takes {LEAST_PROMPTS} at least. Give "
        "more with --valid or --validation-fraction."
    )


# --- comparing ---------------------------------------------------------------------------------


def _kept(candidate: Candidate) -> Losses:
    """The evaluation of the adapter that the run keeps."""
    found = candidate.kept
    assert found is not None
    return found


@dataclass(frozen=True)
class _Contrast:
    """Two candidates at the last step that both have reached."""

    one: Candidate
    other: Candidate
    step: int
    losses: tuple[Losses, Losses]

    @property
    def difference(self) -> Difference:
        """Of the first, less the second."""
        return difference(*self.losses)

    @property
    def words(self) -> str:
        when = f"after {self.step} steps " if self.one.steps != self.other.steps else ""
        return (
            f"{when}{_named(self.one)} has {self.losses[0].mean:.4f}, "
            f"{_named(self.other)} {self.losses[1].mean:.4f} (difference {self.difference})"
        )

    @property
    def numbers(self) -> dict[str, Any]:
        return {
            "candidates": [self.one.number, self.other.number],
            "step": self.step,
            "losses": [loss.mean for loss in self.losses],
            "difference": self.difference.mean,
            "error": self.difference.error,
        }


def _contrast(one: Candidate, other: Candidate) -> _Contrast | None:
    """Both at their lowest up to the last step that both have; ``None`` if there is no such."""
    step = max(set(one.losses) & set(other.losses), default=0)
    if not step:
        return None
    losses = one.best(step), other.best(step)
    if losses[0] is None or losses[1] is None:
        return None
    return _Contrast(one, other, step, (losses[0], losses[1]))


def _best_against(chosen: Candidate, group: Iterable[Candidate]) -> _Contrast | None:
    """The one of the group that went farthest, and of those the best, beside the chosen one."""
    contrasts = [c for one in group if one is not chosen and (c := _contrast(one, chosen))]
    return min(contrasts, key=lambda c: (-c.step, c.losses[0].mean), default=None)


def _alike(one: Candidate, other: Candidate, *but: str) -> bool:
    """Whether two are nearly the same ``but`` for some settings, which then make the difference."""
    low, high = sorted((one.lr, other.lr))
    rest = one.values.keys() - {"lr", *but}
    return high <= NEAR * low and all(one.values[name] == other.values[name] for name in rest)


def _named(candidate: Candidate) -> str:
    return f"candidate {candidate.number} ({described(candidate.values)})"


# --- sentences ---------------------------------------------------------------------------------


def _about_chosen(chosen: Candidate, tried: int, finished: int) -> Reason:
    loss = _kept(chosen)
    return Reason(
        "chosen",
        "chosen",
        f"Candidate {chosen.number} is chosen: {described(chosen.values)}. Its validation loss is "
        f"{loss.mean:.4f}, over {int(loss.counts.sum())} tokens of {len(loss.counts)} prompts; "
        f"{tried} were tried and {finished} trained out.",
        {"loss": loss.mean, "prompts": len(loss.counts), "tried": tried, "finished": finished},
    )


def _about_start(chosen: Candidate, candidates: Sequence[Candidate]) -> Iterable[Reason]:
    tried = [(c, best.mean) for c in candidates if (best := c.best()) is not None]
    lowest = min(mean for c, mean in tried if c.end == "finished")
    rate = min(c.lr for c, _ in tried)
    lower = f"{shown(float(f'{rate / 16:.2g}'))}..{shown(rate)}"
    yield Reason(
        "start", "no training helped",
        f"No candidate that was trained out is better than before its first step "
        f"({_kept(chosen).mean:.4f}; the lowest loss after one is {lowest:.4f}), so this "
        "adapter is the one that the run began with, which for most initialisations changes "
        f'nothing. Search lower rates: --search "lr={lower}".',
        {"loss": _kept(chosen).mean, "lowest": lowest, "lr": rate},
    )  # fmt: skip


def _about_equals(
    chosen: Candidate, best: Candidate, equals: Sequence[Candidate]
) -> Iterable[Reason]:
    if len(equals) < 2:
        return
    others = ", ".join(str(c.number) for c in equals if c is not chosen)
    if chosen is best:
        text = f"Within the noise, {others} would do as well; it has the lowest loss"
        text += "." if len({c.rank for c in equals}) == 1 else " and the smallest rank."
        numbers: dict[str, Any] = {}
    else:
        apart = difference(_kept(chosen), _kept(best))
        text = (
            f"Candidate {best.number} has a lower loss ({_kept(best).mean:.4f}), but only by "
            f"{apart}, which is within the noise; of those that are equal, the one with the "
            f"smallest rank is taken ({chosen.rank} instead of {best.rank})."
        )
        numbers = {"difference": apart.mean, "error": apart.error}
    yield Reason("equal", "equals", text, {"candidates": [c.number for c in equals], **numbers})


def _about_default(chosen: Candidate, candidates: Sequence[Candidate]) -> Iterable[Reason]:
    default = next((c for c in candidates if c.default), None)
    if default is None:
        return
    if chosen is default:
        yield Reason(
            "default", "default is best", "These are the default settings: the search found "
            "nothing that is better beyond the noise.",
        )  # fmt: skip
        return
    found = _contrast(chosen, default)
    if found is None:
        yield Reason(
            "default", "default failed", f"The default settings ({described(default.values)}) "
            f"came to no loss to compare with: {_short(default.reason) or 'not evaluated'}.",
        )  # fmt: skip
        return
    apart = found.difference
    if apart.equal:
        says, text = "equal to the default", "It is no better than the default settings: "
        text += f"{found.words}, within the noise."
    elif apart.mean < 0:
        share = -apart.mean / found.losses[1].mean
        says, text = "better than the default", f"It is {share:.1%} better than the defaults: "
        text += f"{found.words}."
    else:  # of those finished none is better, so the default must have left before the end
        says, text = "default was better", "At their last common step the defaults were better: "
        text += f"{found.words}. Give more time, so that they are trained out too."
    yield Reason("default", says, text, found.numbers)


def _about_rank(
    chosen: Candidate, candidates: Sequence[Candidate], space: Space
) -> Iterable[Reason]:
    tried = sorted({c.rank for c in candidates if c.best() is not None})
    if len(tried) < 2 or "rank" not in space:
        return
    alike = [c for c in candidates if _alike(c, chosen, "rank")]
    above = _best_against(chosen, (c for c in alike if c.rank > chosen.rank))
    below = _best_against(chosen, (c for c in alike if c.rank < chosen.rank))
    if above is None and below is None:
        yield Reason(
            "rank", "not compared",
            "Whether another rank is better is not known: none was tried near this rate. Ask with "
            f'--lr {shown(chosen.lr)} --search "rank={shown(space["rank"])}".',
        )  # fmt: skip
    if above is not None:
        apart = above.difference
        if apart.mean >= 0 or apart.equal:
            yield Reason(
                "rank", "more rank buys nothing",
                f"More rank buys nothing here: {above.words}"
                + (", within the noise." if apart.equal else "."),
                above.numbers,
            )  # fmt: skip
        else:
            yield Reason(
                "rank", "a higher rank was ahead",
                f"A higher rank was ahead when it left: {above.words}. Search again with more "
                "candidates, or with this rank alone.",
                above.numbers,
            )  # fmt: skip
    if below is not None:
        apart = below.difference
        if apart.equal or apart.mean < 0:
            yield Reason(
                "rank", "less rank may do",
                f"Less rank may do: {below.words}"
                + (", within the noise." if apart.equal else ". It left since."),
                below.numbers,
            )  # fmt: skip
        elif chosen.rank == tried[-1]:
            yield Reason(
                "rank", "wants full fine-tuning",
                "Your data wants full fine-tuning, or a higher rank than were tried: the highest "
                f"rank is still improving. {_capital(below.words)}.",
                below.numbers,
            )  # fmt: skip
        else:
            yield Reason(
                "rank", "less rank costs", f"Less rank costs: {below.words}.", below.numbers
            )


def _about_rate(
    chosen: Candidate, candidates: Sequence[Candidate], space: Space
) -> Iterable[Reason]:
    rates = space.get("lr")
    if rates is None:
        return
    low, high = (rates.low, rates.high) if isinstance(rates, Range) else _ends(rates.values)
    lrs = [c.lr for c in candidates if c.best() is not None]
    place = rates.place(chosen.lr) if isinstance(rates, Range) else 0.5
    top = chosen.lr >= max(lrs) or place >= 1 - EDGE
    bottom = chosen.lr <= min(lrs) or place <= EDGE
    numbers = {"lr": chosen.lr, "low": low, "high": high, "tried": [min(lrs), max(lrs)]}
    # whoever failed above shows that the range need not be wider there, if it had begun at all
    failed = [
        c for c in candidates if c.end == "failed" and c.parameters is not None and c.lr > chosen.lr
    ]
    if len(set(lrs)) < 2 and not failed:
        return
    if top and not failed:
        wider = f"{shown(low)}..{shown(float(f'{4 * high:.2g}'))}"
        yield _edge("upper", chosen, wider, numbers)
    elif bottom and chosen.lr < max(lrs):
        wider = f"{shown(float(f'{low / 4:.2g}'))}..{shown(high)}"
        yield _edge("lower", chosen, wider, numbers)
    else:
        sides = [
            (word, found)
            for word, group in (
                ("higher", [c for c in candidates if c.lr > chosen.lr]),
                ("lower", [c for c in candidates if c.lr < chosen.lr]),
            )
            if (found := _best_against(chosen, group)) is not None
        ]
        yield Reason(
            "rate", "inside of the range",
            f"The rate {shown(chosen.lr)} lies inside of the range that was tried "
            f"({shown(min(lrs))} to {shown(max(lrs))})"
            + "".join(
                f"; with a {word} one, {found.losses[0].mean:.4f} against "
                f"{found.losses[1].mean:.4f} after {found.step} steps"
                for word, found in sides
            )
            + ".",
            {**numbers, **{word: found.numbers for word, found in sides}},
        )  # fmt: skip


def _edge(which: str, chosen: Candidate, wider: str, numbers: Mapping[str, Any]) -> Reason:
    return Reason(
        "rate", f"at the {which} edge",
        f"The best rate, {shown(chosen.lr)}, is at the {which} edge of the range: widen it, with "
        f'--search "lr={wider}".',
        numbers,
    )  # fmt: skip


def _about_others(
    chosen: Candidate, candidates: Sequence[Candidate], space: Space
) -> Iterable[Reason]:
    """One sentence for each other setting: the best with another value of it, and alike else."""
    for name, one in space.items():
        if name in ("lr", "rank") or not isinstance(one, Choices):
            continue
        same = chosen.values[name]
        others = (
            c for c in candidates if c.values[name] != same and _alike(c, chosen, name, "rank")
        )
        found = _best_against(chosen, others)
        if found is None:
            continue
        apart = found.difference
        if apart.equal:
            says, what = "makes no difference", "makes no difference beyond the noise"
        elif apart.mean > 0:
            says, what = "is better", f"{shown(same)} is better"
        else:
            says, what = "was behind", f"{shown(same)} was behind at that step"
        yield Reason(name, says, f"{_capital(name)}: {what}; {found.words}.", found.numbers)


def _about_failures(candidates: Sequence[Candidate]) -> Iterable[Reason]:
    failed = [c for c in candidates if c.end == "failed"]
    if failed:
        what = "; ".join(f"{_named(c)}: {_short(c.reason)}" for c in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        yield Reason(
            "failed", "some failed", f"{len(failed)} of {len(candidates)} failed. {what}{more}",
            {"candidates": [c.number for c in failed]},
        )  # fmt: skip


def _none_left(candidates: Sequence[Candidate]) -> str:
    reasons = {_short(c.reason) for c in candidates if c.reason}
    return (
        f"none of the {len(candidates)} candidates came to a finite loss at the end. "
        + " ".join(sorted(reasons)[:3])
    ).strip()


def _short(reason: str) -> str:
    """The beginning of a message, on one line."""
    lines = [line.strip(" -") for line in reason.splitlines()]
    return clipped(" ".join(lines[:2]), 200)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
