"""Where an adapter begins if that takes more than the base's weights.

=========== ===============================================================================
init        what is run
=========== ===============================================================================
``eva``     forwards of some training examples; the inputs of every adapted linear are watched
``lora-ga`` forwards and backwards of them; the gradient of every adapted weight is summed up
            from its inputs and its outputs' gradients, for as many weights at a time as fit
            :data:`GRADIENT_BYTES`, each group in a pass of its own
``loftq``   nothing; the base's dense weights are loaded once more, on the CPU
=========== ===============================================================================

The base is never written to, and receives no gradient.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.bases import Base, load_base
from lorakit.bases.stored import packed_weight
from lorakit.core.spec import LoRASpec
from lorakit.data import Example, pack
from lorakit.errors import SpecError, TargetError, collected
from lorakit.infer import PackedModel
from lorakit.infer.mode import evaluating
from lorakit.inits import Factors, InputDirections, eva, loftq, lora_ga, redistributed
from lorakit.layers.handle import Handle
from lorakit.layers.initial import NEEDS, Initial, initial, new_targets, weight_rows
from lorakit.layers.targets import Target

logger = logging.getLogger(__name__)

#: gradients of weights that exist at a time
GRADIENT_BYTES = 1 << 30
#: tokens of one forward
_TOKENS = 2048
#: directions kept of an input that is too wide to keep all, as a multiple of the rank
_KEPT = 4

#: told the input of a linear (and what it gave)
Watch = Callable[[str, Tensor, Tensor], None]


def calibrate(
    base: Base,
    spec: LoRASpec,
    examples: Sequence[Example] = (),
    *,
    seed: int = 0,
    rho: float = 1.0,
    dense: Callable[[], Base] | None = None,
) -> Initial:
    """The values with which a new adapter of this spec begins.

    Args:
        base: what is adapted; no adapters are attached.
        spec: with any initialisation.
        examples: to look at, for ``eva`` and ``lora-ga``; 64 are plenty.
        seed: of what is drawn.
        rho: for ``eva``: up to how many times the rank a site may get, where the directions that
            explain most are. The sum of the ranks stays, and so does every site's scaling; a site
            may be left out. 1 keeps the ranks.
        dense: for ``loftq``: loads the base as it was before it was quantised; by default
            ``base.ref``, on the CPU.

    Returns:
        To be given to ``attach`` or ``Trainer``.

    Raises:
        SpecError, TargetError: settings that don't fit the base, or nothing to look at.
        BaseError: the dense base cannot be loaded.
    """
    if rho != 1.0 and spec.init != "eva":
        raise SpecError(
            f"rho is {rho:g}, but init {spec.init!r} shares no ranks out; only eva does"
        )
    if spec.init not in NEEDS:
        return initial(base.model, spec, seed)
    targeted = new_targets(base.model, spec)
    if spec.init == "loftq":
        return initial(base.model, spec, seed, _lost(base, targeted, spec, dense))
    if not examples:
        raise SpecError(f"init {spec.init!r} needs examples to look at; give some, such as 64")
    runs = (
        _eva(base, targeted, examples, rho)
        if spec.init == "eva"
        else _lora_ga(base, targeted, examples)
    )
    return initial(base.model, spec, seed, runs)


# --- looking at data ---------------------------------------------------------------------------


@contextlib.contextmanager
def _watched(targeted: Sequence[Target], watch: Watch) -> Iterator[None]:
    """Tell of every call of these linears."""

    def hook(path: str) -> Any:
        def told(module: nn.Module, args: Any, output: Tensor) -> None:
            watch(path, args[0], output)

        return told

    hooks = [t.module.register_forward_hook(hook(t.path)) for t in targeted]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _batches(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    part: list[Example] = []
    for example in examples:
        if part and sum(len(e.ids) for e in [*part, example]) > _TOKENS:
            yield part
            part = []
        part.append(example)
    yield part


@contextlib.contextmanager
def _bare(base: Base) -> Iterator[Callable[[Sequence[Example], bool], None]]:
    """Runs examples through the bare base, with a backward if asked; made before any watching.

    Losses are summed, so that all supervised tokens count the same.
    """
    handle = Handle(base.model)
    try:
        packed = PackedModel(base.model, handle, fused=False)  # fused layers call no hooks

        def run(examples: Sequence[Example], backward: bool) -> None:
            for part in _batches(examples):
                with torch.set_grad_enabled(backward):
                    loss, _ = packed.supervised_loss(pack(part), handle.routing(None))
                    if backward:
                        loss.backward()  # type: ignore[no-untyped-call]

        with evaluating(base.model):
            yield run
    finally:
        handle.detach()


def _eva(
    base: Base, targeted: Sequence[Target], examples: Sequence[Example], rho: float
) -> dict[str, Factors]:
    wanted = {t.path: min(int(t.rank * rho), t.shape.max_rank) for t in targeted}
    streams: dict[str, InputDirections] = {}
    #: linears that read the very same tensor share their statistics: q, k and v, say, which are
    #: called one after the other, so that few tensors need to be kept for the comparison
    same: dict[str, str] = {}
    seen: deque[tuple[Tensor, str]] = deque(maxlen=2)

    def watch(path: str, x: Tensor, y: Tensor) -> None:
        if path not in streams and path not in same:
            before = next((p for ref, p in seen if ref is x), None)
            if before is not None:
                same[path] = before
            else:
                keep = max(wanted[path] * _KEPT, 64)
                streams[path] = InputDirections(x.shape[-1], keep)
                seen.append((x, path))
        if path in streams:
            streams[path].update(x)

    with _bare(base) as run, _watched(targeted, watch):
        run(examples, False)
    found, shares, missing = {}, {}, []
    for target in targeted:
        stream = streams.get(same.get(target.path, target.path))
        if stream is None:
            missing.append(target.path)
            continue
        found[target.path], shares[target.path] = stream.leading(wanted[target.path])
    _refuse_uncalled(missing)
    ranks = {t.path: t.rank for t in targeted}
    if rho != 1.0:
        ranks = redistributed(shares, sum(ranks.values()))
        left = [path for path, rank in ranks.items() if not rank]
        if left:
            logger.info("eva left out %d of %d sites: %s", len(left), len(ranks), ", ".join(left))
    return {
        t.path: eva(found[t.path][: ranks[t.path]], t.shape.d_out)
        for t in targeted
        if ranks[t.path]
    }


def _lora_ga(
    base: Base, targeted: Sequence[Target], examples: Sequence[Example]
) -> dict[str, Factors]:
    found: dict[str, Factors] = {}
    with _bare(base) as run:
        for group in _groups(targeted):
            gradients = _gradients(lambda: run(examples, True), group)
            for target in group:
                found[target.path] = lora_ga(gradients.pop(target.path), target.rank)
    return found


def _groups(targeted: Sequence[Target]) -> Iterator[list[Target]]:
    """Neighbours whose gradients fit the memory together."""
    group: list[Target] = []
    size = 0
    for target in targeted:
        own = 4 * target.shape.d_in * target.shape.d_out
        if group and size + own > GRADIENT_BYTES:
            yield group
            group, size = [], 0
        group.append(target)
        size += own
    yield group


def _gradients(run: Callable[[], None], targeted: Sequence[Target]) -> dict[str, Tensor]:
    """Gradient of the summed loss by each weight, [d_out, d_in], float32 or wider."""
    sums: dict[str, Tensor] = {}

    def watch(path: str, x: Tensor, y: Tensor) -> None:
        if not y.requires_grad:  # nothing below it learns
            y.requires_grad_()
        rows = x.detach().reshape(-1, x.shape[-1])

        def add(dy: Tensor) -> None:
            wide = torch.promote_types(dy.dtype, torch.float32)
            gradient = dy.reshape(-1, dy.shape[-1]).to(wide).T @ rows.to(wide)
            if path in sums:
                sums[path] += gradient
            else:
                sums[path] = gradient

        y.register_hook(add)  # type: ignore[no-untyped-call]

    with _watched(targeted, watch):
        run()
    _refuse_uncalled([t.path for t in targeted if t.path not in sums])
    return sums


def _refuse_uncalled(paths: Sequence[str]) -> None:
    if paths:
        raise TargetError(
            collected("The examples never reached these modules; exclude them", paths, limit=5)
        )


# --- what quantising lost ----------------------------------------------------------------------


def _lost(
    base: Base, targeted: Sequence[Target], spec: LoRASpec, dense: Callable[[], Base] | None
) -> Mapping[str, Factors]:
    plain = [t.path for t in targeted if packed_weight(t.module) is None]
    if plain:
        raise TargetError(
            collected(
                "init 'loftq' begins with what quantising lost, and these weights are not "
                "quantised; load the base with quantize='nf4' or another, or take another init",
                plain,
                limit=3,
            )
        )
    logger.info("LoftQ: loading %s once more, without quantisation", base.ref)
    whole = (dense or (lambda: load_base(base.ref, device="cpu")))()
    found = {}
    for target in targeted:
        weight = weight_rows(whole.model.get_submodule(target.path))
        quantised = weight_rows(target.module).to(weight.device)
        scaling = spec.scaling_of(target.rank, target.alpha)
        found[target.path] = loftq(weight, quantised, target.rank, scaling)
    return found
