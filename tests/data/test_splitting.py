"""Held-out rows: whole prompts, the same each time, as many as asked where that is possible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data import DataSpec, load_data, split

from .toys import make_tokenizer, write_jsonl

TOKENIZER = make_tokenizer(None)


def load(folder, prompts):
    rows = [{"prompt": f"p{p}", "completion": f"c{n}"} for n, p in enumerate(prompts)]
    return load_data(DataSpec(write_jsonl(folder / "a.jsonl", rows)), TOKENIZER)


@given(
    prompts=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_prompt_is_never_on_both_sides(tmp_path_factory, prompts, fraction, seed):
    data = load(tmp_path_factory.mktemp("split"), prompts)
    training, validation = split(data, fraction, seed)
    assert sorted([*training, *validation]) == list(range(len(prompts)))
    assert list(training) == sorted(training)
    assert list(validation) == sorted(validation)
    assert not {prompts[i] for i in training} & {prompts[i] for i in validation}
    assert len(training) > 0
    assert (len(validation) > 0) == (len(set(prompts)) > 1)
    again = split(data, fraction, seed)
    assert [part.tolist() for part in again] == [training.tolist(), validation.tolist()]


def test_the_share_is_met_where_prompts_allow_it(tmp_path):
    data = load(tmp_path, [n // 3 for n in range(300)])
    assert len(split(data, 0.05, 0)[1]) == 15
    assert len(split(data, 0.5, 0, max_rows=31)[1]) == 30
    assert len(split(data, 0, 0)[1]) == 0
    with pytest.raises(ValueError, match="fraction"):
        split(data, 1.0, 0)


class Keys(list):
    """Rows that are their prompts."""

    def prompt_key(self, index):
        return self[index]


def test_a_row_without_a_prompt_is_never_held_out():
    rows = Keys([b"", b"a", b"", b"b", b"c", b"d", b"", b""])
    _, held = split(rows, 0.5, 0)
    assert len(held) == 2  # half of those that may be
    assert all(rows[i] for i in held)
    assert len(split(Keys([b"", b"", b"a"]), 0.9, 0)[1]) == 0


def test_what_is_held_out_depends_on_seed_and_prompts_only(tmp_path):
    prompts = list(range(60))
    data, turned = load(tmp_path, prompts), load(tmp_path, prompts[::-1])
    held = {prompts[i] for i in split(data, 0.2, 1)[1]}
    assert held == {prompts[::-1][i] for i in split(turned, 0.2, 1)[1]}
    assert held != {prompts[i] for i in split(data, 0.2, 2)[1]}


def test_the_split_is_the_same_for_every_base(tmp_path):
    rows = [{"prompt": f"p{n}", "completion": "c"} for n in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = [
        split(load_data(DataSpec(path), tokenizer), 0.2, 0)[1].tolist()
        for tokenizer in (TOKENIZER, make_tokenizer(), make_tokenizer(None, bos=True))
    ]
    assert found == [found[0]] * 3
