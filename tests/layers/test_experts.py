"""Adapters on routers and fused experts, beside float64 formulas that are written here."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakit import Adapter, LoRASpec, attach
from lorakit.core.sites import LowRank
from lorakit.errors import FormatError, RoutingError, SpecError, TargetError
from lorakit.layers import Routing
from lorakit.layers.experts import ExpertsForward

from ..models import llama, randomize
from ..moe_models import FAMILIES, gpt_oss, mixtral, qwen3_moe

#: products of a dozen numbers of order 1 in float64; a router's softmax is float32 in Mixtral and
#: Qwen3-MoE, and rounds both sides alike
LIMIT = 1e-10
#: float32 logits of order 1 after two layers, summed in another order
LIMIT_32 = 2e-5
EVERYTHING = ("experts", "router")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def ids(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """The mixture of one layer alone: a float64 forward without a norm in float32."""

    def __init__(self, family: str, how: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        model = FAMILIES[family]().to(dtype)
        model.set_experts_implementation(how)
        self.mlp = model.model.layers[1].mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.mlp(x)
        return out[0] if isinstance(out, tuple) else out


def formula(family: str, block: Block, sites: dict[str, LowRank], x: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert, with W + s·B A multiplied out."""
    mlp, experts = block.mlp, block.mlp.experts
    is_gpt_oss = family == "gpt_oss"

    def changed(name: str, e: int) -> torch.Tensor:
        weight = getattr(experts, name)[e].detach()
        weight = weight.T if is_gpt_oss else weight  # [d_out, d_in]
        site = sites.get(f"mlp.experts.{name}")
        return weight if site is None else weight + site.scaling * site.B[e] @ site.A[e]

    router = mlp.router if is_gpt_oss else mlp.gate
    path = "mlp.router" if is_gpt_oss else "mlp.gate"
    weight = router.weight.detach()
    if path in sites:
        weight = weight + sites[path].scaling * sites[path].B @ sites[path].A
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = weight @ token + (router.bias.detach() if is_gpt_oss else 0)
        if is_gpt_oss:
            top, chosen = logits.topk(2)
            shares = top.softmax(0)
        else:
            top, chosen = logits.float().softmax(0).topk(2)
            shares = top / top.sum()
            shares = shares.to(x.dtype) if family == "qwen3_moe" else shares
        total = torch.zeros_like(token)
        for share, e in zip(shares, chosen.tolist(), strict=True):
            both = changed("gate_up_proj", e) @ token
            if is_gpt_oss:
                both = both + experts.gate_up_proj_bias[e].detach()
                gate = both[::2].clamp(max=experts.limit)
                up = both[1::2].clamp(-experts.limit, experts.limit)
                inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
            else:
                gate, up = both.chunk(2)
                inner = F.silu(gate) * up
            one = changed("down_proj", e) @ inner
            one = one + experts.down_proj_bias[e].detach() if is_gpt_oss else one
            total = total + share * one
        out.append(total)
    return torch.stack(out).reshape(x.shape)


@pytest.mark.parametrize("how", ["eager", "batched_mm"])  # grouped_mm takes no float64
@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients(family, how):
    block = Block(family, how)
    handle = attach(block, LoRASpec(rank=3, alpha=6.0, targets=EVERYTHING))
    randomize(handle, 0.3)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(2, 5, 16, dtype=torch.float64)

    def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(torch.autograd.grad((out * wanted).sum(), inputs))

    out = block(x)
    mine = gradients(out, [x, *handle.parameters()])
    sites = {
        path: LowRank(s.A.requires_grad_(), s.B.requires_grad_(), 2.0, s.kind)
        for path, s in handle.snapshot().low_rank.items()
    }
    assert len(sites) == 3
    expected = formula(family, block, sites, x)
    tensors = {f"{p}.lora_{k}": t for p, s in sites.items() for k, t in s.tensors().items()}
    theirs = gradients(expected, [x, *(tensors[n] for n in handle._banks["default"]._order)])
    assert (out - expected).abs().max() <= LIMIT
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() <= LIMIT * max(1.0, float(other.abs().max()))
    assert all(float(one.abs().max()) > 1e-3 for one in theirs)  # each of them matters
    site = sites["mlp.experts.gate_up_proj"]  # and the formula is sensitive to what it checks
    wrong = {**sites, "mlp.experts.gate_up_proj": LowRank(site.A.flip(0), site.B, 2.0, "experts")}
    assert (formula(family, block, wrong, x) - out).abs().max() > 1e-2


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_off_swapped(family, how):
    """A zero change and no adapter are the base bit for bit; another adapter beside is not seen."""
    model = FAMILIES[family]()
    model.set_experts_implementation(how)
    with torch.no_grad():
        base = model(ids()).logits
        handle = attach(model, LoRASpec(rank=3, targets=EVERYTHING), "a")
        assert torch.equal(model(ids()).logits, base)
        randomize(handle)
        a = model(ids()).logits
        first = handle.snapshot("a")
        handle.add(LoRASpec(rank=2, targets="experts"), "b")
        assert torch.equal(model(ids()).logits, a)
        with handle.use(None):
            assert torch.equal(model(ids()).logits, base)
        randomize(handle, seed=5)
        b_alone = copy.deepcopy(handle.snapshot("b"))
        with handle.use("b"):
            b = model(ids()).logits
        handle.detach()
        assert torch.equal(model(ids()).logits, base)
        assert "forward" not in model.model.layers[1].mlp.experts.__dict__
        for adapter, expected in ((first, a), (b_alone, b)):
            handle = attach(model, adapter)
            assert torch.equal(model(ids()).logits, expected)
            handle.detach()
    assert (a - base).abs().max() > 0.1
    assert (b - base).abs().max() > 0.1


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_batch_have_their_own_adapters(family, how):
    model = FAMILIES[family]()
    model.set_experts_implementation(how)
    handle = attach(model, LoRASpec(rank=3, targets=EVERYTHING), "a")
    handle.add(LoRASpec(rank=2, targets="experts"), "b", seed=1)
    handle.add(LoRASpec(rank=4, targets=("router", "down_proj")), "c", seed=2)
    randomize(handle)
    rows = ["a", None, {"b": 0.7, "c": -0.4}, "c", {"a": 0.5}]
    tokens = ids(5)
    with torch.no_grad():
        with handle.use(rows=rows):
            together = model(tokens).logits
        for k, mix in enumerate(rows):
            with handle.use(mix):
                alone = model(tokens).logits[k]
            assert (together[k] - alone).abs().max() <= LIMIT_32
        with handle.use(rows=["a"] * 5):
            assert (model(tokens).logits[0] - together[0]).abs().max() <= LIMIT_32
        with handle.use("b"):  # rows that were confused would show
            assert (model(tokens).logits[0] - together[0]).abs().max() > 0.05


def test_runs_of_a_packed_row_have_their_own_adapters():
    block = Block("mixtral", "grouped_mm", torch.float32)
    handle = attach(block, LoRASpec(rank=3, targets=EVERYTHING), "a")
    handle.add(LoRASpec(rank=2, targets="experts"), "b", seed=1)
    randomize(handle)
    x = torch.randn(1, 9, 16)
    with torch.no_grad():
        with handle.forward_scope(Routing.tokens([("a", 4), (None, 2), ("b", 3)])):
            packed = block(x)[0]
        for mix, start, end in (("a", 0, 4), (None, 4, 6), ("b", 6, 9)):
            with handle.forward_scope(Routing.uniform(mix)):
                alone = block(x)[0]
            assert (packed[start:end] - alone[start:end]).abs().max() <= LIMIT_32
        rows = Routing.rows(["a", "b", None])  # padded rows, of which only the routing tells
        with handle.forward_scope(rows):
            padded = block(x.view(3, 3, 16))
        with handle.forward_scope(Routing.uniform("b")):
            assert (padded[1] - block(x.view(3, 3, 16))[1]).abs().max() <= LIMIT_32
        with handle.forward_scope(rows), pytest.raises(RoutingError, match="of 3 rows"):
            block(x[:, :8])


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_nothing_of_one_row_reaches_another_adapter(how):
    """NaN in a row's input and in its adapter stays there, also in the gradients."""
    block = Block("mixtral", how, torch.float32)
    handle = attach(block, LoRASpec(rank=3, targets=EVERYTHING), "a")
    handle.add(LoRASpec(rank=3, targets=EVERYTHING), "b", seed=1)
    randomize(handle)
    x = torch.randn(2, 5, 16)

    def gradient(inputs: torch.Tensor, mixes: list[str | None]) -> torch.Tensor:
        for parameter in handle.parameters("b"):
            parameter.grad = None
        with handle.forward_scope(Routing.rows(mixes)):
            out = block(inputs)
        (out[1] * torch.arange(80.0).view(5, 16)).sum().backward()
        return torch.cat([p.grad.flatten() for p in handle.parameters("b")])

    expected = gradient(x, [None, "b"])
    poisoned = x.clone()
    poisoned[0] = float("nan")
    with torch.no_grad():
        for parameter in handle.parameters("a"):
            parameter.fill_(float("nan"))
    found = gradient(poisoned, ["a", "b"])
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dropout_is_of_tokens_at_experts():
    """Keyed, it does not depend on what else is in the forward; each expert drops its own."""
    block = Block("mixtral", "grouped_mm", torch.float32).train()
    handle = attach(block, LoRASpec(rank=3, targets=EVERYTHING, dropout=0.5), "a")
    randomize(handle)
    x, keys = torch.randn(1, 6, 16), torch.arange(100, 106).view(1, 6)

    def run(part: slice, mix: str | None = "a") -> torch.Tensor:
        routing = Routing.uniform(mix).with_dropout_keys(keys[:, part])
        with torch.no_grad(), handle.forward_scope(routing):
            return block(x[:, part])[0]

    whole = run(slice(0, 6))
    assert torch.equal(whole, run(slice(0, 6)))
    assert (torch.cat([run(slice(0, 2)), run(slice(2, 6))]) - whole).abs().max() <= LIMIT_32
    with torch.no_grad(), handle.forward_scope(Routing.uniform("a")):
        assert (block(x)[0] - whole).abs().max() > 1e-3  # drawn anew without keys
    block.eval()
    with torch.no_grad(), handle.forward_scope(Routing.uniform("a")):
        assert (block(x)[0] - whole).abs().max() > 1e-3


def test_recomputed_layers_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = qwen3_moe().train()
        handle = attach(model, LoRASpec(rank=3, targets=EVERYTHING), "a")
        randomize(handle)
        if recompute:
            model.activation_checkpointing_enable()
        handle.add(LoRASpec(rank=2, targets="experts"), "b")
        with handle.use(rows=["a", "b", "a"]):
            loss = model(ids(), use_cache=False).logits.square().sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in handle.parameters("a")])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_generation_on_off_and_swapped():
    model = gpt_oss()
    handle = attach(model, LoRASpec(rank=3, targets=EVERYTHING), "a")
    handle.add(LoRASpec(rank=2, targets="experts"), "b", seed=1)
    randomize(handle, 0.5)
    prompt = ids(3, 4)

    def answer(tokens: torch.Tensor, **more) -> list[list[int]]:
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False,
            pad_token_id=2, **more,
        )  # fmt: skip
        return found[:, 4:].tolist()

    alone = []
    for k, mix in enumerate(["a", None, "b"]):
        with handle.use(mix):
            alone.append(answer(prompt[k : k + 1])[0])
    with handle.use(rows=["a", None, "b"]):
        together = answer(prompt)
        beams = answer(prompt, num_beams=2)
    assert together == alone
    with handle.use(None):
        assert answer(prompt)[0] != alone[0]
        assert beams[1] == answer(prompt[1:2], num_beams=2)[0]


def test_compiled_code_is_broken_at_them_and_right():
    model = mixtral(num_hidden_layers=1)
    handle = attach(model, LoRASpec(rank=3, targets=(*EVERYTHING, "q_proj")))
    randomize(handle)
    with torch.no_grad():
        expected = model(ids()).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert (compiled(ids()).logits - expected).abs().max() <= LIMIT_32
        with handle.use(None):
            assert (compiled(ids()).logits - expected).abs().max() > 0.1


def test_router_logits_are_recorded_with_the_change():
    model = mixtral(output_router_logits=True)
    handle = attach(model, LoRASpec(rank=3, targets="router"))
    randomize(handle)
    with torch.no_grad():
        changed = model(ids()).router_logits[0]
        with handle.use(None):
            plain = model(ids()).router_logits[0]
    gate = model.model.layers[0].mlp.gate
    site = handle.snapshot().low_rank["model.layers.0.mlp.gate"]
    assert (changed - plain).abs().max() > 0.05
    assert (gate.weight.shape, site.B.shape) == ((4, 16), (4, 3))


# --- what is trained whole, and settings ----------------------------------------------------------


def test_experts_trained_whole_beside_adapted_ones():
    model = gpt_oss()
    handle = attach(model, LoRASpec(rank=2, targets="q_proj", train_modules=("experts",)), "whole")
    handle.add(LoRASpec(rank=2, targets=EVERYTHING, bias="lora"), "low")
    randomize(handle)
    with torch.no_grad():
        found = {}
        for mix in ("whole", "low", None):
            with handle.use(mix):
                found[mix] = model(ids()).logits
        with (
            handle.use(rows=["whole", "low", None]),
            pytest.raises(RoutingError, match="trained whole"),
        ):
            model(ids())
    assert (found["whole"] - found[None]).abs().max() > 0.1
    own = handle.snapshot("low").replaced
    assert any(path.endswith("router.bias") for path in own)
    with torch.no_grad():  # the router's bias acts together with its low-rank change
        handle._banks["low"].get("model.layers.0.mlp.router.bias").zero_()
        with handle.use("low"):
            assert (model(ids()).logits - found["low"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("experts", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("router", {"mlp.gate"}),
        ("model.layers.1.mlp.experts", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("experts.down_proj", {"mlp.experts.down_proj"}),
        (r".*experts\.gate_up_proj", {"mlp.experts.gate_up_proj"}),
        (("gate_up_proj", "gate"), {"mlp.experts.gate_up_proj", "mlp.gate"}),
    ],
)
def test_targets(targets, expected):
    adapter = attach(qwen3_moe(), LoRASpec(rank=2, targets=targets)).snapshot()
    assert set(adapter.sites) == {f"model.layers.1.{path}" for path in expected}
    again = attach(qwen3_moe(), adapter.spec).snapshot()  # what is written down selects the same
    assert set(again.sites) == set(adapter.sites)


def test_names_that_modules_and_parameters_share():
    adapter = attach(qwen3_moe(), LoRASpec(rank=2, targets="down_proj")).snapshot()
    kinds = {path: site.kind for path, site in adapter.low_rank.items()}
    assert kinds == {
        "model.layers.0.mlp.down_proj": "linear",
        "model.layers.1.mlp.experts.down_proj": "experts",
    }
    assert adapter.spec.targets == ("down_proj",)


def test_all_linear_leaves_experts_and_says_so(caplog):
    caplog.set_level("INFO")
    adapter = attach(mixtral(), LoRASpec(rank=2)).snapshot()
    assert {path.rpartition(".")[2] for path in adapter.sites} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    assert "4 parameters of experts" in caplog.text
    caplog.clear()
    attach(mixtral(), LoRASpec(rank=2, targets=("all-linear", "experts", "router")))
    assert "parameters of experts" not in caplog.text


def test_ranks_and_drawn_values():
    spec = LoRASpec(rank=3, targets=EVERYTHING, rank_pattern={"down_proj": 2, "gate": 4})
    sites = attach(mixtral(), spec, seed=3).snapshot().low_rank
    down = sites["model.layers.0.mlp.experts.down_proj"]
    assert (down.rank, down.A.shape, down.B.shape) == (2, (4, 2, 24), (4, 16, 2))
    assert sites["model.layers.0.mlp.gate"].rank == 4
    for site in sites.values():  # Kaiming's bound is that of one expert's inputs
        bound = site.A.shape[-1] ** -0.5
        assert not site.B.any()
        assert 0.9 * bound < float(site.A.abs().max()) <= bound
    orthogonal = attach(mixtral(), LoRASpec(rank=3, targets="experts", init="orthogonal"))
    for site in orthogonal.snapshot().low_rank.values():
        for A in site.A:
            assert torch.allclose(A @ A.T, torch.eye(3), atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------

REFUSED = {
    "DoRA": ({"targets": "experts", "variant": "dora"}, TargetError, "DoRA is not defined"),
    "DoRA of a router": ({"targets": "router", "variant": "dora"}, TargetError, "mlp.gate"),
    "PiSSA": ({"targets": "experts", "init": "pissa"}, TargetError, "fused experts"),
    "OLoRA of a router": ({"targets": "router", "init": "olora"}, TargetError, "a router"),
    "EVA": ({"targets": "experts", "init": "eva"}, TargetError, "fused experts"),
    "mlp": ({"targets": "mlp"}, TargetError, "are 'experts'"),
    "a rank above the width": ({"targets": "experts", "rank": 17}, TargetError, "width 16"),
    "a pattern": ({"rank_pattern": {"up_proj": 4}, "targets": "experts"}, TargetError, "none"),
    "a name": ({"targets": "expert"}, TargetError, "close: experts"),
    "exclude": ({"targets": "experts", "exclude": ("experts",)}, TargetError, "nothing to adapt"),
    "alpha": ({"targets": "experts", "alpha": 0}, SpecError, "alpha is 0"),
    "a parameter whole": ({"train_modules": ("down_proj",)}, TargetError, "matches nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    settings, error, words = REFUSED[name]
    model = mixtral()
    before = {key: id(module) for key, module in model.named_modules()}
    with pytest.raises(error, match=words):
        attach(model, LoRASpec(**{"rank": 2, **settings}))
    assert {key: id(module) for key, module in model.named_modules()} == before


def test_a_model_without_experts():
    for word in ("experts", "router"):
        with pytest.raises(TargetError, match="no mixture of experts"):
            attach(llama(), LoRASpec(rank=2, targets=word))


A, B = torch.zeros(4, 2, 16), torch.zeros(4, 48, 2)
PATH = "model.layers.0.mlp.experts.gate_up_proj"
MALFORMED = {
    "two matrices": (LowRank(A[0], B[0], 1.0, "experts"), "two matrices for each expert"),
    "other ranks": (LowRank(A, B[..., :1], 1.0, "experts"), "rank 2"),
    "other experts": (LowRank(A, B[:3], 1.0, "experts"), "holds 4 experts"),
    "a magnitude": (LowRank(A, B, 1.0, "experts", magnitude=torch.ones(48)), "has a magnitude"),
    "a bias": (LowRank(A[0], B[0], 1.0, "router", bias=torch.ones(48)), "has a bias"),
    "too few experts": (LowRank(A[:3], B[:3], 1.0, "experts"), "this model needs"),
    "too narrow": (LowRank(A, B[:, :47], 1.0, "experts"), "this model needs"),
    "a linear there": (LowRank(A[0], B[0], 1.0), "not in this model|a linear site"),
    "the other way around": (LowRank(B.mT, A.mT, 1.0, "experts"), "this model needs"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_site_that_does_not_fit(name):
    site, words = MALFORMED[name]
    with pytest.raises(FormatError, match=words):
        attach(mixtral(), Adapter({PATH: site}))


def test_experts_where_the_model_has_none():
    for model, words in ((llama(), "not in this model"), (qwen3_moe(), "not in this model")):
        with pytest.raises(FormatError, match=words):
            attach(model, Adapter({PATH: LowRank(A, B, 1.0, "experts")}))
    site = LowRank(torch.zeros(2, 16), torch.zeros(4, 2), 1.0, "router")
    with pytest.raises(FormatError, match="is no linear"):
        attach(mixtral(), Adapter({"model.layers.0.mlp.experts": site}))


def test_ways_of_running_experts_that_have_no_place_for_adapters():
    model = mixtral()
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(TargetError, match="'sonicmoe', which leaves no place"):
        attach(model, LoRASpec(rank=2, targets="experts"))
    model = mixtral()
    handle = attach(model, LoRASpec(rank=2, targets="experts"))
    for how in IMPLEMENTATIONS:  # may be changed at any time
        model.set_experts_implementation(how)
        model(ids())
    model.config._experts_implementation = "deepgemm"
    with pytest.raises(RoutingError, match="deepgemm"):
        model(ids())
    with handle.use("default"):
        assert isinstance(model.model.layers[0].mlp.experts.forward, ExpertsForward)


def test_experts_that_compute_something_else(monkeypatch):
    model = mixtral()
    experts = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(experts, "forward", lambda self, x, i, w: 2 * x)
    with pytest.raises(TargetError, match="computes something else"):
        attach(model, LoRASpec(rank=2, targets="experts"))
    monkeypatch.setattr(experts, "forward", lambda self, x: x)
    with pytest.raises(TargetError, match="does not run as fused experts do"):
        attach(model, LoRASpec(rank=2, targets="experts"))
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(TargetError, match="expert parallelism"):
        attach(model, LoRASpec(rank=2, targets="experts"))


def test_a_router_that_multiplies_in_another_way(monkeypatch):
    model = mixtral()
    gate = type(model.model.layers[0].mlp.gate)
    own = gate.forward
    monkeypatch.setattr(gate, "forward", lambda self, x: own(self, x))  # is found all the same
    handle = attach(model, LoRASpec(rank=2, targets="router"))
    model(ids())

    def other(self, x):
        logits = x.reshape(-1, self.hidden_dim) @ self.weight.T
        scores, index = logits.softmax(-1).topk(2)
        return logits, scores, index

    monkeypatch.setattr(gate, "forward", other)
    with pytest.raises(RoutingError, match="no place to act"):
        model(ids())
    with handle.use(None):
        model(ids())
