"""The same rows, whatever file they come from."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest

from lorakit.data import DataSpec, load_data
from lorakit.data.readers import open_rows
from lorakit.errors import DataError

from .toys import make_tokenizer, write_jsonl

ROWS = [
    {"prompt": "a cat", "completion": "miaow, purr"},
    {"prompt": 'say "hi"\nplease', "completion": "hüt — ☃ 😀"},
    {"prompt": "three", "completion": "3; three"},
]


def as_csv(delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
FILES = {
    "a.jsonl": LINES.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "blank.jsonl": ("\n" + LINES.replace("}\n", "}\n\n")).encode(),
    "no_end.ndjson": LINES.rstrip("\n").encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "PACKED.JSONL.GZ": gzip.compress(LINES.encode()),
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "named.json": json.dumps({"version": 1, "rows": ROWS}).encode(),
    "lines.json": LINES.encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "list_indented.jsonl": json.dumps(ROWS, indent=1).encode(),
    "a.csv": as_csv().encode(),
    "bom.csv": b"\xef\xbb\xbf" + as_csv().encode(),
    "utf16.csv": as_csv().encode("utf-16"),
    "semicolons.csv": as_csv(";").encode(),
    "a.tsv": as_csv("\t").encode(),
    "packed.csv.gz": gzip.compress(as_csv().encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    rows = list(open_rows(str(path), []))
    assert [row.values for row in rows] == ROWS
    assert not any(row.problem for row in rows)


def test_parquet_and_datasets_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    for ref in ("a.parquet", "saved", "two", "two/test"):
        rows = list(open_rows(str(tmp_path / ref), []))
        assert [row.values for row in rows] == (ROWS[:1] if ref == "two/test" else ROWS)
        assert rows[0].where == f"{tmp_path / ref} row 1"


def test_parquet_rows_that_python_cannot_hold_are_named(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [b"one", b"tw\xff", b"three"]
    # a cast would check that it is UTF-8; another writer need not
    text = arrow.StringArray.from_buffers(3, *arrow.array(texts, arrow.binary()).buffers()[1:])
    times = arrow.array([0, 0, 2**62], arrow.timestamp("ms"))
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": text, "when": times}), path)
    rows = list(open_rows(str(path), []))
    assert [row.number for row in rows] == [1, 2, 3]
    assert (rows[0].values["text"], rows[0].problem) == ("one", None)
    assert "column 'text'" in rows[1].problem
    assert "0xff" in rows[1].problem
    assert "column 'when'" in rows[2].problem
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(arrow.table({"text": text})).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved: it cannot be read after row 0 \(.*0xff"):
        list(open_rows(str(tmp_path / "saved"), []))


def test_rows_are_numbered_as_somebody_counts_who_opens_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\na,"two\nlines"\n\nb,c\n')
    assert [row.where for row in open_rows(str(path), [])] == [
        f"{path} row 1 (line 2)",
        f"{path} row 2 (line 5)",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n{"text": "y"}\n')
    assert [row.where for row in open_rows(str(path), [])] == [f"{path} line 1", f"{path} line 3"]


def test_text_is_read_by_paragraphs_or_by_lines(tmp_path):
    notes: list[str] = []
    path = tmp_path / "a.txt"
    path.write_text("\n\none\nstill one\n\n \ntwo\n\n")
    rows = list(open_rows(str(path), notes))
    assert [row.values["text"] for row in rows] == ["one\nstill one", "two"]
    assert rows[1].where == f"{path} paragraph 2 (line 7)"
    path.write_text("one\ntwo\n")
    assert [row.values["text"] for row in open_rows(str(path), notes)] == ["one", "two"]
    assert "per paragraph" in notes[0]
    assert "per line" in notes[1]


def test_a_folder_of_files_is_read_in_order_and_said(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("words about the data")
    notes: list[str] = []
    assert [row.values for row in open_rows(str(tmp_path), notes)] == ROWS
    assert "a.jsonl, b.jsonl" in notes[0]


def test_a_folder_with_held_out_files_is_not_read_as_one(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"held out \(test\.jsonl\).*name the files"):
        open_rows(str(tmp_path), [])


def test_several_files_are_one_data_set(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "b.csv").write_bytes(FILES["a.csv"])
    spec = DataSpec([tmp_path / "a.jsonl", tmp_path / "b.csv"])
    data = load_data(spec, make_tokenizer())
    assert [(e.file.rpartition("/")[2], e.index) for e in data] == [
        ("a.jsonl", 1),
        ("b.csv", 1),
        ("b.csv", 2),
        ("b.csv", 3),
    ]


def test_a_hub_id_is_loaded_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for ref in ("owner/name", "owner/name:small@v1/test", "name:small"):
        assert [row.values for row in open_rows(ref, [])] == ROWS
    assert asked == [
        ("owner/name", None, "train", None),
        ("owner/name", "small", "test", "v1"),
        ("name", "small", "train", None),
    ]


def test_a_hub_id_that_does_not_load_is_one_clear_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/nme: there is no such file.*cannot reach the hub"):
        list(open_rows("owner/nme", []))
