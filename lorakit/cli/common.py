"""What several commands share: their flags, and what is done with them.

At the top only the standard library is imported, so that a command's ``--help`` stays instant.
Progress, notes and tables go to stderr; stdout belongs to the command's result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, collected
from lorakit.optional import require

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.bases import Base
    from lorakit.core.adapter import Adapter
    from lorakit.data import DataSpec
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


# --- numbers -----------------------------------------------------------------------------------


def _number(
    kind: Callable[[str], Any], fits: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # a whole number may be too long for a float
        limit = 2**63 if isinstance(value, int) else math.inf
        if value is None or not abs(value) < limit or not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} given; expected {expected}")
        return value

    return parse


positive_int = _number(int, lambda n: n >= 1, "a whole number of at least 1")
count = _number(int, lambda n: n >= 0, "a whole number of at least 0")
seed = _number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
finite_float = _number(float, lambda x: True, "a finite number")
positive_float = _number(float, lambda x: x > 0, "a number above 0")
non_negative_float = _number(float, lambda x: x >= 0, "a number of at least 0")
probability = _number(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
fraction = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def missing(options: argparse.Namespace, flags: Mapping[str, str]) -> list[str]:
    """A line for each flag that was not given: its name, and what it is for."""
    return [f"--{n}: {what}" for n, what in flags.items() if getattr(options, n) is None]


def comma_list(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: names separated by commas, each out of ``allowed``, none twice."""

    def parse(text: str) -> tuple[str, ...]:
        names = [part.strip() for part in text.split(",") if part.strip()]
        names = [name if name in allowed else name.lower() for name in names]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            what = ", ".join(unknown) or repr(text)
            raise argparse.ArgumentTypeError(
                f"{what} given; expected one or several of {','.join(allowed)}"
            )
        return tuple(dict.fromkeys(names))

    return parse


# --- flags -------------------------------------------------------------------------------------


def add_base_arguments(
    parser: argparse.ArgumentParser,
    *,
    required: bool = True,
    weights: bool = True,
    task: bool = False,
) -> None:
    """Add ``--base`` and how to load it.

    Args:
        required: whether the command needs it (resuming a run reads it from the run).
        weights: whether the command loads the weights; without, only the tokenizer is read
            and the flags about weights are not offered.
        task: whether it takes models other than causal language models.
    """
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--base",
        required=required,
        metavar="B",
        help="hub id, folder, .gguf file, or smollm2 (SmolLM2-135M-Instruct)",
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    if task:
        from lorakit.cli.tasks import add_task_argument

        add_task_argument(group)
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the base's repository brings",
    )
    if not weights:
        return
    group.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="auto (default), cpu, cuda, cuda:1, mps",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
        help="type of the base's weights; auto (default) chooses for the processor and says why",
    )
    group.add_argument(
        "--quantize",
        choices=("nf4", "int8", "int4-torchao", "int8-torchao", "bf16"),
        help="store the base's linears in fewer bits: nf4 or int8 (bitsandbytes; nf4 is the "
        "smallest), int4-torchao or int8-torchao (torchao; scaled integers, their products exact "
        "where int8's own kernel rounds the inputs too), or bf16. All is computed in --dtype",
    )
    group.add_argument(
        "--allow-other-base",
        action="store_true",
        help="use an adapter although its base has other weights (shapes must fit)",
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


def add_data_arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, learnt: bool = False
) -> None:
    """Add ``--data`` and how its rows become examples.

    Args:
        learnt: whether the command writes rows as its adapters learnt them; see :func:`as_learnt`.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        nargs="+",
        required=required,
        metavar="F",
        help="JSONL, JSON, CSV, Parquet or text files, a datasets folder, or a hub id",
    )
    group.add_argument(
        "--map",
        action="append",
        type=column_map,
        metavar="FIELD=COLUMN,…",
        help="which column holds which field, such as prompt=mr,completion=ref",
    )
    group.add_argument(
        "--template", metavar="T", help="the prompt, with {columns} in braces, or a file of it"
    )
    group.add_argument("--system", metavar="TEXT", help="system message before every chat")
    group.add_argument(
        "--format",
        choices=("auto", "chat", "plain"),
        default=None if learnt else "auto",
        help="write prompt and completion as a chat, or one after the other; "
        + ("default: as the adapter learnt them, else auto: " if learnt else "auto (default): ")
        + "as a chat where the tokenizer has a template",
    )
    group.add_argument(
        "--loss-on",
        choices=("completion", "assistant", "all"),
        help="which tokens are supervised; default: the completion, or the assistant's turns",
    )
    group.add_argument(
        "--max-length",
        type=positive_int,
        metavar="TOKENS",
        help="longest example; default: the model's context",
    )
    group.add_argument(
        "--truncate",
        action="store_true",
        help="shorten examples that are too long: the prompt from its left, then the end",
    )
    group.add_argument(
        "--bad-rows",
        choices=("error", "skip"),
        default="error",
        help="what a row that cannot be used does: error (default) or skip, which counts them",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on stdout; numbers that are not finite become null",
    )


def column_map(text: str) -> dict[str, str]:
    """An argparse type: ``"prompt=mr,completion=ref"`` as a dictionary field → column."""
    found: dict[str, str] = {}
    for part in text.split(","):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not (field and equals and column):
            raise argparse.ArgumentTypeError(
                f"{part!r} given; expected FIELD=COLUMN, such as prompt=question"
            )
        if field in found:
            raise argparse.ArgumentTypeError(f"the field {field!r} is mapped twice")
        found[field] = column
    return found


# --- from flags to objects ---------------------------------------------------------------------


def data_spec(options: argparse.Namespace, path: Sequence[str] | None = None) -> DataSpec:
    """The data settings of these flags.

    Args:
        path: other files to be read in the same way, such as those of ``--valid``.
    """
    from lorakit.data import DataSpec

    chosen: dict[str, Any] = {"path": tuple(options.data if path is None else path)}
    for name in ("template", "system", "loss_on", "max_length"):
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    for name in ("template", "system"):
        check_text(chosen.get(name) or "", f"--{name}")
    merged: dict[str, str] = {}
    for part in options.map or []:
        twice = sorted(merged.keys() & part.keys())
        if twice:
            raise InputError(f"--map: the field {twice[0]!r} is mapped twice; give it once")
        merged.update(part)
    for name in ("format", "truncate", "bad_rows"):
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    return DataSpec(map=merged, **chosen)


def as_learnt(
    spec: DataSpec,
    options: argparse.Namespace,
    adapters: Mapping[str, Adapter],
    models: Mapping[str, Any] | None = None,
) -> DataSpec:
    """The rows written as all of these adapters learnt them, where no flag says how; says so.

    Where they learnt differently, that is said too, and nothing is chosen.

    Args:
        models: name → what a fully trained model says of its data, as an adapter's provenance
            does; empty or ``None`` if it says nothing.
    """
    from lorakit.data.load import kind_of_rows

    histories = {name: adapter.provenance.get("data") for name, adapter in adapters.items()}
    histories |= models or {}
    facts = {
        name: told
        for name, told in histories.items()
        if isinstance(told, Mapping)
        and told.get("format") in ("chat", "plain")
        and told.get("kind") != "text"
    }
    kind = kind_of_rows(spec) if facts else "text"
    if kind == "text":
        return spec
    chosen: dict[str, Any] = {}
    formats = {str(told["format"]) for told in facts.values()}
    if options.format is None and len(formats) == 1 and kind != "messages":
        chosen["format"] = next(iter(formats))
    systems = {told.get("system") for told in facts.values() if told["format"] == "chat"}
    if options.system is None and chosen.get("format", options.format) != "plain":
        if len(systems) > 1:
            say(f"{', '.join(facts)} learnt with different system messages; choose with --system")
        elif isinstance(one := next(iter(systems), None), str):
            chosen["system"] = one
    if chosen:
        how = chosen.get("format", "chat")
        system = f" with the system message {chosen['system']!r}" if "system" in chosen else ""
        say(f"Rows are written {how}{system}, as {', '.join(facts)} learnt")
    return dataclasses.replace(spec, **chosen)


def check_text(text: str, where: str) -> None:
    """Refuse what came in as bytes that are no text.

    Args:
        where: the start of the message: ``"--system"``.

    Raises:
        InputError: it is not UTF-8, or holds zero bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 15) : error.start]
        raise InputError(
            f"{where}: character {error.start + 1}, after {near!r}, is not UTF-8; write it as UTF-8"
        ) from None
    if "\0" in text:
        raise InputError(f"{where}: it holds zero bytes, so it is no text; give UTF-8 text")


def load_base_from(
    options: argparse.Namespace,
    *,
    task: Any = "causal-lm",
    load: Callable[..., Base] | None = None,
    quiet: bool = False,
) -> Base:
    """Load the base of these flags; says on stderr where it was put, and why.

    Args:
        load: what loads it, such as a kind's ``load_base``; by default that of ``task``.
        quiet: say nothing.
    """
    from lorakit.bases import load_base

    tell: Callable[[str], None] = (lambda text: None) if quiet else say
    base = (load or partial(load_base, task=task))(
        ref=options.base,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        say=tell,
    )
    placement = base.placement
    dtype = str(placement.dtype).removeprefix("torch.")
    tell(f"Base {options.base}: {dtype} on {placement.device} ({placement.reason})")
    for line in base.notes:
        tell(f"  {line}")
    return base


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
    inner = os.path.join(ref, "adapter")
    outer_config, inner_config = (os.path.join(p, "adapter_config.json") for p in (ref, inner))
    if not os.path.exists(outer_config) and os.path.exists(inner_config):
        return inner
    return ref


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

    handle = None
    for name, adapter in adapters.items():
        for note in check_base(adapter, base.identity, allow_other=allow_other):
            say(f"Adapter {name}: {note}")
        if handle is None:
            handle = attach(base.model, adapter, name, allow_other_base=True)  # checked above
        else:
            handle.add(adapter, name, allow_other_base=True)
    return handle


# --- output ------------------------------------------------------------------------------------


def plural(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def say(text: str) -> None:
    """Print a line for the person at the terminal, on stderr."""
    print(text, file=sys.stderr, flush=True)


def console(*, stdout: bool = False) -> Console:
    """A rich console, on stderr unless a result is to be printed.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    made: Console = require("rich.console", extra="train").Console(stderr=not stdout)
    return made


def printable_stdout() -> None:
    """Let stdout take any text, also where its encoding has no sign for it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def emit_json(value: Any) -> None:
    """Print one JSON object on stdout; floats that are not finite become ``null``.

    Text is escaped where stdout is not UTF-8 or the text is not, such as a path of other bytes.
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    data = plain(value)
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=encoding != "utf8")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2, allow_nan=False)
    print(text, flush=True)


def plain(value: Any) -> Any:
    """The value as JSON data: mappings, lists, text, finite numbers, booleans, ``None``.

    Paths and dtypes become text, sets are sorted, one-element tensors and NumPy scalars become
    numbers, dataclasses become objects.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(one) for one in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return plain(value.tolist())
    return str(value)
