"""Every test of bases has a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bases import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lorakit-cache"
    monkeypatch.setenv("LORAKIT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole base; do not change it."""
    return tiny.write_folder(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base as a float32 GGUF; do not change it."""
    return tiny.write_gguf(tmp_path_factory.mktemp("ggufs") / "tiny.gguf")
