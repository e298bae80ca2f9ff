# requires: openvino-genai==2026.4.1.0
# requires: optimum-intel==2.2.0
# requires: openvino-tokenizers
# without: torchvision
"""OpenVINO GenAI reads the PEFT folder's tensors and no config: folded at 1, or at alpha / r."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
from cases import Work, log_probs
from openvino_genai import (
    Adapter,
    AdapterConfig,
    ContinuousBatchingPipeline,
    GenerationConfig,
    SchedulerConfig,
)

#: log-probabilities of single tokens; the bare base differs by 2e-4
BAR = 1e-3
#: the fused sum is kept in another form, and is farther off
FUSED_BAR = 5e-3
PRECISE = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "INFERENCE_NUM_THREADS": 1,
}
MODES = ("MODE_AUTO", "MODE_DYNAMIC", "MODE_STATIC_RANK", "MODE_STATIC", "MODE_FUSE")

work = Work("openvino")


def exported() -> Path:
    """The base as OpenVINO's own exporter writes it, made once."""
    model = work.own / "model"
    if not (model / "openvino_tokenizer.xml").exists():
        shutil.rmtree(model, ignore_errors=True)
        command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino"]
        flags = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
        subprocess.run([*command, "--model", work.base, *flags, model], check=True, stdout=2)
    return model


def told(adapter: AdapterConfig | None, case: str) -> np.ndarray:
    """Log-probabilities of the prompt's tokens but the first, and of those it generates."""
    scheduler = SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    chosen = {} if adapter is None else {"adapters": adapter}
    pipeline = ContinuousBatchingPipeline(str(exported()), scheduler, "CPU", {**PRECISE, **chosen})
    ids, _ = work.continuation(case)
    settings = GenerationConfig(
        max_new_tokens=len(ids), do_sample=False, logprobs=1, echo=True, ignore_eos=True
    )
    if adapter is not None:
        settings.adapters = adapter
    prompt = openvino.Tensor(np.array([work.prompt], dtype=np.int64))
    # only generate() switches an adapter on; only a request tells the log-probabilities
    pipeline.generate([prompt], [settings])
    handle = pipeline.add_request(1, prompt, settings)
    while pipeline.has_non_finished_requests():
        pipeline.step()
    (output,) = handle.read_all()
    assert len(output.generated_log_probs) == len(work.prompt) + len(ids)
    return np.array(output.generated_log_probs[1:])


def expected(case: str) -> np.ndarray:
    ids, logits = work.continuation(case)
    read = log_probs(work.expected(case))
    asked = [read[i, token] for i, token in enumerate(work.prompt[1:])]
    return np.array(asked + [row[token] for row, token in zip(log_probs(logits), ids, strict=True)])


def config(folder: Path, scale: float, mode: str = "MODE_AUTO") -> AdapterConfig:
    weights = Adapter(str(folder / "adapter_model.safetensors"))
    return AdapterConfig(weights, scale, getattr(AdapterConfig.Mode, mode))


bare = told(None, "base")
work.agrees("base", bare, expected("base"), BAR, "log-probs")
for mode in MODES:
    bar = FUSED_BAR if mode == "MODE_FUSE" else BAR
    got = told(config(work.own / "plain", 1.0, mode), "plain")
    work.agrees(f"plain, folded, {mode}", got, expected("plain"), bar, "log-probs")
for case in ("rslora", "patterns", "tied_head"):
    got = told(config(work.own / case, 1.0), case)
    work.agrees(f"{case}, folded", got, expected(case), BAR, "log-probs")
for mode in ("MODE_AUTO", "MODE_STATIC"):
    got = told(config(work.adapter("plain"), 32 / 8, mode), "plain")
    work.agrees(f"plain, as it is, alpha / r, {mode}", got, expected("plain"), BAR, "log-probs")
work.differs(
    "plain, as it is, at 1", told(config(work.adapter("plain"), 1.0), "plain"),
    expected("plain"), BAR, "log-probs",
)  # fmt: skip
work.differs(
    "dora, whose magnitudes it drops without a word",
    told(config(work.adapter("dora"), 4.0), "dora"),
    expected("dora"), BAR, "log-probs",
)  # fmt: skip
