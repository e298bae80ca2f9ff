"""Hostile files, one trick at a time; `test_mutated.py` has them by the thousand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorakit.core.gguf_file import read_gguf
from lorakit.errors import FormatError
from lorakit.formats import save_adapter
from lorakit.formats.convert import plan_reading
from lorakit.formats.format import Hints, Reading
from lorakit.formats.registry import read
from tests.formats.language_models import LLAMA, adapter

HINTS = Hints(alpha=4, base=LLAMA)


def files(folder: Path) -> dict[str, Path]:
    """Format → the file of its tensors."""
    found = {}
    for to in ("gguf", "mlx", "loralib"):
        planned = plan_reading(Reading(adapter()), source="peft", to=to, hints=HINTS)
        out = folder / to
        if planned.target.folder:
            planned.write(out)
            found[to] = out / "adapters.safetensors"
        else:
            out.mkdir()
            found[to] = planned.write(out)
    save_adapter(adapter(), folder / "peft")
    return found | {"peft": folder / "peft" / "adapter_model.safetensors"}


# --- single tricks -------------------------------------------------------------------------------


def gguf_file(path: Path, *, counts=(0, 0), body: bytes = b"") -> Path:
    import struct

    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + body)
    return path


def field(name: bytes, code: int, value: bytes) -> bytes:
    return len(name).to_bytes(8, "little") + name + code.to_bytes(4, "little") + value


def number(value: int, width: int = 8) -> bytes:
    return value.to_bytes(width, "little")


def placed(name: bytes, shape: list[int], code: int, offset: int) -> bytes:
    dims = b"".join(number(n) for n in shape)
    head = number(len(name)) + name + number(len(shape), 4)
    return head + dims + number(code, 4) + number(offset)


@pytest.mark.parametrize(
    ("counts", "body", "words"),
    [
        ((2**63, 0), b"", "claims 9223372036854775808 tensors"),
        ((0, 2**40), b"", "claims"),
        ((0, 1), number(2**62), "claims 4611686018427387904 bytes"),
        ((0, 1), field(b"x", 9, number(4, 4) + number(2**60)), "claims 1152921504606846976 values"),
        ((0, 1), field(b"x", 9, number(8, 4) + number(2**60)), "texts"),
        ((0, 1), field(b"x", 9, number(9, 4) + number(1)), "the type 9"),
        ((0, 1), field(b"x", 77, b""), "the type 77"),
        ((0, 1), field(b"\xff\xfe", 4, number(1, 4)), "no UTF-8"),
        ((0, 2), field(b"x", 4, number(1, 4)) * 2, "twice"),
        ((0, 1), field(b"general.alignment", 4, number(3, 4)), "power of two"),
        ((0, 1), field(b"general.alignment", 4, number(0, 4)), "power of two"),
        ((1, 0), placed(b"a", [2**40, 2**40], 0, 0), "beyond any memory"),
        ((1, 0), placed(b"a", [4], 0, 2**62), "the file has"),
        ((1, 0), placed(b"a", [4], 0, 1), "no multiple"),
        ((1, 0), placed(b"a", [1] * 9, 0, 0), "9 dimensions"),
        ((2, 0), placed(b"a", [4], 0, 0) + placed(b"a", [4], 0, 32) + bytes(99), "twice"),
        ((2, 0), placed(b"a", [4], 0, 0) + placed(b"b", [4], 0, 0) + bytes(99), "overlaps"),
        ((1, 0), b"", "ends within its header"),
    ],
)
def test_gguf_headers(tmp_path, counts, body, words):
    path = gguf_file(tmp_path / "a.gguf", counts=counts, body=body)
    with pytest.raises(FormatError, match=words):
        read_gguf(path)


def test_gguf_of_another_version(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + number(1, 4) + bytes(40))
    with pytest.raises(FormatError, match="version 1"):
        read_gguf(tmp_path / "a.gguf")


def test_gguf_q8_0_is_read_exactly(tmp_path):
    """As gguf's own dequantiser has it; other quantised types are refused by name."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import dequantize, quantize

    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        packed = quantize(values, kind)
        writer = GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_tensor("x", packed, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file = read_gguf(tmp_path / "a.gguf")
        assert file.entries["x"].shape == (3, 64)
        if kind is GGMLQuantizationType.Q8_0:
            assert torch.equal(file.tensors()["x"], torch.tensor(dequantize(packed, kind)))
        else:
            with pytest.raises(FormatError, match="x: type 2"):
                file.tensors()


def test_values_that_are_not_finite(tmp_path):
    for to, path in files(tmp_path).items():
        content = path.read_bytes()
        if to == "loralib":
            state = torch.load(path, weights_only=True)
            next(iter(state.values()))[0, 0] = float("nan")
            torch.save(state, path)
        else:
            path.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")
        with pytest.raises(FormatError, match="NaN"):
            read(path, hints=HINTS)


def test_configs_that_are_no_configs(tmp_path):
    path = files(tmp_path)["mlx"]
    config = json.loads((path.parent / "adapter_config.json").read_text())
    for change, words in (
        ({"lora_parameters": 3}, "lora_parameters is 3"),
        ({"lora_parameters": {"scale": "big"}}, "scale is 'big'"),
        ({"lora_parameters": {"scale": 1e999}}, "inf"),
        ({"fine_tune_type": "full"}, "only lora and dora"),
    ):
        (path.parent / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(FormatError, match=words):
            read(path.parent)


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000))
    with pytest.raises(FormatError, match="unpacks to"):
        read(tmp_path / "b.pt")
