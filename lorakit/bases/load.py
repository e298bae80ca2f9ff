"""``load_base``: a reference becomes a model on a device, with its tokenizer and identity."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lorakit.bases import affine, half
from lorakit.bases.failures import explained
from lorakit.bases.fetch import loading_options
from lorakit.bases.gguf_cache import Say, cached_base
from lorakit.bases.identity import identify
from lorakit.bases.placement import Placement, choose_placement
from lorakit.bases.quantize import (
    BY_BITSANDBYTES,
    CHOICES,
    Quantize,
    check_quantised,
    keep_bytes_in_order_,
    quantization_config,
)
from lorakit.bases.quiet import quiet_transformers
from lorakit.bases.source import Source, find_source
from lorakit.bases.tokenizers import has_tokenizer, read_tokenizer
from lorakit.core.identity import BaseIdentity
from lorakit.errors import BaseError, collected
from lorakit.optional import require

_log = logging.getLogger(__name__)

Task = Literal["causal-lm", "seq2seq", "classify", "features", "vision", "speech", "vision-chat"]

#: task → transformers' class that picks the model's class
_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classify": "AutoModelForSequenceClassification",
    "features": "AutoModel",
    "vision": "AutoModelForImageClassification",
    "speech": "AutoModelForSpeechSeq2Seq",
    "vision-chat": "AutoModelForImageTextToText",
}
#: task → transformers' class that picks what reads pictures or sound
_PROCESSORS = {
    "vision": "AutoImageProcessor",
    "speech": "AutoFeatureExtractor",
    "vision-chat": "AutoProcessor",
}
#: tasks whose head has classes
_WITH_CLASSES = ("classify", "vision")
#: tasks of which no weight may be new
_COMPLETE = ("causal-lm", "seq2seq", "speech", "vision-chat")


@dataclass
class Base:
    """A loaded base model."""

    model: nn.Module
    """In evaluation mode, on the device of ``placement``."""
    tokenizer: Any | None
    """``None`` if the base has none; see :meth:`require_tokenizer`."""
    ref: str
    """What the user gave."""
    identity: BaseIdentity
    placement: Placement
    notes: list[str] = field(default_factory=list)
    """What the user should know, one sentence each."""
    processor: Any | None = None
    """What reads pictures or sound, where the task has such and the base brings it."""
    new_weights: tuple[str, ...] = ()
    """Parameters that its files lack, or have for other classes: they are random, and the same in
    every run."""

    def require_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            BaseError: the base has none.
        """
        if self.tokenizer is None:
            raise BaseError(
                f"The base {self.ref!r} has no tokenizer, which is needed to read text. Copy the "
                "tokenizer's files (tokenizer.json, tokenizer_config.json) into its folder."
            )
        return self.tokenizer


@dataclass(frozen=True)
class Located:
    """A source that transformers can read: a folder or a hub id."""

    location: str
    storage: str | None
    """How the weights were stored before, where their dtype does not tell."""
    notes: tuple[str, ...] = ()


def load_base(
    ref: str | PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: Quantize | None = None,
    task: Task = "causal-lm",
    num_labels: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
) -> Base:
    """Load a base model.

    Args:
        ref: ``"smollm2"``, a hub id (``id@revision``), a folder, or a ``.gguf`` file.
        device: ``"auto"`` or torch's name of a device.
        dtype: ``"auto"``, a torch dtype or its name.
        quantize: how the weights of the linears are stored, but for the output head: ``"nf4"`` or
            ``"int8"`` through bitsandbytes, ``"int8-torchao"`` or ``"int4-torchao"`` as tensors
            of torchao, ``"bf16"`` as bfloat16 with all else, and what is computed, in ``dtype``;
            ``None`` keeps the weights.
        task: ``"causal-lm"``, ``"seq2seq"``, ``"classify"`` or ``"vision"`` (of texts, of
            pictures, with a head for ``num_labels`` classes), ``"speech"``, ``"vision-chat"`` or
            ``"features"`` (the bare model).
        num_labels: classes of the head; ``None`` means what the config says. Where the base's own
            head has another number of them, a new one takes its place.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run the Python code that the model's repository brings.
        say: called at once with what takes long (a dequantisation, another process that is
            waited for); the default logs it.

    Raises:
        BaseError: the base cannot be found, read or placed; the message names the next step.
        MissingDependencyError: an optional package is needed.
    """
    _check_settings(quantize, task, num_labels)
    with _collector_paused():
        return _load(
            ref,
            device=device,
            dtype=dtype,
            quantize=quantize,
            task=task,
            num_labels=num_labels,
            revision=revision,
            trust_remote_code=trust_remote_code,
            say=say or _log.info,
        )


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Importing transformers makes half a million objects that stay; walking through them again
    and again in search of garbage takes an eighth of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _load(
    ref: str | PathLike[str],
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    quantize: Quantize | None,
    task: Task,
    num_labels: int | None,
    revision: str | None,
    trust_remote_code: bool,
    say: Say,
) -> Base:
    require("transformers", extra="train", purpose="loading a base model")
    placement = choose_placement(device, dtype)
    source = find_source(ref, revision)
    located = locate(source, say)
    options = loading_options(source, trust_remote_code=trust_remote_code)
    model, notes, new = _load_model(source, located, placement, quantize, task, num_labels, options)
    tokenizer: Any | None = None
    tokenizer_notes: list[str] = []
    if task != "vision":
        tokenizer, tokenizer_notes = _find_tokenizer(located.location, model, options)
    processor, processor_notes = _find_processor(located.location, task, options)
    if task == "classify":
        tokenizer_notes += _pad_alike(model, tokenizer)
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    return Base(
        model=model,
        tokenizer=tokenizer,
        ref=fspath(ref),
        identity=identify(
            model,
            source.name,
            storage=located.storage if quantize in (None, half.NAME) else None,
            revision=commit if source.kind == "hub" else None,
        ),
        placement=placement,
        notes=[*located.notes, *notes, *tokenizer_notes, *processor_notes],
        processor=processor,
        new_weights=new,
    )


def locate(source: Source, say: Say) -> Located:
    """Make a source readable for transformers: a GGUF becomes a folder, the rest stays."""
    if source.kind != "gguf":
        return Located(source.location, None)
    gguf = Path(source.location)
    cached = cached_base(gguf, say)
    note = f"the weights come from {gguf.name} ({cached.storage}), dequantised to float32"
    return Located(str(cached.folder), cached.storage, (note, *cached.notes))


def _check_settings(quantize: Any, task: Any, num_labels: Any) -> None:
    problems = []
    if quantize is not None and quantize not in CHOICES:
        problems.append(f"quantize is {quantize!r}; it must be one of {', '.join(CHOICES)}")
    if task not in get_args(Task):
        problems.append(f"task is {task!r}; it must be one of {', '.join(get_args(Task))}")
    if num_labels is not None and task not in _WITH_CLASSES:
        problems.append(f"num_labels={num_labels!r} cannot act: the task is {task!r}")
    elif num_labels is not None and (not isinstance(num_labels, int) or num_labels < 1):
        problems.append(f"num_labels is {num_labels!r}; it must be a whole number of at least 1")
    if problems:
        raise BaseError(collected("The base cannot be loaded like this", problems))


def _load_model(
    source: Source,
    located: Located,
    placement: Placement,
    quantize: Quantize | None,
    task: Task,
    num_labels: int | None,
    options: dict[str, Any],
) -> tuple[Any, list[str], tuple[str, ...]]:
    """The model, what to say about it, and its new parameters."""
    import transformers

    place: dict[str, Any] = {"dtype": placement.dtype}
    if quantize in affine.NAMES:
        affine.require_torchao(str(quantize))  # before anything is read
    if quantize in BY_BITSANDBYTES:
        place["quantization_config"] = quantization_config(
            quantize, placement.device, placement.dtype
        )
        place["device_map"] = {"": placement.device}
    auto = getattr(transformers, _AUTO_CLASSES[task])
    with (
        quiet_transformers(),
        explained(located.location, "the model", how_to_get=source.how_to_get),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(0)  # a new head is the same in every run
        config = transformers.AutoConfig.from_pretrained(located.location, **options)
        own_labels = [str(name) for name in (getattr(config, "id2label", None) or {}).values()]
        if num_labels is not None:
            config.num_labels = num_labels
        _check_config(config, auto, task, quantize, source)
        if quantize == half.NAME:
            _check_wider(placement.dtype)
        if quantize in (half.NAME, *affine.NAMES) and _is_bfloat16(config):
            place["dtype"] = torch.bfloat16  # as in the file; the rest is widened below
        model, report = auto.from_pretrained(
            located.location,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # those of no head are refused below, with the shapes
            **place,
            **options,
        )
        if quantize == half.NAME:
            half.store_half_(model, placement.dtype)
        elif quantize in affine.NAMES:
            affine.store_affine_(model, str(quantize), placement.dtype, placement.device)
        if quantize not in BY_BITSANDBYTES and placement.device.type != "cpu":
            model = model.to(placement.device)
    keep_bytes_in_order_(model)
    check_quantised(model)  # also of a base that was quantised before
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BaseError(
            f"{source.location} holds an adapter beside the model, so it is not clear which of "
            "them is the base. Give the adapter as --adapter and the model it was trained on as "
            "--base."
        )
    notes, new = _what_was_loaded(source, model, task, report, own_labels, num_labels)
    return model.eval(), notes, new


def _is_bfloat16(config: Any) -> bool:
    return getattr(config, "dtype", None) == torch.bfloat16


def _check_wider(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise BaseError(
            f"quantize={half.NAME!r} stores weights in bfloat16 and computes in a wider dtype, and "
            f"dtype is {str(dtype).removeprefix('torch.')}. Leave quantize out, or give "
            "--dtype float32."
        )


def _check_config(
    config: Any, auto: Any, task: Task, quantize: Quantize | None, source: Source
) -> None:
    already = getattr(config, "quantization_config", None)
    if quantize is not None and already is not None:
        method = already.get("quant_method") if isinstance(already, dict) else already
        raise BaseError(
            f"{source.location} is quantised already ({method}), so quantize={quantize!r} cannot "
            "act. Leave it out, or give the model that it was made of."
        )
    has_own_code = auto.__name__ in (getattr(config, "auto_map", None) or {})
    named = ", ".join(getattr(config, "architectures", None) or []) or config.model_type
    if type(config) not in auto._model_mapping and not has_own_code:
        fitting = [t for t in get_args(Task) if _fits(config, t)]
        raise BaseError(
            f"{source.location} ({named}) cannot be loaded for the task {task!r}. "
            f"It can be for: {', '.join(fitting) or 'none of ' + ', '.join(get_args(Task))}."
        )
    if task == "causal-lm" and "ForMaskedLM" in named and not getattr(config, "is_decoder", False):
        raise BaseError(
            f"{source.location} ({named}) fills gaps in a text that it sees whole; it does not "
            "continue text. Use task='classify' or 'features', or a causal language model."
        )


def _fits(config: Any, task: str) -> bool:
    import transformers

    return type(config) in getattr(transformers, _AUTO_CLASSES[task])._model_mapping


def _what_was_loaded(
    source: Source,
    model: Any,
    task: Task,
    report: dict[str, Any],
    own_labels: Sequence[str],
    num_labels: int | None,
) -> tuple[list[str], tuple[str, ...]]:
    """Refuse weights that the file lacks; say what was made new and what was left over.

    Args:
        own_labels: of the head in the file, as the config has them.
        num_labels: as asked for.

    Returns:
        What to say, and the parameters that were made new.
    """
    missing = sorted(report.get("missing_keys") or ())
    left_over = sorted(report.get("unexpected_keys") or ())
    mismatched = sorted(report.get("mismatched_keys") or ())
    # the file's head has a row for each of its own classes: another number needs another head
    change = (len(own_labels), num_labels)
    head = [
        name for name, old, new in mismatched
        if (old[0], new[0]) == change and old[1:] == new[1:]
    ]  # fmt: skip
    if len(head) < len(mismatched):
        name, in_file, in_model = next(one for one in mismatched if one[0] not in head)
        raise BaseError(
            f"{len(mismatched) - len(head)} weights of {source.location} do not have the shapes "
            f"that its config.json describes, such as {name}: {tuple(in_file)} in the file, "
            f"{tuple(in_model)} in the model. Use the config.json that was saved with the weights."
        )
    in_blocks = [key for key in missing if any(part.isdigit() for part in key.split("."))]
    if missing and (in_blocks or task in _COMPLETE):
        other = f" The file holds others, such as {left_over[0]}." if left_over else ""
        raise BaseError(
            f"{source.location} lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{missing[0]}; they would be random.{other} Check that config.json and the weights "
            "belong together, and that the task fits."
        )
    notes = []
    if head:
        named = ", ".join(own_labels[:6]) + (", …" if len(own_labels) > 6 else "")
        notes.append(
            f"its own head has {len(own_labels):,} classes ({named}), and {num_labels:,} are asked "
            "for, so a new head takes its place"
        )
    made = sorted([*missing, *head])
    if made:
        notes.append(
            f"these weights are new and random until they are trained: {', '.join(made[:6])}"
        )
    if left_over and task in _COMPLETE:
        shown = ", ".join(left_over[:3]) + (", …" if len(left_over) > 3 else "")
        notes.append(f"{len(left_over)} weights of the file have no place in the model: {shown}")
    return notes, tuple(made)


def _find_processor(
    location: str, task: Task, options: dict[str, Any]
) -> tuple[Any | None, list[str]]:
    """What reads pictures or sound for a base; ``None`` where it brings nothing.

    Raises:
        BaseError: a library that it needs is not installed.
    """
    import transformers

    if task not in _PROCESSORS:
        return None, []
    try:
        with quiet_transformers():
            auto = getattr(transformers, _PROCESSORS[task])
            return auto.from_pretrained(location, **options), []
    except ImportError as error:
        said = str(error).strip().split("\n")[0].split(". ")[0]
        raise BaseError(
            f"What reads the input of {location} could not be loaded: {said}. Install it and try "
            "again"
        ) from error
    except (OSError, ValueError) as error:
        message = str(error).strip().split("\n")[0]
        return None, [f"the base brings nothing that reads its input: {message}"]


def _pad_alike(model: Any, tokenizer: Any | None) -> list[str]:
    """Let a classifier know the padding token, by which a decoder finds a text's last one."""
    config = model.config.get_text_config()
    padding = getattr(tokenizer, "pad_token_id", None)
    if getattr(config, "pad_token_id", None) is not None or padding is None:
        return []
    config.pad_token_id = padding
    return [f"the config names no padding token; token {padding} of the tokenizer pads"]


def _find_tokenizer(
    location: str, model: Any, options: dict[str, Any]
) -> tuple[Any | None, list[str]]:
    if Path(location).is_dir() and not has_tokenizer(Path(location)):
        return None, ["the base has no tokenizer, so it cannot read text"]
    try:
        tokenizer, notes = read_tokenizer(location, **options)
    except BaseError as error:
        return None, [f"the base is used without a tokenizer: {error}"]
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and len(tokenizer) > rows:
        notes.append(
            f"the tokenizer knows {len(tokenizer)} tokens and the embedding only {rows}: text "
            "with one of the others cannot be read"
        )
    return tokenizer, notes
