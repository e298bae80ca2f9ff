"""Our saved adapters in the real mistral.rs: its log-probabilities beside those of our attaching.

Skipped where mistralrs is not installed. A base of two random layers with grouped heads, so that
it loads in a moment; ``tests/interop/runtimes/check_mistralrs.py`` does the same with SmolLM2.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit import LoRASpec, attach, save_adapter
from tests.models import llama, randomize

mistralrs = pytest.importorskip("mistralrs")

#: log-probabilities over the whole vocabulary; the bare base differs from transformers by 0.0063 in
#: its float32, whatever the adapter, so nothing is tighter
BAR = 0.03
#: what a mistake has to move them by at least
FAR = 0.6

PROMPT = "The ship."
STEPS = 5

SPECS = {
    "plain": LoRASpec(rank=4, alpha=12),
    "rslora": LoRASpec(rank=4, alpha=3, scaling="alpha/sqrt(r)"),
    "patterns": LoRASpec(
        rank=4,
        alpha=12,
        rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
        alpha_pattern={"up_proj": 5, r"layers\.0\.self_attn\.k_proj": 20},
    ),
}


def byte_tokenizer() -> Any:
    """A token for every byte and one for the end; mistral.rs takes no tokenizer without bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


class Served:
    """A base and adapters on the disk, what they must give, and mistral.rs with all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = byte_tokenizer()
        self.model = self._base()
        self.expected = {"base": self._continued()}
        for case, spec in SPECS.items():
            handle = attach(self.model, spec)
            randomize(handle, scale=0.1)
            save_adapter(handle.snapshot().with_(task_type="CAUSAL_LM"), folder / case)
            self.expected[case] = self._continued()
            handle.detach()
        self.runner = self.load(*SPECS)

    def _base(self) -> Any:
        torch.manual_seed(0)
        model = llama(
            vocab_size=len(self.tokenizer), hidden_size=64, intermediate_size=96,
            initializer_range=0.2, bos_token_id=None, eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        model.save_pretrained(self.folder / "base")
        self.tokenizer.save_pretrained(self.folder / "base")
        place = self.folder / "base" / "config.json"
        config = json.loads(place.read_text())
        # where transformers 4 put it and mistral.rs looks for it
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        place.write_text(json.dumps(config))
        # its own template would add words of a chat
        text = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        (self.folder / "plain.jinja").write_text(text)
        return model

    def load(self, *cases: str) -> Any:
        """mistral.rs with the base and some adapters."""
        which = mistralrs.Which.Lora(
            model_id=str(self.folder / "base"),
            adapters=[
                mistralrs.LoraAdapter(alias=case, source=str(self.folder / case)) for case in cases
            ],
            dtype=mistralrs.ModelDType.F32,
        )
        return mistralrs.Runner(which, jinja_explicit=str(self.folder / "plain.jinja"))

    @torch.no_grad()
    def _continued(self) -> tuple[list[int], np.ndarray]:
        """The likeliest STEPS tokens after the prompt, and the log-probabilities [STEPS, V]."""
        ids = list(self.tokenizer(PROMPT)["input_ids"])
        rows = []
        for _ in range(STEPS):
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            rows.append(logits.log_softmax(-1).numpy())
            ids.append(int(logits.argmax()))
        return ids[-STEPS:], np.stack(rows)

    def difference(self, case: str, adapter: str | None) -> float:
        """The largest one between what it says with ``adapter`` and what ``case`` must give.

        Only as far as it generates what is expected: later steps follow another text.
        """
        ids, expected = self.expected[case]
        answer = self.runner.send_chat_completion_request(
            mistralrs.ChatCompletionRequest(
                messages=PROMPT,
                model="default",
                adapter=adapter,
                logprobs=True,
                top_logprobs=len(self.tokenizer),
                max_tokens=STEPS,
                temperature=0.0,
            )
        )
        assert answer.usage.prompt_tokens == len(PROMPT)
        largest, steps = 0.0, answer.choices[0].logprobs.content
        assert steps
        for step, said in enumerate(steps):
            told = {other.token: other.logprob for other in said.top_logprobs}
            assert sorted(told) == list(range(len(self.tokenizer)))
            got = np.array([told[token] for token in range(len(self.tokenizer))])
            largest = max(largest, float(np.abs(got - expected[step]).max()))
            if got.argmax() != ids[step]:
                break
        return largest


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))


def test_the_bare_base_agrees(served):
    assert served.difference("base", None) < BAR


@pytest.mark.parametrize("case", SPECS)
def test_an_adapter_gives_what_ours_gives(served, case):
    assert served.difference(case, case) < BAR


@pytest.mark.parametrize("case", SPECS)
def test_without_it_or_with_another_the_check_would_fail(served, case):
    other = next(name for name in SPECS if name != case)
    assert served.difference(case, None) > FAR
    assert served.difference(case, other) > FAR


def test_dora_is_refused(served):
    handle = attach(served.model, replace(SPECS["plain"], variant="dora"))
    try:
        randomize(handle, scale=0.1)
        save_adapter(handle.snapshot(), served.folder / "dora")
    finally:
        handle.detach()
    with pytest.raises(ValueError, match="DoRA"):
        served.load("dora")
