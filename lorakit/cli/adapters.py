"""``--adapter``: names, weights, and adapters that are loaded and attached by them."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.output import say
from lorakit.errors import BaseError, InputError, collected

if TYPE_CHECKING:
    from lorakit.bases import Base
    from lorakit.core.adapter import Adapter
    from lorakit.layers import Handle

#: the name under which the bare base appears beside adapters; no adapter may have it
BASE_NAME = "base"

#: what every command takes as an adapter
ADAPTER_HELP = "a run, an adapter folder, a file or a hub id (id@revision)"

#: folder and file names that say nothing about an adapter; it is called after what holds them
_ANONYMOUS = (
    *("adapter", "adapter_model", "adapters", "model"),
    *("checkpoint", "best", "final", "latest"),
)


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--adapter``, which may be given several times."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=adapter_argument,
        metavar="A[=W]",
        help=f"{ADAPTER_HELP}, again for several; =0.7 behind it is a weight, name: before it "
        "gives it another name",
    )


@dataclass(frozen=True)
class AdapterArgument:
    """One ``--adapter``: what to load, how it is called here, and its weight."""

    ref: str
    name: str
    weight: float | None = None
    """``None`` where no weight was given; it then acts with weight 1."""
    flag: str = "--adapter"
    """By which it came, for messages."""


def parse_adapter(text: str) -> tuple[str, float | None]:
    """Split ``"path=0.7"`` into ``("path", 0.7)``; without a weight it is ``None``.

    A path that exists as it stands is taken whole, whatever it contains.

    Raises:
        InputError: what follows the last ``=`` is no number, or one that float32 could not act
            with; or nothing precedes it.
    """
    if os.path.exists(text) or "=" not in text:
        return text, None
    ref, _, tail = text.rpartition("=")
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not ref or not abs(weight) <= 1e6:
        raise InputError(
            f"--adapter {text}: the weight is {tail!r}; expected a finite number of at most 1e6 "
            "in size, as in path=0.7"
        )
    return ref, weight


def adapter_argument(text: str) -> AdapterArgument:
    """An argparse type: ``[name:]ref[=weight]``.

    Without ``name:`` an adapter is called after its folder or file, or, where that is called
    ``adapter`` as in every run folder, after the folder around it. ``C:\\adapters`` stays a path.
    """
    explicit = re.fullmatch(r"(?![A-Za-z]:\\)([\w.+-]+):(?!//)(.+)", text)
    if os.path.exists(text) or os.path.exists(text.rpartition("=")[0] or text) or not explicit:
        name, rest = None, text
    else:
        name, rest = explicit.groups()
    try:
        ref, weight = parse_adapter(rest)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not ref:
        raise argparse.ArgumentTypeError("it is empty; expected a folder, a file or a hub id")
    return AdapterArgument(ref, name or adapter_name(ref), weight)


def adapter_name(ref: str) -> str:
    """What an adapter is called where nobody named it: ``runs/mine/adapter`` is ``mine``."""
    local = os.path.exists(ref)
    path = Path(ref).resolve() if local else Path(ref.partition("@")[0])
    parts = [p for p in path.parts if p != path.anchor]
    while parts:
        last = parts.pop()
        stem = last.removesuffix(".safetensors").removesuffix(".bin")
        if parts and (stem in _ANONYMOUS or re.fullmatch(r"(checkpoint|step)[-_]?\d*", stem)):
            continue
        return stem
    return ref


def check_names(adapters: Sequence[AdapterArgument]) -> None:
    """Refuse two adapters of one name, and one that is called like the base.

    Raises:
        InputError: says how to give another name.
    """
    problems = []
    for name, times in Counter(a.name for a in adapters).items():
        refs = [a.ref for a in adapters if a.name == name]
        flag = next(a.flag for a in reversed(adapters) if a.name == name)
        if times > 1:
            problems.append(
                f"{name}: {' and '.join(refs)} have this name; give one of them another, "
                f"as in {flag} other:{refs[-1]}"
            )
        if name == BASE_NAME:
            problems.append(
                f"{name}: {refs[0]} has the name that stands for the bare base; give it another, "
                f"as in {flag} mine:{refs[0]}"
            )
    if problems:
        raise InputError(collected("These names clash", problems))


def adapter_path(ref: str) -> str:
    """The adapter inside a run folder, where the run folder itself was given."""
    from lorakit.formats.folder import adapter_in

    inside = adapter_in(Path(ref)) != Path(ref)
    return os.path.join(ref, "adapter") if inside else ref  # as it was written, for messages


def load_adapters(adapters: Sequence[AdapterArgument]) -> dict[str, Adapter]:
    """Read adapters, by name.

    Raises:
        InputError: two have one name, or a file cannot be read; each problem is listed.
    """
    from lorakit.formats import load_adapter

    check_names(adapters)
    loaded: dict[str, Adapter] = {}
    problems: list[InputError] = []
    for one in adapters:
        path = adapter_path(one.ref)
        if path != one.ref:
            say(f"{one.ref} is a run folder; its adapter is {path}")
        try:
            loaded[one.name] = load_adapter(path)
        except InputError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise InputError(collected("These adapters cannot be read", map(str, problems)))
    return loaded


def use_tokenizer(base: Base, adapters: Mapping[str, Adapter]) -> None:
    """Read text as the adapters were trained to, where they bring another tokenizer.

    Replaces ``base.tokenizer`` and says so; the base is then asked in the same way.

    Raises:
        InputError: two adapters bring different ones, so nothing would be comparable.
    """
    import tempfile

    from lorakit.bases.tokenizers import read_tokenizer

    others: dict[str, Any] = {}
    for name, adapter in adapters.items():
        if not adapter.tokenizer_files:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for file, content in adapter.tokenizer_files.items():
                path = Path(folder, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            tokenizer, notes = read_tokenizer(folder)
        if base.tokenizer is None or _differ(tokenizer, base.tokenizer):
            others[name] = tokenizer
            for note in notes:
                say(f"Adapter {name}: {note}")
    first = next(iter(others), None)
    if first is None:
        return
    without = [name for name in adapters if name not in others]
    differing = [name for name in others if _differ(others[name], others[first])]
    if differing or without:
        raise InputError(
            f"the adapters {first} and {(differing or without)[0]} were trained with different "
            "tokenizers or chat templates; give them one at a time"
        )
    base.tokenizer = others[first]
    say(f"Text is read with the tokenizer of the adapter {first}, which is not the base's")


def _differ(one: Any, other: Any) -> bool:
    def facts(tokenizer: Any) -> Any:
        return tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.special_tokens_map

    return bool(facts(one) != facts(other))


def mixes_of(adapters: Sequence[AdapterArgument], *, blend: bool) -> dict[str, Any]:
    """Name → mix of what is compared: each adapter at its weight, or all of them as one blend.

    Raises:
        InputError: a blend of fewer than two.
    """
    if not blend:
        return {
            one.name: one.name if one.weight is None else {one.name: one.weight} for one in adapters
        }
    if len(adapters) < 2:
        raise InputError("--blend needs at least two adapters; give --adapter again")
    mix = {one.name: 1.0 if one.weight is None else one.weight for one in adapters}
    return {" + ".join(f"{weight:g}·{name}" for name, weight in mix.items()): mix}


def check_not_merged(
    base: str,
    adapters: Mapping[str, Adapter],
    *,
    allow_other: bool,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Refuse adapters that are in this base already: what they learnt would act twice.

    Args:
        weights: with which they are to act, by default 1; one of the other sign takes them out.

    Raises:
        BaseError: one is.
    """
    from lorakit.workflows.merge.folder import merged_weight

    for name, adapter in adapters.items():
        weight = 1.0 if weights is None else weights[name]
        if not allow_other and merged_weight(base, adapter) * weight > 0:
            raise BaseError(
                f"adapter {name} was merged into {base} already, where it would act twice. Use "
                "that base without it, or the one that it was trained on (--allow-other-base uses "
                "it all the same)"
            )


def attach_adapters(
    base: Base, adapters: Mapping[str, Adapter], *, allow_other: bool = False
) -> Handle | None:
    """Attach adapters by name to a loaded base; ``None`` if there is none.

    Says on stderr in what an adapter's base differs from this one, where that is allowed.

    Raises:
        BaseError: an adapter belongs to another base.
        TargetError: a site has no place in this model.
    """
    from lorakit.bases import check_base
    from lorakit.layers import attach

    check_not_merged(base.ref, adapters, allow_other=allow_other)
    handle = None
    for name, adapter in adapters.items():
        for note in check_base(adapter, base.identity, allow_other=allow_other):
            say(f"Adapter {name}: {note}")
        if handle is None:
            handle = attach(base.model, adapter, name, allow_other_base=True)  # checked above
        else:
            handle.add(adapter, name, allow_other_base=True)
    return handle
