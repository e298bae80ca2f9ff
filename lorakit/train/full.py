"""Full fine-tuning: all weights of a base, trained by the loop that trains adapters.

Memory, per parameter: in float32 the weight itself, its gradient, and AdamW's two averages, 16
bytes. The model's parameters become views of one flat buffer, so nothing is there twice. Of a
bfloat16 base the flat buffer is a float32 master copy, which the optimizer moves and of which the
model gets a rounded one (Micikevicius et al., arXiv 1710.03740, section 3.1): steps of the usual
rates are smaller than the last digit of a bfloat16 weight and would be lost. That is 18 bytes. The
gradient is summed in the dtype of the flat buffer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from lorakit.bases import Base
from lorakit.bases.identity import identify
from lorakit.bases.quiet import quiet_transformers
from lorakit.bases.stored import packed_modules
from lorakit.core.files import atomic_folder
from lorakit.errors import BaseError, SpecError, collected
from lorakit.layers.handle import handle_of
from lorakit.layers.targets import matches_pattern
from lorakit.train.settings import EIGHT_BIT, TrainSettings

#: beside a trained model, what it was made of
RECORD = "lorakit_training.json"


@dataclass(frozen=True)
class Full:
    """Train all weights of the base: embeddings, norms and biases too; tied ones once.

    The base object itself is trained. After the run its model has the weights that were kept (the
    best, if there was validation), and its identity is theirs; nothing puts the old ones back, for
    that would need them a second time. Load the base again to go on with it as it was.
    """


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, those that are tied once."""
    return dict(model.named_parameters())


def check_full(base: Base) -> None:
    """Refuse a base whose weights cannot be trained.

    Raises:
        BaseError: says why; all reasons are listed.
    """
    problems = list(_problems(base.model))
    if problems:
        raise BaseError(collected(f"Not all weights of {base.ref} can be trained", problems))


def _problems(model: nn.Module) -> list[str]:
    stored = next((packed.storage for _, _, packed in packed_modules(model)), None)
    if stored is not None:
        return [
            f"its linears are stored as {stored}, which has no gradient. Load it without "
            "--quantize, or train an adapter"
        ]
    found = trainable_parameters(model)
    problems = []
    dtypes = {parameter.dtype for parameter in found.values()}
    if not dtypes <= {torch.float32, torch.bfloat16} and dtypes != {torch.float64}:
        shown = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        problems.append(
            f"its weights are {shown}; float32 and bfloat16 (with a float32 copy that is trained) "
            "are possible. Load it with --dtype bfloat16 or --dtype float32"
        )
    devices = {str(parameter.device) for parameter in found.values()}
    if len(devices) > 1 or "meta" in devices:
        problems.append(f"its weights lie on {', '.join(sorted(devices))}; they must be together")
    places: dict[int, str] = {}
    for name, parameter in found.items():
        if parameter.numel() and parameter.device.type != "meta":
            first = places.setdefault(parameter.data_ptr(), name)
            if first != name:
                problems.append(
                    f"{name} and {first} share memory and are not one parameter; tie them "
                    "(model.tie_weights()), or give each its own"
                )
    if handle_of(model) is not None:
        problems.append("adapters are attached to it; detach them first")
    if not hasattr(model, "save_pretrained"):
        problems.append(f"{type(model).__name__} cannot be saved; give a transformers model")
    return problems


class TrainedBase:
    """All weights of a model, as one flat buffer; see the module's docstring.

    Args:
        model: of one device; float32, float64, or bfloat16.
    """

    name = None
    dropout = 0.0
    adapted: tuple[str, ...] = ()
    is_small = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wanted = {name: p.requires_grad for name, p in trainable_parameters(model).items()}
        self._hooks: list[Any] = []
        self._gradient: Tensor | None = None
        self._has_one: set[nn.Parameter] = set()

    @property
    def flat(self) -> nn.Parameter:
        return self._flat

    @torch.no_grad()
    def arrange(self, settings: TrainSettings) -> dict[float, tuple[int, int]]:
        parameters = trainable_parameters(self._model)
        groups: dict[float, list[nn.Parameter]] = {}
        factor = full_rate_factors(list(parameters), settings)
        for name, parameter in parameters.items():
            groups.setdefault(factor(name), []).append(parameter)
        self._parameters = [p for group in groups.values() for p in group]
        self._make_flat()
        for parameter in self._parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._add
            )
            self._hooks.append(hook)
        stretches, begin = {}, 0
        for one, group in groups.items():
            end = begin + sum(p.numel() for p in group)
            stretches[one] = (begin, end)
            begin = end
        return stretches

    def _make_flat(self) -> None:
        first = self._parameters[0]
        double = all(p.dtype == torch.float64 for p in self._parameters)
        dtype = torch.float64 if double else torch.float32
        #: whether the model uses the buffer itself
        self._shared = all(p.dtype == dtype for p in self._parameters)
        size = sum(p.numel() for p in self._parameters)
        flat = torch.empty(size, dtype=dtype, device=first.device)
        self._spans: dict[nn.Parameter, tuple[int, int]] = {}
        offset = 0
        for parameter in self._parameters:
            span = (offset, offset + parameter.numel())
            view = flat[slice(*span)].view(parameter.shape)
            view.copy_(parameter)
            if self._shared:
                parameter.data = view  # the old memory is free from here on
            self._spans[parameter] = span
            offset = span[1]
        self._flat = nn.Parameter(flat)
        self._buffer()  # here, so that whoever measures a forward does not count it

    def _buffer(self) -> Tensor:
        if self._gradient is None:
            self._gradient = torch.empty_like(self._flat.detach())
            self._gradient.zero_()  # it takes its memory now and not page by page
        return self._gradient

    @torch.no_grad()
    def _add(self, parameter: Tensor) -> None:
        """A backward has left a gradient at a parameter; it goes where all are together."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        mine = self._buffer()[slice(*self._spans[parameter])].view(parameter.shape)
        if parameter in self._has_one:
            mine.add_(parameter.grad)
        else:
            mine.copy_(parameter.grad)
            self._has_one.add(parameter)
        parameter.grad = None

    def gradient(self) -> Tensor:
        buffer = self._buffer()
        for parameter, span in self._spans.items():
            if parameter not in self._has_one:
                buffer[slice(*span)].zero_()
        self._has_one = set(self._spans)
        return buffer

    def clear(self) -> None:
        self._has_one = set()

    @torch.no_grad()
    def moved(self) -> None:
        if self._shared:
            return
        flat = self._flat.detach()
        for parameter, span in self._spans.items():
            parameter.copy_(flat[slice(*span)].view(parameter.shape))

    def release(self) -> None:
        self.clear()
        self._gradient = None

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name, parameter in trainable_parameters(self._model).items():
            parameter.requires_grad_(self._wanted[name])
            parameter.grad = None
        self.release()

    def snapshot(self) -> None:
        return None


def full_rate_factors(names: list[str], settings: TrainSettings) -> Callable[[str], float]:
    """The factor on the learning rate of a parameter, by its name.

    Raises:
        SpecError: a pattern that ends no path, or a ratio of an adapter's factors.
    """

    def path(name: str) -> str:
        return name.rpartition(".")[0]

    problems = [
        f"lr_pattern {pattern!r} matches no module with weights"
        for pattern in settings.lr_pattern
        if not any(matches_pattern(pattern, path(name)) for name in names)
    ]
    if settings.lora_plus_ratio != 1:
        problems.append("lora_plus_ratio needs an adapter's B, and all weights are trained")
    if problems:
        raise SpecError(collected("These learning rates cannot act", problems))

    def factor(name: str) -> float:
        return next(
            (f for one, f in settings.lr_pattern.items() if matches_pattern(one, path(name))), 1.0
        )

    return factor


# --- what is said, and what is written ----------------------------------------------------------


def full_notes(base: Base, out: Path, settings: TrainSettings) -> list[str]:
    """What the user should know before the first step."""
    parameters = trainable_parameters(base.model).values()
    count = sum(p.numel() for p in parameters)
    notes = [f"all {count:,} weights are trained, embeddings and norms too; tied ones once"]
    if any(p.dtype == torch.bfloat16 for p in parameters):
        notes[0] += "; a float32 copy is moved and the model's bfloat16 ones are that, rounded"
    dropping = sum(isinstance(m, nn.Dropout) and m.p > 0 for m in base.model.modules())
    if dropping:
        notes.append(f"the base's own dropout ({dropping} modules) is off, as for an adapter")
    return [*notes, _disk_note(base, out, settings)]


def _disk_note(base: Base, out: Path, settings: TrainSettings) -> str:
    """How much the run folder will take, at most."""
    parameters = list(trainable_parameters(base.model).values())
    model = sum(p.numel() * p.element_size() for p in parameters)
    width = max(4, *(p.element_size() for p in parameters))
    flat = sum(p.numel() for p in parameters) * width
    averages = {"sgd": 0.0, **dict.fromkeys(EIGHT_BIT, 0.51)}.get(settings.optimizer, 2.0)
    each, keep = int(flat * (1 + averages)), settings.keep_checkpoints or 1
    usual = keep * each + flat + model
    # one more checkpoint is written before an old one goes; the best of each, and the latest
    most = (keep + 1) * each + (keep + 1) * flat + model
    above = next((p for p in [out, *out.absolute().parents] if p.exists()), Path("/"))
    free = shutil.disk_usage(above).free
    text = (
        f"on the disk: {_size(each)} a checkpoint (of which {keep} kept), {_size(flat)} the best "
        f"weights, {_size(model)} the model; {_size(usual)} in all, {_size(most)} for moments"
    )
    if free < most:
        text += f". Only {_size(free)} are free there, which is too little"
    return text


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def save_model(base: Base, folder: Path, history: Mapping[str, Any]) -> None:
    """Write the model as transformers does: config, tokenizer, weights (in parts if large).

    The folder is there whole or as it was.

    Args:
        history: JSON data about its making.

    Raises:
        TrainingError: the disk is full.
        InputError: the folder cannot be written to.
    """
    model: Any = base.model
    with atomic_folder(folder) as temporary, quiet_transformers():
        model.save_pretrained(temporary, state_dict=_each_alone(model.state_dict()))
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(temporary)
        record = json.dumps(history, indent=2, ensure_ascii=False) + "\n"
        (temporary / RECORD).write_text(record, encoding="utf-8")


def _each_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same memory as tensors that each begin it, for transformers takes views of one buffer
    for tied weights and copies them all. Those that are tied stay so."""
    return {
        name: from_dlpack(tensor.detach()) if tensor.device.type in ("cpu", "cuda") else tensor
        for name, tensor in tensors.items()
    }


def reidentify(base: Base) -> None:
    """Give a base whose weights have changed the identity that they have now."""
    before = base.identity
    base.identity = identify(base.model, before.name, revision=before.revision)
