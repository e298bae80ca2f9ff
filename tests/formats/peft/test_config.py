"""Every field of PEFT's config maps, is harmless, or is named."""

from __future__ import annotations

import dataclasses
import logging
import warnings

import pytest

from lorakit.core.spec import LoRASpec
from lorakit.errors import SpecError, TargetError
from lorakit.formats.peft.config import (
    FILE_FACTS,
    FOREIGN,
    HARMLESS,
    MAPPED,
    TASK_TYPES,
    config_from_spec,
    read_config,
    spec_from_config,
)
from lorakit.layers.targets import resolve_targets
from tests import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def test_every_field_of_the_installed_peft_is_known():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= MAPPED | HARMLESS | set(FOREIGN)
    assert not MAPPED & HARMLESS
    assert not (MAPPED | HARMLESS) & set(FOREIGN)
    assert set(FILE_FACTS) <= HARMLESS
    assert set(TASK_TYPES) == {str(task.value) for task in peft.TaskType}


def test_pefts_defaults_are_ours():
    spec = spec_from_config(peft.LoraConfig(target_modules=["q"]).to_dict())
    assert spec == LoRASpec(rank=8, alpha=8.0, targets=("q",))


def test_every_mapped_field():
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules={"v", "q"},
        exclude_modules=["head"],
        layers_to_transform=[3, 1],
        rank_pattern={"z": 2, "a": 3},
        alpha_pattern={"z": 1.5},
        use_rslora=True,
        lora_dropout=0.1,
        bias="lora_only",
        modules_to_save=["score", "score", "norm"],
        init_lora_weights="gaussian",
    )
    spec = LoRASpec.from_peft(config)
    assert spec == LoRASpec(
        rank=4,
        alpha=6.0,
        targets=("q", "v"),
        exclude=("head",),
        layers="1,3",
        rank_pattern={"z": 2, "a": 3},
        alpha_pattern={"z": 1.5},
        scaling="alpha/sqrt(r)",
        dropout=0.1,
        bias="lora",
        train_modules=("score", "norm"),
        init="gaussian",
    )
    assert list(spec.rank_pattern) == ["z", "a"]  # the first that matches counts


@pytest.mark.parametrize(
    ("field", "ours"),
    [
        ({"layers_to_transform": 5}, {"layers": "5"}),
        ({"layers_to_transform": []}, {"layers": None}),
        ({"bias": "all"}, {"bias": "all"}),
        ({"init_lora_weights": True}, {"init": "kaiming"}),
        ({"init_lora_weights": "orthogonal"}, {"init": "orthogonal"}),
        ({"target_modules": "all-linear"}, {"targets": "all-linear"}),
        ({"target_modules": r".*\.q"}, {"targets": r".*\.q"}),
        ({"exclude_modules": r".*\.0\..*"}, {"exclude": (r"(?:.*\.0\..*)",)}),
        ({"exclude_modules": "q"}, {"exclude": ("(?:q)",)}),
        ({"rank_pattern": None}, {"rank_pattern": {}}),
    ],
)
def test_values(field, ours):
    spec = spec_from_config({"target_modules": ["q"], **field})
    assert {name: getattr(spec, name) for name in ours} == ours


FOREIGN_VALUES = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "ensure_weight_tying": True,
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1},
    "monteclora_config": {"num_samples": 8},
    "trainable_token_indices": [5],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 64},
}


def test_the_table_of_foreign_values_is_complete():
    assert set(FOREIGN_VALUES) == set(FOREIGN)


@pytest.mark.parametrize("field", FOREIGN_VALUES)
def test_foreign(field):
    with pytest.raises(SpecError, match=field):
        spec_from_config({"target_modules": ["q"], field: FOREIGN_VALUES[field]})
    for off in (None, False, [], {}):
        assert spec_from_config({"target_modules": ["q"], field: off})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*q_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
    ],
)
def test_the_same_modules_are_chosen(fields):
    """By PEFT in its own copy of the model, which is the oracle."""
    theirs = peft.get_peft_model(models.llama(), peft.LoraConfig(r=2, **fields))
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    spec = LoRASpec.from_peft({"r": 2, "lora_alpha": 8, **fields})
    assert {target.path for target in resolve_targets(models.llama(), spec)} == expected


def test_a_string_of_excluded_modules_is_an_expression_of_whole_paths():
    """In PEFT it leaves out nothing, so q_proj is adapted; here it is said and nothing begins."""
    spec = LoRASpec.from_peft({"target_modules": ["q_proj"], "exclude_modules": "q_proj"})
    with pytest.raises(TargetError, match=r"exclude '\(\?:q_proj\)' matches nothing"):
        resolve_targets(models.llama(), spec)


def test_a_new_bias_of_b_is_refused():
    with pytest.raises(SpecError, match="lora_bias"):
        LoRASpec.from_peft(peft.LoraConfig(target_modules=["q"], lora_bias=True))
    raw = {"target_modules": ["q"], "lora_bias": True}
    assert read_config(raw, trained=True)[1] == []


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_inits_that_moved_the_base(init):
    for trained in (True, False):
        _, problems = read_config(
            {"target_modules": ["q"], "init_lora_weights": init}, trained=trained
        )
        assert "moved the base" in problems[0]
        assert "path_initial_model_for_weight_conversion" in problems[0]


@pytest.mark.parametrize("init", ["eva", "mica"])
def test_inits_that_left_the_base_are_history_once_trained(init):
    raw = {"target_modules": ["q"], "init_lora_weights": init}
    spec, problems = read_config(raw, trained=True)
    assert spec is not None
    assert problems == []
    with pytest.raises(SpecError, match="is not available here"):
        spec_from_config(raw)


@pytest.mark.parametrize("init", ["magic", 3, ["a"], {"a": 1}])
def test_unknown_inits(init):
    with pytest.raises(SpecError, match="is unknown"):
        spec_from_config({"target_modules": ["q"], "init_lora_weights": init})


def test_random_b_is_said(caplog):
    spec_from_config({"target_modules": ["q"], "init_lora_weights": False})
    assert "here B starts at 0" in caplog.text


def test_a_head_that_peft_would_train_unasked_is_said(caplog):
    config = peft.LoraConfig(target_modules=["q"], task_type="SEQ_CLS")
    assert LoRASpec.from_peft(config).train_modules == ()
    assert "name it in train_modules" in caplog.text
    caplog.clear()
    config = peft.LoraConfig(target_modules=["q"], task_type="SEQ_CLS", modules_to_save=["score"])
    LoRASpec.from_peft(config)
    assert not caplog.text


def test_a_field_of_the_future(caplog):
    with caplog.at_level(logging.INFO, "lorakit"):
        assert spec_from_config({"target_modules": ["q"], "new_thing": None})
    assert "new_thing is unknown and off" in caplog.text
    with pytest.raises(SpecError, match=r"new_thing = 3: this field is unknown here"):
        spec_from_config({"target_modules": ["q"], "new_thing": 3})


def test_all_problems_at_once():
    raw = {"r": "4", "use_qalora": True, "init_lora_weights": "pissa", "odd": 1, "bias": "x"}
    with pytest.raises(SpecError) as caught:
        spec_from_config(raw)
    for word in ("r is '4'", "use_qalora", "pissa", "odd", "bias is 'x'", "target_modules is not"):
        assert word in str(caught.value)


def test_layers_below_a_named_list():
    """PEFT's two fields become one expression that selects the same modules."""
    raw = {"target_modules": ["q", "v"], "layers_to_transform": [0, 2], "layers_pattern": "h"}
    spec = spec_from_config(raw)
    config = peft.LoraConfig(**raw)
    import re

    from peft.tuners.tuners_utils import check_target_module_exists

    paths = [
        f"{a}.{i}.{b}" for a in ("t.h", "h", "t.x", "a.h.1.x") for i in range(4) for b in "qvk"
    ]
    paths += ["t.h.0.attn.q", "t.h.20.q", "t.h.2.attn.0.v"]
    assert isinstance(spec.targets, str)
    for path in paths:
        theirs = bool(check_target_module_exists(config, path))
        # PEFT counts the first list of that name, and inside another list there is none
        if not path.startswith("a.h.1"):
            assert (re.fullmatch(spec.targets, path) is not None) == theirs, path


def test_what_is_written_has_no_word_that_older_versions_warn_about():
    config = config_from_spec(LoRASpec(), target_modules=["b", "a"])
    assert list(config) == sorted(config)
    assert config["target_modules"] == ["a", "b"]
    newer = {"exclude_modules", "lora_bias", "peft_version", "qalora_group_size", "eva_config"}
    assert not newer & set(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peft.LoraConfig(**config).r == 16
