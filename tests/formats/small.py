"""One small adapter, and the bytes of a folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank
from lorakit.core.spec import LoRASpec

#: where writing to the disk costs nothing, if there is such a place
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def small_adapter(**changes) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    sites = {
        f"model.layers.{i}.attn.{name}": LowRank(
            torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator), 2.0
        )
        for i in range(3)
        for name in ("q_proj", "v_proj")
    }
    base = BaseIdentity("owner/base", "LlamaForCausalLM", {"w": (2, 3)}, {"w": (0.5, 1.0)})
    adapter = Adapter(
        sites,
        LoRASpec(rank=4, alpha=8, targets=("v_proj", "q_proj"), rank_pattern={"k": 1, "a": 2}),
        base=base,
        provenance={"metrics": {"loss": 1.25, "bleu": 52.0}, "data": {"digest": "ab12"}},
        tokenizer_files={"chat_template.jinja": b"{{ x }}"},
        task_type="CAUSAL_LM",
    )
    return adapter.with_(**changes)
