"""Examples that are too long: what gives way, and that it is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data import DataSpec, load_data
from lorakit.errors import DataError

from .toys import make_tokenizer, supervised_text, write_jsonl

TOKENIZER = make_tokenizer()
FRAME = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def load(folder, row, **settings):
    path = write_jsonl(folder / "a.jsonl", [row])
    return load_data(DataSpec(path, truncate=True, **settings), TOKENIZER)


def test_a_prompt_loses_its_left_and_keeps_its_template(tmp_path):
    row = {"prompt": "".join(f"{n}," for n in range(200)), "completion": "the cat"}
    data = load(tmp_path, row, max_length=80)
    text = TOKENIZER.decode(data[0].ids)
    start, end = FRAME.split("{}")
    assert text.startswith(start)
    assert text.endswith(f"198,199,{end}the cat<|im_end|>")
    assert 70 <= len(data[0].ids) <= 80
    assert data.item(0).prompt == text.removesuffix("the cat<|im_end|>")
    assert data.report.cuts[0] == "1 prompt shortened from the left"
    assert any("Truncated" in line for line in data.report.lines())


def test_a_completion_that_does_not_fit_loses_its_end(tmp_path):
    row = {"prompt": "what", "completion": "".join(f"{n}," for n in range(200))}
    data = load(tmp_path, row, max_length=64)
    assert len(data[0].ids) == 64
    assert TOKENIZER.decode(data[0].ids).startswith(FRAME.format("what") + "0,1,2,")
    assert not supervised_text(TOKENIZER, data[0])[0].endswith("<|im_end|>")
    assert "cut at the end" in data.report.cuts[0]


def test_chats_lose_their_oldest_turns(tmp_path):
    chat = [{"role": "system", "content": "be"}]
    for n in range(12):
        chat += [
            {"role": "user", "content": f"what is {n}"},
            {"role": "assistant", "content": f"the {n}"},
        ]
    data = load(tmp_path, {"messages": chat}, max_length=120)
    text = TOKENIZER.decode(data[0].ids)
    assert text.startswith("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nwhat is ")
    assert text.endswith("the 11<|im_end|>")
    assert "what is 0" not in text
    assert len(data[0].ids) <= 120
    assert "1 chat without the oldest turns" in data.report.cuts


def test_plain_text_loses_its_end(tmp_path):
    data = load(tmp_path, {"text": "the cat " * 40}, max_length=20)
    assert len(data[0].ids) == 20
    assert TOKENIZER.decode(data[0].ids) == ("the cat " * 40)[: len(TOKENIZER.decode(data[0].ids))]


def test_nothing_left_to_learn_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing would be left to learn"):
        load(tmp_path, {"prompt": "cat", "completion": "sat"}, max_length=5)


@given(
    prompt=st.text(min_size=1, max_size=120).filter(str.strip),
    completion=st.text(min_size=1, max_size=60).filter(str.strip),
    limit=st.integers(70, 120),
)
def test_whatever_is_cut_fits_and_the_answer_is_kept_where_it_can_be(
    tmp_path_factory, prompt, completion, limit
):
    folder = tmp_path_factory.mktemp("cut")
    row = {"prompt": prompt, "completion": completion}
    full = load(folder, row)
    data = load(folder, row, max_length=limit)
    answer = full[0].ids[full.item(0).prompt_ids.size :].tolist()
    cut = data[0].ids[data.item(0).prompt_ids.size :].tolist()
    assert len(data[0].ids) <= limit
    assert cut == answer[: len(cut)]
    assert len(cut) == len(answer) or len(answer) > limit // 2
    if len(full[0].ids) <= limit:
        assert data.digest == full.digest
        assert not data.report.cuts
    else:
        assert data.report.cuts
