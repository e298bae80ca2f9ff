"""``TrainSettings``: how a run trains, and the only home of the defaults.

A field that is ``None`` is chosen from the data and the base when the run starts;
:meth:`TrainSettings.resolve` makes these choices and gives a sentence with the reason of each.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from lorakit.core.frozen import FrozenDict
from lorakit.errors import SpecError, collected
from lorakit.tasks.names import Recompute

Schedule = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adamw", "adamw8bit", "paged-adamw8bit", "sgd"]
#: those of bitsandbytes, whose averages take a byte each
EIGHT_BIT = ("adamw8bit", "paged-adamw8bit")

DEFAULT_EPOCHS = 3.0
DEFAULT_BETAS = (0.9, 0.999)
DEFAULT_EPS = 1e-8
#: fewer rows are all trained on, where validation is not asked for
LEAST_TO_HOLD_OUT = 40
#: tokens of one forward where nobody said: enough to fill the processor, few enough that the
#: activations stay small beside the weights
DEFAULT_TOKENS = {"cpu": 2048, "mps": 4096}
DEFAULT_TOKENS_GPU = 8192


@dataclass(frozen=True)
class Facts:
    """What the choices depend on."""

    num_examples: int
    """Examples that can be trained on, after the validation part was taken out."""
    num_validation: int = 0
    """Examples that can be evaluated; 0 without validation."""
    hidden_size: int | None = None
    """Width of the base's residual stream; ``None`` if it has none."""
    device: str = "cpu"
    """``"cpu"``, ``"cuda"``, ``"mps"``, …"""
    init: str = "kaiming"
    """How a new adapter begins; one that is gone on with counts as ``"kaiming"``."""
    full: bool = False
    """Whether all weights of the base are trained, and no adapter."""
    prefix: bool = False
    """Whether keys and values in front of the text are trained."""


@dataclass(frozen=True)
class TrainSettings:
    """How a run trains.

    Raises:
        SpecError: a value is impossible, or one setting switches another off. All are listed.
    """

    steps: int | None = None
    """Optimizer steps. ``None``: as many as ``epochs`` needs."""
    epochs: float | None = None
    """Passes over the data. ``None``: 3, unless ``steps`` is given."""
    batch_size: int = 8
    """Examples per optimizer step. More than 32 tends to hurt LoRA."""
    micro_batch: int | None = None
    """Examples per forward at most; the rest of the batch is accumulated, with the same result.
    ``None``: only ``micro_batch_tokens`` limits."""
    micro_batch_tokens: int | None = None
    """Tokens per forward at most; one longer example still goes through alone. Bounds the memory
    of a step. ``None``: chosen for the device."""
    lr: float | None = None
    """Highest learning rate. ``None``: from the width of the base, the initialisation and
    ``lora_plus_ratio``."""
    lora_plus_ratio: float = 1.0
    """How many times faster every B learns than its A, whose rate is ``lr`` (LoRA+, arXiv
    2402.12354, which uses 16). 1: the same rate."""
    prefix_lr_ratio: float | None = None
    """How many times faster a prefix learns than the rest, whose rate is ``lr``. ``None``: 10 where
    there is a prefix."""
    lr_pattern: Mapping[str, float] = field(default_factory=FrozenDict)
    """Regular expression that ends a path → factor on the learning rate there."""
    init_examples: int | None = None
    """Training examples that the initialisations ``eva`` and ``lora-ga`` look at. ``None``: 64."""
    eva_rho: float = 1.0
    """Up to how many times the rank a site may get where ``eva`` shares the ranks out by what the
    directions explain (ρ in arXiv 2410.07170). 1: every site keeps the rank."""
    schedule: Schedule = "linear"
    """What the rate does after the warm-up: stays (``constant``), or falls to zero in a straight
    line (``linear``) or along half a cosine (``cosine``)."""
    warmup: int | None = None
    """Steps in which the rate rises to ``lr``. ``None``: a twentieth of all steps, at most 100."""
    optimizer: Optimizer = "adamw"
    """``adamw`` (Loshchilov & Hutter, arXiv 1711.05101); ``adamw8bit``, which keeps its averages in
    8 bits (Dettmers et al., arXiv 2110.02861); ``paged-adamw8bit``, whose averages also move to the
    processor's memory where a GPU's is full; or ``sgd`` without momentum."""
    betas: tuple[float, float] = DEFAULT_BETAS
    """Decay of AdamW's two averages."""
    eps: float = DEFAULT_EPS
    """Added to AdamW's denominator."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay: each step shrinks what is trained by ``lr · weight_decay``."""
    clip: float = 1.0
    """Largest L2 norm of the gradient; a longer one is scaled down. 0: no limit."""
    seed: int = 0
    """Of the initial weights, the order of the data, the split and the dropout."""
    recompute: Recompute = "none"
    """What a layer does not keep for its backward but makes again, for less memory and more time:
    ``mlp`` the middle of the MLP, ``layers`` all but each layer's input, ``offload`` that too,
    with those inputs in the processor's memory (CUDA). The gradient is the same."""
    validation_fraction: float | None = None
    """Share of the data held out where no validation data is given, in whole prompts. 0: none.
    ``None``: a twentieth, between 16 and 256 rows, and none of fewer than 40 rows."""
    eval_every: int | None = None
    """Steps between two evaluations. 0: only before the first step and after the last.
    ``None``: an eighth of all steps, at least 20."""
    eval_rows: int | None = None
    """Validation rows of each evaluation, always the same. 0: all. ``None``: as many as cost
    about a tenth of the training, between 32 and 256."""
    patience: int = 0
    """Evaluations in a row without a new best after which the run stops. 0: never."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints. ``None``: every minute, or more rarely where the writing
    would take over a hundredth of the time."""
    keep_checkpoints: int | None = None
    """Checkpoints kept; older ones are deleted. ``None``: 2 of an adapter, 1 of all weights."""
    samples: int = 4
    """Validation items that base and adapter answer at the end, for the report. 0: none."""
    sample_tokens: int = 96
    """Longest such answer, in tokens."""

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):  # as YAML gives it
            object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.lr_pattern, Mapping):
            object.__setattr__(self, "lr_pattern", FrozenDict(self.lr_pattern))
        problems = list(self._problems()) or list(self._conflicts())
        if problems:
            raise SpecError(collected("These training settings are impossible", problems))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            SpecError: a name is unknown, or a value impossible.
        """
        known = {one.name for one in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise SpecError(
                f"there is no training setting {', '.join(unknown)}; the settings are "
                f"{', '.join(sorted(known))}"
            )
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for YAML and JSON."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {**values, "betas": list(self.betas), "lr_pattern": dict(self.lr_pattern)}

    def _problems(self) -> Iterator[str]:
        yield from self._wrong_counts()
        yield from self._wrong_numbers()
        for name, allowed in (
            ("schedule", ("constant", "linear", "cosine")),
            ("recompute", get_args(Recompute)),
            ("optimizer", get_args(Optimizer)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                yield f"{name} is {value!r}; it must be one of {', '.join(allowed)}"

    def _wrong_counts(self) -> Iterator[str]:
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is None and name in _CHOSEN:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"{name} is {value!r}; it must be a whole number of at least {least}"
            elif name == "steps" and value > _MOST_STEPS:
                yield f"steps is above {_MOST_STEPS:,}, which would never end; give fewer"

    def _wrong_numbers(self) -> Iterator[str]:
        for name, (fits, expected) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _CHOSEN:
                continue
            if not _is_number(value) or not fits(value):
                yield f"{name} is {value!r}; it must be {expected}"
        if (
            not isinstance(self.betas, tuple)
            or len(self.betas) != 2
            or not all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        ):
            yield f"betas is {self.betas!r}; it must be two numbers in [0, 1)"
        if not isinstance(self.lr_pattern, Mapping):
            yield f"lr_pattern is {self.lr_pattern!r}; it must map patterns to factors"
            return
        for pattern, factor in self.lr_pattern.items():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                yield f"lr_pattern {pattern!r} is no regular expression: {error}"
            if not _is_number(factor) or not factor > 0:
                yield (
                    f"lr_pattern {pattern!r} has the factor {factor!r}; it must be a number above 0"
                    " (exclude what must not learn)"
                )

    def _conflicts(self) -> Iterator[str]:
        """Settings that would be accepted and then not act; asked once the types are right."""
        if self.steps is not None and self.epochs is not None:
            yield f"steps is {self.steps} and epochs {self.epochs:g}; give one of them"
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            yield (
                f"micro_batch is {self.micro_batch}, larger than batch_size {self.batch_size}; "
                "it cuts a batch into parts"
            )
        if self.steps is not None and self.warmup is not None and self.warmup >= self.steps:
            yield (
                f"warmup is {self.warmup} of {self.steps} steps; the rate would never reach lr. "
                "Give fewer"
            )
        if self.patience and self.eval_every == 0:
            yield f"patience is {self.patience}, but eval_every is 0; there is nothing to wait for"
        if self.optimizer == "sgd":
            if self.weight_decay:
                yield f"weight_decay is {self.weight_decay:g}, but sgd has no decoupled decay"
            if self.betas != DEFAULT_BETAS:
                yield f"betas is {self.betas}, but sgd keeps no averages"
            if self.eps != DEFAULT_EPS:
                yield f"eps is {self.eps:g}, but sgd has no denominator to add it to"

    def resolve(self, facts: Facts) -> tuple[TrainSettings, list[str]]:
        """These settings with every choice made, and a sentence on each.

        Settings that are resolved already come back as they are, without a sentence.

        Raises:
            SpecError: a setting cannot act with this data.
        """
        chosen: dict[str, Any] = {}
        notes: list[str] = []
        problems: list[str] = []

        def choose(name: str, value: Any, reason: str) -> None:
            if getattr(self, name) is None and name not in chosen:
                chosen[name] = value
                if reason:
                    notes.append(f"{name} is {_shown(value)}: {reason}")

        steps = self.steps
        if steps is None:
            epochs = DEFAULT_EPOCHS if self.epochs is None else self.epochs
            wanted = epochs * facts.num_examples / self.batch_size
            if wanted > _MOST_STEPS:
                raise SpecError(
                    f"epochs is {epochs:g}, which is {wanted:.3g} steps; at most {_MOST_STEPS:,} "
                    "are possible"
                )
            steps = max(1, math.ceil(wanted))
            choose(
                "steps",
                steps,
                f"{epochs:g} epochs of {facts.num_examples} examples, {self.batch_size} a step",
            )
            chosen["epochs"] = None
        if self.batch_size > facts.num_examples:
            notes.append(
                f"batch_size is {self.batch_size} and there are {facts.num_examples} examples, "
                "so a batch holds some of them several times"
            )
        if facts.full:
            choose("lr", *_full_rate(facts.hidden_size))
            choose("keep_checkpoints", 1, "one is three times the weights")
        choose("lr", *_learning_rate(facts.hidden_size, facts.init, self.lora_plus_ratio))
        choose("keep_checkpoints", 2, "")
        if facts.prefix:
            choose(
                "prefix_lr_ratio",
                10.0,
                "keys and values are moved themselves and not as a product, for which rates near "
                "1e-2 are usual (P-tuning v2, arXiv 2110.07602)",
            )
        warmup = min(100, steps // 20)  # none in a short run, where there is nothing to say of it
        choose("warmup", warmup, "a twentieth of the steps, at most 100" if warmup else "")
        if self.warmup is not None and self.warmup >= steps:
            problems.append(f"warmup is {self.warmup} of {steps} steps; give fewer")
        if self.optimizer == "paged-adamw8bit" and facts.device != "cuda":
            problems.append(
                f"optimizer is paged-adamw8bit, which moves memory off a CUDA GPU, and the device "
                f"is {facts.device}; use adamw8bit"
            )
        tokens = DEFAULT_TOKENS.get(facts.device, DEFAULT_TOKENS_GPU)
        choose(
            "micro_batch_tokens",
            tokens,
            f"enough to fill a {facts.device} device, and it bounds the memory; a larger batch "
            "is accumulated",
        )
        self._resolve_evaluation(facts, steps, choose, chosen, problems)
        if problems:
            raise SpecError(collected("These training settings cannot act", problems))
        return dataclasses.replace(self, **chosen), notes

    def _resolve_evaluation(
        self, facts: Facts, steps: int, choose: Any, chosen: dict[str, Any], problems: list[str]
    ) -> None:
        if not facts.num_validation:
            given = {"eval_every": self.eval_every, "eval_rows": self.eval_rows}
            given["patience"] = self.patience
            problems += [
                f"{name} is {value}, but there is no validation data; give some, or hold some out"
                for name, value in given.items()
                if value
            ]
            chosen["eval_every"] = chosen["eval_rows"] = 0
            return
        every = self.eval_every
        if every is None:
            every = max(20, math.ceil(steps / 8))
            choose("eval_every", every, "eight evaluations a run, but not under 20 steps apart")
        evaluations = 2 + (steps - 1) // every if every else 2
        if self.eval_rows is None:
            # an evaluation's forward costs about a third of a training step's work per row
            rows = 0.3 * steps * self.batch_size / evaluations
            rows = min(256, max(32, int(rows)), facts.num_validation)
            choose(
                "eval_rows",
                0 if rows == facts.num_validation else rows,
                f"{evaluations} evaluations of {rows} of the {facts.num_validation} validation "
                "rows cost about a tenth of the training"
                if rows < facts.num_validation
                else f"all {rows} validation rows",
            )

    def held_out(self, num_rows: int) -> float:
        """Share of ``num_rows`` rows to hold out where there is no validation data; 0 for none."""
        if self.validation_fraction is not None:
            return self.validation_fraction
        if num_rows < LEAST_TO_HOLD_OUT:
            return 0.0
        return min(256.0, max(16.0, num_rows / 20)) / num_rows


def rate_at(step: int, settings: TrainSettings) -> float:
    """Learning rate of a step, the first being 0; ``settings`` are resolved.

    The warm-up ends at ``lr`` itself, and the last step's rate is above zero.
    """
    assert settings.lr is not None
    assert settings.steps is not None
    assert settings.warmup is not None
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    if settings.schedule == "constant":
        return settings.lr
    left = (settings.steps - step) / (settings.steps - settings.warmup)
    if settings.schedule == "linear":
        return settings.lr * left
    return settings.lr * 0.5 * (1.0 - math.cos(math.pi * left))


#: initialisation → factor on the learning rate, and why. Of ten variants whose rate was searched
#: for on one model (arXiv 2602.04998), these had their best one that much lower
RATE_OF_INIT = {
    "pissa": (1 / 10, "PiSSA's factors begin as large as W's own directions: a tenth of that"),
    "olora": (1 / 18, "OLoRA's factors begin as large as W's own directions: an 18th of that"),
    "lora-ga": (1 / 18, "LoRA-GA's B begins large, along the gradient: an 18th of that"),
}


def _learning_rate(hidden_size: int | None, init: str, ratio: float) -> tuple[float, str]:
    """A rate for these settings, and why."""
    rate, reason = _usual_rate(hidden_size)
    if init in RATE_OF_INIT:
        factor, because = RATE_OF_INIT[init]
        rate, reason = rate * factor, f"{reason} ({rate:g}); {because}"
    if ratio != 1:
        # the geometric mean of both rates stays
        rate = rate / math.sqrt(ratio)
        reason += f"; with every B at {ratio:g} times it, 1/√{ratio:g} of that for A"
    return float(f"{rate:.2g}"), reason


def _full_rate(hidden_size: int | None) -> tuple[float, str]:
    """A rate for all weights, and why: a tenth of LoRA's (the same source as of that).

    On E2E (SmolLM2-135M, whose width gives 1.3e-4; 80 steps of 8 rows) the test loss was 1.314 at
    1e-4 and 1.346 at 5e-5.
    """
    rate, _ = _usual_rate(hidden_size)
    if not hidden_size:
        return rate / 10, "a tenth of what is usual for LoRA; the base states no width to choose by"
    return float(f"{rate / 10:.2g}"), (
        f"for all weights a tenth of what is seldom far off for LoRA at width {hidden_size}; "
        "search near it before you compare"
    )


def _usual_rate(hidden_size: int | None) -> tuple[float, str]:
    """A rate that is seldom far off, and why.

    With alpha 32 and scale alpha/r the best LoRA rate hardly depends on the rank and lies near
    ten times that of full fine-tuning; over widths it falls like 5e-4 · (2000/width)^0.78
    (Schulman et al., "LoRA Without Regret", 2025).
    """
    if not hidden_size:
        return 1e-3, "usual for LoRA; the base states no width to choose by"
    rate = 5e-4 * (2000 / hidden_size) ** 0.78
    rate = float(f"{min(2e-3, max(1e-4, rate)):.2g}")
    return rate, f"seldom far off for LoRA with alpha 32 at width {hidden_size}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


#: fields that may be None
_CHOSEN = frozenset(one.name for one in dataclasses.fields(TrainSettings) if one.default is None)

#: more would take years, and is a slip of the pen
_MOST_STEPS = 10**9

#: whole numbers, with the least that is possible
_COUNTS = {
    "steps": 1,
    "batch_size": 1,
    "micro_batch": 1,
    "micro_batch_tokens": 1,
    "warmup": 0,
    "seed": 0,
    "eval_every": 0,
    "eval_rows": 0,
    "patience": 0,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "init_examples": 1,
    "samples": 0,
    "sample_tokens": 1,
}

_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "epochs": (lambda x: x > 0, "a number above 0"),
    "lr": (lambda x: x > 0, "a number above 0"),
    "lora_plus_ratio": (lambda x: x > 0, "a number above 0"),
    "prefix_lr_ratio": (lambda x: x > 0, "a number above 0"),
    "eva_rho": (lambda x: x >= 1, "a number of at least 1"),
    "eps": (lambda x: x > 0, "a number above 0"),
    "weight_decay": (lambda x: x >= 0, "a number of at least 0"),
    "clip": (lambda x: x >= 0, "a number of at least 0; 0 means no limit"),
    "validation_fraction": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
}
