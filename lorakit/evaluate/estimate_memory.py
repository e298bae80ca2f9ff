"""Peak memory of a training step, by component, from shapes alone.

Two moments can be the peak: the start of the backward, when everything is kept that the layers
need and one layer's intermediates stand beside it; and the optimizer's step, when the gradient is
put together in one piece.

What a layer keeps for its backward, in numbers per token (``infer/fused/layer.py``):

=============== ==================================================
x, x₂           2 d
q, k, v         q + 2 kv, as the attention reads them
normed heads    q + kv more, as they were before their norms
attention       2 q: each segment's output, and all of them joined; of short examples on a CPU,
                which are computed together, q and their probabilities, all with padding
gate, up        2 f; not with ``recompute="mlp"``
A x             r of each adapted linear
four norms      2 d more: what came before the norms behind
=============== ==================================================

With ``recompute="layers"`` it is x alone. In the plain path autograd keeps more; see
:func:`_plain_kept`.

Legend: as in ``evaluate.estimate_shape``; ``N`` tokens and ``S`` supervised positions of one
forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorakit.evaluate.estimate_shape import AdapterShape, ModelShape
from lorakit.infer.chunked_loss import chunk_rows, stretches
from lorakit.infer.fused.attention import go_together

Recompute = Literal["none", "mlp", "layers", "offload"]

#: bytes of a packed weight: NF4's 4 bits and, for 64 of them, one byte of scale that has a float32
#: scale of its own for every 256; int8's byte (its float32 per output is added); torchao's 4 bits
#: (a scale and a zero for 64 of them, in the dtype of the computation, are added)
_PACKED_BYTES = {
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
    "int8": 1.0,
    "int8-torchao": 1.0,
    "int4-torchao": 0.5,
    "bf16": 2.0,
}
#: bytes of what an optimizer keeps of each parameter; of eight bits, with a scale for every 256
_STATE_BYTES = {
    "adamw": 8.0,
    "adamw8bit": 2 * (1 + 4 / 256),
    "paged-adamw8bit": 2 * (1 + 4 / 256),
    "sgd": 0.0,
}

#: share of what comes and goes in a step that the allocator holds without use: blocks freed in
#: another order than they were taken leave gaps
ALLOCATOR_SHARE = {"cpu": 0.08, "cuda": 0.08}
#: what CUDA's context, its kernels and the libraries' workspaces take
CUDA_CONTEXT = 600 << 20


@dataclass(frozen=True)
class Part:
    """One forward: what goes through the model together."""

    tokens: int
    """N"""
    supervised: int
    """S"""
    squares: int = 0
    """Sum of the squared lengths of its examples, for the attention."""
    examples: int = 1
    longest: int = 0
    """Tokens of the longest of them; 0: as long as examples that are not computed together."""


@dataclass(frozen=True)
class Setting:
    """How it is trained, as far as memory and time depend on it."""

    itemsize: int = 4
    """Bytes of a number of the hidden states: 4 in float32, 2 in bfloat16."""
    device: str = "cpu"
    quantize: str | None = None
    recompute: Recompute = "none"
    optimizer: str = "adamw"
    program: int = 0
    """Bytes of the process before it loads anything: libraries, the data."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by component; they sum to :attr:`total`."""

    program: int
    """Python, the libraries and the data; on a GPU its context."""
    weights: int
    adapter: int
    """Trained tensors beside the base: an adapter; or the float32 copy of all its weights, where
    these are narrower."""
    gradients: int
    optimizer: int
    activations: int
    """What the layers keep for the backward, at the peak."""
    loss: int
    """Logits of a chunk, hidden states at supervised positions and their gradients."""
    workspace: int
    """Intermediates of one layer's backward or of a step, and the allocator's gaps."""
    file: int
    """Pages of the weights' file that were read while weights were packed. They count as the
    process's and stay, but the system takes them back where memory is short."""
    when: Literal["backward", "optimizer step"]
    """At which moment the peak is."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.components().values())

    @property
    def needed(self) -> int:
        """The same without pages that the system can take back: what has to fit."""
        return self.total - self.file

    def components(self) -> dict[str, int]:
        """Name → bytes."""
        names = (
            "program", "weights", "adapter", "gradients", "optimizer", "activations", "loss",
            "workspace", "file",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def peak_memory(model: ModelShape, adapter: AdapterShape, setting: Setting, part: Part) -> Memory:
    """The peak of a run whose largest forward is ``part``."""
    fixed = _fixed(model, adapter, setting)
    share = ALLOCATOR_SHARE.get(setting.device, ALLOCATOR_SHARE["cuda"])
    kept = kept_bytes(model, adapter, setting, part)
    loss, transient = _loss(model, adapter, setting, part), _layer(model, adapter, setting, part)
    # logits are gone when the layers' backward begins; a CPU's allocator holds their pages still
    beside = transient if setting.device == "cpu" else max(transient - loss, 0)
    slack = int(share * (kept + loss + beside))
    backward = {**fixed, "activations": kept, "loss": loss, "workspace": beside + slack}
    stepping = {**fixed, "activations": 0, "loss": 0, "workspace": _step(adapter, setting)}
    moments: dict[Literal["backward", "optimizer step"], dict[str, int]] = {
        "backward": backward,
        "optimizer step": stepping,
    }
    when = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(when=when, **moments[when])


def _fixed(model: ModelShape, adapter: AdapterShape, setting: Setting) -> dict[str, int]:
    """What is there in every step."""
    trained = adapter.num_parameters
    width = 4  # what is trained is float32: an adapter, or a copy of narrower weights
    if adapter.full:
        width = max(width, setting.itemsize)
    state = _STATE_BYTES[setting.optimizer] * (width / 4)
    context = CUDA_CONTEXT if setting.device != "cpu" else setting.program
    return {
        "program": context,
        "weights": weight_bytes(model, setting),
        "file": _file_bytes(model, setting),
        "adapter": 0 if adapter.full and setting.itemsize >= width else trained * width,
        "gradients": trained * width,
        "optimizer": int(trained * state),
    }


def weight_bytes(model: ModelShape, setting: Setting) -> int:
    """The base as it is stored."""
    if setting.quantize is None:
        return model.num_parameters * setting.itemsize
    packed = model.num_linear * _PACKED_BYTES[setting.quantize]
    if setting.quantize in ("int8", "int8-torchao"):
        packed += 4 * sum(one.d_out for one in model.linears)
    elif setting.quantize == "int4-torchao":
        packed += model.num_linear * 2 * setting.itemsize / 64
    return int(packed) + (model.num_parameters - model.num_linear) * setting.itemsize


def kept_bytes(model: ModelShape, adapter: AdapterShape, setting: Setting, part: Part) -> int:
    """What all layers keep for the backward of one forward."""
    N, size = part.tokens, setting.itemsize
    if setting.recompute == "offload" and setting.device != "cpu":
        return model.hidden * N * size
    if setting.recompute in ("layers", "offload"):
        return model.num_layers * model.hidden * N * size
    if plain_reason(model, adapter) is not None:
        each = _plain_kept(model, adapter)
        if setting.recompute != "none":  # the plain path knows all or nothing
            each = model.hidden
        return model.num_layers * each * N * size + _scores(model, part)
    behind_attention, rest = _fused_kept(model, adapter, setting, part)
    # behind the last layer's attention only the supervised positions go on
    per_layer = (behind_attention + rest) * N * size
    last = (rest * N + behind_attention * part.supervised) * size
    return (model.num_layers - 1) * per_layer + last + _scores(model, part)


def plain_reason(model: ModelShape, adapter: AdapterShape) -> str | None:
    """Why the layers run in the plain path; ``None`` if they run fused."""
    return model.plain_reason or adapter.plain_reason


def _fused_kept(
    model: ModelShape, adapter: AdapterShape, setting: Setting, part: Part
) -> tuple[int, int]:
    """Numbers per token of one layer: behind the attention, and up to it."""
    d, q, kv, f = model.hidden, model.query, model.key_value, model.mlp
    wide = _precise(setting)
    hidden = _ranks_per_layer(model, adapter) * wide
    heads, beside = q + 2 * kv, q
    of_each = q // model.heads
    if setting.device == "cpu" and go_together(part.tokens, part.examples, part.longest, of_each):
        padded = part.examples * part.longest / part.tokens
        heads, beside = int(padded * heads), int(padded * part.longest * model.heads)
    rest = d + wide * (heads + q + beside) + hidden // 2
    rest += q if wide > 1 else 0  # the attention once more, as the linear behind it reads it
    rest += q + kv if model.qk_norm else 0
    behind = d + 2 * f + hidden - hidden // 2
    behind -= 2 * f if setting.recompute == "mlp" else 0
    behind += 2 * d if model.four_norms else 0
    return behind, rest


def _precise(setting: Setting) -> int:
    """How many times the base's precision is that of adapters and attention in fused layers."""
    return 2 if setting.device == "cpu" and setting.itemsize == 2 else 1


def _plain_kept(model: ModelShape, adapter: AdapterShape) -> int:
    """Numbers per token that autograd keeps of one layer of transformers.

    Both norms' inputs and outputs, q, k and v rotated, the attention's output twice, the gate
    before and behind its function, up, and their product; where weights are trained, also the
    normalised input of each norm.
    """
    d, q, kv, f = model.hidden, model.query, model.key_value, model.mlp
    kept = 4 * d + 3 * q + 2 * kv + 4 * f + _ranks_per_layer(model, adapter)
    kept += q + kv if model.qk_norm else 0
    kept += 2 * d if model.four_norms else 0
    if adapter.full:
        kept += 2 * d + (q + kv if model.qk_norm else 0)
    return kept


def _ranks_per_layer(model: ModelShape, adapter: AdapterShape) -> int:
    return sum(adapter.ranks.values()) // model.num_layers


def _scores(model: ModelShape, part: Part) -> int:
    """The attention's log-sum-exp, float32, one for each head and token."""
    return model.num_layers * model.heads * part.tokens * 4


def _loss(model: ModelShape, adapter: AdapterShape, setting: Setting, part: Part) -> int:
    """Of the loss: logits and their probabilities, the states at supervised positions."""
    rows = loss_rows(model, setting, part.supervised)
    logits = rows * model.vocabulary * (setting.itemsize + 4)
    logits += rows * model.vocabulary * setting.itemsize if setting.itemsize != 4 else 0
    states = 2 * part.supervised * model.hidden * setting.itemsize
    head = 0
    if adapter.full:  # the head's gradient so far, and that of a chunk
        head = 2 * model.vocabulary * model.hidden * setting.itemsize
    return logits + states + head


def loss_rows(model: ModelShape, setting: Setting, supervised: int) -> int:
    """Positions whose logits exist together."""
    rows: int = stretches(supervised, chunk_rows(model.vocabulary, setting.device))[0].stop
    return rows


def _layer(model: ModelShape, adapter: AdapterShape, setting: Setting, part: Part) -> int:
    """Intermediates of the backward of one layer."""
    d, f = model.hidden, model.mlp
    numbers = 3 * f + 5 * d
    if plain_reason(model, adapter) is not None:
        numbers = 3 * f + 6 * d
    if setting.recompute == "mlp":
        numbers += 2 * f + d
    elif setting.recompute in ("layers", "offload"):
        if plain_reason(model, adapter) is not None:
            numbers += _plain_kept(model, adapter)
        else:
            numbers += sum(_fused_kept(model, adapter, Setting(recompute="none"), part))
    dense = 0
    if setting.quantize is not None:  # unpacked for the moment, with a copy on the way
        dense = 2 * max(one.d_in * one.d_out for one in model.linears) * setting.itemsize
    precise = 1 if plain_reason(model, adapter) is not None else _precise(setting)
    return numbers * part.tokens * setting.itemsize * precise + dense


def _step(adapter: AdapterShape, setting: Setting) -> int:
    """The gradient in one piece; with averages of 8 bits, what a step is taken back with."""
    if adapter.full:
        return 0
    each = 4.0
    if "8bit" in setting.optimizer:
        each += 4 + _STATE_BYTES[setting.optimizer]
    return int(adapter.num_parameters * each)


def _file_bytes(model: ModelShape, setting: Setting) -> int:
    """What was read of the file to be packed, as long as other weights are used where they lie."""
    if setting.quantize is None or setting.device != "cpu":
        return 0
    return model.num_linear * setting.itemsize


def describe(memory: Memory) -> Mapping[str, float]:
    """The components in MiB, for people and JSON."""
    return {name: value / 2**20 for name, value in memory.components().items()}
