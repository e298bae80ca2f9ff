"""Prefixes: trained keys and values that a row's tokens see in front of their text.

A prefix belongs to an adapter and follows the routing as everything else does: in one batch some
rows have this one, some another, some none. It never enters the cache of the generation, so beams,
padding and rows that come and go need nothing of their own. Two things make it act:

- :class:`PrefixForward` stands in an attention module's ``__dict__`` as ``forward``. While that
  forward runs, the module's config names our attention function, which puts the keys and values of
  each row's adapter in front of those that the model has computed, and widens the mask.
- The text begins at position ``n``, behind the ``n`` virtual tokens, as in the authors' code and in
  PEFT. :meth:`Prefixes.shift` does that at the root's forward; who calls parts of a model calls
  :meth:`Prefixes.shifted`.

An attention function of our own that knows its rows better (``infer.segments``) is left in place
and asks :func:`stretches` itself.

Legend: ``B`` rows, ``T`` queries, ``S`` keys, ``n`` virtual tokens, ``H_kv`` key heads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import RoutingError, SpecError
from lorakit.layers.attention import product
from lorakit.layers.bank import Bank
from lorakit.layers.forwards import Forwards
from lorakit.layers.routing import Plan, Routing

#: the name under which the attention function is registered with transformers
NAME = "lorakit_prefix"

#: attention functions that call :func:`stretches`, by the names that configs hold
ASKING: set[str] = set()

_names: dict[type[nn.Module], list[str]] = {}
#: id of an attention module → what stands in front of its rows in the call that runs
_acting: dict[int, Front] = {}


class PrefixParameters:
    """A prefix as an attention module uses it; its tensors are looked up in a bank at each use.

    Args:
        bank: of the adapter.
        path: of the site in it.
    """

    __slots__ = ("_bank", "_path")

    def __init__(self, bank: Bank, path: str) -> None:
        self._bank, self._path = bank, path

    @property
    def key(self) -> nn.Parameter:
        """[n, H_kv, d]"""
        return self._bank.get(f"{self._path}.prefix_key")

    @property
    def value(self) -> nn.Parameter:
        """[n, H_kv, d]"""
        return self._bank.get(f"{self._path}.prefix_value")

    @property
    def length(self) -> int:
        return int(self.key.shape[0])


@dataclass(frozen=True, eq=False)
class Front:
    """What stands in front of each row of a batch."""

    key: Tensor
    """[B, H_kv, n, d]; rows with a shorter prefix, or none, are padded with zeros."""
    value: Tensor
    seen: Tensor | None
    """bool [B, 1, 1, n], which of it is real; ``None`` if all."""


class Prefixes:
    """All prefixes on one model.

    Args:
        forwards: of the model's handle.
    """

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards
        self.lengths: dict[str, int] = {}
        """Adapter → its virtual tokens, of those that have a prefix."""

    def by_mix(self, routing: Routing) -> list[str | None]:
        """The adapter whose prefix each of the routing's mixes has.

        Raises:
            SpecError: a mix would blend prefixes, or give one a weight.
        """
        return [self._of(dict(mix)) for mix in routing.mixes]

    def _of(self, mix: Mapping[str, float]) -> str | None:
        mine = [name for name in mix if name in self.lengths]
        if len(mine) > 1:
            raise SpecError(
                f"adapters {', '.join(map(repr, mine))} each have a prefix, and a row has one: "
                "which would come first is not defined. Use one of them, with others that have none"
            )
        if mine and mix[mine[0]] != 1.0:
            raise SpecError(
                f"adapter {mine[0]!r} has a prefix, which a row sees or does not; at weight "
                f"{mix[mine[0]]:g} it is not defined. Use it at weight 1"
            )
        return mine[0] if mine else None

    def longest(self, routing: Routing) -> int:
        """Virtual tokens of the longest prefix that a routing uses."""
        names = self.by_mix(routing) if self.lengths else ()
        return max((self.lengths[name] for name in names if name is not None), default=0)

    # --- positions -------------------------------------------------------------------------

    def shifted(self, positions: Tensor) -> Tensor:
        """Positions [B, T] behind the prefixes of the forward that runs."""
        offsets = self._offsets(self.forwards.plan(), positions.shape)
        return positions if offsets is None else positions + offsets.to(positions.device)

    def _offsets(self, plan: Plan, shape: Sequence[int]) -> Tensor | None:
        """int64 that broadcasts to [B, T]; ``None`` if no row has a prefix."""
        if not self.lengths or not plan.routing.names & self.lengths.keys():
            return None
        routing = plan.routing
        each = torch.tensor([self.lengths.get(n or "", 0) for n in self.by_mix(routing)])
        if routing.axis == "uniform":
            return each
        if routing.axis == "token":
            return each[plan._mix_of(int(shape[0] * shape[1]))].reshape(tuple(shape[:2]))
        return each[plan._mix_of(int(shape[0]))][:, None]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def shift(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-forward hook of the root; runs when the routing of the forward is known."""
        if not self.lengths:
            return None
        names = forward_names(type(module))
        if "position_ids" not in names:
            return None  # its positions are no input; they count from the text's own beginning
        given = dict(zip(names, args, strict=False)) | kwargs
        ids = given.get("input_ids")
        ids = given.get("inputs_embeds") if ids is None else ids
        positions = given.get("position_ids")
        if not isinstance(ids, Tensor) or ids.dim() < 2:
            return None
        offsets = self._offsets(self.forwards.plan(), ids.shape)
        if offsets is None:
            return None
        if positions is None:
            if hasattr(getattr(module, "model", module), "get_rope_index"):
                raise foreign(type(module).__name__, "its positions have three dimensions")
            cache: Any = given.get("past_key_values")
            past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
            positions = _positions(past, ids, given.get("attention_mask"))
        positions = positions + offsets.to(positions.device)
        place = names.index("position_ids")
        if place < len(args):
            return (*args[:place], positions, *args[place + 1 :]), kwargs
        return args, {**kwargs, "position_ids": positions}


class PrefixForward:
    """Stands in an attention module's ``__dict__`` as ``forward``; the module is untouched.

    An object rather than a closure, so that copying the model copies it with its module.
    """

    def __init__(self, module: nn.Module, path: str, owner: Prefixes) -> None:
        self.module = module
        self.path = path
        self.owner = owner
        #: a forward that somebody (accelerate, …) had put there before us
        self.previous = module.__dict__.get("forward")
        self.prefixes: dict[str, PrefixParameters] = {}
        self.called = False

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RoutingError(
                f"{self.path} has a prefix, which compiled code does not read; run this model "
                "uncompiled, or remove that adapter"
            )
        self.called = True
        plan = self.owner.forwards.plan()
        config: Any = getattr(self.module, "config", None)
        if not plan.routing.names & self.prefixes.keys():
            return self.base(*args, **kwargs)
        if getattr(config, "_attn_implementation", None) in ASKING:
            return self.base(*args, **kwargs)
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or not hasattr(config, "_attn_implementation_internal"):
            raise foreign(self.path, "it is called in another way")
        _register()
        key, before = id(self.module), config._attn_implementation_internal
        _acting[key] = self.front(plan, x.shape[0])
        config._attn_implementation_internal = NAME
        try:
            out = self.base(*args, **kwargs)
            if key in _acting:
                raise foreign(self.path, "its attention does not go through the registry")
            return out
        finally:
            config._attn_implementation_internal = before
            _acting.pop(key, None)

    def front(self, plan: Plan, rows: int) -> Front:
        """What stands in front of each of ``rows`` rows."""
        if plan.routing.axis == "token":
            raise RoutingError(
                f"{self.path} sees rows, and the routing is by token; a prefix belongs to a row"
            )
        names = self.owner.by_mix(plan.routing)
        used = [self.prefixes.get(name) if name else None for name in names]
        if plan.routing.axis == "uniform" or len(set(names)) == 1:
            (first, *_) = used
            assert first is not None
            key, value = (_as_cache(t).expand(rows, -1, -1, -1) for t in (first.key, first.value))
            return Front(key, value, None)
        length = max(one.length for one in used if one is not None)
        keys, values = (
            torch.stack([_padded(one, field, length, used) for one in used])
            for field in ("key", "value")
        )
        real = torch.tensor([0 if one is None else one.length for one in used])
        numbers = plan._mix_of(rows)
        seen = torch.arange(length) < real[numbers][:, None]
        where = numbers.to(keys.device)
        return Front(
            keys.index_select(0, where),
            values.index_select(0, where),
            None if bool(seen.all()) else seen[:, None, None, :].to(keys.device),
        )


# --- packed rows -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stretches:
    """The prefixes of a packed row."""

    prefixes: tuple[PrefixParameters, ...]
    of: tuple[int | None, ...]
    """For each segment its prefix's place in them; ``None``: it has none."""

    def parameters(self) -> list[nn.Parameter]:
        """Keys and values by turns."""
        return [tensor for one in self.prefixes for tensor in (one.key, one.value)]


def stretches(module: nn.Module, lengths: Sequence[int]) -> Stretches | None:
    """The prefixes of the segments of a packed row, in the forward that runs.

    Args:
        module: an attention module.
        lengths: tokens of each segment.

    Raises:
        RoutingError: tokens of one segment have different prefixes.
    """
    forward = module.__dict__.get("forward")
    if not isinstance(forward, PrefixForward):
        return None
    forward.called = True
    routing = forward.owner.forwards.plan().routing
    if not routing.names & forward.prefixes.keys():
        return None
    names = forward.owner.by_mix(routing)
    if routing.axis == "row" and len(set(names)) > 1:
        raise RoutingError("a routing by rows has no meaning in a packed row")
    if routing.axis == "token":
        runs = [i for i, n in enumerate(routing.lengths) for _ in range(n)]
        found, start = [], 0
        for length in lengths:
            mine = {names[i] for i in set(runs[start : start + length])}
            if len(mine) != 1:
                raise RoutingError(
                    "a routing gives tokens of one example different prefixes; route whole examples"
                )
            found.append(mine.pop())
            start += length
    else:
        found = [names[0]] * len(lengths)
    used = [name for name in dict.fromkeys(found) if name in forward.prefixes]
    return Stretches(
        tuple(forward.prefixes[name] for name in used),
        tuple(used.index(name) if name in used else None for name in found),
    )


def in_front(
    prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask of one segment with its prefix.

    Args:
        prefix: key and value, [n, H_kv, d].
        k, v: [1, H_kv, S, d].
        mask: bool [S, S], or ``None`` for a causal one.

    Returns:
        [1, H_kv, n + S, d] twice, and bool [S, n + S].
    """
    key, value = (_as_cache(tensor).to(k.dtype) for tensor in prefix)
    n, length = key.shape[2], k.shape[2]
    if mask is None:
        mask = _behind(n, length, k.device)
    else:
        mask = torch.cat([mask.new_ones(length, n), mask], dim=1).to(k.device)
    return torch.cat([key, k], dim=2), torch.cat([value, v], dim=2), mask


@functools.lru_cache(maxsize=64)
def _behind(n: int, length: int, device: torch.device) -> Tensor:
    """A causal mask of tokens that all see ``n`` more, bool [length, n + length]."""
    with torch.inference_mode(False):  # it is kept, and a backward may need it
        return torch.ones(length, n + length, dtype=torch.bool, device=device).tril(n)


# --- the attention function ------------------------------------------------------------------


def attention_in_front(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What an attention module with a prefix calls; tensors as transformers gives them.

    Raises:
        RoutingError: the layer wants what this function cannot do.
    """
    front = _acting.pop(id(module), None)
    if front is None:
        raise foreign(type(module).__name__, "another module's attention was called in it")
    for name in ("position_bias", "s_aux", "head_mask", "cache"):
        if others.get(name) is not None:
            raise foreign(type(module).__name__, f"its attention takes {name}")
    seen = seen_keys(module, query, key, attention_mask, others)
    ones = seen.new_ones if seen.dtype == torch.bool else seen.new_zeros
    before = ones(*seen.shape[:-1], front.key.shape[2])
    if front.seen is not None:
        hidden = False if seen.dtype == torch.bool else torch.finfo(seen.dtype).min
        before = torch.where(front.seen.to(seen.device), before, hidden)
    if len(before) != len(seen):
        seen = seen.expand(len(before), -1, -1, -1)
    out = product(others.get("softcap"))(
        query,
        torch.cat([front.key.to(key), key], dim=2),
        torch.cat([front.value.to(value), value], dim=2),
        torch.cat([before, seen], dim=-1),
        dropout,
        scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def seen_keys(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, others: Mapping[str, Any]
) -> Tensor:
    """Which keys each query sees, bool [B or 1, 1, T, S], or what is added to its scores."""
    T, S = query.shape[2], key.shape[2]
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return mask[..., :S]
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise foreign(type(module).__name__, f"its mask is a {type(mask).__name__}")
    columns = torch.arange(S, device=query.device)
    rows = torch.arange(S - T, S, device=query.device)[:, None]
    causal = others.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    seen = (columns <= rows) if causal else torch.ones(T, S, dtype=torch.bool, device=query.device)
    window = others.get("sliding_window")
    if window:
        seen = seen & (columns > rows - int(window))
    seen = seen[None, None]
    return seen if mask is None else seen & mask[:, None, None, :S].to(torch.bool)


def _positions(past: int, ids: Tensor, mask: Any) -> Tensor:
    """Positions of ``ids`` [B, T], counted from each row's first real token; int64 [B or 1, T]."""
    end = past + ids.shape[1]
    if isinstance(mask, Tensor) and mask.shape == (ids.shape[0], end):
        return (mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]
    return torch.arange(past, end, device=ids.device)[None]


def foreign(path: str, why: str) -> RoutingError:
    """What is raised where keys cannot be put in front."""
    return RoutingError(
        f"{path} cannot have a prefix: {why}. Load the base with attn_implementation='sdpa'; if it "
        "is so already, this kind of model takes adapters without a prefix only"
    )


def _as_cache(tensor: Tensor) -> Tensor:
    """[n, H_kv, d] → [1, H_kv, n, d]."""
    return tensor.transpose(0, 1)[None]


def _padded(one: PrefixParameters | None, field: str, length: int, used: Sequence[Any]) -> Tensor:
    """A key or value as [H_kv, length, d]; zeros where there is none."""
    like = next(getattr(other, field) for other in used if other is not None)
    tensor = like.new_zeros(0, *like.shape[1:]) if one is None else getattr(one, field)
    missing = tensor.new_zeros(length - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, missing]).transpose(0, 1)


def forward_names(kind: type[nn.Module]) -> list[str]:
    """Names of what a class's forward takes, ``self`` left out."""
    if kind not in _names:
        _names[kind] = list(inspect.signature(kind.forward).parameters)[1:]
    return _names[kind]


@functools.cache
def _register() -> None:
    """Make the function known to transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_in_front)
