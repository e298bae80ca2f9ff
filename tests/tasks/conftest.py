"""One tiny base and one file of rows for each kind, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.bases import Base
from lorakit.bases.config import read_config
from lorakit.core.spec import LoRASpec
from lorakit.layers import attach
from lorakit.tasks.registry import row_kind
from lorakit.tasks.rows import RowData, RowSpec

from . import small


@dataclass
class Bench:
    """A kind with its base, its data, and where both came from."""

    name: str
    folder: Path
    file: Path
    kind: Any

    def base(self, **options: Any) -> Base:
        settings = {"ref": str(self.folder), "device": "cpu", "dtype": "float32", **options}
        return self.kind.load_base(**settings)

    def data(self, base: Base, **options: Any) -> RowData:
        return self.kind.load_data(RowSpec((str(self.file),), **options), base)

    def attached(self, base: Base, spec: LoRASpec | None = None, name: str = "a") -> Any:
        """A handle whose adapter is far from its beginning."""
        spec = spec or LoRASpec(rank=2, alpha=3)
        spec, _ = self.kind.adapter_spec(spec, base)
        handle = attach(base.model, spec, name, trainable=True, seed=1)
        stir(handle, name)
        return handle


def stir(handle: Any, name: str, seed: int = 3) -> None:
    """Move an adapter's tensors by random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters(name):
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))


def _made(folder: Path, name: str) -> Bench:
    words = small.texts(30)
    pairs = [{"prompt": row["text"], "completion": row["target"]} for row in words]
    content = {
        "classify": (small.write_bert, words),
        "t5": (small.write_t5, pairs),
        "bart": (small.write_bart, pairs),
        "embed": (
            small.write_bert,
            [{"anchor": row["text"], "positive": row["target"]} for row in words],
        ),
    }
    if name == "vision":
        write, rows = small.write_vit, small.write_pictures(folder, 16)
    elif name == "vision-chat":
        write, rows = small.write_smolvlm, small.write_chats(folder, 16)
    elif name == "speech":
        write, rows = small.write_whisper, small.write_sounds(folder, 12)
    else:
        write, rows = content[name]
    base = write(folder / "base")
    file = small.write_rows(folder / "rows.jsonl", rows)
    kind = row_kind({"t5": "seq2seq", "bart": "seq2seq"}.get(name, name))
    return Bench(name, base, file, kind.fitted(RowSpec((str(file),)), read_config(str(base))))


KINDS = ("classify", "t5", "bart", "vision", "speech", "embed", "vision-chat")
#: bart's code is t5's but for its positions, which have tests of their own
SHOWN = tuple(name for name in KINDS if name != "bart")


@pytest.fixture(scope="session")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    return {name: _made(tmp_path_factory.mktemp(name), name) for name in KINDS}


@pytest.fixture(params=SHOWN)
def bench(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> Bench:
    return benches[request.param]
