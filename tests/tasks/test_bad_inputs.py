"""What is wrong with data, base or flags of these kinds: exit 2, one message, no traceback."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import struct
import wave

import numpy as np
import pytest
import transformers

from lorakit import save_adapter
from lorakit.cli.main import main
from lorakit.data.rows import RowError
from lorakit.errors import BaseError, DataError
from lorakit.tasks.kinds import in_order
from lorakit.tasks.registry import fitting_task, named, row_kind
from lorakit.tasks.rows import RowSpec
from lorakit.tasks.speech import read_sound

from . import small


@pytest.fixture
def place(benches, tmp_path):
    """Makes the flags of a training on a bench's base, with rows of one's own."""

    def made(name, rows, *more, command="train", folder=None):
        folder = folder or tmp_path
        file = small.write_rows(folder / "rows.jsonl", rows)
        flags = [command, "--base", str(benches[name].folder), "--data", str(file), *more]
        return [*flags, *(["--out", str(tmp_path / "run")] if command == "train" else [])]

    return made


def texts(**changes):
    """Rows of a classifier, of which some are changed: ``row=value of label``."""
    rows = [{"text": row["text"], "label": row["label"]} for row in small.texts(8)]
    for number, value in changes.items():
        rows[int(number[1:])].update(value)
    return rows


def said(arguments, capsys, *parts):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    for part in parts:
        assert part in captured.err, captured.err
    return captured.err


CLASSIFIERS = {
    "no label": (texts(r2={"label": None}), "line 3: the label is null"),
    "a label that is no class": (texts(r2={"label": [1]}), "the label is a list of 1"),
    "an empty text": (texts(r0={"text": " "}), "the text is empty"),
    "a number for a text": (texts(r1={"text": 5}), "the text is the number 5"),
    "one label": (
        [{**row, "label": "a"} for row in texts()],
        "every row has the label 'a'; a classifier needs at least two",
    ),
    "no label that can be used": (
        [{**row, "label": 0.5} for row in texts()],
        "line 1: the label is the number 0.5; expected a word or a whole number",
    ),
    "a label for each row": (
        [{**row, "label": f"{i} is long"} for i, row in enumerate(texts() * 10)],
        "that is no set of classes",
    ),
    "too long": (texts(r3={"text": "w1 " * 40}), "42 tokens; at most 32 fit"),
    "what cuts": (texts(r3={"text": "w1 " * 40}), "shorten the long ones with --truncate"),
    "no column": ([{"a": "x", "b": "y"}], "no column is known as the text"),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_rows_of_a_classifier(place, capsys, case):
    rows, message = CLASSIFIERS[case]
    said(place("classify", rows, "--task", "classify"), capsys, message)


def test_a_text_that_is_cut_is_used(place, capsys):
    rows = texts(r3={"text": "w1 " * 40})
    assert main(place("classify", rows, "--truncate", command="preview")) == 0
    assert "line 1" in capsys.readouterr().out


def test_pictures(place, tmp_path, capsys):
    rows = small.write_pictures(tmp_path, 6)
    (tmp_path / "2.png").write_bytes(b"\x89PNG broken")
    rows[4]["image"] = "lost.png"
    told = said(place("vision", rows), capsys, "2 of 6 rows cannot be used")
    assert "2.png: it is damaged or no picture" in told
    assert "lost.png: No such file or directory" in told


def test_recordings(place, tmp_path, capsys):
    rows = small.write_sounds(tmp_path, 5)
    small.write_sound(tmp_path / "0.wav", 300, rate=8000)
    small.write_sound(tmp_path / "1.wav", 300, seconds=2)
    content = (tmp_path / "2.wav").read_bytes()
    (tmp_path / "2.wav").write_bytes(content[:-100])
    (tmp_path / "3.wav").write_bytes(b"no sound at all")
    told = said(place("speech", rows), capsys, "4 of 5 rows cannot be used")
    assert "8000 samples a second and the base takes 16000" in told
    assert "1.wav: 2.0 seconds; cut it into parts" in told
    assert "2.wav is damaged: it ends before its last sample" in told
    assert "3.wav cannot be read as sound" in told
    assert "--truncate" not in told  # which cuts transcripts alone


def test_chats(place, tmp_path, capsys):
    rows = small.write_chats(tmp_path, 7)
    rows[0]["messages"] = "hello"
    rows[1]["messages"][0]["role"] = "human"
    rows[2]["messages"].pop()
    rows[3]["messages"][0]["content"] = "w1 without a picture"
    rows[4]["messages"][0]["content"][0] = {"type": "video"}
    rows[5]["messages"][0]["content"][0] = {"type": "image", "image": "lost.png"}
    told = said(place("vision-chat", rows), capsys, "6 of 7 rows cannot be used")
    for part in (
        'the messages are text "hello"; expected a list',
        "message 1 is an object with role, content; expected a role",
        "there is no message of an assistant",
        "there is no picture; rows of text alone are for a language model",
        "message 1 holds an object with type; expected text or an image",
        "lost.png: No such file or directory",
    ):
        assert part in told


@pytest.mark.parametrize("width", [5, 8])
def test_samples_of_a_width_that_nobody_writes(width):
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 4, 16000, 0, "NONE", ""))
        written.writeframes(bytes(40))
    content = bytearray(file.getvalue())
    content[32:36] = struct.pack("<HH", width, 8 * width)  # bytes of a frame, bits of a sample
    with pytest.raises(RowError, match=rf"a\.wav is damaged: its samples have {width} bytes each"):
        read_sound(bytes(content), "a.wav")


def test_samples_that_are_no_numbers(benches, tmp_path, capsys):
    """Whether they are learnt or asked with."""
    samples = np.zeros(8000, np.float32)
    samples[99] = np.nan
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 3, 1, 16000, 64000, 4, 32)
    body = head + b"data" + struct.pack("<I", samples.nbytes) + samples.tobytes()
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    asked = ["generate", "--base", str(benches["speech"].folder), "--prompt", str(path)]
    message = "a.wav is damaged: some samples are NaN or infinite"
    said([*asked, "--task", "speech"], capsys, message)
    rows = small.write_rows(tmp_path / "rows.jsonl", [{"audio": "a.wav", "text": "w1"}])
    base = benches["speech"].base()
    with pytest.raises(DataError, match=message):
        benches["speech"].kind.load_data(RowSpec((str(rows),)), base)


def chat(text, images=("0.png",)):
    turns = [("user", text), ("assistant", "w3")]
    return {"messages": [{"role": r, "content": c} for r, c in turns], "images": list(images)}


def test_a_picture_for_each_mark_in_the_texts(place, tmp_path, capsys):
    small.write_pictures(tmp_path, 2)
    rows = [chat("<image>\nw1"), chat("<image><image> w1"), chat("<image> w1", ["0.png", "1.png"])]
    told = said(place("vision-chat", rows), capsys, "2 of 3 rows cannot be used")
    assert "line 2: the messages have places for 2 pictures (an <image> in a text is one)" in told
    assert "line 3: 1 pictures have no place in the messages" in told


REFUSALS = {
    "{{ raise_exception('take turns') if p['text'] == 'w9' else p['text'] }}": (
        "the base's chat template refuses it: take turns"
    ),
    # a mark that the processor has no picture for
    "{{ p['text'] | replace('w9', '<image>') }}": "the base's processor refuses it: ",
}


@pytest.mark.parametrize("writes", REFUSALS)
def test_a_chat_that_the_base_refuses_is_a_bad_row(benches, tmp_path, writes):
    small.write_pictures(tmp_path, 1)
    bench = benches["vision-chat"]
    base = bench.base()
    template = base.processor.chat_template
    base.processor.chat_template = template.replace("{{ p['text'] }}", writes)
    file = small.write_rows(tmp_path / "rows.jsonl", [chat("w9"), chat("w1")])
    data = bench.kind.load_data(RowSpec((str(file),), bad_rows="skip"), base)
    assert (len(data), data.report.num_dropped) == (1, 1)
    assert REFUSALS[writes] in data.report.dropped_rows[0]


OPTIONAL = {
    "embed": ("negative", "w3", "the negative"),
    "classify": ("sentence2", "w3", "the text_pair"),
    "vision-chat": ("images", ["0.png"], "the images"),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_only_later_rows_have_is_not_passed_over(benches, place, tmp_path, capsys, name):
    column, value, field = OPTIONAL[name]
    rows = [json.loads(line) for line in benches[name].file.read_text().splitlines()[:6]]
    small.write_pictures(tmp_path, 6)
    rows[1][column], rows[2][column] = value, None  # null is as good as no column
    told = said(place(name, rows), capsys, "1 of 6 rows cannot be used")
    assert f"line 2: it has a column '{column}' ({field}), and the first row has none" in told


def test_a_table_whose_quote_is_open(benches, tmp_path, capsys):
    (tmp_path / "open.csv").write_text('text,label\n"w1 w2,a\nw2,b\n')
    flags = ["--base", str(benches["classify"].folder), "--data", str(tmp_path / "open.csv")]
    arguments = ["train", *flags, "--task", "classify", "--out", str(tmp_path / "run")]
    said(arguments, capsys, "open.csv row 1 (line 2): a quote", "no row has a label")


def test_texts_without_the_end_that_the_head_reads(benches, tmp_path, capsys):
    rows = small.write_rows(tmp_path / "rows.jsonl", texts())
    flags = ["--base", str(benches["t5"].folder), "--data", str(rows), "--task", "classify"]
    message = "reads a text at its end token (2), and its tokenizer puts none behind a text"
    said(["train", *flags, "--out", str(tmp_path / "run")], capsys, message)


def test_pairs_with_nothing_to_be_contrasted_with(place, tmp_path, capsys):
    rows = [{"anchor": "w1", "positive": "w2"}]
    said(place("embed", rows), capsys, "nothing to contrast it with")
    said(place("embed", [*rows, {"anchor": "w3", "positive": "w2"}]), capsys, "the same positive")
    rows = [*rows, {"anchor": "w3", "positive": "w4"}]
    said(place("embed", rows, "--batch-size", "1"), capsys, "batch_size is 1, so a pair")
    assert not (tmp_path / "run").exists()
    rows = [{**row, "negative": "w5"} for row in rows]
    assert main(place("embed", rows, "--batch-size", "1", "--steps", "1")) == 0


POOLINGS = [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ({"pooling_mode_lasttoken": True}, "last"),
    ({"embedding_dimension": 16, "pooling_mode": "cls"}, "cls"),
    ({"pooling_mode": "lasttoken"}, "last"),
    ({"pooling_mode": "mean"}, "mean"),
    ({"pooling_mode_max_tokens": True}, None),
    ({"pooling_mode_weightedmean_tokens": True}, None),
    ({"pooling_mode": "max"}, None),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
]


@pytest.mark.parametrize(("config", "expected"), POOLINGS)
def test_the_pooling_of_a_base(tmp_path, config, expected):
    """In the old form and the new one; what is not known is refused rather than replaced."""
    path = tmp_path / "1_Pooling" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    if expected is None:
        with pytest.raises(BaseError, match=r"1_Pooling.config\.json asks for the pooling"):
            row_kind("embed").from_base({"_folder": str(tmp_path)}, "base")
    else:
        assert row_kind("embed").from_base({"_folder": str(tmp_path)}, "base").pooling == expected


FLAGS = [
    ("classify", ["--system", "Be kind"], "--system: it is about texts that are continued"),
    ("classify", ["--loss-on", "all"], "--loss-on: it is about texts that are continued"),
    ("classify", ["--lr", "auto"], "--lr auto: the search trains causal language models"),
    ("classify", ["--init", "eva"], "--init eva: it looks at the texts of causal language models"),
    ("classify", ["--map", "label=nothing"], "there is no column 'nothing'"),
    ("classify", ["--map", "prompt=text"], "--map prompt: classify has no such field"),
    ("classify", ["--task", "causal"], "weights of BertLMHeadModel"),
    ("t5", ["--task", "classify"], "no column is known as the label"),
    ("t5", ["--task", "vision"], "no column is known as the image"),
    ("t5", ["--recompute", "offload"], "offloading needs fused layers"),
    ("vision", ["--max-length", "9"], "--max-length: it cannot act on vision"),
    ("vision-chat", ["--truncate"], "--truncate: it cannot act on vision-chat"),
    ("classify", ["--language", "de"], "--language: it is about recordings of speech"),
    ("speech", ["--language", "de"], "is not told its language; leave it out"),
]


@pytest.mark.parametrize(("name", "flags", "message"), FLAGS)
def test_flags(benches, tmp_path, capsys, name, flags, message):
    bench = benches[name]
    arguments = ["train", "--base", str(bench.folder), "--data", str(bench.file)]
    said([*arguments, "--out", str(tmp_path / "run"), *flags], capsys, message)
    assert not (tmp_path / "run").exists()


def test_bases_that_lack_what_reads_their_input(benches, tmp_path, capsys):
    for name, file, message in (
        ("vision", "preprocessor_config.json", "so pictures cannot be read for it"),
        ("classify", "tokenizer.json", "has no tokenizer, which is needed to read text"),
    ):
        bench = benches[name]
        folder = tmp_path / name
        shutil.copytree(bench.folder, folder)
        (folder / file).unlink()
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        arguments = ["train", "--base", str(folder), "--data", str(bench.file)]
        said([*arguments, "--out", str(tmp_path / "run")], capsys, message)


def test_a_library_that_reads_the_input_is_missing(benches, tmp_path, capsys, monkeypatch):
    """As with Qwen-VL, whose processor wants torchvision for its videos."""

    def lacks(*_, **__):
        raise ImportError("\nIts video processor requires Torchvision. See the\nweb page\n")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lacks)
    bench = benches["vision-chat"]
    arguments = ["train", "--base", str(bench.folder), "--data", str(bench.file)]
    told = said([*arguments, "--out", str(tmp_path / "run")], capsys, "requires Torchvision. Inst")
    assert "brings nothing" not in told


def test_judging_and_asking(benches, tmp_path, capsys):
    bench = benches["classify"]
    base = ["--base", str(bench.folder)]
    data = ["--data", str(bench.file)]
    message = "--metrics bleu: the answers of classify are no texts"
    said(["eval", *base, *data, "--metrics", "bleu"], capsys, message)
    flags = ["--forgetting", str(bench.file), "--parallel", "2", "--show", "5"]
    told = said(["eval", *base, *data, *flags], capsys, "the loss of a causal language model")
    assert "--parallel: how many inputs" in told
    assert "--show: answers are made for --save alone" in told
    asked = ["generate", *base, "--prompt", "w1"]
    said([*asked, "--task", "classify"], capsys, "nothing tells which labels there are")
    flags = ["--temperature", "1", "--top-p", "0.5", "--seed", "3", "--parallel", "2"]
    flags += ["--max-new-tokens", "9"]
    told = said([*asked, "--task", "classify", *flags], capsys)
    assert all(f"{flag}: " in told for flag in flags[::2])
    vision = ["generate", "--base", str(benches["vision"].folder), "--prompt", "lost.png"]
    said([*vision, "--task", "vision"], capsys, "nothing tells which labels there are")
    bart = ["generate", "--base", str(benches["bart"].folder), "--prompt", "w1 " * 70]
    said(bart, capsys, "has 72 tokens, and", "takes 64 at most; shorten it")
    for task, why in (
        ("embed", "makes vectors, not text"),
        ("vision-chat", "a chat with pictures"),
    ):
        # before anything is loaded
        said(["generate", "--base", "nowhere", "--prompt", "w1", "--task", task], capsys, why)


def saved(bench, folder, **facts):
    """An adapter that nobody trained, as a folder."""
    base = bench.base()
    adapter = bench.attached(base).snapshot("a")
    facts = {"base": base.identity, "task_type": bench.kind.peft_type, **facts}
    save_adapter(adapter.with_(**facts), folder)
    return str(folder)


def test_going_on_with_an_adapter_that_brings_no_head(benches, tmp_path, capsys):
    bench, embed = benches["classify"], benches["embed"]
    arguments = ["train", "--base", str(bench.folder), "--data", str(bench.file)]
    arguments += ["--out", str(tmp_path / "run"), "--from"]
    told = {"task": named(embed.kind)}
    start = saved(embed, tmp_path / "embedding", provenance=told)
    # what it was trained for is what the task is
    said([*arguments, start], capsys, "no column is known as the anchor")
    message = "the adapter to go on with has classifier.bias, classifier.weight: they would stay"
    said([*arguments, start, "--task", "classify"], capsys, message)


def test_adapters_that_do_not_say_enough(benches, tmp_path, capsys):
    bench = benches["classify"]
    theirs = saved(bench, tmp_path / "theirs")
    file = small.write_rows(tmp_path / "two.jsonl", [{"text": "w1", "label": x} for x in "ab"])
    flags = ["--base", str(bench.folder), "--adapter", theirs]
    message = "the head of theirs has 3 classes and does not name them, and 2 labels are known"
    said(["eval", *flags, "--data", str(file)], capsys, message)
    told = {"task": named(bench.kind), "data": {"columns": {"text_pair": "text_pair"}}}
    flags[-1] = saved(bench, tmp_path / "pairs", provenance=told)
    said(["generate", *flags, "--prompt", "w1"], capsys, "pairs judges pairs of texts")


def test_what_is_guessed(benches):
    """By the base, and by the rows where the base leaves it open."""

    def guess(name, *columns):
        config = json.loads((benches[name].folder / "config.json").read_text())
        return fitting_task(config, lambda: columns)[0]

    assert guess("t5", "text", "label") == "seq2seq"
    assert guess("bart", "prompt", "completion") == "seq2seq"
    assert guess("speech") == "speech"
    assert guess("vision") == "vision"
    assert guess("vision-chat", "messages") == "vision-chat"
    assert guess("classify", "text", "label") == "classify"
    assert guess("classify", "sentence1", "sentence2", "label") == "classify"
    assert guess("classify", "anchor", "positive") == "embed"
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert fitting_task(llama, lambda: ["text", "label"])[0] == "causal"
    assert fitting_task({"model_type": "gpt2"}, list)[0] == "causal"


def test_labels_have_one_order():
    """Not that of a set, which differs from process to process."""
    for labels in itertools.permutations(["1", "01", "0", "00", "2"]):
        assert in_order(labels) == ("0", "00", "01", "1", "2")
    assert in_order(["b", "a", "10"]) == ("10", "a", "b")
