"""``attach``: adapters on a model, and the handle that chooses among them."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.bases.identity import check_base, identify
from lorakit.core.adapter import Adapter, hollow
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank, Prefix, Replace, Site
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError, LorakitError, RoutingError, TargetError, collected
from lorakit.layers.bank import Bank, LowRankParameters, ReplaceParameters
from lorakit.layers.dora import check_dense
from lorakit.layers.experts import ExpertsForward, check_experts
from lorakit.layers.forwards import Forwards
from lorakit.layers.generating import CapturingGenerate
from lorakit.layers.initial import Initial, initial, since_start
from lorakit.layers.kinds import expert_shapes, is_router
from lorakit.layers.places import Places
from lorakit.layers.prefix import Prefixes, PrefixForward, PrefixParameters
from lorakit.layers.router import RouterForward
from lorakit.layers.routing import MixLike, Order, Routing
from lorakit.layers.site import SiteForward

logger = logging.getLogger(__name__)

#: the child of the root under which the adapters' parameters are registered
CHILD = "lorakit_adapters"

#: fields of a low-rank site → how its parameters are called behind its path
_NAMES = {"A": "lora_A", "B": "lora_B", "bias": "lora_bias", "magnitude": "lora_magnitude"}
#: the same of a prefix
_PREFIX_NAMES = {"key": "prefix_key", "value": "prefix_value"}


def attach(
    model: nn.Module,
    what: LoRASpec | Adapter | Initial,
    name: str = "default",
    *,
    trainable: bool | None = None,
    seed: int = 0,
    allow_other_base: bool = False,
) -> Handle:
    """Put an adapter on a model, which is otherwise unchanged.

    The model's own parameters stop receiving gradients. Its modules keep their objects, classes
    and state-dict keys; only the ``forward`` of adapted ones is overridden.

    Args:
        model: any ``nn.Module``; call this very module (or ``generate``) afterwards.
        what: a spec makes a new adapter whose first forward is the base's (bit for bit, but for
            initialisations that begin inside of the base's weight, where it is up to rounding); an
            :class:`Adapter` brings its values, and so does an :class:`Initial`, of a new one.
            What is trained is a copy of them; a frozen adapter shares their memory where device
            and dtype agree.
        name: how the handle knows it. The first adapter of a model is active at once.
        trainable: whether it receives gradients; by default a new one does and a given one
            does not.
        seed: of the initialisation.
        allow_other_base: use an adapter that was trained on other weights; shapes must fit.

    Raises:
        TargetError: targets that do not fit the model.
        FormatError: an adapter whose paths or shapes are not this model's.
        BaseError: an adapter that was trained on other weights than this model's.
        LorakitError: the model has adapters already (use ``handle.add``).
    """
    if handle_of(model) is not None:
        raise LorakitError(
            "this model has adapters attached already; add another with handle.add(…), or "
            "call handle.detach() first"
        )
    handle = Handle(model)
    try:
        handle.add(what, name, trainable=trainable, seed=seed, allow_other_base=allow_other_base)
    except BaseException:
        handle.detach()
        raise
    handle.activate(name)
    logger.info("adapter %r is attached and active", name)
    return handle


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a model's adapters, or ``None``."""
    child = model._modules.get(CHILD)
    return getattr(child, "handle", None)


class _Child(nn.ModuleDict):
    """Holds the banks; knows the handle, so that a copied model has its own."""

    handle: Handle

    def forward(self, x: Any) -> Any:
        """Nothing: an ``nn.Sequential`` that is the root runs all its children in turn."""
        return x


class Handle:
    """The adapters on one model. Made by :func:`attach`."""

    def __init__(self, model: nn.Module) -> None:
        if hasattr(model, CHILD):
            raise LorakitError(f"this model has an attribute {CHILD!r} that is not ours")
        inner = [p for p, m in model.named_modules() if isinstance(m, _Child)]
        if inner:
            raise LorakitError(
                f"a part of this model has adapters attached ({inner[0]}); detach them there, "
                "and attach to the outer model alone"
            )
        self.model = model
        self._places = Places(model)
        self._forwards = Forwards()
        self._forwards.after = self._check_called
        #: adapters that no forward has used yet
        self._unchecked: set[str] = set()
        self._identity: BaseIdentity | None = None
        self._banks: dict[str, Bank] = {}
        self._sources: dict[str, Adapter] = {}
        #: adapters whose source is subtracted from what they become
        self._subtracted: set[str] = set()
        self._sites: dict[str, SiteForward] = {}
        self._prefixes = Prefixes(self._forwards)
        self._fronts: dict[str, PrefixForward] = {}
        #: hooks that do nothing, and keep torch off the fused path around a site
        self._openers: dict[str, RemovableHandle] = {}
        #: parameters whose gradient we switched off
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
        child = _Child()
        child.handle = self
        model.add_module(CHILD, child)
        self._hooks = [
            model.register_forward_pre_hook(
                self._forwards.before_forward, with_kwargs=True, prepend=True
            ),
            model.register_forward_pre_hook(self._prefixes.shift, with_kwargs=True),
            model.register_forward_hook(self._forwards.after_forward, always_call=True),
        ]
        CapturingGenerate.install(model, self._forwards)

    # --- what is attached ------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The attached adapters, in the order they came."""
        return tuple(self._banks)

    @property
    def active(self) -> Routing:
        """The routing in use."""
        return self._forwards.routing

    def add(
        self,
        what: LoRASpec | Adapter | Initial,
        name: str,
        *,
        trainable: bool | None = None,
        seed: int = 0,
        allow_other_base: bool = False,
    ) -> None:
        """Attach one more adapter; it is used once a routing names it.

        Raises:
            LorakitError: the name is taken or empty, or the handle was detached.
            TargetError, FormatError, BaseError: as :func:`attach`.
        """
        child = self.model._modules.get(CHILD)
        if not isinstance(child, _Child):
            raise LorakitError("this handle was detached; call attach() again")
        key = _key(name)
        if not name or key in child:
            raise LorakitError(
                f"the adapter name {name!r} is "
                + ("taken; choose another, or remove that one first" if name else "empty")
            )
        if isinstance(what, LoRASpec):
            # a prefix begins as what the base computes
            with self.use(None) if what.prefix else contextlib.nullcontext():
                what = initial(self.model, what, seed)
        subtract = False
        if isinstance(what, Initial):
            adapter, trainable = what.adapter, trainable is not False
            subtract = what.subtracted
            if subtract and not trainable:
                adapter, subtract = since_start(adapter, adapter), False
        else:
            adapter, trainable = what, bool(trainable)
            self._check_base(adapter, name, allow_other=allow_other_base)
        owners = self._places.owners(adapter)
        _check_shared(adapter, owners)
        check_dense(
            {p: owners[p][1] for p, s in adapter.low_rank.items() if s.magnitude is not None}
        )
        check_experts({own: owner for p in adapter.low_rank for own, owner in [owners[p]]})
        dropout = adapter.spec.dropout if trainable else 0.0
        bank = self._make_bank(adapter, owners, trainable, subtract)
        self._check_prefix(adapter, owners)
        child[key] = bank
        for path, site in adapter.sites.items():
            owner_path, owner = owners[path]
            if isinstance(site, Prefix):
                front = self._front(owner_path, owner)
                front.prefixes[name] = PrefixParameters(bank, path)
                self._prefixes.lengths[name] = site.length
                continue
            forward = self._site(owner_path, owner)
            if isinstance(site, LowRank):
                kind = "linear" if site.kind == "router" else site.kind
                forward.put(name, path, LowRankParameters(bank, path, site.scaling, kind, dropout))
            else:
                own = forward.replaced.setdefault(name, ReplaceParameters(bank))
                prefix = path[len(owner_path) + 1 :]  # "bias" where the path is a parameter's
                for key in site.tensors_by_name:
                    own.put(key or prefix, f"{path}.{key}" if key else path)
        # what is trained moves away from these values; only a subtracted start is needed again
        source = hollow(adapter) if trainable and not subtract else adapter
        self._banks[name], self._sources[name] = bank, source
        if subtract:
            self._subtracted.add(name)
        self._unchecked.add(name)
        self._forwards.names = self.names
        self._forwards.device = next(bank.parameters()).device

    def remove(self, name: str) -> None:
        """Take one adapter off.

        Raises:
            LorakitError: no such adapter, or it is in use.
        """
        self._known([name])
        if name in self.active.names:
            raise LorakitError(
                f"adapter {name!r} is in use; activate another first, for example "
                "handle.activate(None)"
            )
        del self._banks[name], self._sources[name]
        self._subtracted.discard(name)
        child = self.model._modules[CHILD]
        assert isinstance(child, _Child)
        del child[_key(name)]
        self._unchecked.discard(name)
        self._prefixes.lengths.pop(name, None)
        for path, front in list(self._fronts.items()):
            front.prefixes.pop(name, None)
            if not front.prefixes:
                _restore(front)
                del self._fronts[path]
        for path, site in list(self._sites.items()):
            site.low_rank.pop(name, None)
            site.replaced.pop(name, None)
            if not site.low_rank and not site.replaced:
                _restore(site)
                del self._sites[path]
                if path in self._openers:
                    self._openers.pop(path).remove()
        self._forwards.names = self.names

    def detach(self) -> None:
        """Take everything off; the model is as it was.

        Raises:
            LorakitError: somebody else has overridden a forward since; it must go first.
        """
        ours: list[SiteForward | PrefixForward] = [*self._sites.values(), *self._fronts.values()]
        covered = [s.path for s in ours if s.module.__dict__.get("forward") is not s]
        if covered:
            raise LorakitError(
                collected(
                    "Another library has overridden these forwards since; remove its hooks "
                    "first (for accelerate: remove_hook_from_submodules(model))",
                    covered,
                    limit=5,
                )
            )
        for site in ours:
            _restore(site)
        self._sites.clear()
        self._fronts.clear()
        self._prefixes.lengths.clear()
        self._banks.clear()
        self._sources.clear()
        self._subtracted.clear()
        for hook in (*self._hooks, *self._openers.values()):
            hook.remove()
        self._openers.clear()
        CapturingGenerate.remove(self.model)
        self.model._modules.pop(CHILD, None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    # --- choosing --------------------------------------------------------------------------

    @contextlib.contextmanager
    def use(
        self,
        mix: MixLike | Routing = None,
        *,
        rows: Sequence[MixLike] | None = None,
        expand: int = 1,
        order: Order = "interleave",
    ) -> Iterator[Handle]:
        """Use these adapters inside the ``with`` block.

        Args:
            mix: a name, ``None`` for the bare base, weights such as ``{"a": 0.7, "b": 0.3}``,
                or a :class:`Routing`; the same for every row.
            rows: one such entry per row of the batch instead.
            expand, order: how a caller multiplies the rows; ``generate``'s beams are known.

        The choice holds for the whole model, whichever thread runs it. ``generate`` keeps the
        one that holds when it is entered, which in a new thread is after the thread's start.

        Raises:
            RoutingError: an adapter that is not attached, a weight that is not finite, or another
                thread is choosing too.
            SpecError: prefixes would be blended, or one given a weight.
        """
        with self._forwards.choose(self.routing(mix, rows=rows, expand=expand, order=order)):
            yield self

    def activate(self, mix: MixLike | Routing = None, **rows: Any) -> None:
        """Use these adapters from now on; arguments as :meth:`use`."""
        self._forwards.routing = self.routing(mix, **rows)

    def routing(
        self,
        mix: MixLike | Routing = None,
        *,
        rows: Sequence[MixLike] | None = None,
        expand: int = 1,
        order: Order = "interleave",
    ) -> Routing:
        """The routing that :meth:`use` would use, with its names checked."""
        if rows is not None and mix is not None:
            raise RoutingError("give one mix for all rows, or rows=[…], not both")
        if isinstance(mix, Routing):
            routing = mix
        elif rows is not None:
            routing = Routing.rows(rows, expand=expand, order=order)
        else:
            routing = Routing.uniform(mix)
        self._known(sorted(routing.names))
        self._prefixes.by_mix(routing)  # raises where prefixes would be blended
        return routing

    def forward_scope(self, routing: Routing) -> contextlib.AbstractContextManager[None]:
        """One forward made of several calls (a body, then its head) under this routing."""
        self._known(sorted(routing.names))
        self._prefixes.by_mix(routing)
        return self._forwards.scope(routing)

    def shifted(self, positions: Tensor) -> Tensor:
        """Positions [B, T] of a text, behind the prefixes that its rows have in this forward.

        For whoever calls a part of the model in a :meth:`forward_scope`; the root does it itself.
        """
        return self._prefixes.shifted(positions)

    def virtual_tokens(self, mix: MixLike | Routing = None) -> int:
        """Positions that the longest prefix of these adapters takes of the model's context."""
        return self._prefixes.longest(self.routing(mix))

    # --- values ----------------------------------------------------------------------------

    def snapshot(self, name: str = "default") -> Adapter:
        """A copy of an adapter's present values, on the CPU, in the dtype they have here.

        Of one that began inside of the base's weight (PiSSA, OLoRA, LoRA-GA) it is the change
        since then, at twice the rank, which any tool can put on the untouched base.
        """
        self._known([name])
        source, bank = self._sources[name], self._banks[name]

        def value(key: str) -> Tensor:
            return bank.get(key).detach().to("cpu", copy=True)

        sites: dict[str, Site] = {}
        for path, site in source.sites.items():
            if isinstance(site, LowRank):
                tensors: dict[str, Any] = {
                    key: value(f"{path}.{_NAMES[key]}") for key in site.tensors()
                }
                sites[path] = replace(site, **tensors)
            elif isinstance(site, Prefix):
                sites[path] = Prefix(value(f"{path}.prefix_key"), value(f"{path}.prefix_value"))
            else:
                sites[path] = Replace(
                    {k: value(f"{path}.{k}" if k else path) for k in site.tensors_by_name}
                )
        now = source.with_(sites=sites)
        return since_start(now, source) if name in self._subtracted else now

    def paths(self, name: str = "default") -> tuple[str, ...]:
        """The modules that an adapter changes, by their paths in the model."""
        self._known([name])
        return tuple(self._sources[name].sites)

    def parameters(self, name: str = "default") -> list[nn.Parameter]:
        """An adapter's tensors on the model, in the order of :meth:`flat`."""
        self._known([name])
        return self._banks[name].own()

    def flat(self, name: str = "default") -> nn.Parameter:
        """A trainable adapter as one flat parameter; its ``grad`` is what the sites add to.

        Gradients that the tensors of :meth:`parameters` have by then are in it. Optimise this
        instead of them; clear ``grad`` with ``zero_()``, not by setting it to ``None``.
        """
        self._known([name])
        return self._banks[name].flat()

    def arrange(
        self, name: str, group_of: Callable[[str], Hashable]
    ) -> dict[Hashable, tuple[int, int]]:
        """Order :meth:`flat` by groups, so that each is one stretch of it, its A's first.

        The buffer may be another one afterwards: ask for :meth:`flat` and :meth:`parameters` again.

        Args:
            name: of a trainable adapter.
            group_of: of a tensor's name, ``"<path>.lora_A"``, ``"<path>.lora_B"``,
                ``"<path>.lora_magnitude"``, ``"<path>.prefix_key"``, ``"<path>.prefix_value"`` or
                the path of a parameter that is trained whole.

        Returns:
            Group → (begin, end).
        """
        self._known([name])
        return self._banks[name].arrange(group_of)

    # --- inside ----------------------------------------------------------------------------

    def _known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._banks:
                close = difflib.get_close_matches(name, self.names, n=1)
                raise RoutingError(
                    f"no adapter {name!r} is attached"
                    + (f"; did you mean {close[0]!r}?" if close else "")
                    + f" Attached: {', '.join(self.names) or 'none'}"
                )

    def _site(self, path: str, module: nn.Module) -> SiteForward:
        if path not in self._sites:
            site = _forward_of(module)(module, path, self._forwards)
            module.__dict__["forward"] = site
            self._sites[path] = site
            if self._in_fused_layer(path):
                # torch calls a layer's modules one by one where any of them has a hook
                self._openers[path] = module.register_forward_pre_hook(_nothing)
        return self._sites[path]

    def _in_fused_layer(self, path: str) -> bool:
        """Whether a module lies in one whose forward, in eval, reads the weights by itself."""
        above = itertools.accumulate(path.split("."), lambda one, more: f"{one}.{more}")
        holders = [self.model, *map(self.model.get_submodule, list(above)[:-1])]
        fused = nn.TransformerEncoderLayer.forward
        return any(type(holder).forward is fused for holder in holders if path)

    def _front(self, path: str, module: nn.Module) -> PrefixForward:
        if path not in self._fronts:
            front = PrefixForward(module, path, self._prefixes)
            module.__dict__["forward"] = front
            self._fronts[path] = front
        return self._fronts[path]

    def _check_prefix(self, adapter: Adapter, owners: Mapping[str, tuple[str, nn.Module]]) -> None:
        """A module whose own parameters are trained whole has one forward of ours already."""
        fronts = {owners[p][0] for p in adapter.prefixes} | self._fronts.keys()
        others = {owners[p][0] for p in adapter.sites if p not in adapter.prefixes}
        both = sorted(fronts & (others | self._sites.keys()))
        if both:
            raise TargetError(
                collected(
                    "A prefix acts in these attention modules, and they are trained whole too; "
                    "leave one of the two out",
                    both,
                    limit=4,
                )
            )

    def _make_bank(
        self,
        adapter: Adapter,
        owners: Mapping[str, tuple[str, nn.Module]],
        trainable: bool,
        subtract: bool,
    ) -> Bank:
        tensors: dict[str, Tensor] = {}
        fixed: dict[str, Tensor] = {}
        # in the model's order, whoever made the adapter: what a layer uses together lies together
        modules = self.model.named_modules(remove_duplicate=False)
        places = {path: number for number, (path, _) in enumerate(modules)}
        paths = sorted(adapter.sites, key=lambda path: places[owners[path][0]])
        for path, site in ((path, adapter.sites[path]) for path in paths):
            device, dtype = self._places.home(owners[path][0])
            target = dtype if trainable else None
            for key, tensor in site.tensors().items():
                if not isinstance(site, Replace):
                    key = (_NAMES if isinstance(site, LowRank) else _PREFIX_NAMES)[key]
                full = f"{path}.{key}" if key else path
                # nobody writes into a value; what is trained is a copy of it
                tensors[full] = tensor.detach().to(device=device, dtype=target, copy=trainable)
            if subtract and isinstance(site, LowRank):
                fixed[f"{path}.start_A"] = tensors[f"{path}.lora_A"].clone()
                fixed[f"{path}.start_B"] = tensors[f"{path}.lora_B"].clone()
        return Bank(tensors, trainable=trainable, fixed=fixed)

    def _check_base(self, adapter: Adapter, name: str, *, allow_other: bool) -> None:
        """Compare the adapter's base with this one, where it says what it was trained on."""
        if adapter.base is None or allow_other:
            return
        if self._identity is None:
            label = getattr(getattr(self.model, "config", None), "name_or_path", "")
            self._identity = identify(self.model, label or type(self.model).__name__)
        for note in check_base(adapter, self._identity):
            logger.info("adapter %r: %s", name, note)

    def _check_called(self, used: frozenset[str]) -> None:
        """After an adapter's first forward: each of its sites must have been called."""
        names = used & self._unchecked
        if not names:
            return
        silent = [
            path
            for path, site in self._sites.items()
            # an expert may wait for its first token for long
            if not site.was_called
            and not site.routed
            and names & (site.low_rank.keys() | site.replaced.keys())
        ]
        silent += [
            path
            for path, front in self._fronts.items()
            if not front.called and names & front.prefixes.keys()
        ]
        if silent:
            raise TargetError(
                collected(
                    "The first forward never called these adapted modules, so adapting them has "
                    "no effect (a fused path reads their weights directly, or this input does "
                    "not reach them). Leave them out with exclude",
                    silent,
                    limit=8,
                )
            )
        self._unchecked -= names


def _forward_of(module: nn.Module) -> type[SiteForward]:
    if is_router(module):
        return RouterForward
    return ExpertsForward if expert_shapes(module) else SiteForward


def _nothing(module: nn.Module, args: Any) -> None:
    """A hook that is there, and no more."""


def _check_shared(adapter: Adapter, owners: Mapping[str, tuple[str, nn.Module]]) -> None:
    """A module has one change of an adapter's, whatever its paths; merging refuses a second too.

    Raises:
        FormatError: two of the adapter's sites are one place of the model. All are listed.
    """
    met: dict[tuple[str, str], str] = {}
    problems = []
    for path, site in adapter.sites.items():
        last = path.rpartition(".")[2]
        if isinstance(site, Replace):
            parts = [key or last for key in site.tensors_by_name]
        else:
            parts = [last if isinstance(site, LowRank) and site.kind == "experts" else ""]
        places = [(owners[path][0], part) for part in parts]
        twice = [met[place] for place in places if place in met]
        problems += [f"{path}: it is the same module as {other}" for other in twice[:1]]
        met.update(dict.fromkeys(places, path))
    if problems:
        raise FormatError(
            collected("The adapter has several sites for one module of this model", problems)
            + "\nKeep one of its paths; the module is shared, and so is its adapter."
        )


def _key(name: str) -> str:
    """What an adapter's bank is called in the model: no dot, and no attribute of a module."""
    return "adapter " + name.replace(".", "·")


def _restore(site: SiteForward | PrefixForward) -> None:
    if site.module.__dict__.get("forward") is site:
        if site.previous is None:
            del site.module.__dict__["forward"]
        else:
            site.module.__dict__["forward"] = site.previous
