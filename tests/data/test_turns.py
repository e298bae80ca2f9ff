"""Chats of several turns: exactly the assistant's words and their ends are supervised."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data import DataSpec, load_data, make_rendering
from lorakit.data.asked import Chat, asked_in
from lorakit.data.rows import RowError
from lorakit.errors import DataError

from .toys import (
    CHATML,
    HEADERLESS,
    LLAMA2,
    LLAMA3,
    THINKING,
    UNENDED,
    make_tokenizer,
    supervised_text,
    write_jsonl,
)

CHAT = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "the cat sat"},
    {"role": "user", "content": "what"},
]
ENDS = {
    CHATML: "<|im_end|>",
    LLAMA3: "<|im_end|>",
    LLAMA2: " </s>",
    HEADERLESS: "<|im_end|>",
    THINKING: "<|im_end|>",
}

#: says itself where an answer stands; transformers then makes the mask, an independent oracle
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load(tmp_path, chats, tokenizer, **settings):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    return load_data(DataSpec(path, **settings), tokenizer)


@pytest.mark.parametrize("template", ENDS)
def test_every_turn_of_the_assistant_is_supervised_with_its_end(tmp_path, template):
    tokenizer = make_tokenizer(template)
    end = ENDS[template]
    data = load(tmp_path, [CHAT], tokenizer)
    assert supervised_text(tokenizer, data[0]) == [f"the cat{end}", f"the cat sat{end}"]
    assert data.report.loss_on == "assistant"
    # what follows the last answer teaches nothing and is left out
    assert data[0].supervised[-1]
    last = load(tmp_path, [CHAT], tokenizer, loss_on="completion")
    assert supervised_text(tokenizer, last[0]) == [f"the cat sat{end}"]
    assert tokenizer.decode(last[0].ids) == tokenizer.decode(data[0].ids)
    assert last.item(0).completion == "the cat sat"


words = st.sampled_from(["the", "cat", "sat", "<", "\n", " ", "ü", "assistant", "user"])
content = st.lists(words, min_size=1, max_size=5).map(" ".join).filter(str.strip)
chats = st.lists(st.tuples(content, content), min_size=1, max_size=4).map(
    lambda pairs: [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)


@given(chats)
def test_the_mask_is_that_of_a_template_with_generation_marks(tmp_path_factory, chat):
    tokenizer = make_tokenizer(MARKED)
    oracle = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = np.array(oracle["input_ids"]), np.array(oracle["assistant_masks"], bool)
    data = load(tmp_path_factory.mktemp("chat"), [chat], make_tokenizer(CHATML))
    # pieces are tokenised apart, so the tokens may differ; the supervised text may not
    found = "|".join(supervised_text(tokenizer, data[0]))
    expected, previous = [], False
    for token, supervised in zip(ids.tolist(), mask.tolist(), strict=True):
        if supervised:
            expected = [*expected, []] if not previous else expected
            expected[-1].append(token)
        previous = supervised
    assert found == "|".join(tokenizer.decode(e) for e in expected)
    assert tokenizer.decode(data[0].ids) + "\n" == tokenizer.decode(ids)


def test_turns_of_weight_zero_are_not_learnt(tmp_path):
    tokenizer = make_tokenizer()
    chat = [dict(message) for message in CHAT]
    chat[1]["weight"] = 0
    data = load(tmp_path, [chat], tokenizer)
    assert supervised_text(tokenizer, data[0]) == ["the cat sat<|im_end|>"]
    chat[1]["weight"], chat[3]["weight"] = 1, 0
    data = load(tmp_path, [chat], tokenizer)
    assert supervised_text(tokenizer, data[0]) == ["the cat<|im_end|>"]
    assert data[0].supervised[-1]


def test_a_turn_that_the_template_rewrites_is_an_error_with_a_way_out(tmp_path):
    tokenizer = make_tokenizer(THINKING)
    chat = [dict(message) for message in CHAT]
    chat[1]["content"] = "<think>hm</think>the cat"
    with pytest.raises(DataError, match=r"line 1: message 2: .*--loss-on completion"):
        load(tmp_path, [chat], tokenizer)
    data = load(tmp_path, [chat], tokenizer, loss_on="completion")
    assert supervised_text(tokenizer, data[0]) == ["the cat sat<|im_end|>"]
    assert "hm" not in data.item(0).prompt


def test_a_template_without_ends_gets_one_after_the_last_answer_only(tmp_path):
    tokenizer = make_tokenizer(UNENDED)
    data = load(tmp_path, [CHAT], tokenizer)
    assert supervised_text(tokenizer, data[0]) == ["the cat", "the cat sat</s>"]


CALLS = CHATML.replace(
    "+ m['content'] +",
    "+ m['content'] + (m['tool_calls'] | tojson if m['tool_calls'] else '') +",
)


def test_tool_calls_and_tools_go_through_the_template(tmp_path):
    template = "{% if tools %}{{ 'tools: ' + (tools | length | string) + '\n' }}{% endif %}" + CALLS
    tokenizer = make_tokenizer(template)
    call = {"type": "function", "function": {"name": "cat", "arguments": "{}"}}
    chat = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "the cat"},
        CHAT[3],
    ]
    tool = {"type": "function", "function": {"name": "cat", "parameters": {}}}
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": chat, "tools": [tool]}])
    data = load_data(DataSpec(path), tokenizer)
    assert tokenizer.decode(data[0].ids).startswith("tools: 1\n")
    assert not any("tools" in note for note in data.report.notes)
    mute = [{"messages": CHAT, "tools": [tool]}, {"messages": CHAT}]
    path = write_jsonl(tmp_path / "m.jsonl", mute)
    notes = load_data(DataSpec(path), make_tokenizer()).report.notes
    assert sum("writes no tools" in note for note in notes) == 1
    first, second = supervised_text(tokenizer, data[0])
    assert json.loads(first.removesuffix("<|im_end|>")) == [call]
    assert second == "the cat sat<|im_end|>"
    only = load(tmp_path, [chat[:2]], tokenizer)
    assert supervised_text(tokenizer, only[0])[0].startswith('[{"')


@pytest.mark.parametrize("last", [True, False])
def test_tool_calls_that_the_template_leaves_out_are_no_empty_answer(tmp_path, last):
    call = {"type": "function", "function": {"name": "cat", "arguments": "{}"}}
    chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(DataError, match=r"message 2: .*does not write its tool_calls"):
        load(tmp_path, [chat if last else [*chat, *CHAT[2:4]]], make_tokenizer())


def test_an_empty_list_of_tool_calls_is_none(tmp_path):
    chat = [CHAT[0], {**CHAT[1], "tool_calls": []}]
    tokenizer = make_tokenizer()
    data = load(tmp_path, [chat], tokenizer)
    assert supervised_text(tokenizer, data[0]) == ["the cat<|im_end|>"]


def test_calls_without_which_a_template_refuses_the_message_are_written(tmp_path):
    refuses = "{% if m['role'] == 'assistant' and not m['content'] and not m['tool_calls'] %}"
    refuses += "{{ raise_exception('an empty answer') }}{% endif %}"
    start = CALLS.index("{% for m in messages %}") + len("{% for m in messages %}")
    tokenizer = make_tokenizer(CALLS[:start] + refuses + CALLS[start:])
    call = {"type": "function", "function": {"name": "cat", "arguments": "{}"}}
    chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    data = load(tmp_path, [chat], tokenizer)
    assert "function" in supervised_text(tokenizer, data[0])[0]


def test_a_given_system_message_gives_way_to_a_chats_own(tmp_path):
    tokenizer = make_tokenizer()
    own = [{"role": "system", "content": "mine"}, *CHAT]
    data = load(tmp_path, [CHAT, own], tokenizer, system="given")
    assert tokenizer.decode(data[0].ids).startswith("<|im_start|>system\ngiven<|im_end|>")
    assert tokenizer.decode(data[1].ids).startswith("<|im_start|>system\nmine<|im_end|>")
    assert any("1 chat with a system message of their own" in n for n in data.report.notes)


def test_chats_that_begin_alike_share_a_key(tmp_path):
    other = [{"role": "user", "content": "what else"}, *CHAT[1:]]
    data = load(tmp_path, [CHAT, CHAT[:2], other], make_tokenizer())
    assert data.prompt_key(0) == data.prompt_key(1) != data.prompt_key(2)


DONE = CHAT[:4]  # ends with an answer


@pytest.mark.parametrize("system", [None, "given"])
def test_generation_asks_a_chat_with_what_training_put_before_its_last_answer(tmp_path, system):
    template = "{% if tools %}{{ 'tools: ' + (tools | length | string) + '\n' }}{% endif %}" + CALLS
    tokenizer = make_tokenizer(template)
    own = [{"role": "system", "content": "mine"}, *DONE]
    tool = {"type": "function", "function": {"name": "cat", "parameters": {}}}
    rows = [{"messages": DONE, "tools": [tool]}, {"messages": own}]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    data = load_data(DataSpec(path, system=system), tokenizer)
    rendering = make_rendering(tokenizer, system=system)
    for i, row in enumerate(rows):
        (asked,) = rendering.prompts([asked_in(row)])
        ids = data[i].ids.tolist()
        assert tuple(ids[: len(asked.ids)]) == asked.ids
        end = tokenizer.decode(ids[len(asked.ids) :])
        assert end == DONE[-1]["content"] + "<|im_end|>"


def test_what_a_row_asks():
    assert asked_in({"prompt": "a", "messages": DONE}) == Chat(DONE[:-1])  # as training reads it
    empty = [*DONE[:-1], {"role": "assistant", "content": ""}]
    assert asked_in({"messages": empty}) == Chat(DONE[:-1])
    assert asked_in({"question": "a"}) == "a"
    assert asked_in({"instruction": "a", "input": "b", "output": None}) == "a\n\nb"
    assert asked_in({"prompt": None, "messages": DONE}) == Chat(DONE[:-1])
    assert asked_in({"prompt": DONE}) == Chat(DONE)  # nothing of it is an answer
    # what holds no messages gives way
    assert asked_in({"prompt": "a", "messages": []}) == "a"
    assert asked_in({"prompt": "a", "conversation": "thread 7"}) == "a"
    # as training reads them
    assert asked_in({"instruction": "a", "input": "b", "response": "c"}) == "a"
    assert asked_in({"input": "a", "output": "b", "question": "c"}) == "a"
    assert asked_in({"prompt": "a", "question": "b", "answer": "c"}) == "b"
    for broken in ([], "a"):
        with pytest.raises(RowError, match=r"column 'messages' is .*; expected a list of messages"):
            asked_in({"messages": broken})
    with pytest.raises(RowError, match=r"looks like messages, .*to ask it as text give --prompt"):
        asked_in({"prompt": "[{'role': 'user', 'content': 'a'}]"})
    waiting = asked_in({"conversation": CHAT[:1], "tools": "[1]"})
    assert waiting == Chat((CHAT[0],), [1])
    assert str(waiting) == CHAT[0]["content"]


@pytest.mark.parametrize("messages", [[], [{"role": "who", "content": "a"}], ["a"]])
def test_a_chat_that_is_none(messages):
    with pytest.raises(DataError, match="messages"):
        Chat(messages)
