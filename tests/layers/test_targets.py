"""From words to modules, and what is said when they match nothing."""

from __future__ import annotations

import pytest

from lorakit import LoRASpec
from lorakit.errors import SpecError, TargetError
from lorakit.layers.targets import compact_targets, output_heads, resolve_targets

from .. import models


def ends(model, **spec):
    return {t.path.rpartition(".")[2] for t in resolve_targets(model, LoRASpec(rank=2, **spec))}


def paths(model, **spec):
    return [t.path for t in resolve_targets(model, LoRASpec(rank=2, **spec))]


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("make", "all_linear", "attention", "mlp"),
    [
        (models.llama, ATTENTION | MLP, ATTENTION, MLP),
        (models.gpt2, {"c_attn", "c_proj", "c_fc"}, {"c_attn", "c_proj"}, {"c_fc", "c_proj"}),
        (models.t5, {"q", "k", "v", "o", "wi", "wo"}, {"q", "k", "v", "o"}, {"wi", "wo"}),
        (
            models.bert_classifier,
            {"query", "key", "value", "dense"},
            {"query", "key", "value", "dense"},
            {"dense"},
        ),
    ],
)
def test_keywords(make, all_linear, attention, mlp):
    model = make()
    assert ends(model) == all_linear
    assert ends(model, targets="attention") == attention
    assert ends(model, targets="mlp") == mlp
    chosen = set(paths(model, targets="attention")) & set(paths(model, targets="mlp"))
    assert not chosen


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (models.llama, ["lm_head"]),
        (models.t5, ["lm_head"]),
        (models.bert_classifier, ["dropout", "classifier"]),
        (models.vit, ["classifier"]),
        (models.ConvNet, []),
    ],
)
def test_heads_are_left_out_of_all_linear(make, heads):
    model = make()
    assert output_heads(model) == heads
    assert not any(p.startswith(h) for p in paths(model) for h in heads)


def test_exact_suffix_and_regular_expression():
    model = models.llama()
    one = "model.layers.1.self_attn.q_proj"
    assert paths(model, targets=one) == [one]
    assert len(paths(model, targets="q_proj")) == 2
    assert len(paths(model, targets=("q_proj", "mlp.up_proj"))) == 4
    assert paths(model, targets=r".*\.1\..*[qk]_proj") == [one, one.replace("q_", "k_")]
    assert ends(model, targets="lm_head") == {"lm_head"}, "a head may be named"
    with pytest.raises(TargetError):  # not the end of a name
        paths(model, targets="proj")


def test_excludes_and_layers():
    model = models.llama(num_hidden_layers=4)
    assert ends(model, exclude=("k_proj", "mlp.up_proj")) == (ATTENTION | MLP) - {
        "k_proj",
        "up_proj",
    }

    def layers(text):
        return {int(p.split(".")[2]) for p in paths(model, layers=text)}

    assert layers("1-2") == {1, 2}
    assert layers("2-") == {2, 3}
    assert layers("0-1") == {0, 1}
    assert layers("0,3") == {0, 3}


def test_patterns():
    model = models.llama()
    spec = LoRASpec(
        rank=2, alpha=4, rank_pattern={"layers.0.*": 3, "q_proj": 5}, alpha_pattern={"mlp.*": 9}
    )
    found = {t.path: (t.rank, t.alpha) for t in resolve_targets(model, spec)}
    assert found["model.layers.0.self_attn.q_proj"] == (3, 4), "the first pattern that fits"
    assert found["model.layers.1.self_attn.q_proj"] == (5, 4)
    assert found["model.layers.1.mlp.up_proj"] == (2, 9)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"targets": "q_prj"}, "'q_prj' matches nothing; close: q_proj"),
        ({"targets": "zzzzz"}, "there are: "),
        ({"targets": ("q_proj", "nope_a", "nope_b")}, "nope_b"),
        ({"targets": "self_attn"}, "(LlamaAttention), which is no linear"),
        ({"targets": "([a"}, "is not a regular expression"),
        ({"exclude": ("embed",)}, "exclude 'embed' matches nothing"),
        ({"targets": "q_proj", "exclude": ("q_proj",)}, "leave nothing to adapt"),
        ({"layers": "0-9"}, "the blocks are numbered 0 to 1"),
        ({"layers": "a-b"}, "expected numbers and ranges"),
        ({"layers": "-1"}, "Write 0-1"),
        ({"layers": "0", "targets": "lm_head"}, "none of the targets lies in a numbered block"),
        ({"rank": 33}, "rank 33 is above its width 16"),
        ({"rank_pattern": {"c_attn": 4}}, "rank_pattern 'c_attn' matches none"),
        ({"alpha_pattern": {"(": 4}}, "is not a regular expression"),
        ({"train_modules": ("scores",)}, "train_modules entry 'scores' matches nothing"),
    ],
)
def test_what_matches_nothing_is_named(spec, words):
    with pytest.raises(TargetError) as caught:
        resolve_targets(models.llama(), LoRASpec(**{"rank": 2, **spec}))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": True}, "rank is True"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"scaling": "rslora"}, "scaling is 'rslora'; it must be one of alpha/r"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"targets": ()}, "targets is empty"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is 0"),
        ({"r": 8}, "r: here it is rank"),
        ({"lora_alpha": 8}, "lora_alpha: here it is alpha"),
        ({"target_modules": ["q"]}, "target_modules: here it is targets"),
        ({"use_rslora": True}, 'here it is scaling="alpha/sqrt(r)"'),
        ({"ranks": 8}, "ranks: the settings are"),
    ],
)
def test_impossible_settings_are_all_named(spec, words):
    with pytest.raises(SpecError) as caught:
        LoRASpec(**spec)
    assert words in str(caught.value)


def test_compact_targets_select_the_same():
    model = models.llama()
    assert compact_targets(model, paths(model, targets="attention")) == tuple(sorted(ATTENTION))
    some = paths(model, targets="attention", layers="0")
    assert compact_targets(model, some) == tuple(sorted(some))
