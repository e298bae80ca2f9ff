# requires: mistralrs==0.9.5
# requires: numpy==2.4.6
"""mistral.rs reads the PEFT folder as it is, and tells log-probabilities as it generates."""

from __future__ import annotations

import json

import numpy as np
from cases import Work, log_probs
from mistralrs import ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which

#: the bare base differs from transformers by 0.0085 in it, whatever the adapter; nothing is tighter
BAR = 0.02
TOP = 500

work = Work("mistralrs")
#: its own template would put a system message in front
template = work.own / "plain.jinja"
template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def runner(*cases: str) -> Runner:
    adapters = [LoraAdapter(alias=case, source=str(work.adapter(case))) for case in cases]
    which = Which.Lora(model_id=str(work.base), adapters=adapters, dtype=ModelDType.F32)
    return Runner(which, jinja_explicit=str(template))


def differences(model: Runner, case: str, adapter: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [N · TOP] of the likeliest tokens as it says them, and as they must be.

    Compared as far as it generates what is expected; later steps have another text behind them.
    """
    ids, logits = work.continuation(case)
    expected = log_probs(logits)
    text = json.loads((work.folder / "prompt.json").read_text())["text"]
    answer = model.send_chat_completion_request(
        ChatCompletionRequest(
            messages=text,
            model="default",
            adapter=adapter,
            logprobs=True,
            top_logprobs=TOP,
            max_tokens=len(ids),
            temperature=0.0,
        )
    )
    assert answer.usage.prompt_tokens == len(work.prompt), answer.usage.prompt_tokens
    told, meant = [], []
    for step, said in enumerate(answer.choices[0].logprobs.content):
        for other in said.top_logprobs:
            told.append(other.logprob)
            meant.append(expected[step, other.token])
        likeliest = max(said.top_logprobs, key=lambda other: other.logprob)
        if likeliest.token != ids[step]:
            break
    return np.array(told), np.array(meant)


model = runner("plain", "rslora", "patterns")
work.agrees("base", *differences(model, "base", None), BAR, "log-probs")
for case in ("plain", "rslora", "patterns"):
    work.agrees(case, *differences(model, case, case), BAR, "log-probs")
work.differs("adapter= left out", *differences(model, "plain", None), BAR, "log-probs")
work.differs("another adapter", *differences(model, "plain", "patterns"), BAR, "log-probs")
del model

for case in ("dora", "embedding"):
    try:
        runner(case)
    except Exception as error:
        work.refuses(f"{case} is refused", error)
    else:
        work.refuses(f"{case} is refused", None)
