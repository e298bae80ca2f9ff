"""Our reading of PEFT's matching rules against PEFT's own functions."""

from __future__ import annotations

import math
import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.sites import LowRank
from lorakit.core.spec import LoRASpec
from lorakit.formats.peft.match import Patterned, Selection, fitting_spec, scalings, select

from ..adapters import NAMES, paths, specs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

words = st.sampled_from([*NAMES[:7], "layers.1.fc", "attn.x", "1.mlp.fc", "h.0.x"])


@settings(max_examples=200, deadline=None)
@given(
    paths(),
    st.one_of(
        st.lists(words, max_size=3),
        st.sampled_from([r".*\.x", r"(.*\.)?(fc|conv)", "fc", r"h\..*"]),
    ),
    st.lists(words, max_size=2),
    st.none() | st.lists(st.integers(0, 11), min_size=1, max_size=3),
)
def test_selection(module_paths, targets, exclude, layers):
    layers = None if isinstance(targets, str) else layers
    config = peft.LoraConfig(
        target_modules=targets, exclude_modules=exclude, layers_to_transform=layers
    )
    ours = Selection(
        targets if isinstance(targets, str) else tuple(targets),
        tuple(exclude),
        None if layers is None else tuple(layers),
    )
    for path in module_paths:
        assert ours.selects(path) == bool(check_target_module_exists(config, path)), path


@settings(max_examples=200, deadline=None)
@given(
    paths(),
    st.dictionaries(
        st.sampled_from(
            [*NAMES[:6], "^fc", r"layers\.1\..*", "layers.1.mlp.fc", "h.0.x", r".*", "attn.(x|fc)"]
        ),
        st.integers(1, 9),
        max_size=4,
    ),
)
def test_patterns(module_paths, pattern):
    ours = Patterned(99, pattern)
    for path in module_paths:
        assert ours.at(path) == pattern.get(get_pattern_key(pattern.keys(), path), 99)


@settings(max_examples=150, deadline=None)
@given(specs(), paths(), st.data())
def test_what_is_written_gives_the_sites_under_pefts_rules(spec, module_paths, data):
    sites = {
        path: LowRank(
            torch.ones(rank, 2),
            torch.ones(2, rank),
            data.draw(st.sampled_from([1.0, 2.0, 32 / 3, 0.1, math.pi])),
        )
        for path in module_paths
        for rank in [data.draw(st.integers(1, 5))]
    }
    fitted = fitting_spec(spec, sites)
    selection = select(fitted, list(sites))
    config = peft.LoraConfig(
        r=fitted.rank,
        lora_alpha=fitted.alpha,
        rank_pattern=dict(fitted.rank_pattern),
        alpha_pattern=dict(fitted.alpha_pattern),
        use_rslora=fitted.scaling == "alpha/sqrt(r)",
        target_modules=(
            selection.target_modules
            if isinstance(selection.target_modules, str)
            else list(selection.target_modules)
        ),
        exclude_modules=list(selection.exclude_modules),
        layers_to_transform=(
            None if selection.layers_to_transform is None else list(selection.layers_to_transform)
        ),
    )
    for path, site in sites.items():
        assert check_target_module_exists(config, path), path
        key = get_pattern_key(config.rank_pattern.keys(), path)
        rank = config.rank_pattern.get(key, config.r)
        assert rank == site.rank, path
        key = get_pattern_key(config.alpha_pattern.keys(), path)
        alpha = config.alpha_pattern.get(key, config.lora_alpha)
        scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        # to the last bit, but where no alpha divides to it
        assert math.isclose(scaling, site.scaling, rel_tol=1e-15), path
        assert scalings(fitted, [path])[path] == scaling


def test_own_settings_stay_where_they_hold():
    spec = LoRASpec(rank=4, alpha=8, rank_pattern={"q": 2, ".*": 4}, alpha_pattern={"q": 4.0})
    sites = {
        "a.q": LowRank(torch.ones(2, 2), torch.ones(2, 2), 2.0),
        "a.v": LowRank(torch.ones(4, 2), torch.ones(2, 4), 2.0),
    }
    assert fitting_spec(spec, sites) == spec


def test_names_that_are_expressions_by_accident():
    sites = {
        path: LowRank(torch.ones(rank, 2), torch.ones(2, rank), 1.0)
        for path, rank in [("a.b+", 1), ("a.bb", 2), ("a.(", 3), ("a.c", 2)]
    }
    fitted = fitting_spec(LoRASpec(), sites)
    ranks = Patterned(fitted.rank, fitted.rank_pattern)
    assert {path: ranks.at(path) for path in sites} == {p: s.rank for p, s in sites.items()}


def test_a_path_that_ends_another():
    sites = {
        path: LowRank(torch.ones(rank, 2), torch.ones(2, rank), 1.0)
        for path, rank in [("b.0", 1), ("a.b.0", 2), ("a.b.1", 2)]
    }
    fitted = fitting_spec(LoRASpec(rank=9), sites)
    ranks = Patterned(fitted.rank, fitted.rank_pattern)
    assert {path: ranks.at(path) for path in sites} == {p: s.rank for p, s in sites.items()}
