"""Continue prompts with a base or with adapters on it, several of them side by side.

A prompt is written for the model as in training: by the tokenizer's chat template, or plain; an
adapter that lorakit trained remembers which. --raw takes the text as it is.

  lorakit generate --base smollm2 --adapter runs/mine --prompt "Hello"
  lorakit generate --base smollm2 --adapter runs/a --adapter runs/b --with-base --prompts some.txt
  lorakit generate --base B --adapter a=0.7 --adapter b=0.3 --blend --prompt "…"
  cat letter.txt | lorakit generate --base B --adapter A --json

--prompts takes a text file with a prompt a line, or a file of rows (JSONL, JSON, CSV, Parquet) with
the columns that training recognises; rows with "messages" are asked for the last answer.
Without --prompt and --prompts, all of stdin is one prompt. One prompt for one model is printed
as it grows; Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import (
    BASE_NAME,
    add_adapter_arguments,
    attach_adapters,
    check_names,
    load_adapters,
    mixes_of,
    use_tokenizer,
)
from lorakit.cli.bases import add_base_arguments, load_base_from
from lorakit.cli.flags import check_text, non_negative_float, positive_int, probability, seed
from lorakit.cli.output import add_json_argument, console, emit_json, printable_stdout, say
from lorakit.cli.prompts import as_json, read_prompts, texts_of
from lorakit.cli.training import note_defaults
from lorakit.errors import DataError, InputError, collected

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorakit.bases import Base
    from lorakit.core.adapter import Adapter
    from lorakit.data import Chat, Rendering
    from lorakit.infer import Answer
    from lorakit.layers import Handle

#: narrower than this, answers are printed below each other
_LEAST_COLUMN = 36


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_base_arguments(parser, task=True)
    add_adapter_arguments(parser)
    parser.add_argument("--with-base", action="store_true", help="the bare base beside adapters")
    parser.add_argument(
        "--blend", action="store_true", help="use the adapters, at their weights, as one"
    )
    asking = parser.add_argument_group("prompts")
    asking.add_argument("--prompt", action="append", metavar="P", help="a prompt; may be repeated")
    asking.add_argument("--prompts", metavar="FILE", help="a file of prompts; - is stdin")
    asking.add_argument("--system", metavar="TEXT", help="system message of every chat")
    asking.add_argument(
        "--format",
        choices=("auto", "chat", "plain"),
        help="how prompts are written; default: as the adapter learnt them, else auto: as a "
        "chat where the tokenizer has a template",
    )
    asking.add_argument("--raw", action="store_true", help="take prompts exactly as they are")
    answering = parser.add_argument_group("answers")
    answering.add_argument(
        "--max-new-tokens", type=positive_int, default=256, metavar="N", help="default 256"
    )
    answering.add_argument(
        "--temperature",
        type=non_negative_float,
        default=0.0,
        metavar="T",
        help="0 (default) takes the most likely token; above, tokens are drawn",
    )
    answering.add_argument(
        "--top-p",
        type=probability,
        default=1.0,
        metavar="P",
        help="draw from the most likely tokens with this probability together; default 1: all",
    )
    answering.add_argument("--seed", type=seed, default=0, help="of the drawing; default 0")
    answering.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text"
    )
    answering.add_argument(
        "--parallel", type=positive_int, metavar="N", help="answers generated at a time"
    )
    add_json_argument(parser)
    note_defaults(parser)


@dataclass(frozen=True)
class _Model:
    """One column of the result."""

    name: str
    mix: Any
    parts: tuple[str, ...]
    """Names of the adapters in it."""


def run(options: argparse.Namespace) -> int:
    """Load, answer, print."""
    _check(options)
    models = _models(options)
    prompts = read_prompts(options.prompt, options.prompts)
    from lorakit.cli import tasks
    from lorakit.infer import answers, stream
    from lorakit.infer.generation.sampling import Sampling

    Sampling(options.temperature, options.top_p, options.seed)  # raises before anything is loaded
    adapters = load_adapters(options.adapter)
    task, why = tasks.chosen_task(options, None, adapters)
    if task not in (tasks.CAUSAL, "seq2seq"):  # those are written as in training, and streamed
        mixes = {model.name: model.mix for model in models}
        asked_texts = texts_of(prompts, f"this model is asked as of the task {task}")
        return tasks.generate(options, task, why, mixes, asked_texts, adapters)
    base = load_base_from(options, task=_task(options))
    use_tokenizer(base, adapters)
    handle = attach_adapters(base, adapters, allow_other=options.allow_other_base)
    written = {model.name: _write(model, options, prompts, base, adapters) for model in models}
    asked = [(i, model) for i in range(len(prompts)) for model in models]
    settings: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "stop": options.stop,
    }
    printable_stdout()
    if len(asked) == 1 and not options.json:
        [(i, model)] = asked
        ids, stops = written[model.name][0], written[model.name][1]
        pieces = stream(base, handle, ids[i], adapter=model.mix, stop_ids=stops, **settings)
        _print_growing(pieces)
        return 0
    found = _answer_all(answers, base, handle, asked, written, settings, options.parallel)
    if options.json:
        emit_json(
            {
                "base": base.ref,
                "answers": [
                    {
                        "prompt": as_json(prompts[i]),
                        "model": model.name,
                        "text": answer.text,
                        "tokens": answer.num_tokens,
                        "finish": answer.finish,
                    }
                    for (i, model), answer in zip(asked, found, strict=True)
                ],
            }
        )
    else:
        _print(prompts, models, found)
    return 0


# --- what is asked ---------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    check_names(options.adapter)
    if options.prompt and options.prompts:
        raise InputError("--prompt and --prompts are both given; give one of them")
    if options.raw and (options.system is not None or options.format is not None):
        other = "--system" if options.system is not None else "--format"
        raise InputError(f"--raw takes prompts as they are, so {other} cannot act; drop one")
    if options.with_base and not options.adapter:
        raise InputError("--with-base puts the base beside adapters; give an --adapter too")
    if "" in options.stop:
        raise InputError("--stop is empty; give the text before which an answer ends")
    for flag, texts in (
        ("--prompt", options.prompt or ()),
        ("--system", [options.system or ""]),
        ("--stop", options.stop),
    ):
        for text in texts:
            check_text(text, flag)


def _models(options: argparse.Namespace) -> list[_Model]:
    mixes = mixes_of(options.adapter, blend=options.blend)
    found = [
        _Model(name, mix, (mix,) if isinstance(mix, str) else tuple(mix))
        for name, mix in mixes.items()
    ]
    if options.with_base or not found:
        found.insert(0, _Model(BASE_NAME, None, ()))
    return found


def _task(options: argparse.Namespace) -> str:
    from lorakit.bases import base_config

    config = base_config(
        options.base, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm"


# --- how it is written -----------------------------------------------------------------------


def _write(
    model: _Model,
    options: argparse.Namespace,
    prompts: Sequence[str | Chat],
    base: Base,
    adapters: Mapping[str, Adapter],
) -> tuple[list[list[int]], list[int] | None]:
    """The ids of each prompt as this model is asked, and where its answers end.

    ``None`` means: at the end tokens of tokenizer and model.
    """
    from lorakit.data import make_rendering

    tokenizer = base.require_tokenizer()
    if getattr(getattr(base.model, "config", None), "is_encoder_decoder", False):
        for flag in ("system", "format"):
            if getattr(options, flag) is not None:
                raise InputError(f"--{flag} cannot act: an encoder-decoder takes text as it is")
        from lorakit.bases import most_positions
        from lorakit.tasks.kinds import asked_of

        room = most_positions(base.model)
        texts = texts_of(prompts, "an encoder-decoder takes text as it is")
        return [list(asked_of(base, text, room).ids) for text in texts], None
    learnt = {str(name): _learnt(adapters[name]) for name in model.parts}
    format, kind, reason = _format(options, learnt)
    system = options.system
    if system is None and not options.raw:
        system, told = _common(learnt, "system")
        reason += told
    try:
        rendering = make_rendering(tokenizer, format, system=system, kind=kind)
    except DataError as error:
        raise InputError(f"{model.name}: {error}") from error
    if options.raw or kind == "text":
        why = f"{model.name}: prompts are taken as they are ({reason})"
        ids = rendering.first_ids(texts_of(prompts, why))
    else:
        if rendering.chat is None:
            why = f"{model.name}: prompts are written plain ({reason or rendering.reason})"
            other = ", or --format chat" if getattr(tokenizer, "chat_template", None) else ""
            prompts = texts_of(prompts, why, f"give texts as prompts{other}")
        ids = _asked_ids(rendering, prompts, model.name)
    how = "taken as they are" if options.raw or kind == "text" else f"written {rendering.format}"
    say(f"{model.name}: prompts are {how} ({reason or rendering.reason})")
    for note in rendering.notes:
        say(f"{model.name}: {note}")
    for name, facts in learnt.items():
        if facts.get("template") and not options.raw:
            say(f"{name} learnt from prompts of this form: {facts['template']}")
    return ids, list(rendering.stop_ids) + _end_ids(base)


def _asked_ids(rendering: Rendering, prompts: Sequence[str | Chat], model: str) -> list[list[int]]:
    """The ids of each prompt; what the chat template refuses is named.

    Raises:
        InputError: it refuses some.
    """
    found, problems = [], []
    for number, prompt in enumerate(prompts, 1):
        try:
            found.append(list(rendering.prompts([prompt])[0].ids))
        except DataError as error:
            where = "" if isinstance(prompt, str) else prompt.where
            problems.append(f"{where or f'prompt {number}'}: {error}")
    if problems:
        raise InputError(collected(f"{model} cannot be asked", problems))
    return found


def _learnt(adapter: Adapter) -> Mapping[str, Any]:
    """What an adapter says about the data that it was trained on."""
    data = adapter.provenance.get("data")
    return data if isinstance(data, dict) else {}


def _format(
    options: argparse.Namespace, learnt: Mapping[str, Mapping[str, Any]]
) -> tuple[Any, str | None, str]:
    """Format, kind of rows, and why."""
    if options.raw:
        return "plain", "text", "--raw"
    if options.format is not None:
        return options.format, None, "--format"
    if learnt and all(facts.get("kind") == "text" for facts in learnt.values()):
        return "plain", "text", f"{', '.join(learnt)} learnt from plain text"
    format, reason = _common(learnt, "format")
    return format or "auto", None, reason


def _common(learnt: Mapping[str, Mapping[str, Any]], key: str) -> tuple[Any, str]:
    """What all of these adapters say alike, and that they do; else ``None``.

    Raises:
        InputError: a blend of adapters that learnt from differently written prompts.
    """
    said = {name: facts[key] for name, facts in learnt.items() if facts.get(key) is not None}
    if len({str(value) for value in said.values()}) > 1:
        each = ", ".join(f"{name}: {value!r}" for name, value in said.items())
        raise InputError(
            f"the adapters of this blend learnt with a different {key} ({each}); choose one with "
            f"--{key}"
        )
    if not said:
        return None, ""
    names, value = ", ".join(said), next(iter(said.values()))
    return value, f"{names} learnt so" if key == "format" else f", with its {key} message {value!r}"


def _end_ids(base: Base) -> list[int]:
    from lorakit.infer.generation import end_ids

    return end_ids(base)


# --- answering and printing ------------------------------------------------------------------


def _answer_all(
    answers: Any,
    base: Base,
    handle: Handle | None,
    asked: Sequence[tuple[int, _Model]],
    written: Mapping[str, tuple[list[list[int]], list[int] | None]],
    settings: Mapping[str, Any],
    parallel: int | None,
) -> list[Answer]:
    """All answers, in the order of ``asked``; models whose answers end alike run together."""
    from lorakit.cli.meter import meter

    groups: dict[tuple[int, ...] | None, list[int]] = {}
    for place, (_, model) in enumerate(asked):
        stops = written[model.name][1]
        groups.setdefault(None if stops is None else tuple(sorted(set(stops))), []).append(place)
    found: dict[int, Answer] = {}
    done = 0
    with meter() as tell:

        def on_done(index: int, answer: Answer) -> None:
            nonlocal done
            done += 1
            tell("answers", done, len(asked))

        for stops_of_group, places in groups.items():
            these = answers(
                base,
                handle,
                [written[asked[p][1].name][0][asked[p][0]] for p in places],
                mixes=[asked[p][1].mix for p in places],
                numbers=[asked[p][0] for p in places],
                stop_ids=stops_of_group,
                batch_size=parallel,
                on_done=on_done,
                **settings,
            )
            found.update(zip(places, these, strict=True))
    return [found[place] for place in range(len(asked))]


def _print_growing(pieces: Any) -> None:
    begun = False
    try:
        for piece in pieces:
            begun = True
            print(piece, end="", flush=True)
    except BaseException:
        if begun:
            print(flush=True)  # what is said about it begins on a line of its own
        raise
    print(flush=True)


def _print(
    prompts: Sequence[str | Chat], models: Sequence[_Model], found: Sequence[Answer]
) -> None:
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    out = console(stdout=True)
    beside = len(models) > 1 and out.width // len(models) >= _LEAST_COLUMN
    rows = [found[i * len(models) : (i + 1) * len(models)] for i in range(len(prompts))]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(prompts) > 1:
            out.print(Rule(Text(" ".join(str(prompt).split())[: out.width - 8]), align="left"))
        if beside:
            table = Table(box=None, header_style="bold", expand=True, padding=(0, 2, 0, 0))
            for model in models:
                table.add_column(Text(model.name), ratio=1, overflow="fold")
            table.add_row(*(Text(answer.text) for answer in row))
            out.print(table)
            continue
        for model, answer in zip(models, row, strict=True):
            if len(models) > 1:
                out.print(Text(model.name, style="bold"))
            # as it is: a redirected answer must not be wrapped
            print(answer.text, flush=True)
