# requires: xllamacpp==2026.10.11549
# requires: numpy==2.4.6
"""llama.cpp runs whole models that `lorakit merge --to gguf` wrote, and tells all log-probs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from cases import Work, log_probs

#: in float32
BAR = 1e-3
#: nats; llama.cpp multiplies packed weights with activations rounded to 8 bits, transformers does
#: not, which moves unlikely tokens by up to 1. A file of others, the base as it is published, shows
#: how much of that is llama.cpp's own: 0.008 nats
QUANTISED_BAR = 0.01
LENGTHS = (6, 13, 20)

work = Work("llama_cpp_model")


def server(path: Path) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    return xllamacpp.Server(params)


def told(runtime: Any, prompt: list[int] | str, vocabulary: int) -> tuple[int, np.ndarray]:
    """How many tokens it read, and the log-probabilities [V] of the next."""
    answer = runtime.handle_completions(
        {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": vocabulary,
            "temperature": 0.0,
            "cache_prompt": False,
            # a part of a character, or the end, would be said without its log-probabilities;
            # those that are told are the model's own, before this
            "logit_bias": [["a", 100.0]],
        }
    )
    row = np.full(vocabulary, np.nan)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return answer["usage"]["prompt_tokens"], row


def large(name: str) -> np.ndarray:
    """Log-probabilities [len(LENGTHS), V] of a file, which is then removed."""
    path = work.own / f"{name}.gguf"
    runtime = server(path)
    vocabulary = work.expected("base").shape[1]
    rows = [told(runtime, work.prompt[:length], vocabulary)[1] for length in LENGTHS]
    del runtime
    path.unlink()
    return np.array(rows)


def expected(logits: np.ndarray) -> np.ndarray:
    return log_probs(logits[[length - 1 for length in LENGTHS]])


def divergence(got: np.ndarray, must: np.ndarray) -> np.ndarray:
    """Kullback–Leibler divergence [N] of what was told from what must be, in nats."""
    return (np.exp(must) * (must - got)).sum(-1)


for path in sorted(work.own.glob("tiny_*.npz")):
    stored = np.load(path)
    runtime = server(path.with_suffix(".gguf"))
    vocabulary = stored["logits_0"].shape[1]
    got, must, same = [], [], True
    for number in range(3):
        ids = [int(i) for i in stored[f"ids_{number}"]]
        got.append(told(runtime, ids, vocabulary)[1])
        must.append(log_probs(stored[f"logits_{number}"][-1]))
        # the same tokens from the text give the same numbers, bit for bit
        count, row = told(runtime, str(stored[f"text_{number}"]), vocabulary)
        same = same and count == len(ids) and bool((row == got[-1]).all())
    name = path.stem.removeprefix("tiny_")
    work.agrees(f"tiny {name}", np.array(got), np.array(must), BAR, "log-probs")
    work.holds(f"tiny {name}: text is cut as by transformers", same)
    del runtime

stored = np.load(work.own / "tiny_qwen2.npz")
count, _ = told(server(work.own / "wrong_rule.gguf"), str(stored["text_0"]), 416)
work.holds("another cutting rule is noticed", count != len(stored["ids_0"]))

plain = expected(work.expected("plain"))
work.agrees("GGUF base, f32", large("from_gguf"), plain, BAR, "log-probs")
work.agrees("transformers folder, f32", large("from_folder"), plain, BAR, "log-probs")
for case in ("embedding", "dora"):
    must_be = expected(work.expected(case))
    work.agrees(f"{case}, f32", large(case), must_be, BAR, "log-probs")
for kind in ("original", "q8_0", "q4_0"):
    logits = work.expected("base") if kind == "original" else np.load(work.own / f"{kind}.npy")
    far = divergence(large(kind), expected(logits))
    name = "SmolLM2 as published, Q4_1, no adapter" if kind == "original" else kind
    work.agrees(f"{name}: transformers on the file", far, far * 0, QUANTISED_BAR, "nats")
    if kind != "original":
        without = divergence(expected(work.expected("base")), expected(logits))
        work.holds(f"{kind}: without the adapter it is further off", without.max() > 3 * far.max())
work.differs("rows of q and k not permuted", large("unpermuted"), plain, BAR, "log-probs")
