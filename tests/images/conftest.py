"""A cache of its own for each test, and libraries that do not talk."""

from __future__ import annotations

import warnings

import pytest

from lorakit.images.base import PictureBase, load_pipeline
from tests.images import tiny


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _quiet():
    """diffusers and transformers warn of each other's coming versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loaded(family: str, prediction: str = "epsilon", dtype: str = "float32") -> PictureBase:
    """A tiny pipeline as a base, on the CPU."""
    length = 8 if family in ("sd3", "flux") else None
    folder = tiny.folder(family, prediction)
    return load_pipeline(folder, device="cpu", dtype=dtype, text_length=length)
