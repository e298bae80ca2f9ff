# requires: xllamacpp==2026.10.11549
# requires: numpy==2.4.6
"""llama.cpp reads our GGUF adapters beside a float32 GGUF of the base, and tells all log-probs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xllamacpp
from cases import Work, log_probs

#: in float32; FORMATS' goal, five times what the bare base differs by
BAR = 1e-3
#: prompts of these lengths are read, and the next token's log-probabilities compared
LENGTHS = (6, 13, 20)

work = Work("xllamacpp")


def told(adapter: Path | None) -> np.ndarray:
    """Log-probabilities [len(LENGTHS), V] over the whole vocabulary."""
    params = xllamacpp.CommonParams()
    params.model.path = str(work.gguf)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    vocabulary = work.expected("base").shape[1]
    rows = []
    for length in LENGTHS:
        answer = server.handle_completions(
            {
                "prompt": work.prompt[:length],
                "n_predict": 1,
                "n_probs": vocabulary,
                "temperature": 0.0,
                "cache_prompt": False,
            }
        )
        assert answer["usage"]["prompt_tokens"] == length, answer["usage"]
        row = np.full(vocabulary, np.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    return np.array(rows)


def expected(case: str) -> np.ndarray:
    return log_probs(work.expected(case)[[length - 1 for length in LENGTHS]])


bare = told(None)
work.agrees("base", bare, expected("base"), BAR, "log-probs")
for case in ("plain", "rslora", "patterns"):
    work.agrees(case, told(work.own / f"{case}.gguf"), expected(case), BAR, "log-probs")
direct = told(work.own / "direct.gguf")
work.agrees("plain, by `--to gguf`", direct, expected("plain"), BAR, "log-probs")
wrong = told(work.own / "unpermuted.gguf")
work.differs("rows of q and k not permuted", wrong, expected("plain"), BAR, "log-probs")
work.differs("no adapter", bare, expected("plain"), BAR, "log-probs")
