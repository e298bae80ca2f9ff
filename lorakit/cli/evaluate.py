"""Judge a base, its adapters and fully fine-tuned models on the same data, side by side.

Rows are written as the adapters learnt them, where lorakit trained them and no flag says how.
Loss and perplexity are over the supervised tokens. With --metrics, each prompt is also answered
(greedily) and the answers are compared with the references; rows that share a prompt are one
item with several references.

  lorakit eval --base smollm2 --adapter runs/mine --data test.jsonl
  lorakit eval --base smollm2 --adapter runs/mine --data test.csv --map prompt=mr,completion=ref \\
      --metrics bleu,rouge --limit 100
  lorakit eval --base B --adapter a=0.7 --adapter b=0.3 --blend --data F --metrics json --json
  lorakit eval --base B --adapter runs/mine --full runs/full --data F --forgetting

metrics, from 0 to 100: bleu, chrf (sacrebleu), rouge (ROUGE-L), exact (equal to a reference),
json (json_valid: the whole answer is JSON; json_fields: fields right; json_record: all right).

size is what the weights take on the disk. Models of --full are loaded one after the other, when
the base is gone from memory.

forgetting is the loss on general text less the base's, ± its standard error over passages. Within
two standard errors of 0 nothing can be told from it; +0.05 is 5% more perplexity; a few tenths
say that the model has become worse at text that is not the task. Below 0 it writes more like this
text than before. The text that ships is 62 short passages of everyday knowledge, talk, lists and
code, mostly English; give your own where that is what must not suffer.
"""

from __future__ import annotations

import argparse
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import (
    BASE_NAME,
    adapter_path,
    add_adapter_arguments,
    attach_adapters,
    check_names,
    load_adapters,
    mixes_of,
    use_tokenizer,
)
from lorakit.cli.bases import add_base_arguments, load_base_from
from lorakit.cli.flags import comma_list, count, positive_int
from lorakit.cli.full_models import (
    FullModel,
    check_lengths,
    check_tokenizers,
    find_full_models,
    full_argument,
    load_full_model,
    refuse_models,
)
from lorakit.cli.judged import Judged, print_judged, say_not_finite
from lorakit.cli.output import add_json_argument, emit_json, plain, say
from lorakit.cli.rows import add_data_arguments, as_learnt, data_spec
from lorakit.cli.training import note_defaults
from lorakit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorakit.bases import Base
    from lorakit.core.adapter import Adapter
    from lorakit.data import PromptItem, TokenData
    from lorakit.evaluate import Contestant, GeneralText, Judgement, LossResult

#: repeated here, for the help must not import what computes them; a test compares the two
METRICS = ("bleu", "chrf", "rouge", "exact", "json")

#: what --forgetting holds where no file was given; no path is empty
SHIPPED_TEXT = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_base_arguments(parser, task=True)
    add_adapter_arguments(parser)
    parser.add_argument(
        "--full",
        action="append",
        default=[],
        type=full_argument,
        metavar="M",
        help="a fully fine-tuned model: a folder, a run, a .gguf file or a hub id; again for "
        "several; name: before it gives it another name",
    )
    parser.add_argument("--no-base", action="store_true", help="leave the bare base out")
    parser.add_argument(
        "--blend", action="store_true", help="judge the adapters, at their weights, as one"
    )
    add_data_arguments(parser, learnt=True)
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--limit", type=positive_int, metavar="N", help="judge the first N items; default: all"
    )
    judging.add_argument(
        "--metrics",
        type=comma_list(*METRICS),
        default=(),
        metavar="M,…",
        help=f"out of {','.join(METRICS)}; default: none, which answers nothing and is fast",
    )
    judging.add_argument(
        "--forgetting",
        nargs="?",
        const=SHIPPED_TEXT,
        metavar="FILE",
        help="also the loss on general text, against the base's: of FILE (text, whose passages "
        "are separated by empty lines, or rows with a column text), or text that ships",
    )
    judging.add_argument(
        "--max-new-tokens",
        type=positive_int,
        metavar="N",
        help="longest answer; default: 16 more than the longest reference",
    )
    judging.add_argument(
        "--parallel", type=positive_int, metavar="N", help="prompts answered at a time"
    )
    judging.add_argument(
        "--save", metavar="FILE", help="write every answer, with its prompt, as JSON lines"
    )
    judging.add_argument(
        "--show", type=count, default=2, metavar="N", help="answers to print; default 2"
    )
    add_json_argument(parser)
    note_defaults(parser)


@dataclass
class _Question:
    """What every model is asked."""

    data: TokenData
    items: Sequence[PromptItem] | None
    indices: Sequence[int] | None
    general: GeneralText | None
    generate: bool
    length: int | None


def run(options: argparse.Namespace) -> int:
    """Load, judge, print."""
    from lorakit.cli import tasks

    check_names([*options.adapter, *options.full])
    mixes = mixes_of(options.adapter, blend=options.blend)
    if options.no_base and not mixes and not options.full:
        raise InputError("--no-base leaves nothing to judge; give an --adapter or a --full too")
    if options.save is not None:
        given = [*options.data, *([options.forgetting] if options.forgetting else [])]
        _check_save(options.save, given)
    refuse_models(options.adapter)
    adapters = load_adapters(options.adapter)
    task, why = tasks.chosen_task(options, options.data, adapters)
    if task != tasks.CAUSAL:
        return tasks.evaluate(options, task, why, adapters)
    if not options.metrics and options.save is None:
        idle = tasks.UNANSWERED.format("--metrics or --save")
        about_answers = ("show", "max_new_tokens", "parallel")
        tasks.refuse(options, f"{task} ({why})", dict.fromkeys(about_answers, idle))
    models = find_full_models(options.full, trust_remote_code=options.trust_remote_code)
    base = load_base_from(options)
    use_tokenizer(base, adapters)
    check_tokenizers(base, models, trust_remote_code=options.trust_remote_code)
    asked = _question(options, base, adapters, models)
    judged = _judge(options, base, adapters, mixes, asked, models)
    rows = _rows_of(asked.items, asked.indices)
    for one in judged:
        say_not_finite(one.name, one.judgement.loss, asked.data, rows)
    if options.save is not None and asked.items is not None:
        _save(Path(options.save), judged, asked.items)
    if options.json:
        emit_json(_result(options, base.ref, asked, judged))
    else:
        column = None if options.template else asked.data.report.columns.get("prompt")
        print_judged(judged, asked.items, asked.general, options.show, column)
    return 0


def _question(
    options: argparse.Namespace,
    base: Base,
    adapters: Mapping[str, Adapter],
    models: Sequence[FullModel],
) -> _Question:
    """Read the data, and say how it is read."""
    from lorakit.bases import context_length
    from lorakit.data import items as items_of
    from lorakit.data import load_data
    from lorakit.evaluate import answer_length, general_text

    learnt = {one.name: one.learnt for one in models}
    spec = as_learnt(data_spec(options), options, adapters, learnt)
    context = context_length(base.model)
    data = load_data(spec, base.require_tokenizer(), context_length=context)
    for line in data.report.lines():
        say(line)
    for name, adapter in adapters.items():
        _compare_provenance(f"Adapter {name}", adapter.provenance.get("data"), data)
    for one in models:
        _compare_provenance(f"Full model {one.name}", one.learnt, data)
    general = None
    if options.forgetting is not None:
        path = options.forgetting or None
        fits = min((c for c in [context, *(m.context for m in models)] if c), default=None)
        general = general_text(base.require_tokenizer(), path, context_length=fits)
        say(general.line())
    check_lengths(models, data)
    asked = _Question(data, None, None, general, bool(options.metrics or options.save), None)
    if data.report.kind != "text" or asked.generate:
        asked.items = items_of(data)[: options.limit]
    else:
        asked.indices = list(range(len(data)))[: options.limit]
    asked.length = options.max_new_tokens
    if asked.generate and asked.items:
        asked.length = asked.length or answer_length(data, asked.items)
        say(f"Answers of at most {asked.length} tokens, greedy")
    return asked


def _judge(
    options: argparse.Namespace,
    base: Base,
    adapters: dict[str, Adapter],
    mixes: Mapping[str, Any],
    asked: _Question,
    models: Sequence[FullModel],
) -> list[Judged]:
    """The base and its adapters in one memory, then each full model in the place of them."""
    from lorakit.evaluate import Contestant, forgetting
    from lorakit.evaluate.weights import adapter_bytes

    contestants = [Contestant(name, mix) for name, mix in mixes.items()]
    if not options.no_base:
        contestants.insert(0, Contestant(BASE_NAME, None))
    found, before = _judge_loaded(options, base, adapters, contestants, asked)
    refs = {one.name: one.ref for one in options.adapter}
    judged: list[Judged] = []
    for one in found:
        parts = _parts(mixes.get(one.name), refs)
        sizes = [adapter_bytes(adapter_path(part["ref"])) for part in parts]
        judged.append(Judged(one, parts, None, _total(sizes or [_size_of(options.base)])))
    if models:
        adapters.clear()
        _forget_model(base)
    for model in models:
        loaded = load_full_model(model, options, base)
        [one], _ = _judge_loaded(options, loaded, {}, [Contestant(model.name, None)], asked)
        judged.append(Judged(one, [], model.ref, _size_of(model.place)))
        _forget_model(loaded)
    if asked.general is not None and before is not None:
        for line in judged:
            after = line.judgement.general
            assert after is not None
            line.forgetting = forgetting(before, after, asked.general.passage_of)
    return judged


def _judge_loaded(
    options: argparse.Namespace,
    base: Base,
    adapters: Mapping[str, Adapter],
    contestants: Sequence[Contestant],
    asked: _Question,
) -> tuple[list[Judgement], LossResult | None]:
    """Judge what one model in memory can be; the second is its own loss on general text."""
    from lorakit.evaluate import compare, loss
    from lorakit.tasks import CAUSAL

    handle = attach_adapters(base, adapters, allow_other=options.allow_other_base)
    task = CAUSAL.on(base.model, handle)
    for note in task.notes:
        say(f"note: {note}")
    general = None if asked.general is None else asked.general.data
    unchanged = {one.name: one.mix is None for one in contestants}
    with _meter() as tell:
        judged = compare(
            base,
            handle,
            contestants,
            asked.data,
            items=asked.items,
            indices=asked.indices,
            metrics=options.metrics,
            generate=asked.generate,
            general=general,
            max_new_tokens=asked.length,
            batch_size=options.parallel,
            task=task,
            on_progress=lambda p: tell(f"{p.contestant}: {p.stage}", p.done, p.total),
            on_judged=_say_judged if options.full else None,
        )
        bare = next((one.general for one in judged if unchanged[one.name]), None)
        if general is not None and bare is None:
            bare = loss(
                base.model,
                handle,
                None,
                general,
                task=task,
                on_batch=lambda done, total: tell(f"{BASE_NAME}: general text", done, total),
            )
    return judged, bare


def _say_judged(one: Judgement) -> None:
    """So that what is known stays known, should a later model not load."""
    scores = "".join(f", {name} {value:.1f}" for name, value in one.metrics.items())
    say(f"{one.name}: loss {one.loss.loss:.4f}, perplexity {one.loss.perplexity:.4g}{scores}")


def _forget_model(base: Base) -> None:
    """Give its memory back; the rest of ``base`` stays."""
    from torch import cuda, nn

    base.model = nn.Module()
    gc.collect()  # a model and the handle on it hold each other
    if cuda.is_available():
        cuda.empty_cache()


def _size_of(ref: str) -> int | None:
    from lorakit.bases.source import find_source
    from lorakit.evaluate.weights import model_bytes

    source = find_source(ref)
    return model_bytes(source.location, source.revision)


def _total(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _check_save(target: str, data: Sequence[str]) -> None:
    """Refuse a place that cannot be written, or that holds the data, before hours of work.

    Raises:
        InputError: says which of these it is.
    """
    path = os.path.realpath(target)  # a link stays, and what it points to is written
    folder = os.path.dirname(path)
    there = True
    try:
        os.stat(path)
    except FileNotFoundError:
        there = False
    except OSError as error:
        raise InputError(f"--save {target} cannot be written: {error.strerror}") from None
    if os.path.isdir(path):
        raise InputError(f"--save {target} is a folder; give the name of a file")
    if there and any(os.path.exists(one) and os.path.samefile(path, one) for one in data):
        raise InputError(
            f"--save {target} is the file of --data, which would be lost; give another name"
        )
    if there and not os.path.isfile(path):
        return  # a pipe or a device is written to, so its folder does not matter
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"--save {target} cannot be written: {folder} is no folder that you may write to"
        )


def _meter() -> Any:
    from lorakit.cli.meter import meter

    return meter()


def _compare_provenance(who: str, learnt: Any, data: TokenData) -> None:
    """Say where this data is, or is written, otherwise than what ``who`` learnt from."""
    if not isinstance(learnt, dict):
        return
    if learnt.get("digest") == data.digest:
        say(f"{who}: this is the very data that it was trained on")
    written = learnt.get("format")
    if written in ("chat", "plain") and written != data.report.format:
        known = f"--format {written} writes them as it knows them"
        if data.report.kind == "messages":  # which nothing can write plain
            known = "Give texts as prompts to ask it as it knows"
        say(
            f"{who}: it learnt from prompts written as {written}; these are written as "
            f"{data.report.format}. {known}"
        )
    template = learnt.get("template")
    if isinstance(template, str) and template != data.report.template:
        say(f"{who}: it learnt from prompts of this form: --template {template!r}")


def _rows_of(items: Sequence[PromptItem] | None, indices: Sequence[int] | None) -> list[int]:
    if items is None:
        return list(indices or ())
    return [i for item in items for i in item.indices]


def _save(path: Path, judged: Sequence[Judged], items: Sequence[PromptItem]) -> None:
    """One line an item: prompt, references, its row, and each one's answer and loss."""
    import json

    from lorakit.core.files import write_atomic

    lines, row = [], 0
    for i, item in enumerate(items):
        mine = slice(row, row + len(item.indices))
        row = mine.stop
        entry = {
            "prompt": item.prompt,
            "references": item.references,
            "row": item.fields,
            "models": [
                {
                    "name": one.name,
                    "answer": one.answers[i].text,
                    "finish": one.answers[i].finish,
                    "loss": one.loss.sums[mine].sum() / max(1, one.loss.counts[mine].sum()),
                }
                for one in (line.judgement for line in judged)
            ],
        }
        lines.append(json.dumps(plain(entry), ensure_ascii=True, allow_nan=False))
    content = "".join(line + "\n" for line in lines).encode()
    if path.exists() and not path.is_file():
        path.write_bytes(content)  # a pipe or a device: replacing it would leave its reader waiting
    else:
        write_atomic(path, content)
    say(f"Answers written to {path}")


def _result(
    options: argparse.Namespace, base: str, asked: _Question, judged: Sequence[Judged]
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "models": [_line(one) for one in judged],
        "base": base,
        "data": {
            "files": asked.data.report.files,
            "digest": asked.data.digest,
            "format": asked.data.report.format,
            "items": None if asked.items is None else len(asked.items),
            "rows": len(_rows_of(asked.items, asked.indices)),
            "supervised_tokens": judged[0].judgement.loss.tokens,
        },
    }
    if asked.general is not None:
        result["general_text"] = {
            "file": options.forgetting or None,
            "digest": asked.general.data.digest,
            "passages": asked.general.passages,
            "tokens": int(asked.general.data.supervised_counts.sum()),
        }
    return result


def _line(one: Judged) -> dict[str, Any]:
    found = {
        "name": one.judgement.name,
        "loss": one.judgement.loss.loss,
        "perplexity": one.judgement.loss.perplexity,
        "metrics": one.judgement.metrics,
        "adapters": one.adapters,
        "full": one.full,
        "size_bytes": one.size,
    }
    return found if one.forgetting is None else {**found, "forgetting": one.forgetting}


def _parts(mix: Any, refs: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a contestant is made of."""
    if mix is None:
        return []
    weights = {mix: 1.0} if isinstance(mix, str) else mix
    return [{"ref": refs[name], "weight": weight} for name, weight in weights.items()]
