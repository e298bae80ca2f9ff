"""The exact sum: against dense float64, and what may not be added."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.algebra.combine import add, combine, negate, scale
from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank, Replace
from lorakit.core.spec import LoRASpec
from lorakit.errors import BaseError, FormatError, InputError, SpecError
from lorakit.formats import load_adapter, save_adapter
from tests.algebra.drawn import PLACES, adapters, bias_of, change, close, numbers, site_at, weights

Q = "model.layers.0.q_proj"


def one(seed: int = 0, rank: int = 2, path: str = Q, **options) -> Adapter:
    return Adapter({path: site_at(path, rank, seed, **options)})


pairs = st.lists(st.tuples(adapters(biases=True), weights), min_size=1, max_size=4)


@settings(max_examples=150)
@given(pairs)
def test_it_is_the_weighted_sum_of_the_dense_changes(given):
    found = combine(given)
    assert set(found.sites) == {path for adapter, _ in given for path in adapter.sites}
    for path in found.sites:
        expected = sum(weight * change(adapter, path) for adapter, weight in given)
        size = max(abs(weight) * float(change(a, path).abs().max()) for a, weight in given)
        close(change(found, path), expected, 1e-10, size)
        bias = sum(weight * bias_of(adapter, path) for adapter, weight in given)
        close(bias_of(found, path), bias, 1e-10, float(bias.abs().max()) + 1)


def test_the_oracle_sees_a_scaling_that_is_left_out():
    a, b = one(0, scaling=2.0), one(5, scaling=0.5)
    expected = 0.7 * change(a, Q) + 0.3 * change(b, Q)
    unscaled = combine([(one(0), 0.7), (one(5), 0.3)])
    with pytest.raises(AssertionError):
        close(change(unscaled, Q), expected, 1e-10)


@settings(max_examples=60)
@given(st.lists(st.tuples(adapters(), weights), min_size=2, max_size=3))
def test_factors_stay_bitwise_where_they_can(given):
    found = combine(given)
    for path, site in found.sites.items():
        own = [adapter.sites[path] for adapter, _ in given if path in adapter.sites]
        wide = torch.stack([torch.zeros((), dtype=s.A.dtype) for s in own[:1]]).dtype
        for other in own:
            wide = torch.promote_types(wide, other.A.dtype)
        assert site.A.dtype == wide
        rows = {tuple(row.tolist()) for row in site.A.double().flatten(1)}
        for other in own:
            assert {tuple(row.tolist()) for row in other.A.double().flatten(1)} <= rows


def test_powers_of_two_keep_the_dtype_and_others_widen_b_alone():
    a, b = (one(s, dtype=torch.bfloat16, scaling=2.0) for s in (0, 9))
    kept = combine([(a, 1.0), (b, -0.25)]).sites[Q]
    assert (kept.A.dtype, kept.B.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(kept.B[:, :2], a.sites[Q].B)
    assert torch.equal(kept.B[:, 2:], b.sites[Q].B * -0.25)
    widened = combine([(a, 0.7), (b, 0.3)]).sites[Q]
    assert (widened.A.dtype, widened.B.dtype) == (torch.bfloat16, torch.float64)
    assert torch.equal(widened.B[:, :2].bfloat16(), a.sites[Q].B)


def test_a_given_dtype_rounds_and_says_how_much():
    a, b = (one(s, dtype=torch.bfloat16) for s in (0, 9))
    found = combine([(a, 0.7), (b, 0.3)], dtype=torch.bfloat16)
    assert found.dtypes == {torch.bfloat16}
    expected = 0.7 * change(a, Q) + 0.3 * change(b, Q)
    error = float((change(found, Q) - expected).norm() / expected.norm())
    told = found.provenance["combined"]["sites"][Q]["relative_error"]
    assert told == pytest.approx(error, rel=1e-6)
    assert 1e-4 < told < 1e-2


def test_one_adapter_is_scaled_bitwise():
    a = one(0, scaling=1.5, dtype=torch.float16, bias=True)
    for found, factor in ((scale(a, 0.3), 0.3), (negate(a), -1.0)):
        site = found.sites[Q]
        assert site.A is a.sites[Q].A
        assert site.B is a.sites[Q].B
        assert site.scaling == 1.5 * factor
    close(bias_of(scale(a, 0.3), Q), 0.3 * bias_of(a, Q), 1e-15)


def test_adding_its_negative_leaves_nothing():
    a = one(3, scaling=0.7)
    assert float(change(add(a, negate(a)), Q).abs().max()) <= 1e-15


def test_a_weight_of_zero_leaves_an_adapter_out():
    a, b = one(0), one(5, path="embed")
    assert set(combine([(a, 1.0), (b, 0.0)]).sites) == {Q}


def test_a_scaling_of_zero_adds_nothing():
    a, b = one(0, scaling=0.0), one(5, scaling=3.0)
    close(change(combine([(a, 1.0), (b, 2.0)]), Q), 2 * change(b, Q), 1e-15)
    assert combine([(a, 1.0), (a, 2.0)]).sites[Q].scaling == 0.0


@settings(max_examples=40)
@given(given=st.lists(st.tuples(adapters(), weights), min_size=1, max_size=3))
def test_the_file_gives_it_back(tmp_path_factory, given):
    found = combine(given)
    again = load_adapter(save_adapter(found, tmp_path_factory.mktemp("x") / "adapter"))
    assert again.provenance["combined"] == found.provenance["combined"]
    for path, site in found.sites.items():
        assert torch.equal(site.A, again.sites[path].A)
        assert torch.equal(site.B, again.sites[path].B)
        assert site.scaling == again.sites[path].scaling


# --- trained whole -------------------------------------------------------------------------------


def whole(value: torch.Tensor) -> Adapter:
    return Adapter({Q: site_at(Q, 1, 0), "head": Replace({"weight": value})})


def test_values_are_averaged_where_the_weights_sum_to_one():
    base, first, second = (numbers(s, 3, 4) for s in (1, 2, 3))
    found = combine([(whole(first), 0.7), (whole(second), 0.3)])
    expected = base + 0.7 * (first - base) + 0.3 * (second - base)
    close(found.sites["head"].tensors()["weight"], expected, 1e-14)


def test_a_head_of_one_adapter_at_weight_one_stays_bitwise():
    head = numbers(1, 3, 4).bfloat16()
    found = combine([(whole(head), 1.0), (one(5), -0.4)])
    assert found.sites["head"].tensors()["weight"] is head
    assert found.sites[Q].rank == 3


def test_values_without_a_sum_are_refused_together():
    first, second = whole(numbers(1, 3, 4)), whole(numbers(2, 3, 4))
    second = second.with_(sites={**second.sites, "fc.bias": Replace({"": numbers(0, 2)})})
    with pytest.raises(InputError) as error:
        combine([(first, 0.5), (second, 0.7)], names=["a", "b"])
    assert "head: it was trained whole in a, b" in str(error.value)
    assert "0.5 + 0.7 = 1.2" in str(error.value)
    assert "fc.bias: it was trained whole in b" in str(error.value)
    with pytest.raises(InputError, match="only method='linear' averages"):
        combine([(first, 0.5), (first, 0.5)], "ties")
    with pytest.raises(InputError, match="trained whole"):
        scale(first, 2.0)


def test_low_rank_beside_trained_whole_is_refused():
    first = Adapter({"head": LowRank(numbers(1, 2, 4), numbers(2, 3, 2), 1.0)})
    with pytest.raises(InputError, match="head: adapter 2 changes it by low rank and adapter 1"):
        combine([(whole(numbers(1, 3, 4)), 1.0), (first, 1.0)])
    inner = Adapter({"head.dense": LowRank(numbers(1, 2, 4), numbers(2, 3, 2), 1.0)})
    with pytest.raises(InputError, match=r"head\.dense: lies inside head"):
        combine([(whole(numbers(1, 3, 4)), 1.0), (inner, 1.0)])


# --- refused ---------------------------------------------------------------------------------


def test_dora_refuses_addition_and_says_why():
    site = site_at(Q, 2, 0)
    dora = Adapter({Q: LowRank(site.A, site.B, 1.0, magnitude=numbers(4, 5).abs())})
    for call in (lambda: add(dora, one(5)), lambda: scale(dora, 0.5), lambda: negate(dora)):
        with pytest.raises(InputError) as error:
            call()
        text = str(error.value)
        assert Q in text
        assert "is not linear in ΔW" in text
        assert "lorakit merge" in text
        assert "lorakit extract" in text
    assert combine([(dora, 1.0)]).sites[Q].magnitude is not None


def test_shapes_kinds_and_groups_must_agree():
    sites = {path: site_at(path, 1, 0) for path in ("conv", "grouped", Q)}
    first = Adapter(sites)
    second = Adapter(
        {
            "conv": LowRank(numbers(0, 1, 3, 2, 2), numbers(1, 6, 1, 1, 1), 1.0, "conv"),
            "grouped": LowRank(numbers(0, 2, 4, 3), numbers(1, 6, 2, 1), 1.0, "conv"),
            Q: LowRank(numbers(0, 1, 7), numbers(1, 5, 1), 1.0, "embedding"),
        }
    )
    with pytest.raises(InputError) as error:
        add(first, second)
    for path in sites:
        assert f"{path}: its changes have different shapes" in str(error.value)


def identity(name: str, value: float = 0.5, **changes) -> BaseIdentity:
    facts = {"architecture": "LlamaForCausalLM", "shapes": {"w": (2,)}, "samples": {"w": (value,)}}
    return BaseIdentity(name, **{**facts, **changes})


@pytest.mark.parametrize(
    "other",
    [
        identity("two", 0.9),
        identity("two", architecture="GPT2LMHeadModel"),
        identity("two", shapes={}, samples={}),
    ],
)
def test_other_bases_are_refused_and_both_named(other):
    first, second = one(0).with_(base=identity("one")), one(5).with_(base=other)
    with pytest.raises(BaseError) as error:
        combine([(first, 1.0), (second, 1.0)], names=["a", "b"])
    assert "'one'" in str(error.value)
    assert "'two'" in str(error.value)
    assert "allow_other_base" in str(error.value)
    allowed = combine([(second, 1.0), (first, 1.0)], allow_other_base=True)
    assert allowed.base is not None
    assert allowed.base.shapes


def test_the_same_base_in_another_storage_is_allowed():
    other = identity("one", 0.5004, storage="bfloat16")
    assert add(one(0).with_(base=identity("one")), one(5).with_(base=other)).base is not None


def test_tasks_and_tokenizers_must_agree():
    first = one(0).with_(task_type="CAUSAL_LM", tokenizer_files={"tokenizer.json": b"1"})
    second = one(1).with_(task_type="SEQ_CLS", tokenizer_files={"tokenizer.json": b"2"})
    with pytest.raises(InputError, match=r"different tasks(.|\n)*another tokenizer"):
        add(first, second)
    found = add(first, one(3))
    assert (found.task_type, dict(found.tokenizer_files)) == ("CAUSAL_LM", {"tokenizer.json": b"1"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "method is 'mean'"),
        ({"density": 0.5}, "which method 'linear' does not use"),
        ({"method": "ties", "seed": 1}, "seed is 1, which method 'ties' does not use"),
        ({"method": "dare", "scope": "site"}, "scope is 'site', which method 'dare' does not use"),
        ({"method": "ties", "density": 0.0}, "density is 0.0"),
        ({"rank": 0}, "rank is 0"),
        ({"dtype": torch.int32}, "it must be a float"),
        ({"names": ["x", "y"]}, "2 names are given for 1"),
    ],
)
def test_settings_that_cannot_act(options, message):
    with pytest.raises(SpecError, match=message):
        combine([(one(0), 1.0)], **options)


@pytest.mark.parametrize("given", [[], [(one(0), 0.0)], [(one(0), float("nan"))]])
def test_weights_that_make_no_sum(given):
    with pytest.raises(SpecError):
        combine(given)


def test_a_sum_outside_a_dtype_is_refused():
    site = one(0).low_rank[Q]
    huge = Adapter({Q: dataclasses.replace(site, B=1e6 * site.B)})
    with pytest.raises(FormatError, match="NaN or Inf"):
        combine([(huge, 1.0), (one(1), 1.0)], dtype=torch.float16)


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_weights_far_apart_fit_a_narrow_dtype_in_any_order(method):
    """The larger one becomes the scaling, so that no factor grows."""
    given = [(one(0, dtype=torch.float16), 1e-3), (one(1, dtype=torch.float16), 1e3)]
    for pairs in (given, given[::-1]):
        found = change(combine(pairs, method=method, dtype=torch.float16), Q)
        expected = sum(weight * change(adapter, Q) for adapter, weight in pairs)
        size = expected.abs().max()
        assert (found - expected).abs().max() < 4e-3 * size  # fp16 has eleven bits


# --- history -----------------------------------------------------------------------------------


def test_the_history_names_what_was_combined():
    facts = {"data": {"digest": "d"}, "train": {"lr": 1}, "metrics": {"loss": 1.0}}
    first = one(0).with_(provenance=facts, base=identity("one"))
    second = one(5).with_(provenance={**facts, "train": {"lr": 2}}, base=identity("one"))
    found = combine([(first, 0.7), (second, 0.3)], names=["a", "b"]).provenance
    assert found["data"] == {"digest": "d"}
    assert "metrics" not in found
    told = found["combined"]
    assert (told["method"], told["relative_error"]) == ("linear", 0.0)
    assert [(m["name"], m["weight"], m["base"]) for m in told["adapters"]] == [
        ("a", 0.7, "one"),
        ("b", 0.3, "one"),
    ]
    assert told["adapters"][0]["provenance"] == {"train": {"lr": 1}, "metrics": {"loss": 1.0}}
    assert told["adapters"][0]["fingerprint"] != told["adapters"][1]["fingerprint"]


def test_settings_that_differ_give_way_to_the_sites():
    first = one(0).with_(spec=LoRASpec(targets="attention", dropout=0.1, layers="0-3"))
    second = one(0, 3, path="embed").with_(spec=LoRASpec(targets=("embed",), dropout=0.1))
    spec = add(first, second).spec
    assert spec.targets == ("embed", Q)
    assert (spec.layers, spec.dropout) == (None, 0.1)
    assert add(first, first).spec.targets == "attention"


def test_every_place_is_drawn():
    assert {kind for kind, *_ in PLACES.values()} == {"linear", "conv", "embedding"}
