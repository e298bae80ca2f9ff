"""The card: facts of the adapter, and a front matter that the hub accepts."""

from __future__ import annotations

import yaml

from lorakit.core.adapter import Adapter
from lorakit.formats import save_adapter
from lorakit.formats.card import model_card

from .small import small_adapter


def front_matter(card: str) -> dict:
    _, block, _ = card.split("---\n", 2)
    return yaml.safe_load(block)


def test_facts():
    card = model_card(small_adapter(), "owner/base")
    assert front_matter(card) == {
        "library_name": "peft",
        "base_model": "owner/base",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorakit"],
    }
    for fact in (
        "| rank | 4 |",
        "| modules | q_proj, v_proj |",
        "| bleu | 52 |",
        "| digest | ab12 |",
    ):
        assert fact in card
    assert 'AutoModelForCausalLM.from_pretrained("owner/base")' in card
    assert 'lorakit.load_base("owner/base")' in card


def test_a_local_base_is_kept_from_the_front_matter():
    """The hub refuses an upload whose base_model is no id."""
    card = model_card(small_adapter(), "/home/me/model")
    assert "base_model" not in front_matter(card)
    assert "# LoRA adapter for /home/me/model" in card


def test_no_base_and_no_provenance():
    card = model_card(Adapter(small_adapter().sites), None)
    assert "the base that it was trained on" in card
    assert "Results" not in card


def test_odd_facts_stay_in_their_cell():
    told = {"metrics": {"a": "x | y\nz", "b": [1, {"c": 2}], "d": None, "e": "é" * 300}}
    card = model_card(small_adapter(provenance=told), None)
    assert "| a | x \\| y z |" in card
    assert '| b | [1, {"c": 2}] |' in card
    assert "| d |" not in card
    assert max(map(len, card.splitlines())) < 300


def test_it_is_in_the_folder(tmp_path):
    folder = save_adapter(small_adapter(), tmp_path / "a")
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card(
        small_adapter(), "owner/base"
    )
