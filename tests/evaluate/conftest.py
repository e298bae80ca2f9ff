"""A tiny base that reads bytes, and files of rows for it."""

import json

import pytest
import torch

from lorakit.bases import Base, Placement, identify
from lorakit.data import DataSpec, load_data
from tests.infer.conftest import all_double, byte_tokenizer, make

__all__ = ["all_double"]

ROWS = [
    {"prompt": "one", "completion": "eins"},
    {"prompt": "two", "completion": "zwei"},
    {"prompt": "one", "completion": "ein einziges"},
    {"prompt": "three times", "completion": "drei"},
]


@pytest.fixture
def base():
    tokens = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    model = make("llama", **tokens)
    placement = Placement(torch.device("cpu"), torch.float32, "a test")
    return Base(model, byte_tokenizer(), "tiny", identify(model, "tiny"), placement)


@pytest.fixture
def load(base, tmp_path):
    """``load(rows, **settings)``: rows → TokenData."""

    def loaded(rows=ROWS, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = DataSpec(str(path), **settings)
        return load_data(spec, base.tokenizer, context_length=64)

    return loaded
