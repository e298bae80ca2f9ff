"""The file of tensors against the format's own library, and against damage of every kind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit.core.safetensors_io import DTYPES, read_safetensors, write_safetensors
from lorakit.errors import FormatError

from ..formats.small import MEMORY


@st.composite
def tensor_dicts(draw) -> dict[str, torch.Tensor]:
    printable = st.text(min_size=1, max_size=6).filter(str.isprintable)  # what names may be
    names = draw(st.lists(printable, max_size=5, unique=True))
    found = {}
    for name in names:
        if name == "__metadata__":
            continue
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        found[name] = (torch.rand(shape) * 100).to(dtype)
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(
        t.dtype == second[k].dtype and torch.equal(t, second[k]) for k, t in first.items()
    )


@settings(max_examples=60, deadline=None)
@given(tensor_dicts(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_the_library_reads_ours_and_we_read_the_librarys(tensors, metadata):
    with tempfile.TemporaryDirectory(dir=MEMORY) as parent:
        ours, theirs = Path(parent) / "ours", Path(parent) / "theirs"
        write_safetensors(ours, tensors, metadata)
        assert same(load_file(ours), tensors)
        with safe_open(ours, framework="pt") as file:
            assert (file.metadata() or {}) == metadata
        save_file(tensors, theirs, metadata or None)
        read, told = read_safetensors(theirs)
        assert same(read, tensors)
        assert told == metadata
        read, told = read_safetensors(ours)
        assert same(read, tensors)
        assert told == metadata


@settings(max_examples=40, deadline=None)
@given(tensor_dicts())
def test_byte_for_byte_the_librarys_where_that_is_reproducible(tensors):
    """With one entry of metadata there is no order to randomise."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as parent:
        ours, theirs = Path(parent) / "ours", Path(parent) / "theirs"
        write_safetensors(ours, tensors, {"format": "pt"})
        save_file(tensors, theirs, {"format": "pt"})
        if not any(name in ("", "\x7f") or not name.isascii() for name in tensors):
            assert ours.read_bytes() == theirs.read_bytes()


def test_dtypes_of_one_width_stand_in_the_librarys_order(tmp_path):
    tensors = {f"{i}": torch.zeros(1).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    tensors |= {f"{9 - i}'": tensor.clone() for i, tensor in enumerate(tensors.values())}
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_metadata_of_null_is_none(tmp_path):
    """As MLX writes it where it is given none; the library reads it so too."""
    path = tmp_path / "mlx.safetensors"
    path.write_bytes(file_with({"__metadata__": None, "a": entry()}, FOUR))
    with safe_open(path, framework="pt") as file:
        assert not file.metadata()
    tensors, metadata = read_safetensors(path)
    assert metadata == {}
    assert torch.equal(tensors["a"], torch.zeros(1))


def test_metadata_is_sorted(tmp_path):
    """The library's writer would order these by a hash that differs in every process."""
    names = dict.fromkeys("zyxabcmnk", "x")
    write_safetensors(tmp_path / "a", {}, names)
    header = json.loads((tmp_path / "a").read_bytes()[8:])
    assert list(header["__metadata__"]) == sorted(names)


def file_with(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 4, dtype: object = "F32", shape: object = (1,)) -> dict:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FOUR = b"\0" * 4

#: name → (content, words of the message)
DAMAGED = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"\0" * 7, "7 bytes"),
    "header beyond the file": (file_with({}, length=99), "claims 99 bytes"),
    "header beyond any file": (file_with({}, length=2**63), "claims"),
    "no JSON": (file_with(b"{nonsense"), "no JSON"),
    "no UTF-8": (file_with(b"\xff\xfe{}"), "no JSON"),
    "a list": (file_with([1]), "no JSON object"),
    "a deep list": (file_with(b"[" * 100_000), "no JSON"),
    "a number of many digits": (file_with(b"1" * 10_000), "no JSON"),
    "key twice": (file_with(b'{"a": {}, "a": {}}'), "'a' twice"),
    "field twice": (file_with(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "'dtype' twice"),
    "metadata of numbers": (file_with({"__metadata__": {"a": 1}}), "metadata"),
    "metadata as list": (file_with({"__metadata__": []}), "metadata"),
    "entry is null": (file_with({"a": None}), "exactly dtype"),
    "entry too short": (file_with({"a": {"dtype": "F32"}}), "exactly dtype"),
    "entry too long": (file_with({"a": {**entry(), "x": 1}}, FOUR), "exactly dtype"),
    "unknown dtype": (file_with({"a": entry(dtype="F31")}, FOUR), "'F31'"),
    "dtype is a list": (file_with({"a": entry(dtype=["F32"])}, FOUR), "a"),
    "shape is text": (file_with({"a": entry(shape="1")}, FOUR), "lists of counts"),
    "negative shape": (file_with({"a": entry(shape=(-1,))}, FOUR), "lists of counts"),
    "fractional shape": (file_with({"a": entry(shape=(1.0,))}, FOUR), "lists of counts"),
    "boolean shape": (file_with({"a": entry(shape=(True,))}, FOUR), "lists of counts"),
    "beyond memory": (file_with({"a": entry(0, 0, shape=(0, 2**40, 2**40))}), "beyond any memory"),
    "shape and place disagree": (file_with({"a": entry(shape=(3,))}, FOUR), "needs 12 bytes"),
    "negative place": (file_with({"a": entry(-4, 0)}, FOUR), "lists of counts"),
    "place backwards": (file_with({"a": entry(4, 0)}, FOUR), "needs 4 bytes"),
    "overlap": (file_with({"a": entry(0, 4), "b": entry(2, 6)}, FOUR + b"\0\0"), "overlaps"),
    "gap": (file_with({"a": entry(0, 4), "b": entry(6, 10)}, b"\0" * 10), "leaves a gap"),
    "cut off": (file_with({"a": entry(0, 8, shape=(2,))}, FOUR), "cut off"),
    "left over": (file_with({"a": entry(0, 4)}, FOUR * 2), "left over"),
    "a zip file": (b"PK\x03\x04" + b"\0" * 40, "claims"),
    "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "claims"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage(tmp_path, name):
    content, words = DAMAGED[name]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "copy or download it again" in message


def test_a_folder_in_the_files_place(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        read_safetensors(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_damage_is_noticed_or_harmless(data):
    """Whatever bytes change, the answer is a FormatError or tensors of the declared shapes."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    with tempfile.TemporaryDirectory(dir=MEMORY) as parent:
        path = Path(parent) / "x"
        write_safetensors(path, tensors, {"format": "pt"})
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            position = data.draw(st.integers(0, len(content) - 1))
            content[position] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, 12))
        path.write_bytes(bytes(content[: len(content) - cut]))
        try:
            read, _ = read_safetensors(path)
        except FormatError:
            return
        assert all(isinstance(tensor, torch.Tensor) for tensor in read.values())


def test_a_dtype_that_has_no_name(tmp_path):
    with pytest.raises(FormatError, match=r"a: torch\.complex64"):
        write_safetensors(tmp_path / "x", {"a": torch.ones(2, dtype=torch.complex64)}, {})
    assert not (tmp_path / "x").exists()
