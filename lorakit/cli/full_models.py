"""``--full``: fully fine-tuned models beside a base, looked at before any of them is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import AdapterArgument, adapter_argument, adapter_path
from lorakit.cli.output import plural, say
from lorakit.errors import BaseError, InputError, collected

if TYPE_CHECKING:
    from lorakit.bases import Base
    from lorakit.data import TokenData

#: where a run that trained all weights keeps its model, as others keep ``adapter/``
_INNER = "model"
#: by what a folder of a model is known
_CONFIG = "config.json"


@dataclass(frozen=True)
class FullModel:
    """A fully fine-tuned model that has not been loaded."""

    name: str
    ref: str
    """What the user gave."""
    place: str
    """What is loaded: the model inside of a run folder, else ``ref``."""
    context: int | None
    """Longest sequence, in tokens."""
    learnt: Mapping[str, Any]
    """What its run says of the data; empty without a run."""


def full_argument(text: str) -> AdapterArgument:
    """An argparse type: ``[name:]ref``."""
    one = adapter_argument(text)
    if one.weight is not None:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; a whole model acts as it is and has no weight: --full {one.ref}"
        )
    name = one.name.removesuffix(".gguf")
    return dataclasses.replace(one, name=name, flag="--full")


def refuse_models(arguments: Sequence[AdapterArgument]) -> None:
    """Say which flag takes a whole model, where one was given as an adapter.

    Raises:
        InputError: one or several were; all are listed.
    """
    problems = [
        f"{one.ref} is a whole model; give it as --full {one.ref}"
        for one in arguments
        if not os.path.exists(os.path.join(adapter_path(one.ref), "adapter_config.json"))
        and os.path.exists(os.path.join(_model_in(one.ref), _CONFIG))
    ]
    if problems:
        raise InputError(collected("--adapter takes adapters", problems))


def find_full_models(
    arguments: Sequence[AdapterArgument], *, trust_remote_code: bool = False
) -> list[FullModel]:
    """Look at each one's folder and config, so that a mistake shows before hours of work.

    Raises:
        InputError: what was given is no model; all problems are listed.
    """
    found, problems = [], []
    for one in arguments:
        try:
            found.append(_find(one, trust_remote_code))
        except InputError as error:
            problems.append(f"--full {one.ref}: {error}")
    if problems:
        raise InputError(
            problems[0]
            if len(problems) == 1
            else collected("These models cannot be judged", problems)
        )
    return found


def _find(one: AdapterArgument, trust_remote_code: bool) -> FullModel:
    from lorakit.bases import base_config, context_length
    from lorakit.bases.source import find_source
    from lorakit.core.checkpoint import open_checkpoint

    place = _model_in(one.ref)
    if place != one.ref:
        say(f"{one.ref} is a run folder; its model is {place}")
    elif adapter_path(one.ref) != one.ref:
        raise BaseError(f"this run trained an adapter. Give it as --adapter {one.ref}")
    source = find_source(place)
    if source.kind == "folder" and any(Path(source.location).glob("model*.safetensors*")):
        open_checkpoint(Path(source.location))  # a shard that is missing or cut off shows here
    config = base_config(place, trust_remote_code=trust_remote_code)
    run = Path(os.path.expanduser(place)).absolute().parent
    return FullModel(one.name, one.ref, place, context_length(config), _learnt(run))


def _model_in(ref: str) -> str:
    """The model inside of a run folder, where the run folder itself was given."""
    folder = os.path.expanduser(ref)
    inner = os.path.join(folder, _INNER)
    is_run = not os.path.exists(os.path.join(folder, _CONFIG))
    return inner if is_run and os.path.exists(os.path.join(inner, _CONFIG)) else ref


def _learnt(run: Path) -> Mapping[str, Any]:
    """How the rows of a run were written: ``data_report`` of its run.yaml, and their digest."""
    path = run / "run.yaml"
    if not os.path.isfile(path):
        return {}
    from lorakit.optional import require

    yaml = require("yaml", extra="train", purpose="reading a run's settings")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {**settings["data_report"], "digest": (settings.get("content") or {}).get("data")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        say(f"{path} does not tell how its rows were written ({type(error).__name__}: {error})")
        return {}


def check_tokenizers(base: Base, models: Sequence[FullModel], *, trust_remote_code: bool) -> None:
    """All are asked with the same tokens, which each model must understand alike.

    A base without a tokenizer takes that of the first model. Another chat template is said, and
    does not act.

    Raises:
        InputError: a model has another vocabulary, so that losses a token would not compare.
    """
    from lorakit.bases import load_tokenizer

    problems = []
    for one in models:
        try:
            own = load_tokenizer(one.place, trust_remote_code=trust_remote_code)
        except BaseError:
            say(f"{one.name} has no tokenizer of its own; it is asked through the base's")
            continue
        if base.tokenizer is None:
            base.tokenizer = own
            say(f"Text is read with the tokenizer of {one.name}, for the base has none")
        elif own.get_vocab() != base.tokenizer.get_vocab():
            mine, theirs = own.get_vocab().items(), base.tokenizer.get_vocab().items()
            token, _ = min(mine ^ theirs, key=lambda pair: pair[1])
            problems.append(
                f"{one.name}: {len(mine):,} tokens, and {len(theirs):,} in the tokenizer that the "
                f"others are asked through; they differ at {token!r}"
            )
        elif own.chat_template != base.tokenizer.chat_template:
            had, has = bool(own.chat_template), bool(base.tokenizer.chat_template)
            whose = "another" if had and has else "a" if had else "no"
            say(f"{one.name} brings {whose} chat template; all are asked as the base is")
    if problems:
        raise InputError(
            collected("These models read text as other tokens, so no loss compares", problems)
            + "\nJudge such a model alone, as --base."
        )


def check_lengths(models: Sequence[FullModel], data: TokenData) -> None:
    """Refuse examples that a model cannot take.

    Raises:
        InputError: names the model and what to do.
    """
    longest = int(data.lengths.max(initial=0))
    for one in models:
        if one.context is not None and longest > one.context:
            raise InputError(
                f"{one.name} takes {one.context:,} tokens, and an example has {longest:,}. "
                f"Give --max-length {one.context} with --truncate or --bad-rows skip."
            )


def load_full_model(one: FullModel, options: argparse.Namespace, base: Base) -> Base:
    """Load one where and as the base was; says what is odd about it.

    Args:
        base: the base's facts; its model may be gone.

    Raises:
        InputError: it cannot be loaded, or its weights are not finite.
    """
    from lorakit.bases import load_base

    loaded = load_base(
        one.place,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        trust_remote_code=options.trust_remote_code,
        say=say,
    )
    loaded.tokenizer = base.tokenizer
    dtype = str(loaded.placement.dtype).removeprefix("torch.")
    say(f"Full model {one.name} ({one.ref}): {dtype} on {loaded.placement.device}")
    for line in loaded.notes:
        say(f"  {line}")
    _check_finite(one, loaded)
    mine, theirs = loaded.identity, base.identity
    if (mine.architecture, mine.shapes) != (theirs.architecture, theirs.shapes):
        say(f"  note: it is not the base fine-tuned: its shapes are not those of {base.ref}")
    elif mine.samples and mine.samples == theirs.samples:
        say(f"  note: its weights, as far as sampled, are those of {base.ref}: was it trained?")
    return loaded


def _check_finite(one: FullModel, loaded: Base) -> None:
    bad = [
        name
        for name, weight in loaded.model.named_parameters()
        if weight.is_floating_point() and not weight.isfinite().all()
    ]
    if bad:
        raise InputError(
            f"{one.ref} holds NaN or infinite values in {plural(len(bad), 'weight')}, such as "
            f"{bad[0]}: its training diverged, or the file is damaged. Give an earlier checkpoint."
        )
