# requires: llama-cpp-python==0.3.36
# build: CMAKE_BUILD_PARALLEL_LEVEL=2
# build: CMAKE_ARGS=-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
"""The compiled binding of llama.cpp gives logits, so the tolerance is the tightest (half an hour).

The key-value cache is in float32 and flash attention off.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cases import Work
from llama_cpp import GGML_TYPE_F32, Llama

#: logits in float32
BAR = 3e-4

work = Work("llama_cpp")


def logits(adapter: Path | None) -> np.ndarray:
    """Logits [T, V] of the prompt."""
    model = Llama(
        str(work.gguf),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        flash_attn=False,
        logits_all=True,
        verbose=False,
    )
    model.eval(work.prompt)
    return np.array(model.scores[: len(work.prompt)])


bare = logits(None)
work.agrees("base", bare, work.expected("base"), BAR)
for case in ("plain", "rslora", "patterns"):
    work.agrees(case, logits(work.own / f"{case}.gguf"), work.expected(case), BAR)
work.differs("no adapter", bare, work.expected("plain"), BAR)
work.differs("another adapter", logits(work.own / "rslora.gguf"), work.expected("plain"), BAR)
