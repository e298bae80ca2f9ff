"""``PackedModel``: the loss of packed batches on a causal language model, in the best way it can.

Three things are decided once, by trying them on two short sequences, and are said in ``notes``:

- how examples share a forward: *packed*, one behind the other in one row without padding;
  *padded*, a row each; or *single*, one at a time, for a model in which padding is seen;
- whether body and head can be called apart, so that the head runs at supervised positions only
  and its logits never exist together; otherwise the model's own forward keeps those logits;
- what the model does to the logits behind its head (a bound, a factor), if anything.

Legend: ``N`` tokens of a batch, ``E`` examples, ``S`` supervised positions, ``d`` hidden size,
``V`` vocabulary, ``T`` tokens of the longest example.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core.products import unrounded_products
from lorakit.errors import BaseError, RoutingError
from lorakit.infer import segments
from lorakit.infer.chunked_loss import Head, chunk_rows, group_losses, position_losses
from lorakit.infer.fused.family import DoesNotFit
from lorakit.infer.fused.layer import Recompute
from lorakit.infer.fused.running import FusedBody
from lorakit.infer.inputs import Input, PackedBatch, example_of
from lorakit.infer.mode import accepted, evaluating, forget_longest
from lorakit.infer.probing import close, int8_linears, probe_sequences, rope_kinds, unpacked_int8
from lorakit.layers import Handle, Routing
from lorakit.layers.site import SiteForward

log = logging.getLogger(__name__)

Mode = Literal["packed", "padded", "single"]


#: position encodings whose frequencies depend on the longest position of a forward
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class PackedModel:
    """A causal language model, with or without adapters, that computes losses of batches.

    Args:
        model: a transformers model with an output head.
        handle: the adapters attached to it, if any; each call then takes a routing.
        chunk: positions whose logits exist together; ``None`` chooses for the device.
        mode: skip the trial and use this mode; for tests and for measuring.
        recompute: what fused layers make again in the backward instead of keeping it; see
            ``infer.fused.layer``. ``"none"`` means ``"layers"`` where the model's own gradient
            checkpointing is on.
        offload: the inputs of fused layers wait for the backward in the processor's memory, pinned;
            on CUDA, with ``recompute="layers"``.
        fused: run decoder layers of the Llama kind in packed forwards with a backward written
            by hand (:mod:`lorakit.infer.fused`), where they agree with the model's own.

    Raises:
        BaseError: the model is an encoder-decoder, or computes no logits over a vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        handle: Handle | None = None,
        *,
        chunk: int | None = None,
        mode: Mode | None = None,
        fused: bool = True,
        recompute: Recompute = "none",
        offload: bool = False,
    ) -> None:
        self.model = model
        self.handle = handle
        self.notes: list[str] = []
        """What was decided against the fastest way, and why; empty if nothing."""
        self.device = next(model.parameters()).device
        if offload and self.device.type != "cuda":
            raise BaseError(
                f"the model is on {self.device}, and what is kept for the backward can move to the "
                "processor's memory only from a CUDA GPU. Leave offloading out"
            )
        if offload and recompute != "layers":
            raise BaseError("only inputs of layers can be offloaded; give recompute='layers' too")
        self.offload = offload
        self.chunk = chunk or _chunk(model, self.device)
        self.mode: Mode = mode or "packed"
        self._body, self._head = _split(model)
        self._finish: Head | None = None
        self.fused: FusedBody | None = None
        """The fused layers, if they are used."""
        int8 = fused and bool(int8_linears(model))
        with evaluating(model), torch.no_grad(), unrounded_products():
            with unpacked_int8(model) if int8 else contextlib.nullcontext():
                alone = self._probe(fixed=mode is not None)
                if fused and self.mode == "packed" and self._finish is not None:
                    self._try_fused(alone, recompute)
            if int8 and self.fused is None:
                self.mode = mode or "packed"
                alone = self._probe(fixed=mode is not None)
            if mode is None and self.mode == "packed" and _recomputes(model):
                self._recompute_like_the_model(alone)
        for note in self.notes:
            log.info("%s", note)

    # --- losses ----------------------------------------------------------------------------

    def supervised_loss(
        self,
        batch: PackedBatch,
        routing: Routing | None = None,
        *,
        reduction: Literal["sum", "mean"] = "sum",
    ) -> tuple[Tensor, int]:
        """Negative log-likelihood of the supervised tokens, in nats, with a gradient.

        Returns:
            ``(loss, count)``: a scalar, float32 or wider, and the number of supervised tokens.
        """
        count = len(batch.labels)
        if not count:
            return torch.zeros((), device=self.device), 0
        total = self.group_losses(batch, routing, (len(batch.lengths),))[0]
        return (total / count if reduction == "mean" else total), count

    def group_losses(
        self, batch: PackedBatch, routing: Routing | None, groups: Sequence[int]
    ) -> Tensor:
        """Negative log-likelihood of the supervised tokens by group of examples, with a gradient.

        Nothing of one group reaches another's sum or gradient, NaN included.

        Args:
            groups: examples of each group, one group behind the other.

        Returns:
            The sums, [G], float32 or wider.
        """
        group_of = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
        found = [torch.zeros(len(groups), device=self.device)]
        for part in self._forwards(batch):
            mine = group_of[part.example : part.example + len(part.lengths)]
            counts = torch.bincount(mine[example_of(part)], minlength=len(groups)).tolist()
            sums = self._with_head(part, routing, partial(self._summed, groups=counts))
            found.append(sums)
        return found[-1] if len(found) == 2 else torch.stack(found).sum(0)

    @torch.no_grad()
    def position_losses(self, batch: PackedBatch, routing: Routing | None = None) -> Tensor:
        """Negative log-likelihood of each supervised token, [S], without a gradient."""
        parts = [self._with_head(part, routing, self._each) for part in self._forwards(batch)]
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)

    def per_example_loss(
        self, batch: PackedBatch, routing: Routing | None = None
    ) -> tuple[Tensor, Tensor]:
        """Per example, [E]: the summed negative log-likelihood (float64), and its tokens."""
        losses = self.position_losses(batch, routing).double()
        where = example_of(batch).to(losses.device)
        sums = losses.new_zeros(len(batch.lengths)).index_add_(0, where, losses)
        counts = torch.bincount(where, minlength=len(batch.lengths))
        return sums, counts

    def _summed(
        self, hidden: Tensor, labels: Tensor, head: Head, *, groups: Sequence[int]
    ) -> Tensor:
        labels = labels.to(hidden.device)
        used = [i for i, count in enumerate(groups) if count]
        sums = group_losses(hidden, labels, head, [groups[i] for i in used], chunk=self.chunk)
        if len(used) == len(groups):
            return sums
        return sums.new_zeros(len(groups)).index_copy(0, torch.tensor(used).to(sums.device), sums)

    def _each(self, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
        return position_losses(hidden, labels.to(hidden.device), head, chunk=self.chunk)

    # --- forwards --------------------------------------------------------------------------

    def _forwards(self, batch: PackedBatch) -> list[Input]:
        """The batch as inputs of one forward each: one, or one an example in single mode."""
        if not len(batch.labels):
            return []
        plain = Input(
            batch.input_ids.to(self.device),
            batch.position_ids.to(self.device),
            tuple(batch.lengths),
            batch.supervised.to(self.device),
            batch.labels.to(self.device),
        )
        if self.mode != "single":
            return [plain]
        return [part for part in plain.examples() if len(part.labels)]

    def _with_head(
        self,
        part: Input,
        routing: Routing | None,
        consume: Callable[[Tensor, Tensor, Head], Tensor],
    ) -> Tensor:
        """One forward of the model: hidden states or logits at the supervised positions."""
        if self.handle is not None:
            routing = self._arranged_routing(part, routing or self.handle.active)
        finish, head = self._finish, self._head
        front = self.handle.virtual_tokens(routing) if self.handle and routing else 0
        forget_longest(self.model, max(part.lengths) + front)
        with self._scope(routing):
            if finish is None:
                # the logits are there already; the head that remains does nothing
                return consume(self._own_logits(part), part.labels, _identity)
            if _needs_all_tokens(head, routing):
                logits = finish(self._full_head(part))
                return consume(logits, part.labels, _identity)
            hidden = self._hidden(part, routing)
            return consume(hidden, part.labels, lambda rows: finish(head(rows)))

    def _scope(self, routing: Routing | None) -> AbstractContextManager[Any]:
        if self.handle is None or routing is None:
            return contextlib.nullcontext()
        return self.handle.forward_scope(routing)

    def _states(self, part: Input) -> tuple[Tensor, Tensor]:
        """Last hidden states [B, T, d], and the supervised positions in [B·T]."""
        inputs, rows = self._arranged(part, shift=True)
        with self._attention(part), self._layers():
            states = self._body(**inputs, **accepted(self._body, use_cache=False))[0]
        return states, rows

    def _hidden(self, part: Input, routing: Routing | None = None) -> Tensor:
        """Last hidden states at the supervised positions, [S, d]."""
        behind = [m for m in self._body.children() if not isinstance(m, nn.ModuleList)]
        wanted = any(_needs_all_tokens(one, routing) for m in behind for one in m.modules())
        if self.fused is not None and self.fused.selects and not wanted:
            inputs, rows = self._arranged(part, shift=True)
            with self._attention(part), self._layers(rows):
                selected = self._body(**inputs, **accepted(self._body, use_cache=False))[0]
            row: Tensor = selected[0]
            return row
        states, rows = self._states(part)
        return states.flatten(0, 1).index_select(0, rows.to(states.device))

    def _full_head(self, part: Input) -> Tensor:
        """What the head makes of every token, then the supervised positions, [S, V]."""
        states, rows = self._states(part)
        logits: Tensor = self._head(states)
        return logits.flatten(0, 1).index_select(0, rows.to(states.device))

    def _own_logits(self, part: Input) -> Tensor:
        """Logits at the supervised positions from the model's own forward, [S, V]."""
        inputs, rows = self._arranged(part)
        width = inputs["input_ids"].shape[1]
        columns, inverse = torch.unique(rows % width, return_inverse=True)
        options = accepted(self.model, use_cache=False, logits_to_keep=columns)
        with self._attention(part):
            logits: Tensor = self.model(**inputs, **options).logits
        if "logits_to_keep" in options:
            rows = rows // width * len(columns) + inverse
        return logits.flatten(0, 1).index_select(0, rows.to(logits.device))

    def _arranged(self, part: Input, *, shift: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs [B, T], and where the supervised positions are in [B·T].

        Args:
            shift: let the text begin behind its prefix, as the model's own forward does.
        """
        rows = part.supervised
        inputs = {"input_ids": part.ids, "position_ids": part.positions}
        if self.mode != "packed":
            inputs, rows = part.padded()
        if shift and self.handle is not None:
            inputs["position_ids"] = self.handle.shifted(inputs["position_ids"])
        if self.mode != "packed" and "position_ids" not in accepted(self._body, position_ids=None):
            del inputs["position_ids"]
        return inputs, rows

    def _arranged_routing(self, part: Input, routing: Routing) -> Routing:
        """The routing of a packed row, for the way in which this forward arranges it.

        Raises:
            RoutingError: an example whose tokens use different adapters cannot be a padded row.
        """
        if self.mode == "packed":
            return routing
        if routing.axis == "token":
            runs = [i for i, n in enumerate(routing.lengths) for _ in range(n)]
            mine = [set(runs[start : start + n]) for start, n in part.spans()]
            if any(len({routing.mixes[i] for i in one}) > 1 for one in mine):
                raise RoutingError(
                    "a routing gives tokens of one example different adapters; this model takes "
                    "padded batches, in which an example has one mix. Route whole examples"
                )
            mixes = tuple(routing.mixes[min(one)] for one in mine)
            routing = replace(routing, axis="row", mixes=mixes, lengths=())
        if routing.dropout_keys is not None:
            keys = routing.dropout_keys.reshape(-1)[part.first : part.first + part.ids.shape[1]]
            routing = routing.with_dropout_keys(part.spread(keys.to(self.device)))
        return routing

    def _attention(self, part: Input) -> AbstractContextManager[None]:
        if self.mode == "packed":
            return segments.running(self.model, part.lengths, self.device)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _layers(self, rows: Tensor | None = None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.fused is not None:
                stack.enter_context(self.fused.running(rows))
                if self.offload and torch.is_grad_enabled():
                    # of a layer that is made again only its input is saved, so no weight moves
                    stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=True))
            yield

    # --- the trial -------------------------------------------------------------------------

    def _recompute_like_the_model(self, alone: Tensor) -> None:
        """The model's own gradient checkpointing is on: let the fused layers do that, or pad."""
        if self.fused is not None:
            if self.fused.recompute == "none":
                self.fused.recompute = "layers"
                self.notes.append(
                    "the model's gradient checkpointing is done by the fused layers: each keeps "
                    "its input and runs again in the backward"
                )
            return
        self.notes.append(
            "batches are padded: gradient checkpointing runs the layers again when the "
            "segments of a packed row are no longer known"
        )
        self._choose_mode("padded", alone)

    def _try_fused(self, alone: Tensor, recompute: Recompute) -> None:
        """Use fused layers if the model has such and they give its logits, [N, V]."""
        try:
            self.fused = FusedBody(self._body, recompute=recompute)
        except DoesNotFit as reason:
            self.notes.append(f"layers are not fused: {reason}")
            return
        whole = Input.of(probe_sequences(self.model, self.device))
        problem = self._disagrees(whole, alone)
        if problem is not None:
            self.fused = None
            self.notes.append(f"layers are not fused: {problem}")

    def _probe(self, *, fixed: bool) -> Tensor:
        """Decide mode and split by comparing with the model on each sequence alone.

        Returns:
            The model's own logits of the sequences, [N, V].
        """
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise BaseError(
                f"{type(self.model).__name__} is an encoder-decoder; its loss over packed "
                "examples is not supported. Give a causal language model."
            )
        sequences = probe_sequences(self.model, self.device)
        with self._bare():
            alone = torch.cat([self._logits_alone(ids) for ids in sequences])
        kinds = rope_kinds(self.model).intersection(_LENGTH_DEPENDENT)
        if not fixed and kinds:  # which the short sequences of this trial cannot show
            self.mode = "single"
            self.notes.append(
                f"examples go through one at a time: with {', '.join(sorted(kinds))} position "
                "encodings, the length of one would change the others"
            )
        self._choose_split(sequences[0])
        self._choose_mode(self.mode, alone, fixed=fixed)
        return alone

    def _choose_mode(self, first: Mode, alone: Tensor, *, fixed: bool = False) -> None:
        """The first mode, from ``first`` on, that gives the logits of each sequence alone."""
        whole = Input.of(probe_sequences(self.model, self.device))
        modes: list[Mode] = ["packed", "padded", "single"]
        for mode in [first] if fixed else modes[modes.index(first) :]:
            self.mode = mode
            problem = self._disagrees(whole, alone)
            if problem is None:
                return
            self.notes.append(f"batches are not {mode}: {problem}")
        raise BaseError(
            f"{type(self.model).__name__} does not compute the same logits twice: "
            + "; ".join(self.notes)
        )

    def _choose_split(self, ids: Tensor) -> None:
        """Find what turns ``head(body(x))`` into the model's logits; ``None`` if nothing does."""
        if self._head is None:
            self.notes.append("the model's own forward is used: it names no output head")
            return
        try:
            with self._bare():
                logits = self._logits_alone(ids)
            with self._bare_scope():
                hidden = self._body(ids[None], **accepted(self._body, use_cache=False))[0][0]
                mine = self._head(hidden)
        except Exception as error:
            self.notes.append(
                "the model's own forward is used: body and head cannot be called apart "
                f"({type(error).__name__}: {error})"
            )
            return
        for finish in _finishes(getattr(self.model, "config", None)):
            if close(finish(mine), logits):
                self._finish = finish
                return
        self.notes.append(
            "the model's own forward is used, and all logits at supervised positions are kept: "
            "it computes its logits by more than its output head"
        )

    def _disagrees(self, whole: Input, alone: Tensor) -> str | None:
        """Why logits of a shared forward are not those of each sequence alone."""
        try:
            if self.mode == "packed":
                segments.register()
            parts = whole.examples() if self.mode == "single" else [whole]
            logits = torch.cat([self._probe_logits(part) for part in parts])
        except Exception as error:  # whatever a model's own code raises on what it cannot do
            return f"the model does not take them ({type(error).__name__}: {error})"
        if close(logits, alone):
            return None
        worst = float((logits - alone).abs().max() / alone.abs().max())
        return f"logits differ by {worst:.1e} from those of each example alone"

    def _probe_logits(self, part: Input) -> Tensor:
        """Logits at every position of a forward of the bare base, [N, V]."""
        with self._bare_scope():
            if self._finish is None:
                return self._own_logits(part)
            return self._finish(self._head(self._hidden(part)))

    def _logits_alone(self, ids: Tensor) -> Tensor:
        """The model's own logits of one sequence, [n, V]."""
        out = self.model(ids[None], **accepted(self.model, use_cache=False))
        logits = getattr(out, "logits", None)
        if logits is None or logits.ndim != 3:
            raise BaseError(
                f"{type(self.model).__name__} computes no logits over a vocabulary for each "
                "token. Give a causal language model."
            )
        alone: Tensor = logits[0]
        return alone

    def _bare(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.handle is None else self.handle.use(None)

    def _bare_scope(self) -> AbstractContextManager[Any]:
        if self.handle is None:
            return contextlib.nullcontext()
        return self.handle.forward_scope(Routing.uniform(None))


def _identity(logits: Tensor) -> Tensor:
    return logits


def _needs_all_tokens(head: Any, routing: Routing | None) -> bool:
    """Whether an adapted head, or a norm before it, cannot run on a part of the tokens.

    It tells tokens apart by their place in the forward where they use different adapters, and
    where its dropout is keyed by the token.
    """
    site = head.__dict__.get("forward")
    if routing is None or not isinstance(site, SiteForward):
        return False
    mine = routing.names & (site.low_rank.keys() | site.replaced.keys())
    dropped = head.training and any(
        site.low_rank[name].dropout for name in mine & site.low_rank.keys()
    )
    keyed = routing.dropout_keys is not None
    return bool(mine) and (routing.axis != "uniform" or (dropped and keyed))


def _split(model: nn.Module) -> tuple[Any, Any]:
    """Body (ids → hidden states) and output head; the head is ``None`` if it has none."""
    body = getattr(model, "base_model", model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return (model, None) if head is None or body is model else (body, head)


def _chunk(model: nn.Module, device: torch.device) -> int:
    """Positions whose float32 logits exist together."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None) or 1 << 17
    return chunk_rows(vocabulary, device.type)


def _finishes(config: Any) -> list[Head]:
    """What a model may do to the logits behind its head, by the names configs use for it."""
    found: list[Head] = [lambda logits: logits]
    bound = getattr(config, "final_logit_softcapping", None)
    if bound:
        found.append(lambda logits: bound * torch.tanh(logits / bound))
    for name in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if isinstance(factor, (int, float)):
            found.append(lambda logits, factor=factor: logits * factor)  # type: ignore[misc]
    divisor = getattr(config, "logits_scaling", None)
    if isinstance(divisor, (int, float)):
        found.append(lambda logits: logits / divisor)
    return found


def _recomputes(model: nn.Module) -> bool:
    """Whether the model's layers run again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
