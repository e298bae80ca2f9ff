"""``lorakit generate``: where prompts come from, how they are written, how answers are printed."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from lorakit import LoRASpec, attach, load_adapter, load_base, save_adapter
from lorakit.cli.main import main
from lorakit.data import Chat, make_rendering
from lorakit.infer import generate

from .. import models
from ..tokenizers_ import chat_tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A base that knows chats, adapters that learnt from differently written prompts."""
    root = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    model = models.llama(vocab_size=120)
    model.save_pretrained(root / "base")
    chat_tokenizer().save_pretrained(root / "base")
    learnt = {
        "chatty": {"format": "chat", "kind": "prompt/completion"},
        "plain": {"format": "plain", "kind": "prompt/completion"},
        "reader": {"format": "plain", "kind": "text"},
        "guided": {"format": "chat", "system": "w90 w91", "template": "{a} and {b}"},
        "silent": None,
    }
    for seed, (name, about) in enumerate(learnt.items()):
        handle = attach(model, LoRASpec(rank=2), "a", seed=seed)
        models.randomize(handle, seed=seed)
        provenance = {} if about is None else {"data": about}
        save_adapter(handle.snapshot("a").with_(provenance=provenance), root / name)
        handle.detach()
    (root / "prompts.txt").write_text("w1 w2\n\nw3\n")
    (root / "prompts.JSONL").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    (root / "odd.txt").write_text("w1\u2028w2\x0cw3\x85w4\r\n", encoding="utf-8", newline="")
    (root / "prompts.json").write_text('[{"prompt": "w1 w2"}, {"prompt": "w3"}]')
    (root / "prompts.csv").write_text("\ufeffprompt,x\nw1 w2,1\nw3,2\n")
    (root / "prompts.jsonl").write_text('{"prompt": "w1 w2", "x": 1}\n{"prompt": "w3"}\n')
    return root


@pytest.fixture
def run(world, monkeypatch, capfd):
    """``run(*flags, stdin="")`` → (exit code, stdout, stderr)."""
    monkeypatch.chdir(world)

    def call(*flags, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        start = ["generate", "--base", "base", "--device", "cpu", "--max-new-tokens", "6"]
        code = main([*start, *flags])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def expected(world):
    """``expected(ids, adapter or None)``: the answer, by the library."""
    base = load_base(world / "base", device="cpu")

    def answer(prompt, adapter=None, *, format="chat", system=None, raw=False, **settings):
        handle = attach(base.model, load_adapter(world / adapter), "x") if adapter else None
        kind = "text" if raw else None
        rendering = make_rendering(base.tokenizer, format, system=system, kind=kind)
        ids = rendering.first_ids([prompt])[0] if raw else rendering.prompts([prompt])[0].ids
        stops = {*rendering.stop_ids, 2}  # 2: the model's own end token
        [text] = generate(
            base, handle, [ids], adapter="x" if adapter else None,
            stop_ids=list(stops), **{"max_new_tokens": 6, **settings},
        )  # fmt: skip
        if handle is not None:
            handle.detach()
        return text

    return answer


def test_one_answer_is_streamed(run, expected):
    code, out, err = run("--prompt", "w1 w2")
    assert code == 0
    assert out == expected("w1 w2") + "\n"
    assert "prompts are written chat (the tokenizer has a chat template)" in err


@pytest.mark.parametrize(
    ("adapter", "how", "said"),
    [
        ("chatty", {"format": "chat"}, "chatty learnt so"),
        ("plain", {"format": "plain"}, "plain learnt so"),
        ("reader", {"format": "plain", "raw": True}, "reader learnt from plain text"),
        ("guided", {"system": "w90 w91"}, "with its system message 'w90 w91'"),
        ("silent", {}, "the tokenizer has a chat template"),
    ],
)
def test_an_adapter_is_asked_as_it_learnt(run, expected, adapter, how, said):
    code, out, err = run("--adapter", adapter, "--prompt", "w1 w2")
    assert code == 0
    assert out == expected("w1 w2", adapter, **how) + "\n"
    assert said in err
    if adapter == "guided":
        assert "learnt from prompts of this form: {a} and {b}" in err


def test_flags_win_over_what_the_adapter_learnt(run, expected):
    _, out, _ = run("--adapter", "guided", "--prompt", "w1", "--format", "plain", "--system", "")
    assert out == ""  # a system message needs a chat
    _, out, _ = run("--adapter", "guided", "--prompt", "w1", "--system", "w5")
    assert out == expected("w1", "guided", system="w5") + "\n"
    _, out, _ = run("--adapter", "guided", "--prompt", "w1", "--raw")
    assert out == expected("w1", "guided", format="plain", raw=True) + "\n"


@pytest.mark.parametrize(
    ("flags", "stdin"),
    [
        (["--prompt", "w1 w2", "--prompt", "w3"], ""),
        (["--prompts", "prompts.txt"], ""),
        (["--prompts", "prompts.jsonl"], ""),
        (["--prompts", "prompts.JSONL"], ""),
        (["--prompts", "prompts.json"], ""),
        (["--prompts", "prompts.csv"], ""),
        (["--prompts", "-"], "\ufeffw1 w2\r\nw3\r\n"),
        (["--prompts", "-"], "w1 w2\nw3\n"),
    ],
)
def test_where_prompts_come_from(run, expected, flags, stdin):
    code, out, _ = run(*flags, "--json", stdin=stdin)
    assert code == 0
    answers = json.loads(out)["answers"]
    assert [a["prompt"] for a in answers] == ["w1 w2", "w3"]
    assert [a["text"] for a in answers] == [expected("w1 w2"), expected("w3")]
    assert {a["model"] for a in answers} == {"base"}


def test_only_a_line_break_ends_a_prompt(run):
    _, out, _ = run("--prompts", "odd.txt", "--json")
    assert [a["prompt"] for a in json.loads(out)["answers"]] == ["w1\u2028w2\x0cw3\x85w4"]


def test_all_of_stdin_is_one_prompt(run, expected):
    _, out, _ = run(stdin="w1 w2\nw3\n")
    assert out == expected("w1 w2\nw3") + "\n"


def test_several_models_side_by_side_each_in_its_own_way(run, expected):
    flags = ["--adapter", "plain", "--adapter", "c:chatty", "--with-base", "--prompt", "w1 w2"]
    code, out, _ = run(*flags, "--json")
    assert code == 0
    answers = json.loads(out)["answers"]
    assert [a["model"] for a in answers] == ["base", "plain", "c"]
    assert [a["text"] for a in answers] == [
        expected("w1 w2"),
        expected("w1 w2", "plain", format="plain"),
        expected("w1 w2", "chatty"),
    ]
    _, out, _ = run(*flags)
    for answer in answers:
        assert answer["model"] in out
        assert answer["text"].split()[0] in out


def test_a_blend(run, world):
    _, out, _ = run(
        "--adapter", "chatty=0.5", "--adapter", "silent", "--blend", "--prompt", "w1", "--json"
    )
    [answer] = json.loads(out)["answers"]
    assert answer["model"] == "0.5·chatty + 1·silent"
    base = load_base(world / "base", device="cpu")
    handle = attach(base.model, load_adapter(world / "chatty"), "chatty")
    handle.add(load_adapter(world / "silent"), "silent")
    rendering = make_rendering(base.tokenizer)
    [text] = generate(
        base, handle, [rendering.prompts(["w1"])[0].ids],
        adapter={"chatty": 0.5, "silent": 1.0}, max_new_tokens=6,
    )  # fmt: skip
    assert answer["text"] == text


def test_drawing_and_stops_arrive(run, expected):
    few = {"temperature": 2.0, "top_p": 0.9, "seed": 5, "max_new_tokens": 9}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in few.items()]
    _, out, _ = run("--prompt", "w1", *flags)
    text = expected("w1", **few)
    assert out == text + "\n"
    stop = text.split()[2]
    _, out, _ = run("--prompt", "w1", *flags, "--stop", stop)
    assert out == text[: text.index(stop)] + "\n"
    assert run("--prompt", "w1", *flags[:2], "--seed", "6")[1] != out


def test_what_is_drawn_does_not_hang_on_who_is_asked_beside(run):
    flags = ["--prompts", "prompts.txt", "--temperature", "2", "--json", "--adapter", "chatty"]

    def drawn(*more):
        answers = json.loads(run(*flags, *more)[1])["answers"]
        return {model: [a["text"] for a in answers if a["model"] == model] for model in models}

    models = ["chatty", "again"]
    alone = drawn()["chatty"]
    together = drawn("--with-base", "--adapter", "again:chatty")
    assert together["chatty"] == together["again"] == alone
    assert alone[0] != alone[1]


def test_ctrl_c_ends_it(run, monkeypatch):
    def interrupted(*_, **__):
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.infer.stream", interrupted)
    code, out, err = run("--prompt", "w1")
    assert code == 130
    assert out == "so far\n"
    assert "Traceback" not in err


def test_an_encoder_decoder(tmp_path, capfd):
    torch.manual_seed(0)
    models.t5().save_pretrained(tmp_path / "t5")
    chat_tokenizer().save_pretrained(tmp_path / "t5")
    start = ["generate", "--base", str(tmp_path / "t5"), "--device", "cpu", "--prompt", "w1"]
    assert main([*start, "--max-new-tokens", "3", "--json"]) == 0
    [answer] = json.loads(capfd.readouterr().out)["answers"]
    assert answer["tokens"] <= 3
    assert main([*start, "--system", "w2"]) == 2
    assert "--system cannot act" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "w1", "--prompts", "prompts.txt"], "give one of them"),
        (["--prompts", "nothing.txt"], "cannot be read"),
        (["--prompts", "base/model.safetensors"], "not UTF-8"),
        (["--prompts", "/dev/null"], "holds no prompt"),
        ([], "stdin holds no prompt"),
        (["--prompt", "w1", "--raw", "--system", "w2"], "--system cannot act"),
        (["--prompt", "w1", "--format", "plain", "--system", "w2"], "belongs to a chat"),
        (["--prompt", "w1", "--with-base"], "give an --adapter too"),
        (["--prompt", "w1", "--stop", ""], "--stop is empty"),
        (["--prompt", "w1", "--top-p", "0.5"], "cannot act: at temperature 0"),
        (["--prompt", "w1", "--temperature", "-1"], "at least 0"),
        (["--prompt", "w1 " * 200], "there is no room"),
        (["--prompt", "w1", "--adapter", "chatty", "--blend"], "at least two"),
        (
            ["--prompt", "w1", "--adapter", "chatty", "--adapter", "plain", "--blend"],
            "choose one with --format",
        ),
    ],
)
def test_mistakes(run, flags, message):
    code, out, err = run(*flags)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


CHATS = [
    [{"role": "user", "content": "w1 w2"}],
    [
        {"role": "user", "content": "w1 w7 w50 w20"},
        {"role": "assistant", "content": "w4 w30 w31 w32 w60"},
        {"role": "user", "content": "w3"},
    ],
]


@pytest.mark.parametrize("how", ["prompt", "JSON in prompt", "messages", "with the answer"])
def test_chats_are_asked(run, world, how, expected):
    answer = {"role": "assistant", "content": "w9"}
    rows = {
        "prompt": [{"prompt": chat} for chat in CHATS],
        "JSON in prompt": [{"prompt": json.dumps(chat)} for chat in CHATS],
        "messages": [{"messages": chat} for chat in CHATS],
        "with the answer": [{"conversations": [*chat, answer]} for chat in CHATS],
    }[how]
    (world / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run("--prompts", "chats.jsonl", "--json")
    assert code == 0
    answers = json.loads(out)["answers"]
    assert [one["prompt"] for one in answers] == CHATS
    several = Chat(tuple(CHATS[1]))
    assert [one["text"] for one in answers] == [expected("w1 w2"), expected(several)]
    assert expected(several) != expected("w3")
    code, out, _ = run("--prompts", "chats.jsonl")
    assert code == 0
    assert "w1 w2 ─" in out  # what was said last stands above the answer
    assert "w3 ─" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--raw"], "taken as they are (--raw), and chats.jsonl line 1 is a chat"),
        (["--format", "plain"], "written plain (--format), and chats.jsonl line 1 is a chat"),
        (["--adapter", "plain"], "plain learnt so), and chats.jsonl line 1 is a chat"),
    ],
)
def test_chats_that_cannot_be_asked(run, world, flags, message):
    (world / "chats.jsonl").write_text(json.dumps({"prompt": CHATS[0]}))
    code, out, err = run("--prompts", "chats.jsonl", *flags)
    assert (code, out) == (2, "")
    assert message in err


def test_chats_are_not_asked_of_a_base_without_a_chat_template(run, world):
    shutil.copytree(world / "base", world / "mute", dirs_exist_ok=True)
    (world / "mute" / "chat_template.jinja").unlink()
    (world / "chats.jsonl").write_text(json.dumps({"prompt": CHATS[0]}))
    code, _, err = run("--base", "mute", "--prompts", "chats.jsonl")
    assert code == 2
    assert "needs a chat template; give texts as prompts\n" in err  # and no flag that cannot help


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "nothing before the assistant's"),
        ({"messages": "w1"}, "expected a list of messages"),
        ({"prompt": [{"role": "who", "content": "w1"}]}, 'the role is text "who"'),
        ({"colour": "w1"}, "it has no column that asks; it has colour"),
    ],
)
def test_rows_that_ask_nothing(run, world, row, message):
    (world / "bad.jsonl").write_text(json.dumps(row))
    code, _, err = run("--prompts", "bad.jsonl")
    assert code == 2
    assert "bad.jsonl line 1" in err
    assert message in err


def test_a_broken_file_of_prompts(run, world):
    (world / "bad.jsonl").write_text('{"prompt": "w1"}\n{"prompt": 3}\n')
    code, _, err = run("--prompts", "bad.jsonl")
    assert code == 2
    assert "bad.jsonl line 2" in err
    (world / "bad.jsonl").write_text('{"prompt": "w1"}\n{"prompt": \n')
    code, _, err = run("--prompts", "bad.jsonl")
    assert code == 2
    assert "bad.jsonl line 2: broken JSON" in err
