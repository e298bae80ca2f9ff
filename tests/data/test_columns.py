"""Kinds of rows: recognised, mapped, written by a template."""

from __future__ import annotations

import json

import pytest

from lorakit.data import DataSpec, load_data
from lorakit.errors import DataError

from .toys import make_tokenizer, write_jsonl

TOKENIZER = make_tokenizer(None)


def load(tmp_path, row, **settings):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    return load_data(DataSpec(path, **settings), TOKENIZER)


@pytest.mark.parametrize(
    ("row", "kind", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt/completion", "p", "c"),
        ({"question": "p", "answer": "c", "id": 3}, "prompt/completion", "p", "c"),
        ({"prompt": "p", "response": "c"}, "prompt/completion", "p", "c"),
        ({"input": "p", "output": "c"}, "prompt/completion", "p", "c"),
        ({"instruction": "p", "output": "c"}, "instruction", "p", "c"),
        ({"instruction": "p", "input": "x", "output": "c"}, "instruction", "p\n\nx", "c"),
        ({"instruction": "p", "input": "", "output": "c", "text": "all"}, "instruction", "p", "c"),
        ({"instruction": "p", "input": None, "output": "c"}, "instruction", "p", "c"),
    ],
)
def test_kinds_are_recognised(tmp_path, row, kind, prompt, completion):
    data = load(tmp_path, row)
    assert data.report.kind == kind
    assert data.item(0).prompt == prompt + "\n"
    assert data.item(0).completion == completion
    assert data.item(0).fields == row


def test_columns_that_nothing_reads_are_said(tmp_path):
    data = load(tmp_path, {"question": "p", "answer": "c", "id": 3, "source": "x"})
    assert data.report.unused_columns == ("id", "source")
    assert "Columns not used: id, source" in data.report.lines()
    assert "prompt=question, completion=answer" in data.report.lines()[0]


def test_a_map_wins_over_what_would_be_recognised(tmp_path):
    row = {"prompt": "p", "completion": "c", "ref": "r", "mr": "m"}
    data = load(tmp_path, row, map={"completion": "ref"})
    assert (data.item(0).prompt, data.item(0).completion) == ("p\n", "r")
    data = load(tmp_path, row, map={"text": "mr"})
    assert (data.report.kind, data.item(0).completion) == ("text", "m")
    data = load(tmp_path, row, map={"instruction": "mr", "input": "prompt", "output": "ref"})
    assert (data.item(0).prompt, data.item(0).completion) == ("m\n\np\n", "r")


def test_a_template_writes_the_prompt(tmp_path):
    row = {"a": "cat", "n": 3, "answer": "yes"}
    data = load(tmp_path, row, template="Is {a} {{or}} {n}?\nSay:\n")
    assert data.item(0).prompt == "Is cat {or} 3?\nSay:\n"
    assert data.item(0).completion == "yes"
    assert data.report.columns == {"prompt": "template of {a} + {n}", "completion": "answer"}
    data = load(tmp_path, row, template="{answer}?", map={"completion": "a"})
    assert (data.item(0).prompt, data.item(0).completion) == ("yes?\n", "cat")


def test_a_template_may_lie_in_a_file(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("Is it\n{a}?\n")
    data = load(tmp_path, {"a": "cat", "answer": "yes"}, template=str(file))
    assert data.item(0).prompt == "Is it\ncat?\n"
    assert any(str(file) in note for note in data.report.notes)
    with pytest.raises(DataError, match="there is no file"):
        load(tmp_path, {"a": "cat", "answer": "yes"}, template=str(tmp_path / "no.txt"))


def test_a_backslash_n_in_a_template_is_pointed_out(tmp_path):
    data = load(tmp_path, {"a": "cat", "answer": "yes"}, template=r"Is it\n{a}?")
    assert any("backslash" in note for note in data.report.notes)


def test_sharegpt_and_openai_dialects_are_one(tmp_path):
    tokenizer = make_tokenizer()
    theirs = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "gpt", "value": "a"},
    ]
    ours = [
        {"role": "system", "content": "s", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": "a"},
    ]
    rows = [
        {"conversations": theirs},
        {"messages": ours},
        {"messages": json.dumps(ours)},
        {"conversation": ours},
    ]
    ids = []
    for n, row in enumerate(rows):
        data = load_data(DataSpec(write_jsonl(tmp_path / f"{n}.jsonl", [row])), tokenizer)
        assert data.report.kind == "messages"
        ids.append(data[0].ids.tolist())
    assert ids == [ids[0]] * 4


def test_a_chat_may_be_parted_into_prompt_and_completion(tmp_path):
    tokenizer = make_tokenizer()
    asked = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "w"},
    ]
    answer = {"role": "assistant", "content": "b"}
    unlearnt = [asked[0], {**asked[1], "weight": 0}, asked[2]]
    rows = [
        {"messages": [*unlearnt, answer]},
        {"prompt": asked, "completion": [answer]},
        {"prompt": asked, "completion": "b"},
        {"prompt": json.dumps(asked), "completion": json.dumps([answer])},
        {"question": asked, "answer": json.dumps([answer])},
    ]
    found = []
    for n, row in enumerate(rows):
        data = load_data(DataSpec(write_jsonl(tmp_path / f"{n}.jsonl", [row])), tokenizer)
        assert (data.report.kind, data.report.loss_on) == ("messages", "assistant")
        parted = "the loss is on every assistant's turn of the completion" in data.report.lines()[1]
        assert parted == ("messages" not in row)
        found.append(data[0])
    for one in found[1:]:
        assert one.ids.tolist() == found[0].ids.tolist()
        assert one.supervised.tolist() == found[0].supervised.tolist()


ASKED = json.dumps([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        # as Python prints it, and cut: no chat is learnt as the text of one
        ([{"prompt": "[{'role': 'user', 'content': 'a'}]"}], "line 1: column 'prompt' looks like"),
        ([{"prompt": "[{'content': 'a', 'role': 'user'}]"}], "line 1: column 'prompt' looks like"),
        ([{"prompt": ASKED[:-1]}, {"prompt": ASKED}], "write it with json.dumps(.|\n)*line 2"),
        ([{"prompt": "a"}, {"prompt": ASKED}], "line 2: .*the first row has a text there"),
        # whoever speaks, and whatever else is said of him
        ([{"prompt": '[{"role": "Human", "content": "a"}]'}], 'the role text "Human" is unknown'),
        ([{"prompt": "[{'from': 'User', 'value': 'a'}]"}], 'the role text "User" is unknown'),
        (
            [{"prompt": '[{"name": "Ann", "role": "ipython", "content": "{}"}]'}],
            'the role text "ipython" is unknown; expected one of system, developer, user',
        ),
        (
            [{"prompt": "[{'name': 'A', 'role': 'user', 'content': 'a'}]"}],
            "write it with json.dumps",
        ),
        ([{"prompt": ASKED}, {"prompt": "a"}], "line 2: column 'prompt' is text \"a\"; expected"),
        ([{"prompt": ASKED}, {"prompt": "[" * 100_000}], "line 2: column 'prompt' is text"),
        (
            [{"prompt": ASKED, "completion": '[{"role": "assistant", "content": "b"'}],
            "line 1: column 'completion' looks like messages",
        ),
        (
            [{"prompt": ASKED, "completion": '{"role": "assistant", "content": "b"}'}],
            "line 1: column 'completion' looks like messages",
        ),
    ],
)
def test_what_looks_like_a_chat_is_read_as_one_or_named(tmp_path, rows, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"completion": "b", **row} for row in rows])
    with pytest.raises(DataError, match=message):
        load_data(DataSpec(path), make_tokenizer())
    if len(rows) == 1 and "completion" not in rows[0]:
        told = DataSpec(path, template="{prompt}", map={"completion": "completion"})
        assert len(load_data(told, make_tokenizer())) == 1


@pytest.mark.parametrize(
    ("columns", "options", "named", "flags"),
    [
        (("instruction", "output"), {}, "instruction", "'{instruction}' --map completion=output"),
        (("question", "answer"), {}, "question", "'{question}' --map completion=answer"),
        (
            ("frage", "antwort"),
            {"map": {"prompt": "frage", "completion": "antwort"}},
            "frage",
            "'{frage}' --map completion=antwort",
        ),
    ],
)
def test_what_is_advised_for_a_chat_among_texts_works(tmp_path, columns, options, named, flags):
    ask, answer = columns
    path = write_jsonl(tmp_path / "a.jsonl", [{ask: ASKED[:-1], answer: "b"}])
    with pytest.raises(DataError, match=f"column '{named}' looks like messages") as error:
        load_data(DataSpec(path, **options), make_tokenizer())
    assert f"give --template {flags}" in str(error.value)
    told = DataSpec(path, template=f"{{{ask}}}", map={"completion": answer})
    assert len(load_data(told, make_tokenizer())) == 1


@pytest.mark.parametrize(
    "text",
    [
        '[{"from": "Paris", "to": "Rome"}]',
        '[{"name": "Ann", "role": "CEO"}]',
        '[{"name": "Ann", "role": "user"}, {"name": "Bob", "role": "admin"}]',
        '[{"from": "EUR", "to": "USD", "value": 3}]',
        '[{"from": "a@b.c", "subject": "s", "content": "c"}]',
        '[{"model": "m", "messages": [{"role": "user", "content": "a"}]}]',
        "[{'id': 1}, {'role': 'Human', 'content': 'a'}]",
        '["a", "b"]',
        "[]",
        '{"role": "admin"}',
        "say [{'role': 'user'}]",
    ],
)
def test_other_json_is_text(tmp_path, text):
    rows = [{"prompt": text, "completion": "b"}, {"prompt": "a", "completion": text}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert load_data(DataSpec(path), make_tokenizer()).report.kind == "prompt/completion"
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": ASKED, "completion": text}])
    assert load_data(DataSpec(path), make_tokenizer()).report.kind == "messages"


@pytest.mark.parametrize("prompt", [[], ["a", "b"], [{"name": "a"}]])
def test_a_list_that_is_no_chat_does_not_decide(tmp_path, prompt):
    good = {"prompt": "a", "completion": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [{**good, "prompt": prompt}, good, good])
    data = load_data(DataSpec(path, bad_rows="skip"), make_tokenizer())
    assert (data.report.used, data.report.kind) == (2, "prompt/completion")


@pytest.mark.parametrize(
    ("loss_on", "learnt", "told"),
    [
        (None, "axc", "every assistant's turn of the completion"),
        ("completion", "c", "the loss is on its last turn"),
        ("all", None, "the loss is on all tokens"),
    ],
)
def test_what_is_learnt_of_a_parted_chat(tmp_path, loss_on, learnt, told):
    tokenizer = make_tokenizer()
    row = {
        "prompt": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "p"},
            {"role": "user", "content": "v"},
        ],
        "completion": [
            {"role": "assistant", "content": "ax"},
            {"role": "user", "content": "w"},
            {"role": "assistant", "content": "c"},
        ],
    }
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    data = load_data(DataSpec(path, loss_on=loss_on), tokenizer)
    assert told in data.report.lines()[1]
    one = data[0]
    if learnt is None:
        assert one.supervised[1:].all()
        return
    ids = one.ids[one.supervised].tolist()
    assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) == learnt


def test_plain_chats_are_refused_with_what_to_give(tmp_path):
    row = {"prompt": [{"role": "user", "content": "u"}], "completion": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match="prompt and completion as texts"):
        load_data(DataSpec(path, format="plain"), make_tokenizer())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [], "completion": "b"}, r"column 'prompt' is .*; expected a list of messages"),
        (
            {"prompt": "u", "completion": "b"},
            "column 'prompt' is text \"u\"; expected a list of messages",
        ),
        ({"prompt": [{"role": "user", "content": "u"}], "completion": []}, "column 'completion'"),
        (
            {
                "prompt": [{"role": "user", "content": "u"}],
                "completion": [{"role": "user", "content": "v"}],
            },
            "column 'completion' has no assistant's turn to learn from",
        ),
        ({"prompt": [{"role": "user", "content": "u"}], "completion": " "}, "completion' is empty"),
    ],
)
def test_a_parted_chat_that_cannot_be_learnt_is_named(tmp_path, row, message):
    good = {"prompt": [{"role": "user", "content": "u"}], "completion": "b"}
    with pytest.raises(DataError, match=message):
        load_data(DataSpec(write_jsonl(tmp_path / "a.jsonl", [good, row])), make_tokenizer())
