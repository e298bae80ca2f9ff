"""What the model is asked with: the same ids in training and in generation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data import DataSpec, load_data, make_rendering
from lorakit.data.spec import DataSpec as Spec

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

#: template → (what the model is asked with, what it learns)
WRITTEN = {
    CHATML: ("<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", " sat <|im_end|>"),
    LLAMA3: (
        "<s><|im_start|>user\n\nthe cat<|im_end|><|im_start|>assistant\n\n",
        "sat<|im_end|>",
    ),
    LLAMA2: ("<s>[INST] the cat [/INST]", " sat  </s>"),
    HEADERLESS: ("<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", " sat <|im_end|>"),
    THINKING: ("<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", " sat <|im_end|>"),
    UNENDED: ("user: the cat\nassistant: ", " sat </s>"),
    None: ("the cat\n", " sat </s>"),
}


@pytest.mark.parametrize("template", WRITTEN)
@pytest.mark.parametrize("bos", [False, True])
def test_training_and_generation_see_the_same(tmp_path, template, bos):
    tokenizer = make_tokenizer(template, bos=bos)
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the cat", "completion": " sat "}])
    data = load_data(DataSpec(path), tokenizer)
    prompt, answer = WRITTEN[template]
    begin = "<s>" if bos and template is None else ""

    item, example = data.item(0), data[0]
    assert tokenizer.decode(example.ids) == begin + prompt + answer
    assert supervised_text(tokenizer, example) == [answer]
    assert item.prompt == prompt
    assert item.prompt_ids.tolist() == example.ids[: len(item.prompt_ids)].tolist()
    assert not example.supervised[: len(item.prompt_ids)].any()
    assert example.supervised[len(item.prompt_ids) :].all()

    asked = make_rendering(tokenizer).prompts(["the cat"])[0]
    assert asked.text == item.prompt
    assert list(asked.ids) == item.prompt_ids.tolist()
    # the last token learnt is one at which generation stops
    assert example.ids[-1] in data.stop_ids
    assert example.ids.tolist().count(0) == (1 if begin or "<s>" in prompt else 0)


@given(prompt=st.text(min_size=1), completion=st.text(min_size=1))
def test_the_tokens_of_any_text_come_back(tmp_path_factory, prompt, completion):
    if not prompt.strip() or not completion.strip():
        return
    tokenizer = make_tokenizer(None)
    path = write_jsonl(
        tmp_path_factory.mktemp("any") / "a.jsonl", [{"prompt": prompt, "completion": completion}]
    )
    try:
        data = load_data(DataSpec(path), tokenizer)
    except ValueError as error:
        assert "surrogate" in str(error)  # noqa: PT017 - Hypothesis draws none, JSON could hold one
        return
    gap = "" if prompt[-1].isspace() else "\n"
    assert tokenizer.decode(data[0].ids) == prompt + gap + completion + "</s>"
    assert (data.item(0).completion, data.item(0).fields["prompt"]) == (completion, prompt)


def test_bos_is_never_doubled(tmp_path):
    tokenizer = make_tokenizer(None, bos=True)
    rows = [{"prompt": "<s>the cat", "completion": "sat</s>"}]
    data = load_data(DataSpec(write_jsonl(tmp_path / "a.jsonl", rows)), tokenizer)
    assert tokenizer.decode(data[0].ids) == "<s>the cat\nsat</s>"
    assert "special token" in data.report.notes[-1]
    (tmp_path / "a.txt").write_text("<s>the cat\nthe dog")
    data = load_data(DataSpec(tmp_path / "a.txt"), tokenizer)
    assert [tokenizer.decode(e.ids) for e in data] == ["<s>the cat</s>", "<s>the dog</s>"]


def test_plain_text_is_learnt_but_for_its_first_token(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat\n")
    data = load_data(DataSpec(tmp_path / "a.txt"), make_tokenizer())
    assert data.report.format == "plain"
    assert data[0].supervised.tolist() == [False] + [True] * (len(data[0].ids) - 1)
    assert data.report.supervised_tokens == len(data[0].ids) - 1


def test_loss_on_all_supervises_the_prompt_too(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the cat", "completion": "sat"}])
    tokenizer = make_tokenizer()
    some = load_data(DataSpec(path), tokenizer)
    every = load_data(DataSpec(path, loss_on="all"), tokenizer)
    assert every[0].ids.tolist() == some[0].ids.tolist()
    assert every[0].supervised.tolist() == [False] + [True] * (len(every[0].ids) - 1)
    assert every.item(0).prompt == some.item(0).prompt


def test_format_and_system_act(tmp_path):
    tokenizer = make_tokenizer()
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the cat", "completion": "sat"}])
    plain = load_data(DataSpec(path, format="plain"), tokenizer)
    assert tokenizer.decode(plain[0].ids) == "the cat\nsat</s>"
    chat = load_data(DataSpec(path, system="be"), tokenizer)
    assert tokenizer.decode(chat[0].ids).startswith("<|im_start|>system\nbe<|im_end|>")
    assert "as asked" in plain.report.lines()[1]
    assert "has a chat template" in chat.report.lines()[1]


@pytest.mark.parametrize(
    ("template", "note"),
    [
        (HEADERLESS, "has no generation prompt"),
        (THINKING, r"'<think>\n\n</think>\n\n' before a finished answer"),
        (UNENDED, "'</s>' is added"),
        (CHATML + "{{ '' if strftime_now is defined }}", "today's date"),
    ],
)
def test_what_a_template_does_is_said(template, note):
    assert any(note in one for one in make_rendering(make_tokenizer(template)).notes)


def test_a_template_without_the_bos_of_its_tokenizer_is_said():
    notes = make_rendering(make_tokenizer(CHATML, bos=True)).notes
    assert any("does not begin with <s>" in note for note in notes)
    assert make_rendering(make_tokenizer(LLAMA3, bos=True)).notes == ()


def test_a_truncation_left_in_the_tokenizer_does_not_act(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer("the cat sat on the mat", truncation=True, max_length=4, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation is not None
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the cat " * 9, "completion": "sat"}])
    data = load_data(DataSpec(path), tokenizer)
    assert tokenizer.decode(data[0].ids).endswith(
        "the cat <|im_end|>\n<|im_start|>assistant\nsat<|im_end|>"
    )


def test_a_spec_survives_its_dictionary():
    spec = Spec(["a", "b"], map={"completion": "x"}, template="{y}", system="s", max_length=9)
    assert Spec(**spec.to_dict()) == spec
