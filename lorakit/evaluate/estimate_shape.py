"""What a base is made of, as far as memory and time depend on it: widths and counts.

Read off the model on the meta device, so that no weight is loaded.

Legend: ``d`` hidden size, ``q`` features of all query heads, ``kv`` of all key heads, ``f`` width
of the MLP, ``V`` vocabulary, ``r`` rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.core.spec import LoRASpec
from lorakit.errors import BaseError
from lorakit.layers.past import numbers_per_token
from lorakit.layers.targets import norm_modules, output_heads, resolve_targets, whole_modules

#: names of what a fused layer is made of; see ``infer.fused.family``
_FUSED_PARTS = (
    ("self_attn.q_proj", "self_attn.qkv_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.gate_up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class LinearShape:
    """One linear of a block."""

    path: str
    d_in: int
    d_out: int
    layer: int
    """Number of its block, from 0."""


@dataclass(frozen=True)
class ModelShape:
    """A causal language model in numbers."""

    name: str
    num_layers: int
    hidden: int
    """d"""
    query: int
    """q"""
    key_value: int
    """kv"""
    mlp: int
    """f"""
    heads: int
    vocabulary: int
    linears: tuple[LinearShape, ...]
    """Those of the blocks, in order."""
    num_parameters: int
    """All, shared ones once."""
    num_embedding: int
    """Parameters of the input embedding."""
    tied: bool
    """Whether the output head is the input embedding."""
    qk_norm: bool
    four_norms: bool
    plain_reason: str | None
    """Why the layers are expected to run in the plain path; ``None`` if fused."""

    @property
    def num_linear(self) -> int:
        """Parameters that quantisation packs: the weights of the blocks' linears."""
        return sum(one.d_in * one.d_out for one in self.linears)

    @property
    def num_gradient_rows(self) -> int:
        """d_in + d_out, summed over the blocks' linears."""
        return sum(one.d_in + one.d_out for one in self.linears)


@dataclass(frozen=True)
class AdapterShape:
    """What is trained, in numbers."""

    num_parameters: int
    """Trained parameters."""
    ranks: Mapping[str, int]
    """Path of an adapted linear of a block → its rank."""
    plain_reason: str | None = None
    """Why its layers cannot run fused."""
    full: bool = False
    """All weights of the base are trained, and there is no adapter."""

    @property
    def rank(self) -> int:
        """The largest rank; 0 of full fine-tuning."""
        return max(self.ranks.values(), default=0)


def model_shape(model: Any, name: str) -> ModelShape:
    """Read a model on the meta device.

    Raises:
        BaseError: it has no list of blocks, or its config does not tell its widths.
    """
    config = model.config.get_text_config()
    body = getattr(model, "base_model", model)
    blocks = _blocks(body)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not blocks or not heads or not hidden:
        raise BaseError(
            f"{name} ({type(model).__name__}) has no list of blocks with attention heads, so what "
            "training it takes cannot be told beforehand. Run lorakit train --steps 3 and look at "
            "rss_mb in metrics.jsonl"
        )
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    prefix = _path_of(model, blocks)
    linears = _linears(model, prefix)
    first = dict(blocks[0].named_modules())
    widest = max((one.d_out for one in linears if "mlp" in one.path), default=0)
    fused_gate_up = "mlp.gate_up_proj" in first
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    table = getattr(embedding, "weight", None)
    return ModelShape(
        name=name,
        num_layers=len(blocks),
        hidden=hidden,
        query=heads * head_dim,
        key_value=kv,
        mlp=getattr(config, "intermediate_size", None)
        or (widest // 2 if fused_gate_up else widest)
        or 4 * hidden,
        heads=heads,
        vocabulary=config.vocab_size,
        linears=linears,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_embedding=0 if table is None else table.numel(),
        tied=head is not None and getattr(head, "weight", None) is table,
        qk_norm="self_attn.q_norm" in first,
        four_norms="pre_feedforward_layernorm" in first,
        plain_reason=_why_plain(first),
    )


def adapter_shape(model: nn.Module, spec: LoRASpec, shape: ModelShape) -> AdapterShape:
    """What a new adapter of this spec trains.

    Raises:
        TargetError: targets that do not fit the model.
    """
    targets = resolve_targets(model, spec)
    count = 0
    for target in targets:
        A, B = target.shape.a(target.rank), target.shape.b(target.rank)
        count += _product(A) + _product(B)
        count += target.shape.d_out if spec.variant == "dora" else 0
    whole = whole_modules(model, spec.train_modules)
    if spec.norms:
        whole = {**norm_modules(model), **whole}
    count += spec.prefix * numbers_per_token(model) if spec.prefix else 0
    count += sum(p.numel() for module in whole.values() for p in module.parameters())
    adapted = {target.path for target in targets}
    biases = _biases(model, spec, adapted, set(whole))
    new, beside = _new_biases(model, spec, adapted, set(whole))
    in_blocks = {one.path for one in shape.linears}
    reason = None
    if spec.variant == "dora":
        reason = "DoRA's lengths need the plain path"
    elif spec.norms:
        reason = "an adapter trains a norm of the layer, or another part that is no linear"
    elif biases or beside or any(_inside(path, in_blocks) for path in whole):
        reason = "an adapter trains a module or a bias of the layer whole"
    return AdapterShape(
        num_parameters=count + biases + new,
        ranks={target.path: target.rank for target in targets if target.path in in_blocks},
        plain_reason=reason,
    )


def full_shape(shape: ModelShape) -> AdapterShape:
    """Full fine-tuning: every weight is trained."""
    return AdapterShape(
        shape.num_parameters, {}, plain_reason="its own weights are trained", full=True
    )


def _blocks(body: nn.Module) -> list[nn.Module]:
    """The longest list of modules, outermost first."""
    lists = [list(m) for m in body.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return max(lists, key=len, default=[])


def _path_of(model: nn.Module, blocks: Sequence[nn.Module]) -> str:
    path: str = next(path for path, module in model.named_modules() if module is blocks[0])
    return path.rpartition(".")[0] + "."


def _linears(model: nn.Module, prefix: str) -> tuple[LinearShape, ...]:
    heads = set(output_heads(model))
    found = []
    for path, module in model.named_modules():
        if not path.startswith(prefix) or path in heads:
            continue
        if isinstance(module, nn.Linear):
            widths = module.in_features, module.out_features
        elif type(module).__name__ == "Conv1D":
            widths = int(module.weight.shape[0]), int(module.weight.shape[1])
        else:
            continue
        found.append(LinearShape(path, *widths, int(path[len(prefix) :].partition(".")[0])))
    return tuple(found)


def _why_plain(first: Mapping[str, nn.Module]) -> str | None:
    for names in _FUSED_PARTS:
        if not any(name in first for name in names):
            return f"its layers have no {' or '.join(names)}"
    norms = [m for path, m in first.items() if path.endswith("layernorm")]
    if not norms or not all("RMSNorm" in type(m).__name__ for m in norms):
        return "its norms are no RMS norms"
    return None


def _biases(model: nn.Module, spec: LoRASpec, adapted: set[str], whole: set[str]) -> int:
    """Trained numbers of biases that are no part of a module trained whole."""
    if spec.bias == "none":
        return 0
    return sum(
        parameter.numel()
        for path, parameter in model.named_parameters()
        if path.endswith(".bias")
        and (spec.bias in ("all", "new") or path.removesuffix(".bias") in adapted)
        and not _inside(path, whole)
    )


def _new_biases(
    model: nn.Module, spec: LoRASpec, adapted: set[str], whole: set[str]
) -> tuple[int, bool]:
    """Numbers of biases that begin at zero, and whether some stand where no weight is adapted."""
    if spec.bias != "new":
        return 0, False
    inside = whole | set(output_heads(model))
    linears = {
        path: module.out_features
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.bias is None and not _inside(path, inside)
    }
    return sum(linears.values()), bool(linears.keys() - adapted) or spec.variant == "dora"


def _inside(path: str, parents: set[str]) -> bool:
    return any(
        path == one or path.startswith(one + ".") or one.startswith(path + ".") for one in parents
    )


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
