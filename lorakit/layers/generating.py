"""``generate`` captures its routing at the start and knows its beams."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lorakit.layers.forwards import Forwards


class CapturingGenerate:
    """Stands in a model's ``__dict__`` as ``generate`` while adapters are attached.

    A streaming ``generate`` runs in its own thread and may outlive the ``with`` block in which
    it began; every forward of it uses the routing that held at its start. Beams and returned
    sequences multiply the rows, which is declared here.
    """

    def __init__(self, model: Any, forwards: Forwards) -> None:
        self.model = model
        self.forwards = forwards
        self.previous = model.__dict__.get("generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.forwards.held(self._expansion(args, kwargs)):
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            return type(self.model).generate(self.model, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(self.previous or type(self.model).generate)
        return own if self.previous else own.replace(parameters=list(own.parameters.values())[1:])

    def _expansion(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """As transformers' generate: the larger of beams and returned sequences."""
        given = self.__signature__.bind_partial(*args, **kwargs).arguments
        config = given.get("generation_config") or getattr(self.model, "generation_config", None)
        sizes = [
            kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)
            for name in ("num_beams", "num_return_sequences")
        ]
        return max(int(size or 1) for size in sizes)

    @classmethod
    def install(cls, model: nn.Module, forwards: Forwards) -> None:
        """Override ``generate``, where the model has one."""
        if callable(getattr(model, "generate", None)):
            model.__dict__["generate"] = cls(model, forwards)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Undo :meth:`install`."""
        own = model.__dict__.get("generate")
        if isinstance(own, cls):
            if own.previous is None:
                del model.__dict__["generate"]
            else:
                model.__dict__["generate"] = own.previous
