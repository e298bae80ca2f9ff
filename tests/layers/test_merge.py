"""``merge``: elementwise against W + ΔW in float64, and back bit for bit."""

from __future__ import annotations

import copy
import gc
import importlib
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import lorakit
from lorakit import Adapter, LoRASpec, attach
from lorakit.core.identity import BaseIdentity
from lorakit.core.merging import Recipe, Term, check_rows, merge_
from lorakit.core.sites import LowRank, Replace
from lorakit.errors import BaseError, FormatError, InputError, LorakitError
from lorakit.layers import merge
from lorakit.layers.merge_plan import plan_merge
from tests import models


def draw(*shape, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


class Conv1D(nn.Module):
    """As transformers' of that name: known by it and by ``nf``."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(draw(d_in, d_out))
        self.bias = nn.Parameter(draw(d_out))

    def forward(self, x):
        return x @ self.weight + self.bias


#: kind → module, the input of its forward, and ΔW from B and A by a formula of its own
def kinds():
    ids = torch.tensor([[0, 3, 8]])
    yield "linear", nn.Linear(5, 7), draw(2, 5), lambda B, A: torch.einsum("or,ri->oi", B, A)
    yield "conv1d", Conv1D(5, 7), draw(2, 5), lambda B, A: torch.einsum("or,ri->io", B, A)
    yield "embedding", nn.Embedding(9, 5), ids, lambda B, A: torch.einsum("or,ri->io", B, A)
    for n, kernel in ((1, (3,)), (2, (3, 2)), (3, (1, 2, 3))):
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        x = draw(2, 4, *(6,) * n)
        letters = "xyz"[:n]
        rule = f"or,ri{letters}->oi{letters}"
        yield (
            f"conv {n}d",
            make(4, 6, kernel),
            x,
            (lambda B, A, rule=rule: torch.einsum(rule, B.flatten(1), A)),
        )


def site_for(module, rank=2, seed=0, **more):
    from lorakit.layers.kinds import shape_of

    shape = shape_of(module)
    return LowRank(
        draw(*shape.a(rank), seed=seed),
        draw(*shape.b(rank), seed=seed + 1),
        0.7,
        shape.kind,
        **more,
    )


def wrapped(module):
    return nn.Sequential(module.double())


CASES = {name: (module, x, rule) for name, module, x, rule in kinds()}


@pytest.mark.parametrize("name", CASES)
def test_a_merged_weight_is_the_sum(name):
    module, x, rule = CASES[name]
    model = wrapped(copy.deepcopy(module))
    site = site_for(module)
    before = model[0].weight.detach().clone()
    expected = before + 0.7 * 0.6 * rule(site.B, site.A)
    handle = attach(model, Adapter({"0": site}), "a")
    handle.activate({"a": 0.6})
    unmerged = model(x)
    handle.detach()
    undo = merge(model, (Adapter({"0": site}), 0.6))
    assert (model[0].weight - expected).abs().max() <= 1e-12
    assert (model(x) - unmerged).abs().max() <= 1e-12
    assert (model[0].weight - before).abs().max() > 0.1  # it can fail
    undo()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", CASES)
def test_dora(name):
    module, _, rule = CASES[name]
    model = wrapped(copy.deepcopy(module))
    before = model[0].weight.detach().clone()
    columns = name in ("conv1d", "embedding")
    site = site_for(module)
    magnitude = draw(site.B.shape[0], seed=5).abs() + 0.5
    changed = before + 0.7 * rule(site.B, site.A)
    rows = (changed.T if columns else changed.flatten(1)).clone()
    for i, row in enumerate(rows):
        rows[i] = magnitude[i] * row / math.sqrt(sum(float(v) ** 2 for v in row))
    expected = rows.T if columns else rows.view(before.shape)
    adapter = Adapter({"0": site_for(module, magnitude=magnitude)})
    undo = merge(model, adapter)
    assert (model[0].weight - expected).abs().max() <= 1e-12
    undo()
    assert torch.equal(model[0].weight, before)
    with pytest.raises(FormatError, match=r"DoRA site.*weight 1"):
        merge(model, (adapter, 0.5))
    with pytest.raises(FormatError, match="merged alone"):
        merge(model, [adapter, Adapter({"0": site})])
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Embedding(4, 3)], ids=["rows", "columns"])
def test_dora_leaves_an_output_of_zeros(module):
    """It has no direction that could be brought to a length; attached it is left alone too."""
    model = wrapped(copy.deepcopy(module))
    columns = isinstance(module, nn.Embedding)
    site = site_for(model[0])
    with torch.no_grad():
        (model[0].weight.T if columns else model[0].weight)[1] = 0
        site.B[1] = 0
    d_out = site.B.shape[0]
    adapter = Adapter({"0": site_for(model[0], magnitude=draw(d_out, seed=5).abs() + 0.5)})
    adapter.low_rank["0"].B[1] = 0
    x = torch.arange(4)[None] if columns else draw(2, 3)
    handle = attach(model, adapter)
    attached = model(x)
    handle.detach()
    merge(model, adapter)
    assert not (model[0].weight.T if columns else model[0].weight)[1].any()
    assert (model(x) - attached).abs().max() <= 1e-12


def test_a_grouped_convolution_within_its_groups():
    model = wrapped(nn.Conv2d(4, 6, 3, groups=2))
    site = site_for(model[0], rank=4)
    with pytest.raises(FormatError, match="2 groups"):
        merge(model, Adapter({"0": site}))
    A = site.A.clone()
    A[:2, 2:] = 0
    A[2:, :2] = 0
    adapter = Adapter({"0": LowRank(A, site.B, 0.7, "conv")})
    x, before = draw(1, 4, 6, 6), model[0].weight.detach().clone()
    handle = attach(model, adapter)
    unmerged = model(x)
    handle.detach()
    merge(model, adapter)
    assert (model(x) - unmerged).abs().max() <= 1e-12
    expected = before.clone()
    for o in range(6):
        for i in range(2):
            for r in range(2):
                g = o // 3
                expected[o, i] += 0.7 * site.B[o, r, 0, 0] * A[2 * g + r, 2 * g + i]
    assert (model[0].weight - expected).abs().max() <= 1e-12


def test_biases_and_parameters_trained_whole():
    model = nn.Sequential(nn.Linear(5, 7), nn.Embedding(9, 5), nn.Linear(7, 3)).double()
    new = {"weight": draw(3, 7, seed=3), "bias": draw(3, seed=4)}
    sites = {
        "0": site_for(model[0], bias=draw(7)),
        "1": site_for(model[1], bias=draw(5)),
        "2": Replace(new),
    }
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.tensor([[1, 2]])
    adapter = Adapter(sites)
    undo = merge(model, adapter)
    assert (model[0].bias - before["0.bias"] - 0.7 * sites["0"].bias).abs().max() <= 1e-12
    rows = before["1.weight"] + 0.7 * (sites["1"].B @ sites["1"].A).T + 0.7 * sites["1"].bias
    assert (model[1](ids) - rows[ids]).abs().max() <= 1e-12
    assert torch.equal(model[2].weight, new["weight"])
    assert torch.equal(model[2].bias, new["bias"])
    undo()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    undo = merge(model, Adapter({"0.bias": Replace({"": draw(7, seed=9)})}))
    assert torch.equal(model[0].bias, draw(7, seed=9))
    assert undo.names == ("0.bias",)


def test_low_rank_on_top_of_a_weight_trained_whole():
    model = wrapped(nn.Linear(5, 7))
    site, value = site_for(model[0]), draw(7, 5, seed=8)
    merge(model, [Adapter({"0": Replace({"weight": value})}), (Adapter({"0": site}), 2.0)])
    assert (model[0].weight - value - 1.4 * site.B @ site.A).abs().max() <= 1e-12


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    asked=st.sampled_from([torch.float32, torch.float64]),
    block=st.sampled_from([1, 64, 1 << 18]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_sums_are_rounded_once(rows, columns, ranks, dtype, asked, block, seed):
    """Within what float64 arithmetic and one rounding to the stored dtype allow, in any blocks."""
    weight = draw(rows, columns, seed=seed, dtype=dtype)
    terms = tuple(
        Term(draw(rows, r, seed=seed + r), draw(r, columns, seed=seed - r), 0.3) for r in ranks
    )
    recipe = Recipe(terms)
    before = weight.clone()
    patch = pytest.MonkeyPatch()
    with patch.context() as scope:
        scope.setattr("lorakit.core.merging.BLOCK_BYTES", block)
        assert bool(merge_(weight, recipe, asked))
    ratio = check_rows(before, weight, list(range(rows)), recipe, asked)
    assert ratio <= 1
    exact = before.double() + sum(0.3 * t.left @ t.right for t in terms)
    step = torch.finfo(dtype).eps * exact.abs() + 1e-5 * (dtype != torch.float64)
    assert bool(((weight.double() - exact).abs() <= step + 1e-13).all())
    off = (weight.double() * (1 + 8 * torch.finfo(dtype).eps) + 1e-4).to(dtype)
    assert check_rows(before, off, list(range(rows)), recipe, torch.float64) > 1  # it can fail


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def llama_adapter(seed=1, model=None, **spec):
    model = model or models.llama()
    handle = attach(model, LoRASpec(rank=4, alpha=8, targets="all-linear", **spec), seed=seed)
    models.randomize(handle, seed=seed)
    adapter = handle.snapshot().with_(base=None)
    handle.detach()
    return adapter


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(model, before):
    return all(torch.equal(raw(v), raw(before[k])) for k, v in bits(model).items())


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_undo_is_bitwise(dtype, where):
    model = models.llama().to(dtype)
    adapter, before = llama_adapter(), bits(model)
    numbers = sum(model.get_submodule(p).weight.numel() for p in adapter.sites)
    for _ in range(3):
        undo = merge(model, [(adapter, 0.7), (adapter, -0.2)], undo=where)
        assert not same(model, before)
        assert undo.bytes >= numbers * dtype.itemsize
        assert undo.bytes < numbers * dtype.itemsize + 10_000
        path = undo._store.path
        assert path is None or path.exists()
        undo()
        assert same(model, before)
        assert path is None or not path.parent.exists()


def test_the_file_goes_with_the_result():
    model = models.llama()
    undo = merge(model, llama_adapter(), undo="disk")
    folder = undo._store.path.parent
    assert folder.exists()
    del undo
    gc.collect()
    assert not folder.exists()


def test_structure_stays():
    """Modules, types, parameters, storage, strides, hooks: nothing that costs time is added."""
    model = models.llama().bfloat16()
    model.model.layers[0].self_attn.q_proj.weight.data = (
        model.model.layers[0].self_attn.q_proj.weight.data.T.contiguous().T
    )
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))

    def structure():
        return (
            [(p, type(m), id(m), sorted(m.__dict__)) for p, m in model.named_modules()],
            [(p, id(t), t.data_ptr(), t.stride(), t.dtype) for p, t in model.named_parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        )

    before, values = structure(), bits(model)
    undo = merge(model, llama_adapter())
    assert structure() == before
    undo()
    assert structure() == before
    assert same(model, values)


def test_logits_equal_those_of_the_attached_adapter():
    model, ids = models.gpt2().double(), torch.arange(12)[None]
    spec = LoRASpec(rank=4, alpha=8, targets=("c_attn", "c_proj", "c_fc", "wpe"))
    handle = attach(model, spec)
    models.randomize(handle)
    adapter = handle.snapshot()
    with torch.no_grad():
        attached = model(ids).logits
        with handle.use(None):
            base = model(ids).logits
        handle.detach()
        merge(model, adapter)
        assert (model(ids).logits - attached).abs().max() <= 1e-10
    assert (base - attached).abs().max() > 0.01


# --- refused before anything is touched ----------------------------------------------------------


def refused(model, what, error, match, **options):
    before = bits(model)
    with pytest.raises(error, match=match):
        merge(model, what, **options)
    assert same(model, before)


def test_mismatches_are_collected():
    model = models.llama()
    q = "model.layers.0.self_attn.q_proj"
    sites = {
        "model.layers.0.self_attn.q_prj": LowRank(torch.ones(2, 32), torch.ones(32, 2), 1.0),
        q: LowRank(torch.ones(2, 31), torch.ones(32, 2), 1.0),
        "model.layers.1.self_attn.q_proj": LowRank(torch.ones(2, 32), torch.ones(32, 2), 1.0),
    }
    with pytest.raises(FormatError) as caught:
        merge(model, Adapter(sites))
    assert "close: model.layers.0.self_attn.q_proj" in str(caught.value)
    assert "(2, 31)" in str(caught.value)
    refused(model, Adapter(sites), FormatError, "does not fit")
    site = LowRank(torch.ones(2, 32), torch.ones(32, 2), 1.0, bias=torch.ones(32))
    refused(model, Adapter({q: site}), FormatError, "has none to add it to")
    refused(
        model, (Adapter({q: Replace({"weight": torch.ones(32, 32)})}), 0.5), FormatError, "whole"
    )


@pytest.mark.parametrize("undo", ["memory", "disk", None])
def test_overflow_leaves_the_model_alone(undo):
    model = models.llama().half()
    huge = llama_adapter().sites
    path = "model.layers.1.mlp.down_proj"
    site = huge[path]
    adapter = Adapter({**huge, path: LowRank(site.A, site.B, 1e7)})
    refused(model, adapter, InputError, path, undo=undo)
    model.bfloat16()
    merge(model, adapter, undo=undo)  # it is the dtype alone


def test_an_overflow_of_one_number_is_seen():
    model = nn.Sequential(nn.Linear(64, 4096)).half()  # several blocks
    with torch.no_grad():
        model[0].weight[3000, 5] = 65000
    A, B = torch.zeros(1, 64), torch.zeros(4096, 1)
    A[0, 5], B[3000] = 1.0, 600.0
    adapter = Adapter({"0": LowRank(A, B, 1.0)})
    for undo in ("memory", None):
        refused(model, adapter, InputError, "0.weight", undo=undo)
    merge(model, (adapter, 0.5))  # 65300 is below 65504


def test_tied_weights():
    model = models.llama(tie_word_embeddings=True)
    adapter = Adapter({"model.embed_tokens": site_for(model.model.embed_tokens)})
    refused(model, adapter, FormatError, r"tied to lm_head\.weight")
    ids, before = torch.arange(8)[None], bits(model)
    handle = attach(model, adapter)
    with torch.no_grad():
        attached = model(ids).logits
    handle.detach()
    undo = merge(model, adapter, untie=True)
    with torch.no_grad():
        assert (model(ids).logits - attached).abs().max() < 1e-5
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same(model, before)


def test_weights_in_the_same_memory_are_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    adapter = Adapter({"0": site_for(model[0])})
    refused(model, adapter, FormatError, r"0\.weight: it is tied to 1\.weight")
    other = model[1].weight.detach().clone()
    undo = merge(model, adapter, untie=True)
    assert torch.equal(model[1].weight, other)
    assert not torch.equal(model[0].weight, other)
    undo()
    model[1].weight = nn.Parameter(model[0].weight.data[1:3])  # a part of it, as of a joined one
    refused(model, adapter, FormatError, r"tied to 1\.weight")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_slices_of_one_tensor_are_not_tied(device):
    rows, columns = torch.randn(8, 4, device=device), torch.randn(4, 8, device=device)
    model = nn.ModuleList(nn.Linear(4, 4, device=device) for _ in range(4))
    halves = rows[:4], rows[4:], columns[:, :4], columns[:, 4:]
    for module, half in zip(model, halves, strict=True):
        module.weight = nn.Parameter(half)
    adapter = Adapter({name: site_for(model[int(name)]) for name in "0123"})
    assert len(plan_merge(model, [(adapter, 1.0)])) == 4
    model[1].weight = nn.Parameter(rows[3:7])
    with pytest.raises(FormatError, match=r"1\.weight: it is tied to 0\.weight"):
        plan_merge(model, [(adapter, 1.0)])


@pytest.mark.parametrize(
    "computed",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3), dim=2),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
        lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 2),
    ],
    ids=["weight_norm", "spectral_norm", "hook", "pruned"],
)
def test_computed_weights_are_refused(computed):
    """A change of what the next forward computes again would be lost without a word."""
    model = nn.Sequential(computed())
    adapter = Adapter({"0": site_for(model[0])})
    refused(model, adapter, FormatError, r"0\.weight: its module holds no such tensor: .* computed")
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    nn.utils.parametrize.remove_parametrizations(module[0], "weight")  # as the message says
    merge(module, Adapter({"0": site_for(module[0])}))


def test_settings_that_cannot_act():
    model, adapter = models.llama(), llama_adapter()
    refused(model, [], InputError, "no adapter")
    refused(model, (adapter, 0), InputError, "changes nothing")
    refused(model, (adapter, math.nan), InputError, "not finite")
    refused(model, "adapter", InputError, "expected an Adapter")
    refused(model, adapter, InputError, "undo is 'file'", undo="file")
    refused(model, adapter, InputError, "compute_dtype", compute_dtype=torch.float16)
    handle = attach(model, adapter)
    refused(model, adapter, LorakitError, "detach")
    handle.detach()
    undo = merge(model, adapter)
    attach(model, adapter)
    with pytest.raises(LorakitError, match="detach"):
        undo()
    limited = nn.Sequential(nn.Embedding(9, 5, max_norm=1.0))
    refused(limited, Adapter({"0": site_for(limited[0])}), FormatError, "max_norm")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(5, 7))
    with pytest.raises(InputError, match="not in memory"):
        merge(empty, Adapter({"0": site_for(nn.Linear(5, 7))}))


def test_another_base_is_refused():
    model = models.llama()
    other = BaseIdentity("other", "MistralForCausalLM", {"model.norm.weight": (32,)})
    adapter = llama_adapter().with_(base=other)
    refused(model, adapter, BaseError, "another one")
    merge(model, adapter, allow_other_base=True)()


# --- undo ----------------------------------------------------------------------------------------


def test_merges_are_undone_in_reverse():
    model = models.llama()
    before = bits(model)
    handle = attach(model, LoRASpec(rank=4, alpha=8, targets="all-linear"))
    models.randomize(handle)
    adapter = handle.snapshot()
    handle.detach()
    first = merge(model, adapter)
    between = bits(model)
    second = merge(model, (adapter, 0.5))
    with pytest.raises(LorakitError, match="merged again since"):
        first()
    second()
    assert same(model, between)
    first()
    assert same(model, before)
    with pytest.raises(LorakitError, match="undone already"):
        first()


def test_undo_refuses_to_lose_other_changes():
    model, adapter = models.llama(), llama_adapter()
    undo = merge(model, adapter)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(LorakitError, match="written to since"):
        undo()
    kept = merge(model, adapter, undo=None)
    assert kept.bytes == 0
    with pytest.raises(LorakitError, match="not kept"):
        kept()
    model = models.llama()
    undo = merge(model, adapter)
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.detach().clone())
    with pytest.raises(LorakitError, match="another tensor"):
        undo()


def test_autocast_and_reduced_precision_do_not_reach_the_sums():
    adapter = llama_adapter()
    plain, other = models.llama(), models.llama()
    other.load_state_dict(plain.state_dict())
    merge(plain, adapter)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            merge(other, adapter)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert same(other, bits(plain))


def test_an_interruption_in_the_middle_rolls_back(monkeypatch):
    model, adapter = models.llama(), llama_adapter()
    before, calls = bits(model), []
    module = importlib.import_module("lorakit.layers.merge")  # the name is the function's

    rewrite = module._rewrite_

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return rewrite(*args, **options)

    monkeypatch.setattr(module, "_rewrite_", interrupted)
    for where in ("memory", "disk"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            merge(model, adapter, undo=where)
        assert same(model, before)


def test_nothing_keeps_a_merged_model_alive():
    model = models.llama()
    undo = merge(model, llama_adapter())
    parameter = weakref.ref(model.lm_head.weight)
    merged = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del model, undo
    gc.collect()
    assert parameter() is None
    assert merged() is None


def test_an_interrupted_undo_is_made_again(monkeypatch):
    model, adapter = models.llama(), llama_adapter()
    before = bits(model)
    undo = merge(model, adapter)
    restore, calls = undo._store.kept, []

    def interrupted(step):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return restore(step)

    monkeypatch.setattr(undo._store, "kept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        undo()
    assert not same(model, before)
    undo()
    assert same(model, before)


def test_public_name():
    assert lorakit.merge is merge


# --- quantised bases -----------------------------------------------------------------------------


def quantised(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    for i in (0, 2):
        old = model[i]
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False
            )
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False)
        else:
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, old.bias is not None, quant_type=kind
            )
            new.weight = bnb.nn.Params4bit(
                old.weight.data, requires_grad=False, quant_type=kind, compress_statistics=True
            )
            new.support_avx512bf16_for_cpu = False
        if old.bias is not None:
            new.bias = old.bias
        model[i] = new
    return model.to("cpu")


def packed_bits(model):
    from lorakit.bases.stored import packed_modules

    return {
        f"{path}.{k}": v.clone()
        for path, _, packed in packed_modules(model)
        for k, v in packed.tensors().items()
    }


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("after_a_forward", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantised_weights(kind, where, after_a_forward):
    from lorakit.bases.stored import packed_modules
    from lorakit.layers.dense import to_dense_

    model, x = quantised(kind), draw(3, 128, dtype=torch.float32)
    if after_a_forward:
        with torch.no_grad():
            model(x)
    dense = {path: packed.dense(torch.float64) for path, _, packed in packed_modules(model)}
    assert set(dense) == {"0", "2"}
    before = packed_bits(model)
    ids = {k: id(m) for k, m in model.named_modules()}
    site = LowRank(draw(2, 128, scale=0.1), draw(64, 2, scale=0.1), 1.0)
    undo = merge(model, Adapter({"0": site}), undo=where)
    wanted = dense["0"] + site.B @ site.A
    found = {path: packed.dense(torch.float64) for path, _, packed in packed_modules(model)}
    error = float((found["0"] - wanted).norm() / wanted.norm())
    assert undo.errors["0.weight"] == pytest.approx(error, rel=1e-3)
    assert error < {"nf4": 0.12, "fp4": 0.16, "int8": 0.02}[kind]  # storing so costs that much
    assert torch.equal(found["2"], dense["2"])
    assert {k: id(m) for k, m in model.named_modules()} == ids
    after = packed_bits(model)
    assert not torch.equal(after["0.packed"], before["0.packed"])
    # what the module computes is what was stored
    from torch.nn import functional as F

    with torch.no_grad():
        y = model[0](x)
    near = F.linear(x.double(), found["0"], model[0].bias.double())
    assert (y.double() - near).norm() / near.norm() < 0.02
    second = merge(model, Adapter({"0": site}))
    with pytest.raises(LorakitError, match="merged again since"):
        undo()
    second()
    undo()
    again = packed_bits(model)
    assert all(torch.equal(raw(again[k]), raw(before[k])) for k in before)
    assert to_dense_(model, torch.float64) == ["0", "2"]
    assert type(model[0]) is nn.Linear
    assert (model[0].weight - dense["0"]).abs().max() < 1e-6


def test_unpacking_equals_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    from lorakit.bases.stored import packed_weight

    for kind in ("nf4", "fp4"):
        module = quantised(kind)[0]
        theirs = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        ours = packed_weight(module).dense(torch.float32)
        assert (ours - theirs.float()).abs().max() <= 1e-6 * float(ours.abs().max()) + 1e-8


def test_storages_that_cannot_be_written_to():
    class Odd(torch.Tensor):
        pass

    model = nn.Sequential(nn.Linear(5, 7))
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Odd))
    with pytest.raises(FormatError, match="cannot be written to"):
        merge(model, Adapter({"0": site_for(nn.Linear(5, 7))}))
