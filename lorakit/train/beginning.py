"""What a run trains, and the values that it begins with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lorakit.bases import Base
from lorakit.core.adapter import Adapter
from lorakit.core.spec import LoRASpec
from lorakit.data import Example, indices_at
from lorakit.errors import SpecError, collected
from lorakit.layers.initial import DRAWN, NEEDS, Initial, initial
from lorakit.layers.past import numbers_per_token
from lorakit.layers.targets import norm_modules, resolve_targets, whole_modules
from lorakit.tasks.task import Examples
from lorakit.train.full import Full
from lorakit.train.settings import TrainSettings

#: training examples that an initialisation looks at, where nobody said how many
INIT_EXAMPLES = 64

#: makes the values that a new adapter begins with, from its spec and some examples
Calibrate = Callable[[LoRASpec, Sequence[Example]], Initial]


class Beginning:
    """A new adapter, one to go on with, or all weights of the base.

    Args:
        what: settings of a new adapter, the values that it begins with, an adapter, or ``Full()``.
        calibrate: for initialisations that look at more than the base's weights.
    """

    def __init__(
        self,
        base: Base,
        what: LoRASpec | Adapter | Initial | Full,
        calibrate: Calibrate | None = None,
    ) -> None:
        self._base = base
        self._calibrate = calibrate
        self._what = what
        self.made: LoRASpec | Adapter | Initial | Full = what
        """What is attached; once :meth:`make` was called, with its values."""

    @property
    def is_full(self) -> bool:
        """Whether all weights of the base are trained."""
        return isinstance(self._what, Full)

    @property
    def continued(self) -> Adapter | None:
        """The adapter that is gone on with, if it is one."""
        return self._what if isinstance(self._what, Adapter) else None

    @property
    def values(self) -> Adapter | None:
        """Of a new adapter whose values come from more than a seed: these, once they are made."""
        return self.made.adapter if isinstance(self.made, Initial) else None

    @property
    def is_base(self) -> bool:
        """Whether the model computes at first what the base does; once the values are made."""
        if isinstance(self.made, Initial):
            return self.made.is_base
        return not isinstance(self._what, Adapter)

    @property
    def spec(self) -> LoRASpec | None:
        """Of a new adapter; ``None`` of one that was there before, and of all weights."""
        if self.values is not None:
            return self.values.spec
        return self._what if isinstance(self._what, LoRASpec) else None

    @property
    def init(self) -> str:
        """How the adapter begins; ``"kaiming"`` where it was there before, or there is none."""
        if isinstance(self._what, Adapter | Full):
            return "kaiming"
        return (self._what.adapter.spec if isinstance(self._what, Initial) else self._what).init

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that a prefix takes in front of each text."""
        if isinstance(self._what, LoRASpec):
            return self._what.prefix
        adapter = self._what.adapter if isinstance(self._what, Initial) else self._what
        return adapter.num_virtual_tokens if isinstance(adapter, Adapter) else 0

    def num_parameters(self) -> int:
        """About how many parameters are trained."""
        model = self._base.model
        if isinstance(self._what, Full):
            return sum(parameter.numel() for parameter in model.parameters())
        if not isinstance(self._what, LoRASpec):
            adapter = self._what.adapter if isinstance(self._what, Initial) else self._what
            sites = adapter.sites.values()
            return sum(t.numel() for site in sites for t in site.tensors().values())
        shapes = [
            shape
            for target in resolve_targets(model, self._what)
            for shape in (target.shape.a(target.rank), target.shape.b(target.rank))
        ]
        shapes += [
            tuple(parameter.shape)
            for path in {
                **whole_modules(model, self._what.train_modules),
                **(norm_modules(model) if self._what.norms else {}),
            }
            for parameter in model.get_submodule(path).parameters()
        ]
        if self._what.prefix:
            shapes.append((self._what.prefix, numbers_per_token(model)))
        return sum(math.prod(shape) for shape in shapes)

    def check(self, settings: TrainSettings) -> None:
        """Refuse settings that the initialisation does not use, and one that lacks its means.

        Raises:
            SpecError: lists them.
        """
        there = not isinstance(self._what, LoRASpec)
        problems = []
        if settings.init_examples is not None and (self.init not in ("eva", "lora-ga") or there):
            problems.append(
                f"init_examples is {settings.init_examples}, but nothing looks at examples here"
            )
        if settings.eva_rho != 1 and (self.init != "eva" or there):
            problems.append(f"eva_rho is {settings.eva_rho:g}, but no ranks are shared out here")
        if self.init in NEEDS and not there and self._calibrate is None:
            problems.append(
                f"init {self.init!r} needs {NEEDS[self.init]}; give calibrate=partial("
                "lorakit.workflows.calibrate.calibrate, base)"
            )
        if problems:
            raise SpecError(collected("This run cannot begin so", problems))

    def make(
        self, settings: TrainSettings, data: Examples, training: np.ndarray
    ) -> LoRASpec | Adapter | Initial | Full:
        """What is attached: the values of the beginning, where more than a seed makes them.

        Args:
            training: which examples of ``data`` are trained on.
        """
        what = self._what
        if isinstance(what, Initial):
            made = what
        elif not isinstance(what, LoRASpec) or (what.init in DRAWN and not what.prefix):
            self.made = what
            return what
        elif what.init not in NEEDS:
            made = initial(self._base.model, what, settings.seed)
        else:
            assert self._calibrate is not None
            made = self._calibrate(what, _looked_at(settings, data, training))
        # in the order in which a file gives them back: it is that of the optimizer's state
        ordered = dict(sorted(made.adapter.sites.items()))
        self.made = Initial(made.adapter.with_(sites=ordered))
        return self.made


def _looked_at(settings: TrainSettings, data: Examples, training: np.ndarray) -> list[Example]:
    """The training examples of the first steps, each once."""
    count = min(settings.init_examples or INIT_EXAMPLES, len(training))
    places = indices_at(len(training), settings.seed, 0, count)
    return [data[int(index)] for index in training[places]]
