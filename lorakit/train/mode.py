"""How a frozen model stands while adapters on it train: its dropout, its gradient checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def own_checkpointing_kept(model: nn.Module) -> Iterator[None]:
    """After the block the modules' gradient checkpointing is as it was before."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (module, {name: module.__dict__[name] for name in names if name in module.__dict__})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, had in before:
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(had)


@contextlib.contextmanager
def training_mode(model: nn.Module, adapted: Sequence[str]) -> Iterator[None]:
    """Training mode for the adapted modules alone, evaluation mode for all others.

    The base is frozen, so its own dropout and batch statistics would be noise that depends on
    how a batch is cut; the adapters' dropout is keyed and is not. Layers whose gradient
    checkpointing is on count as training, without which it would not act, except while they run.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        for path in dict.fromkeys(adapted):
            model.get_submodule(path).training = True
        with contextlib.ExitStack() as stack:
            for module in _checkpointing(model):
                stack.enter_context(_recomputed(module))
            yield
    finally:
        for module, mode in before:
            module.training = mode


def _checkpointing(model: nn.Module) -> list[nn.Module]:
    """The innermost modules whose gradient checkpointing is on; those around them only say so."""
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    return [m for m in on if sum(inner in on for inner in m.modules()) == 1]


@contextlib.contextmanager
def _recomputed(module: Any) -> Iterator[None]:
    """Let a module's gradient checkpointing act, while its own dropout stays off."""
    module.training = True
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if checkpoint is None:  # it has a way of its own
        yield
        return

    def quiet(run: Callable[..., Any], *inputs: Any) -> Any:
        mode, module.training = module.training, False
        try:
            return run(*inputs)
        finally:
            module.training = mode

    def quietly(run: Callable[..., Any], *inputs: Any) -> Any:
        inputs = tuple(map(_with_gradient, inputs))
        return checkpoint(partial(quiet, run), *inputs)

    module._gradient_checkpointing_func = quietly
    try:
        yield
    finally:
        module._gradient_checkpointing_func = checkpoint


def _with_gradient(value: Any) -> Any:
    """An input of a reentrant checkpoint, which gives no gradient at all where none needs one."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value
