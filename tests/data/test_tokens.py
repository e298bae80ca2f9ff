"""``TokenData``: the same in memory and on disk, grouped by prompt, recognised by its digest."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data import DataSpec, items, load_data
from lorakit.errors import DataError

from .toys import make_tokenizer, write_jsonl

ROWS = [
    {"prompt": f"what is {n % 7}", "completion": f"the cat {n} ü", "more": n} for n in range(50)
]


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", ROWS)


def same(a, b) -> bool:
    return all(
        x.ids.tolist() == y.ids.tolist()
        and x.supervised.tolist() == y.supervised.tolist()
        and (x.index, x.file, x.id) == (y.index, y.file, y.id)
        for x, y in zip(a, b, strict=True)
    )


def test_large_data_lie_on_disk_and_are_the_same(path, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    tokenizer = make_tokenizer()
    small = load_data(DataSpec(path), tokenizer)
    large = load_data(DataSpec(path), tokenizer, memory_bytes=1000)
    assert (small.on_disk, large.on_disk) == (False, True)
    assert isinstance(large[0].ids.base, np.memmap)
    assert same(small, large)
    assert small.digest == large.digest
    assert small.report == large.report
    assert [large.item(i).completion for i in range(50)] == [r["completion"] for r in ROWS]
    assert [large.item(i).fields for i in range(50)] == ROWS
    assert [small.prompt_key(i) for i in range(50)] == [large.prompt_key(i) for i in range(50)]
    # unlinked while open: a crash leaves nothing behind
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_progress_counts_every_row(path):
    seen: list[int] = []
    load_data(DataSpec(path), make_tokenizer(), progress=seen.append)
    assert seen[-1] == 50


def test_examples_are_read_only_and_end_at_the_last(path):
    data = load_data(DataSpec(path), make_tokenizer())
    assert len(list(data)) == 50 == len(data[:])
    assert data[-1].id == 49
    with pytest.raises(IndexError):
        data[50]
    with pytest.raises(ValueError):
        data[0].ids[0] = 1


def test_the_digest_is_that_of_the_tokens(path, tmp_path):
    tokenizer = make_tokenizer()
    digest = load_data(DataSpec(path), tokenizer).digest
    renamed = write_jsonl(tmp_path / "b.jsonl", [{**row, "more": 0} for row in ROWS])
    assert load_data(DataSpec(renamed), tokenizer).digest == digest
    assert load_data(DataSpec(path, loss_on="all"), tokenizer).digest != digest
    other = write_jsonl(tmp_path / "c.jsonl", ROWS[::-1])
    assert load_data(DataSpec(other), tokenizer).digest != digest


def test_rows_of_one_prompt_are_one_item_in_file_order(path):
    data = load_data(DataSpec(path), make_tokenizer())
    found = items(data)
    assert [item.indices for item in found] == [tuple(range(n, 50, 7)) for n in range(7)]
    assert found[2].references == [ROWS[i]["completion"] for i in range(2, 50, 7)]
    assert found[2].fields == ROWS[2]
    assert found[2].prompt_ids.tolist() == data.item(2).prompt_ids.tolist()
    assert [item.indices for item in items(data, [8, 1, 3])] == [(8, 1), (3,)]


def test_equal_references_are_kept_once_and_duplicates_counted(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": "c"}]
    data = load_data(DataSpec(write_jsonl(tmp_path / "a.jsonl", rows)), make_tokenizer())
    assert items(data)[0].references == ["b", "c"]
    assert items(data)[0].indices == (0, 1, 2, 3)
    assert data.report.duplicates == 2
    assert any("2 examples equal to earlier ones" in line for line in data.report.lines())


def test_plain_text_has_no_prompts_to_generate_from(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="plain text without prompts"):
        items(load_data(DataSpec(tmp_path / "a.txt"), make_tokenizer()))


def test_places_are_named_for_later_messages(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n"a\nb",c\nd,e\n')
    data = load_data(DataSpec(tmp_path / "a.csv"), make_tokenizer())
    assert data.where(1) == f"{tmp_path / 'a.csv'} row 2 (line 4)"
    assert (data[1].file, data[1].index) == (str(tmp_path / "a.csv"), 2)


def test_the_report_counts_and_is_plain_data(path):
    data = load_data(DataSpec(path), make_tokenizer(), context_length=512)
    report = data.report
    lengths = [len(example.ids) for example in data]
    assert report.tokens == sum(lengths) == int(data.lengths.sum())
    counts = [int(example.supervised.sum()) for example in data]
    assert data.supervised_counts.tolist() == counts
    assert report.supervised_tokens == sum(counts)
    assert report.lengths == {
        "min": min(lengths),
        "median": int(np.median(lengths)),
        "p95": int(np.percentile(lengths, 95)),
        "max": max(lengths),
    }
    for start, end, number in report.histogram:
        assert number == sum(start <= n < end for n in lengths)
    assert sum(number for _, _, number in report.histogram) == 50
    assert json.loads(json.dumps(report.to_dict()))["limit"] == 512


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_the_histogram_loses_nothing(lengths):
    from lorakit.data.report import _histogram

    bars = _histogram(np.array(lengths))
    assert sum(number for _, _, number in bars) == len(lengths)
    assert len(bars) <= 10
    assert all(n == sum(a <= x < b for x in lengths) for a, b, n in bars)
