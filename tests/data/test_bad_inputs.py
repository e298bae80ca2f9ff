"""What users get wrong: each message names the file, the row, the column, and the next step."""

from __future__ import annotations

import gzip
import json

import pytest

from lorakit.data import DataSpec, load_data
from lorakit.errors import DataError

from .toys import CHATML, NO_SYSTEM, make_tokenizer, write_jsonl

GOOD = '{"prompt": "a", "completion": "b"}\n'


def chat(*messages) -> str:
    return json.dumps({"messages": list(messages)}) + "\n"


USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "yes"}

#: name → (file, content, settings, what the message must say)
TABLE = {
    "broken JSON": (
        "a.jsonl",
        GOOD + '{"prompt": "a", "completion" "b"}\n',
        {},
        ["1 of 2 rows", "a.jsonl line 2", "broken JSON at column 30", "--bad-rows skip"],
    ),
    "cut-off JSON": ("a.jsonl", GOOD + '{"prompt": "a', {}, ["a.jsonl line 2", "column 12"]),
    "a list as a row": ("a.jsonl", GOOD + "[1, 2]\n", {}, ["line 2: a list of 2", "an object"]),
    "broken JSON file": ("a.json", '[{"prompt": "a"},\n {]', {}, ["a.json line 2", "column 3"]),
    "JSON without a list": ("a.json", '{"a": 1}', {}, ["an object with a", "a list of objects"]),
    "empty JSON list": ("a.json", "[]", {}, ["a.json", "empty"]),
    "empty file": ("a.jsonl", "", {}, ["a.jsonl: it is empty"]),
    "only blank lines": ("a.csv", "\n \n", {}, ["a.csv: it is empty"]),
    "bad byte": (
        "a.jsonl",
        GOOD.encode() + b'{"prompt": "caf\xe9", "completion": "b"}\n',
        {},
        ["a.jsonl line 2", "byte 0xe9 at column 16", "UTF-8"],
    ),
    "bad byte in JSON": (
        "a.json",
        b'[\n{"prompt": "caf\xe9", "completion": "b"}]',
        {},
        ["a.json line 2", "byte 0xe9", "UTF-8"],
    ),
    "bad byte in CSV": (
        "a.csv",
        b"prompt,completion\na,b\nc,\xff\n",
        {},
        ["a.csv row 2 (line 3)", "column 'completion'", "byte 0xff"],
    ),
    "half a surrogate pair": (
        "a.jsonl",
        '{"prompt": "a\\ud800", "completion": "b"}\n',
        {},
        ["line 1: column 'prompt'", "\\ud800", "character 2"],
    ),
    "zero bytes": ("a.csv", b"p\x00r\x00", {}, ["a.csv", "zero bytes", "UTF-8"]),
    "an Excel file": ("a.csv", b"PK\x03\x04rest", {}, ["a.csv", "Excel", "CSV"]),
    "cut-off gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD.encode() * 100)[:-9],
        {},
        ["a.jsonl.gz", "cut off"],
    ),
    "no gzip": ("a.jsonl.gz", GOOD, {}, ["a.jsonl.gz", "damaged"]),
    "no Parquet": ("a.parquet", "PAR1 no", {}, ["a.parquet", "Parquet"]),
    "unknown ending": ("a.xlsx", "x", {}, ["a.xlsx", "ends in .xlsx", ".csv"]),
    "too many values": (
        "a.csv",
        "prompt,completion\na,b\na,b,c\n",
        {},
        ["a.csv row 2 (line 3)", "3 values for the 2 columns prompt, completion", "unquoted"],
    ),
    "too few values": ("a.csv", "prompt,completion\na\n", {}, ["row 1 (line 2)", "1 value for"]),
    "an open quote": (
        "a.csv",
        'prompt,completion\na,"b\nc,d\n',
        {},
        ["a.csv row 1 (line 2)", "quote", "never closed"],
    ),
    "a column twice": (
        "a.csv",
        "prompt,prompt\na,b\n",
        {},
        ["a.csv line 1", "'prompt'", "2 times"],
    ),
    "an empty header": ("a.csv", ",,\na,b,c\n", {}, ["a.csv line 1", "names of the columns"]),
    "only a header": ("a.csv", "prompt,completion\n", {}, ["a.csv", "no rows"]),
    "a header that is missing": (
        "a.csv",
        "hello there,my answer\nx,y\n",
        {},
        [
            "hello there, my answer",
            "first line of a CSV names its columns",
            "--map 'prompt=hello there,completion=my answer'",
        ],
    ),
    "unknown columns": (
        "a.jsonl",
        '{"q": "a", "r": "b"}\n',
        {},
        ["columns q, r", "--map prompt=q,completion=r"],
    ),
    "preferences": (
        "a.jsonl",
        '{"chosen": "a", "rejected": "b"}\n',
        {},
        ["pairs of preferences", "completion=chosen"],
    ),
    "a mapped column that is not there": (
        "a.csv",
        "mr,ref\na,b\n",
        {"map": {"prompt": "mr", "completion": "reff"}},
        ["a.csv row 1", "mr, ref", "no column 'reff'", "'ref'"],
    ),
    "half a map": (
        "a.csv",
        "mr,ref\na,b\n",
        {"map": {"prompt": "mr"}},
        ["--map prompt=mr,completion=ref"],
    ),
    "one column for two fields": (
        "a.csv",
        "mr,ref\na,b\n",
        {"map": {"prompt": "mr", "completion": "mr"}},
        ["'mr' is given for two fields"],
    ),
    "a map of two kinds": (
        "a.csv",
        "mr,ref\na,b\n",
        {"map": {"prompt": "mr", "text": "ref"}},
        ["different kinds"],
    ),
    "an unknown field": (
        "a.jsonl",
        GOOD,
        {"map": {"question": "prompt"}},
        ["question is no field", "prompt, completion"],
    ),
    "a map turned round": (
        "a.csv",
        "Customer text,ref\na,b\n",
        {"map": {"Customer text": "prompt", "ref": "completion"}},
        ["is no field", "--map 'prompt=Customer text,completion=ref'"],
    ),
    "a map turned round whose columns are called like fields": (
        "a.csv",
        "input,text\na,b\n",
        {"map": {"input": "prompt", "text": "completion"}},
        ["no column 'prompt'", "--map prompt=input,completion=text"],
    ),
    "a template without a completion": (
        "a.csv",
        "mr,my ref\na,b\n",
        {"template": "Say {mr}"},
        ["no column is known as the completion", "--map 'completion=my ref'"],
    ),
    "empty completion": (
        "a.jsonl",
        GOOD + '{"prompt": "a", "completion": "  "}\n',
        {},
        ["a.jsonl line 2: column 'completion' is empty", "1 × empty completion"],
    ),
    "empty prompt": ("a.csv", "prompt,completion\n,b\n", {}, ["row 1 (line 2): column 'prompt'"]),
    "null": ("a.jsonl", '{"prompt": "a", "completion": null}\n', {}, ["'completion' is null"]),
    "a number": (
        "a.jsonl",
        '{"prompt": "a", "completion": 4}\n',
        {},
        ["'completion' is the number 4", "in quotes"],
    ),
    "a row without the column": (
        "a.jsonl",
        GOOD + '{"prompt": "a", "completions": "b"}\n',
        {},
        ["line 2", "no column 'completion'", "it has prompt, completions", "'completions'"],
    ),
    "no list of messages": (
        "a.jsonl",
        '{"messages": "hi"}\n',
        {},
        ["line 1", "a list of messages"],
    ),
    "an unknown role": (
        "a.jsonl",
        chat({"role": "robot", "content": "x"}, BOT),
        {},
        ["line 1: column 'messages' message 1", 'text "robot"', "system"],
    ),
    "a message without role": ("a.jsonl", chat({"content": "x"}, BOT), {}, ["role is missing"]),
    "an empty answer": (
        "a.jsonl",
        chat(USER, {"role": "assistant", "content": ""}),
        {},
        ["message 2 (role assistant) is empty"],
    ),
    "no assistant turn": ("a.jsonl", chat(USER), {}, ["no assistant's turn", "roles: user"]),
    "all turns weigh nothing": ("a.jsonl", chat(USER, {**BOT, "weight": 0}), {}, ["no assistant"]),
    "a broken weight": ("a.jsonl", chat(USER, {**BOT, "weight": 2}), {}, ["weight", "0 or 1"]),
    "a picture": (
        "a.jsonl",
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, BOT),
        {},
        ["message 1", "image_url", "type text"],
    ),
    "a chat written plain": ("a.jsonl", chat(USER, BOT), {"format": "plain"}, ["rows are chats"]),
    "text written as a chat": ("a.txt", "hi\n", {"format": "chat"}, ["plain text"]),
    "text with a completion": ("a.txt", "hi\n", {"loss_on": "completion"}, ["plain text"]),
    "a system message that cannot act": (
        "a.jsonl",
        GOOD,
        {"format": "plain", "system": "be kind"},
        ["system", "belongs to a chat"],
    ),
    "longer than allowed": (
        "a.jsonl",
        GOOD + json.dumps({"prompt": "a" * 90, "completion": "b"}) + "\n",
        {"max_length": 50},
        ["line 2", "at most 50 fit", "1 × longer than 50 tokens", "--truncate"],
    ),
    "a length above the context": ("a.jsonl", GOOD, {"max_length": 4096}, ["4,096", "holds 1,024"]),
    "an impossible length": ("a.jsonl", GOOD, {"max_length": 1}, ["max_length: 1 given"]),
    "a template without columns": ("a.jsonl", GOOD, {"template": "Say it"}, ["names no column"]),
    "a template with an unknown column": (
        "a.jsonl",
        GOOD,
        {"template": "Say {promt}"},
        ["no column 'promt'", "Did you mean 'prompt'"],
    ),
    "a template with its answer": (
        "a.jsonl",
        GOOD,
        {"template": "{prompt} {completion}"},
        ["hold its own answer"],
    ),
    "a template with open braces": (
        "a.jsonl",
        GOOD,
        {"template": "Say {prompt"},
        ["template:", "{{ or }}"],
    ),
    "a template with a format": (
        "a.jsonl",
        GOOD,
        {"template": "Say {prompt!r:>5}"},
        ["{prompt!r:>5}", "column's name alone"],
    ),
    "a template and a mapped prompt": (
        "a.jsonl",
        GOOD,
        {"template": "{prompt}", "map": {"prompt": "prompt"}},
        ["template", "cannot act"],
    ),
    "an empty template column": (
        "a.jsonl",
        '{"a": null, "completion": "b"}\n',
        {"template": "Say {a}"},
        ["line 1: column 'a' is null"],
    ),
    "a setting out of its range": ("a.jsonl", GOOD, {"loss_on": "none"}, ["loss_on", "'none'"]),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_message_names_the_place_and_the_next_step(tmp_path, name):
    file, content, settings, expected = TABLE[name]
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        load_data(DataSpec(path, **settings), make_tokenizer(), context_length=1024)
    message = str(caught.value)
    for part in expected:
        assert part in message
    assert message.rstrip().endswith((".", ")", "'?")) or "\n" in message


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match=r"trian\.jsonl: there is no such file.*train\.jsonl"):
        load_data(DataSpec(tmp_path / "trian.jsonl"), make_tokenizer())
    with pytest.raises(DataError, match="Nor is there a folder"):
        load_data(DataSpec(tmp_path / "no" / "a.jsonl"), make_tokenizer())


def test_all_missing_files_are_named_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        load_data(DataSpec([tmp_path / "a.csv", tmp_path / "b.csv"]), make_tokenizer())
    assert "a.csv" in str(caught.value)
    assert "b.csv" in str(caught.value)


def test_a_folder_without_data(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="the folder holds no data"):
        load_data(DataSpec(tmp_path), make_tokenizer())


def test_all_problems_come_at_once_with_the_first_named(tmp_path):
    rows = [{"prompt": "a", "completion": "" if n % 2 else "b"} for n in range(40)]
    rows[6]["completion"] = 5
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_data(DataSpec(path), make_tokenizer())
    message = str(caught.value)
    assert (
        "21 of 40 rows cannot be used (20 × empty completion, 1 × completion is no text)" in message
    )
    assert f"{path} line 2:" in message
    assert f"{path} line 7:" in message
    assert message.count("line ") == 10
    assert "and 11 more" in message


def test_bad_rows_are_left_out_and_counted_on_request(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "{broken\n" + '{"prompt": "a", "completion": ""}\n' + GOOD)
    data = load_data(DataSpec(path, bad_rows="skip"), make_tokenizer())
    assert [example.index for example in data] == [1, 4]
    assert (data.report.rows, data.report.used) == (4, 2)
    assert data.report.dropped == {"cannot be read": 1, "empty completion": 1}
    lines = "\n".join(data.report.lines())
    assert "Left out: 2 of 4 rows" in lines
    assert f"{path} line 2" in lines


def test_skipping_every_row_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(DataError, match="3 of 3 rows cannot be used"):
        load_data(DataSpec(path, bad_rows="skip"), make_tokenizer())


def test_a_base_without_chat_template(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(chat(USER, BOT))
    with pytest.raises(DataError, match=r"no chat template.*--format plain"):
        load_data(DataSpec(path), make_tokenizer(None))


def test_a_template_that_refuses_the_system_message(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    with pytest.raises(DataError, match=r"no system role here.*system message"):
        load_data(DataSpec(path, system="be kind"), make_tokenizer(NO_SYSTEM))


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    strict = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('never no') }}"
        "{% endif %}",
    )
    path = tmp_path / "a.jsonl"
    path.write_text(chat(USER, BOT) + chat({"role": "user", "content": "no"}, BOT))
    with pytest.raises(DataError, match=r"a\.jsonl line 2: the chat template refuses it: never no"):
        load_data(DataSpec(path), make_tokenizer(strict))


def test_a_file_that_is_not_there_names_those_that_are(tmp_path):
    for name in ("mine.csv", "other.jsonl", "picture.png"):
        (tmp_path / name).write_text("x\n")
    with pytest.raises(DataError) as caught:
        load_data(DataSpec(str(tmp_path / "others.jsonl")), make_tokenizer())
    assert "In its folder are: other.jsonl, mine.csv." in str(caught.value)
