"""Seconds of a training step, from shapes and a device's rates.

    products of the base     2 · N · d_in · d_out forward, as much for the input's gradient
    products of adapters     6 · N · r · (d_in + d_out)
    head and loss            4 · S · d · V, and the softmax
    elementwise              passes over activations, counted in ``infer/fused/layer.py``
    attention                7 · q · Σ n² over the examples
    optimizer                AdamW, the gradient's norm and clipping; of all weights, new gradients
    operations               a fixed cost for starting each

Legend: as in ``evaluate.estimate_memory``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.evaluate.estimate_machine import Rates, attention_operations
from lorakit.evaluate.estimate_memory import Part, Setting, loss_rows, plain_reason
from lorakit.evaluate.estimate_shape import AdapterShape, ModelShape

#: passes over the numbers of a layer, forward and backward together, in units of (d, f, q):
#: norms, positions, the gate, residuals, copies
_PASSES_FUSED = (44, 20, 14)
_PASSES_PLAIN = (58, 32, 26)
#: of which the forward alone
_FORWARD_SHARE = 0.3
#: products inside of a model share the caches with what is between them
_INSIDE = 1.06
#: operations started in a layer, forward and backward together
_OPERATIONS_FUSED, _OPERATIONS_PLAIN = 260, 420


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to."""

    products: float
    """Of the base's linears."""
    adapter: float
    """Of the adapter's factors."""
    head: float
    """The output head and the loss."""
    elementwise: float
    attention: float
    unpacking: float
    """A quantised base's weights, made dense for each use."""
    optimizer: float
    starting: float
    """Of operations, whatever they do."""

    @property
    def total(self) -> float:
        """Seconds."""
        return float(sum(dataclasses.asdict(self).values()))


def step_time(
    model: ModelShape,
    adapter: AdapterShape,
    setting: Setting,
    parts: Sequence[Part],
    rates: Rates,
) -> StepTime:
    """One optimizer step that goes through in these forwards."""
    found = [_forward_and_backward(model, adapter, setting, part, rates) for part in parts]
    sums = {
        field.name: sum(getattr(one, field.name) for one in found)
        for field in dataclasses.fields(StepTime)
    }
    sums["optimizer"] = _optimizer(adapter, rates)
    return StepTime(**sums)


def _forward_and_backward(
    model: ModelShape, adapter: AdapterShape, setting: Setting, part: Part, rates: Rates
) -> StepTime:
    plain = plain_reason(model, adapter) is not None
    again = {"none": 0.0, "mlp": 0.0, "layers": 1.0, "offload": 1.0}[setting.recompute]
    if plain and setting.recompute != "none":
        again = 1.0
    d, f, q = _PASSES_PLAIN if plain else _PASSES_FUSED
    passes = (d * model.hidden + f * model.mlp + q * model.query) * (1 + again * _FORWARD_SHARE)
    moved = model.num_layers * passes * part.tokens * setting.itemsize
    each = _OPERATIONS_PLAIN if plain else _OPERATIONS_FUSED
    operations = model.num_layers * each * (1 + again * _FORWARD_SHARE)
    squares = part.squares or part.tokens**2 / max(part.examples, 1)
    attention = model.num_layers * attention_operations(model.query, int(squares))
    return StepTime(
        products=_INSIDE * _products(model, adapter, setting, part, rates, again, plain=plain),
        adapter=_INSIDE * _adapter(model, adapter, part, rates, again),
        head=_INSIDE * _head(model, adapter, setting, part, rates),
        elementwise=moved / rates.elementwise,
        attention=attention * (1 + again * 2 / 7) / rates.attention,
        unpacking=_unpacking(model, setting, again, rates),
        optimizer=0.0,
        starting=operations * rates.overhead,
    )


def _products(
    model: ModelShape,
    adapter: AdapterShape,
    setting: Setting,
    part: Part,
    rates: Rates,
    again: float,
    *,
    plain: bool,
) -> float:
    seconds = 0.0
    last = model.num_layers - 1
    trained = [one.layer for one in model.linears if one.path in adapter.ranks]
    lowest = 0 if adapter.full else min(trained, default=model.num_layers)
    for one in model.linears:
        rows = part.tokens
        if one.layer == last and not plain and not _reads_all_tokens(one.path):
            rows = part.supervised
        times = 1.0 + again  # the forward
        if setting.recompute == "mlp" and not plain and _is_gate_or_up(one.path):
            times += 1
        if one.layer > lowest or (one.layer == lowest and not _reads_all_tokens(one.path)):
            times += 1  # the input's gradient
        times += 1 if adapter.full else 0  # the weight's
        width = (one.d_in * one.d_out) ** 0.5
        seconds += times * 2 * rows * one.d_in * one.d_out / rates.gemm_rate(rows, width)
    return seconds


def _reads_all_tokens(path: str) -> bool:
    """Whether a linear stands before the attention."""
    return path.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn")


def _is_gate_or_up(path: str) -> bool:
    return path.rpartition(".")[2] in ("gate_proj", "up_proj", "gate_up_proj")


def _adapter(
    model: ModelShape, adapter: AdapterShape, part: Part, rates: Rates, again: float
) -> float:
    seconds = 0.0
    for one in model.linears:
        rank = adapter.ranks.get(one.path, 0)
        operations = (6 + 2 * again) * part.tokens * rank * (one.d_in + one.d_out)
        seconds += operations / rates.thin_rate(rank)
    return seconds


def _head(
    model: ModelShape, adapter: AdapterShape, setting: Setting, part: Part, rates: Rates
) -> float:
    rows = max(1, loss_rows(model, setting, part.supervised))
    times = 3 if adapter.full else 2
    operations = times * 2 * part.supervised * model.hidden * model.vocabulary
    softmax = part.supervised * model.vocabulary / rates.softmax
    sums = 0.0
    if adapter.full:  # each chunk makes a gradient of the head's weights, and adds it
        weights = model.hidden * model.vocabulary * setting.itemsize
        sums = -(-part.supervised // rows) * (
            weights / rates.fresh + 3 * weights / rates.elementwise
        )
    return operations / rates.gemm_rate(rows, 2048) + softmax + sums


def _unpacking(model: ModelShape, setting: Setting, again: float, rates: Rates) -> float:
    if setting.quantize is None:
        return 0.0
    uses = 2 + again + (0.5 if setting.recompute == "mlp" else 0.0)
    # int8: read a byte, write and scale a float; bf16: read two bytes, write four
    by_elementwise = {"int8": 16, "int8-torchao": 16, "bf16": 6}
    known = by_elementwise.get(setting.quantize)
    rate = rates.unpack if known is None else rates.elementwise / known
    return uses * model.num_linear / rate


def _optimizer(adapter: AdapterShape, rates: Rates) -> float:
    bytes_ = 4 * adapter.num_parameters
    seconds = adapter.num_parameters / rates.optimizer
    seconds += 3 * bytes_ / rates.elementwise  # the norm, and clipping by it
    if adapter.full:  # a gradient is new every time, and copied to where all are together
        seconds += bytes_ / rates.fresh + 3 * bytes_ / rates.elementwise
    return seconds
