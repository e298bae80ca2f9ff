"""Fixtures of a tiny base on disk, its data, and a way to run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorakit.bases import load_base
from lorakit.core.spec import LoRASpec
from lorakit.data import DataSpec, load_data
from lorakit.train import Origin, Trainer, TrainSettings
from tests.train import tiny

SPEC = LoRASpec(rank=3, alpha=6, dropout=0.1)


@dataclass
class Workshop:
    """Files of one small task, and what is made of them."""

    base_folder: Path
    data_file: Path
    out: Path

    def base(self) -> Any:
        return load_base(str(self.base_folder), device="cpu", dtype="float32")

    def data(self, base: Any, path: Path | None = None) -> Any:
        spec = DataSpec(path=(str(path or self.data_file),))
        return load_data(spec, base.tokenizer, context_length=64)

    def trainer(self, out: str = "run", *, what: Any = SPEC, base: Any = None, **options: Any):
        """A trainer of 12 steps; ``options`` of the trainer, or else of its settings."""
        given = {
            name: options.pop(name)
            for name in (
                *("callbacks", "validation", "allow_other_base", "extra", "data"),
                *("world", "shard", "calibrate"),
            )
            if name in options
        }
        base = base or self.base()
        data = given.pop("data", None)
        data = data if data is not None else self.data(base)
        defaults = {"steps": 12, "batch_size": 3, "lr": 1e-2, "eval_every": 4, "samples": 0}
        settings = TrainSettings(**{**defaults, **options})
        origin = Origin(
            base={"ref": str(self.base_folder), "device": "cpu", "dtype": "float32"},
            data=DataSpec(path=str(self.data_file)),
        )
        return Trainer(base, what, data, settings, self.out / out, origin=origin, **given)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def shop(base_folder: Path, tmp_path: Path) -> Workshop:
    return open_shop(base_folder, tmp_path)


def open_shop(base_folder: Path, folder: Path) -> Workshop:
    """A workshop with the same 60 rows wherever it is."""
    return Workshop(base_folder, tiny.write_rows(folder / "data.jsonl", tiny.rows(60)), folder)
