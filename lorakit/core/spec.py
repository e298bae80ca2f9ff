"""``LoRASpec``: the settings from which sites are made, and the only home of their defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lorakit.core.frozen import FrozenDict
from lorakit.errors import SpecError, collected

Scaling = Literal["alpha/r", "alpha/sqrt(r)"]
BiasMode = Literal["none", "lora", "all", "new"]
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga", "loftq"]
Variant = Literal["lora", "dora"]

#: names from PEFT's dialect, and what they are called here
_FOREIGN_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "lora_dropout": "dropout",
    "use_rslora": 'scaling="alpha/sqrt(r)"',
    "use_dora": 'variant="dora"',
    "modules_to_save": "train_modules",
    "layers_to_transform": "layers",
    "init_lora_weights": "init",
}


@dataclass(frozen=True)
class LoRASpec:
    """Which weights of a model are adapted, and how.

    Raises:
        SpecError: a value is impossible, or a name is PEFT's (the message names ours).
    """

    rank: int = 16
    """Rank of every site that no pattern names; at least 1."""
    alpha: float = 32.0
    """Numerator of the scaling. Kept fixed while the rank varies, it makes the best learning
    rate nearly independent of the rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """``"all-linear"`` (every linear but the output head), ``"attention"``, ``"mlp"``,
    ``"experts"`` and ``"router"`` (of a mixture of experts), or one or several module paths, path
    suffixes (``"q_proj"``) or regular expressions that match a whole path. ``"none"`` adapts no
    weight: biases, norms, modules or a prefix are trained alone."""
    exclude: tuple[str, ...] = ()
    """Paths, suffixes or regular expressions that are left out again."""
    layers: str | None = None
    """Blocks to adapt, such as ``"0-11"``, ``"20-"`` or ``"0,4,8"``; ``None`` means all. A target
    that is a whole path (``"lm_head"``) is adapted in any case."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Regular expression that ends a path → the rank there."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Regular expression that ends a path → the alpha there."""
    scaling: Scaling = "alpha/r"
    """``"alpha/r"`` (Hu et al., 2021) or ``"alpha/sqrt(r)"`` (rsLoRA, arXiv 2312.03732)."""
    dropout: float = 0.0
    """Probability that an input element of A is dropped in training; in [0, 1)."""
    bias: BiasMode = "none"
    """Biases trained too (BitFit, arXiv 2106.10199): ``"none"``, ``"lora"`` (of the adapted
    modules), ``"all"``, or ``"new"``: all, and every linear but the output head that has no bias
    gets one, which begins at zero. Llama and its kind have none."""
    norms: bool = False
    """Whether every norm's own weight (and bias) is trained and saved whole too."""
    prefix: int = 0
    """Virtual tokens in front of the text whose keys and values are trained in every attention
    layer (prefix tuning, Li & Liang, arXiv 2101.00190); 0: none. They begin as those that the base
    computes for a few drawn tokens, and take as many positions of its context."""
    train_modules: tuple[str, ...] = ()
    """Paths or suffixes of modules trained and saved whole, such as a new classifier head."""
    init: Init = "kaiming"
    """Where A and B begin. ``"kaiming"``, ``"gaussian"``, ``"orthogonal"``: A is drawn and B zero,
    so that the first forward is the base's. ``"pissa"`` (arXiv 2404.02948), ``"olora"``
    (2406.01775) and ``"lora-ga"`` (2407.05000) begin inside of the base's weight, which stays as
    it is: their beginning is subtracted. ``"eva"`` (2410.07170): A from the inputs, B zero.
    ``"loftq"`` (2310.08659): B·A begins with what quantising the base lost."""
    variant: Variant = "lora"
    """How the factors change the weight: ``"lora"`` adds ``scaling·B A``; ``"dora"`` (Liu et al.,
    arXiv 2402.09353) trains the length of each output's weight vector apart from its direction:
    ``magnitude · (W + scaling·B A) / ‖W + scaling·B A‖``."""

    def __init_subclass__(cls) -> None:  # pragma: no cover - a value, not a base class
        raise TypeError("LoRASpec is a value; it is not subclassed")

    def __new__(cls, *args: Any, **kwargs: Any) -> LoRASpec:
        known = {f.name for f in dataclasses.fields(cls)}
        wrong = [name for name in kwargs if name not in known]
        if wrong:
            raise SpecError(
                collected(
                    "LoRASpec does not know these settings",
                    (
                        f"{name}: here it is {_FOREIGN_NAMES[name]}"
                        if name in _FOREIGN_NAMES
                        else f"{name}: the settings are {', '.join(sorted(known))}"
                        for name in wrong
                    ),
                )
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _as_targets(self.targets))
        for name in ("exclude", "train_modules"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))
        problems = list(self._problems())
        if problems:
            raise SpecError(collected("These LoRA settings are impossible", problems))

    def _problems(self) -> Sequence[str]:
        problems = []
        for where, rank in [("rank", self.rank), *_prefixed("rank_pattern", self.rank_pattern)]:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                problems.append(f"{where} is {rank!r}; it must be a whole number of at least 1")
        for where, alpha in [
            ("alpha", self.alpha),
            *_prefixed("alpha_pattern", self.alpha_pattern),
        ]:
            # far larger ones would leave float32's range once multiplied
            if not isinstance(alpha, (int, float)) or not abs(alpha) <= 1e30:
                problems.append(
                    f"{where} is {alpha!r}; it must be a number of at most 1e30 in size"
                )
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout is {self.dropout!r}; it must lie in [0, 1)")
        for name, allowed in (
            ("scaling", ("alpha/r", "alpha/sqrt(r)")),
            ("bias", get_args(BiasMode)),
            ("init", get_args(Init)),
            ("variant", ("lora", "dora")),
        ):
            if getattr(self, name) not in allowed:
                problems.append(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}"
                )
        if isinstance(self.prefix, bool) or not isinstance(self.prefix, int) or self.prefix < 0:
            problems.append(
                f"prefix is {self.prefix!r}; it must be a whole number of virtual tokens, or 0"
            )
        if not isinstance(self.norms, bool):
            problems.append(f"norms is {self.norms!r}; it must be true or false")
        if not self.targets:
            problems += self._without_targets()
        return problems

    def _without_targets(self) -> list[str]:
        """What is wrong where no weight is adapted by low rank."""
        if self.bias == "lora":
            return ['bias is "lora", but no module is adapted; give bias="all" or "new"']
        if self.bias == "none" and not (self.train_modules or self.norms or self.prefix):
            return [
                "targets is empty, and so are train_modules, bias, norms and prefix; nothing would "
                "be trained"
            ]
        return []

    def scaling_of(self, rank: int, alpha: float) -> float:
        """The factor on B·A: alpha/r, or alpha/√r under rsLoRA."""
        return alpha / math.sqrt(rank) if self.scaling == "alpha/sqrt(r)" else alpha / rank

    def alpha_of(self, rank: int, scaling: float) -> float:
        """The alpha that gives ``scaling`` at ``rank``; the inverse of :meth:`scaling_of`.

        Rounded to nine decimals where that loses nothing, so that 32/3·3 is 32.
        """
        alpha = scaling * (math.sqrt(rank) if self.scaling == "alpha/sqrt(r)" else rank)
        rounded = round(alpha, 9)
        return rounded if self.scaling_of(rank, rounded) == scaling else alpha

    @classmethod
    def from_peft(cls, config: Any) -> LoRASpec:
        """The same settings from a ``peft.LoraConfig`` or its dictionary.

        Raises:
            SpecError: the config uses a PEFT feature that has no counterpart here.
        """
        from lorakit.formats.peft.config import spec_from_config  # the dialect's home

        raw = config if isinstance(config, Mapping) else config.to_dict()
        return spec_from_config(raw)


def _as_tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _as_targets(value: str | Sequence[str]) -> str | tuple[str, ...]:
    if value == "none" or tuple(value) == ("none",):
        return ()
    return value if isinstance(value, str) else tuple(value)


def _prefixed(name: str, pattern: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{name}[{key!r}]", value) for key, value in pattern.items()]
