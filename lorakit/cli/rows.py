"""``--data``: files of rows, and how they become examples."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli.flags import check_text, positive_int
from lorakit.cli.output import say
from lorakit.errors import InputError

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter
    from lorakit.data import DataSpec


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


def merged_map(options: argparse.Namespace) -> dict[str, str]:
    """Field → column of all ``--map`` together.

    Raises:
        InputError: two of them give a column for one field.
    """
    merged: dict[str, str] = {}
    for part in options.map or []:
        twice = sorted(merged.keys() & part.keys())
        if twice:
            raise InputError(f"--map: the field {twice[0]!r} is mapped twice; give it once")
        merged.update(part)
    return merged


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
    for name in ("format", "truncate", "bad_rows"):
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    return DataSpec(map=merged_map(options), **chosen)


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
