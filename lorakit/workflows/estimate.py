"""From a base's name, data and training settings to an estimate; no weight is loaded.

The model is built on the meta device, the data is tokenised, and the run's own order of examples
is cut into forwards as training will cut it, so the largest forward is known, not guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lorakit.bases import base_config, choose_placement
from lorakit.bases.quiet import quiet_transformers
from lorakit.core.spec import LoRASpec
from lorakit.data import TokenData, indices_at, split
from lorakit.errors import BaseError, DataError
from lorakit.evaluate.estimate import Estimate, Plan, estimate
from lorakit.evaluate.estimate_advice import Option, options, warnings
from lorakit.evaluate.estimate_machine import Gpu, Rates, device_name, measured_rates
from lorakit.evaluate.estimate_memory import Part, Recompute, Setting, peak_memory
from lorakit.evaluate.estimate_shape import (
    AdapterShape,
    ModelShape,
    adapter_shape,
    full_shape,
    model_shape,
)
from lorakit.train.memory import resident_mb
from lorakit.train.room import available_bytes
from lorakit.train.settings import Facts, TrainSettings

#: what a training process has in memory beside this one: the adapter's objects, more of the
#: libraries' pages; measured with two bases on Linux
_TRAINING_PROGRAM = 45 << 20
#: steps whose forwards are looked at for the largest, and for the mean time
_STEPS_SEEN, _STEPS_TIMED = 2000, 64
#: forwards, the longest, whose memory is computed
_LONGEST = 8
_RECOMPUTE: tuple[Recompute, ...] = ("none", "mlp", "layers", "offload")


@dataclass(frozen=True)
class Answer:
    """An estimate, what would change it, and what looks unwise."""

    estimate: Estimate
    options: Sequence[Option]
    warnings: Sequence[str]
    settings: TrainSettings
    notes: Sequence[str]
    """What was chosen, and on what the numbers rest."""


@dataclass(frozen=True)
class Question:
    """A run that is asked about."""

    model: Any
    """On the meta device."""
    shape: ModelShape
    data: TokenData
    spec: LoRASpec | None
    """``None``: full fine-tuning."""
    settings: TrainSettings
    device: str
    """``"cpu"``, ``"cuda"`` …"""
    device_name: str
    itemsize: int
    quantize: Any = None
    max_length: int | None = None
    """Longer examples are cut; ``None``: they are as they are."""
    rates: Rates | None = None
    available: int | None = None
    program: int = 0
    notes: tuple[str, ...] = field(default=())

    # --- what follows from it --------------------------------------------------------------

    def adapter(self) -> AdapterShape:
        """What is trained."""
        if self.spec is None:
            return full_shape(self.shape)
        return adapter_shape(self.model, self.spec, self.shape)

    def setting(self) -> Setting:
        """How, as far as memory and time depend on it."""
        return Setting(
            itemsize=self.itemsize,
            device="cpu" if self.device == "cpu" else "cuda",
            quantize=self.quantize,
            recompute=self.settings.recompute,
            optimizer=self.settings.optimizer,
            program=self.program,
        )

    def changed(self, changes: Mapping[str, Any]) -> Question:
        """The same with other settings, named as the command line names them."""
        own = {n: v for n, v in changes.items() if n in ("quantize", "max_length")}
        found = dataclasses.replace(self, **own)
        if "rank" in changes and self.spec is not None:
            found = dataclasses.replace(
                found, spec=dataclasses.replace(self.spec, rank=changes["rank"])
            )
        own = {n: v for n, v in changes.items() if n in ("micro_batch_tokens", "recompute")}
        return dataclasses.replace(found, settings=dataclasses.replace(self.settings, **own))

    def estimate(self) -> Estimate:
        """Predict it."""
        adapter, setting = self.adapter(), self.setting()
        return estimate(
            self._shape_that_is_touched(),
            adapter,
            setting,
            self.plan(adapter, setting),
            rates=self.rates,
            available=self.available,
            device=self.device_name,
        )

    def _shape_that_is_touched(self) -> ModelShape:
        """On a CPU the weights are pages of their file: of an embedding that is not the head too,
        only the rows of tokens that occur are ever read."""
        shape = self.shape
        if self.device != "cpu" or shape.tied or self.spec is None or not shape.num_embedding:
            return shape
        width = shape.num_embedding // shape.vocabulary
        rows = min(self._num_distinct() * _pages_per_row(width * self.itemsize), shape.vocabulary)
        left_out = shape.num_embedding - int(rows) * width
        return dataclasses.replace(shape, num_parameters=shape.num_parameters - left_out)

    def _num_distinct(self) -> int:
        seen = min(len(self.data), 4096)
        return len(np.unique(np.concatenate([self.data[i].ids for i in range(seen)])))

    def plan(self, adapter: AdapterShape, setting: Setting) -> Plan:
        """The run's forwards."""
        lengths, supervised = self._lengths()
        training = _training_indices(self.data, self.settings)
        settings = self.settings
        assert settings.steps is not None
        windows = [
            tuple(cut_window(settings, lengths, supervised, training, step))
            for step in range(min(settings.steps, _STEPS_SEEN))
        ]
        parts = sorted({part for window in windows for part in window}, key=_by_tokens)
        largest = max(
            parts[-_LONGEST:],
            key=lambda part: peak_memory(self.shape, adapter, setting, part).total,
        )
        tokens = [sum(part.tokens for part in window) for window in windows]
        return Plan(
            steps=settings.steps,
            largest=largest,
            typical=tuple(windows[:: max(1, len(windows) // _STEPS_TIMED)]),
            tokens_per_step=float(np.mean(tokens)),
            supervised_total=int(supervised[training].sum()),
            batch_size=settings.batch_size,
            longest=int(lengths[training].max()),
        )

    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and supervised tokens of each example."""
        lengths, supervised = _counts(self.data)
        if self.max_length is not None:
            lengths = np.minimum(lengths, self.max_length)
            supervised = np.minimum(supervised, self.max_length - 1)
        return lengths, supervised


def ask(
    base: str | os.PathLike[str],
    data: TokenData,
    spec: LoRASpec | None,
    settings: TrainSettings | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Any = None,
    gpu: Gpu | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fresh: bool = False,
    rates: Rates | None = None,
) -> Question:
    """Put a question together; measures this machine if that was not done before.

    Args:
        data: tokenised, as the run will read it.
        spec: of the adapter; ``None`` for full fine-tuning.
        gpu: another device than this machine's.
        fresh: measure the machine again.
        rates: of the device, where they are known; nothing is measured then.

    Raises:
        BaseError: the base is not found, or is of no kind that can be estimated.
        DataError: there is no example.
        SpecError: settings that cannot act.
    """
    if not len(data):
        raise DataError("there is no example to train on; see lorakit preview")
    if spec is None and quantize is not None:
        raise BaseError(
            f"quantize is {quantize!r}, but full fine-tuning trains the weights themselves, and "
            "packed ones have no gradient. Leave it out, or train an adapter"
        )
    model = meta_model(base, revision=revision, trust_remote_code=trust_remote_code)
    shape = model_shape(model, os.fspath(base))
    notes: list[str] = []
    if gpu is None:
        placement = choose_placement(device, dtype)
        kind, itemsize = placement.device.type, placement.dtype.itemsize
        where, available = device_name(placement.device), available_memory(placement.device)
        compute = placement.dtype
    else:
        compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        kind, itemsize, where, available = "cuda", compute.itemsize, gpu.name, gpu.memory
    full = spec is None
    settings, resolved = _resolved(settings or TrainSettings(), data, shape, kind, full)
    notes += resolved
    # before the measuring, whose memory training has not
    program = int(resident_mb() * 2**20) + _TRAINING_PROGRAM
    if gpu is not None:
        rates = gpu.rates
        notes.append(
            f"the speed of {gpu.name} is not known, so there is no time; name the GPU for one"
            if rates is None
            else f"the speed is half of what the data sheet of {gpu.name} says; nothing was "
            "measured"
        )
    elif rates is None and kind in ("cpu", "cuda"):
        rates, now = measured_rates(compute, placement.device, fresh=fresh)
        notes.append(
            f"the speed of this machine was measured {'now' if now else 'earlier'}"
            + ("" if now else " (--measure measures it again)")
        )
    return Question(
        model=model,
        shape=shape,
        data=data,
        spec=spec,
        settings=settings,
        device=kind,
        device_name=where,
        itemsize=itemsize,
        quantize=quantize,
        rates=rates,
        available=available,
        program=program,
        notes=tuple(notes),
    )


def answer(question: Question) -> Answer:
    """Predict, and look for what would change it."""
    now = question.estimate()
    adapter = question.adapter()

    def predict(changes: Mapping[str, Any]) -> Estimate:
        return question.changed(changes).estimate()

    _, supervised = question._lengths()
    training = _training_indices(question.data, question.settings)
    total = int(supervised[training].sum())
    return Answer(
        estimate=now,
        options=options(now, list(_candidates(question)), predict),
        warnings=warnings(
            adapter,
            supervised=total,
            batch_size=question.settings.batch_size,
            rank_that_holds=_rank_that_holds(question, adapter, total),
        ),
        settings=question.settings,
        notes=(*question.notes, *now.notes),
    )


def _candidates(question: Question) -> Iterator[dict[str, Any]]:
    """Settings that could be changed, one at a time."""
    lengths, _ = question._lengths()
    longest = int(lengths.max())
    tokens = question.settings.micro_batch_tokens
    assert tokens is not None
    for share in (2, 4):
        if tokens // share >= 64:
            yield {"micro_batch_tokens": tokens // share}
    for one in _RECOMPUTE[_RECOMPUTE.index(question.settings.recompute) + 1 :]:
        if one != "offload" or question.device == "cuda":
            yield {"recompute": one}
    if question.quantize is None and question.spec is not None:
        yield {"quantize": "nf4"}
        yield {"quantize": "int8"}
    for share in (2, 4):
        if longest // share >= 32:
            # without it the rows that are longer would be refused
            yield {"max_length": longest // share, "truncate": True}
    if question.spec is not None and question.spec.rank >= 2:
        yield {"rank": max(1, question.spec.rank // 4)}


def _rank_that_holds(question: Question, adapter: AdapterShape, tokens: int) -> int | None:
    """The least power of two whose adapter has as many parameters as there are tokens."""
    if question.spec is None or adapter.rank == 0 or adapter.num_parameters >= tokens:
        return None
    widest = min(min(one.d_in, one.d_out) for one in question.shape.linears)
    rank = 1
    while adapter.num_parameters / adapter.rank * rank < tokens:
        rank *= 2
    return rank if rank <= widest else None


def meta_model(
    base: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The causal language model of a base without its weights.

    Raises:
        BaseError: its config is not found, or no such model can be built.
    """
    config = base_config(base, revision=revision, trust_remote_code=trust_remote_code)
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise BaseError(
            f"{base} ({type(config).__name__}) is no causal language model, and only such are "
            "estimated"
        ) from error
    model.tie_weights()
    return model.eval()


def cut_window(
    settings: TrainSettings,
    lengths: np.ndarray,
    supervised: np.ndarray,
    training: np.ndarray,
    step: int,
) -> Iterator[Part]:
    """The forwards of one step, as ``train.job.Job`` cuts them."""
    size = settings.batch_size
    rows = training[indices_at(len(training), settings.seed, step * size, size)]
    most_tokens = settings.micro_batch_tokens or np.inf
    most = settings.micro_batch or np.inf
    open_: list[int] = []
    for row in rows:
        if open_ and (len(open_) + 1 > most or lengths[open_].sum() + lengths[row] > most_tokens):
            yield _part(lengths, supervised, open_)
            open_ = []
        open_.append(int(row))
    yield _part(lengths, supervised, open_)


def _part(lengths: np.ndarray, supervised: np.ndarray, rows: list[int]) -> Part:
    mine = lengths[rows]
    return Part(
        tokens=int(mine.sum()),
        supervised=int(supervised[rows].sum()),
        squares=int((mine.astype(np.int64) ** 2).sum()),
        examples=len(rows),
        longest=int(mine.max()),
    )


def _by_tokens(part: Part) -> tuple[int, int]:
    return part.tokens, part.supervised


@functools.lru_cache(maxsize=2)
def _counts(data: TokenData) -> tuple[np.ndarray, np.ndarray]:
    """[len], [len]: tokens, and those predicted with a loss; nothing predicts the first."""
    first = np.asarray([bool(data[i].supervised[0]) for i in range(len(data))], np.int64)
    return np.asarray(data.lengths), data.supervised_counts - first


def _training_indices(data: TokenData, settings: TrainSettings) -> np.ndarray:
    return _split(data, settings.validation_fraction or 0.0, settings.seed)


@functools.lru_cache(maxsize=4)
def _split(data: TokenData, fraction: float, seed: int) -> np.ndarray:
    return split(data, fraction, seed)[0] if fraction else np.arange(len(data))


def _resolved(
    settings: TrainSettings, data: TokenData, shape: ModelShape, device: str, full: bool
) -> tuple[TrainSettings, list[str]]:
    """The settings as the trainer resolves them."""
    fraction = settings.held_out(len(data))
    settings = dataclasses.replace(settings, validation_fraction=fraction)
    training = _training_indices(data, settings)
    facts = Facts(
        num_examples=len(training),
        num_validation=len(data) - len(training),
        hidden_size=shape.hidden,
        device=device,
        full=full,
    )
    return settings.resolve(facts)


def _pages_per_row(row_bytes: int) -> float:
    """Rows that one read row brings along, pages being read whole."""
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
    return (row_bytes + page) / row_bytes


def available_memory(device: torch.device) -> int | None:
    """Bytes that a new process could take; ``None`` where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return available_bytes() if device.type == "cpu" else None
