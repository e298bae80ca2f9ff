"""What every test shares: one thread, no network, tiny models made from their configs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import hypothesis
import pytest
import torch

# a busy machine is no failure: the time of one drawn case says nothing about the code. A change is
# judged by the same cases each time; elsewhere they are drawn anew
FIXED_DRAWS = os.environ.get("LORAKIT_DRAWS") == "fixed"
hypothesis.settings.register_profile("lorakit", deadline=None, derandomize=FIXED_DRAWS)
hypothesis.settings.load_profile("lorakit")

torch.set_num_threads(1)  # tiny models, and one seed gives one result


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; the test is skipped where it is not."""
    root = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[1].parent / "shared"))
    if not (root / "data").is_dir():
        pytest.skip("the real data is not here; set LORAKIT_SHARED")
    return root / "data"
