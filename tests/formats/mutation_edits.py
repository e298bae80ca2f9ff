"""What is done to sound files: bytes damaged at random, or headers edited into hostile ones.

Every choice is drawn from the generator that is given, so a seed names a file.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from .mutation_files import Sample

#: where a pickle that runs code would leave its mark; set by the harness
MARK = "lorakit-code-was-run"

#: counts, offsets and ranks that break readers
NUMBERS = (0, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63,
           2**64 - 1, 10**30, 10**400, -1, -(2**63))  # fmt: skip

#: what stands where another type is expected
VALUES: tuple[Any, ...] = (
    *NUMBERS, 0.5, -1.5, 1e30, 1e308, math.nan, math.inf, -math.inf, None, True, False, "", "8",
    "x", "q_proj", [], [1], ["q_proj"], [[]], {}, {"a": 1}, {"a": {"b": []}}, [None], "\x00", "../x",  # noqa: E501
)  # fmt: skip

#: expressions that take years on the names in these files
BOMBS = (
    "(a+)+$", "(.*)*x", "((.*)+)+y", "(.*.*)*.*=.*z", "(?:.*\\.)*(?:.*\\.)*(?:.*\\.)*#",
    "(model|m.*)*!", ".*.*.*.*.*.*.*.*.*.*.*.*.*.*!", "([a-z.0-9_]+)*!", "(.+)\\1+\\1+!",
    "(?:a|a|.)*!", "(?=(.*)*!)", "(x?){500}x{500}", "((((.{0,99}){0,99}){0,99}){0,99})!",
)  # fmt: skip

#: names of tensors, files and modules
NAMES = (
    "", ".", "..", "../../x", "/etc/passwd", "a\x00b", "\x1b[2J\x1b[31m", "a\nb", "\r", "\ud800",
    "\u202egpj.exe", "\U0001f4a9", "e\u0301", "a" * 300, "a." * 200, "a" * 70_000, " ", "%s%n",
    "{0}", "~", "C:\\x", "lora_A.weight", "base_model.model.", "__proto__", "#", "0", "-0",
)  # fmt: skip


def mutated(sample: Sample, draw: Random, *, edit: bool) -> dict[str, bytes]:
    """The files of a sample, one or more of them spoiled.

    Args:
        edit: change what a header says and keep the file in its form; otherwise change bytes.
    """
    files = dict(sample.files)
    name = sample.weights
    if sample.texts and draw.random() < 0.4:
        name = draw.choice(sample.texts)
    if not edit:
        files[name] = damaged(files[name], draw)
    elif name in sample.texts:
        files[name] = edited_json(files[name], draw)
    else:
        files[name] = _EDITORS[sample.kind](files[name], draw)
    return files


# --- bytes ---------------------------------------------------------------------------------------


def damaged(content: bytes, draw: Random) -> bytes:
    """One to four changes of bytes; half of them near the beginning, where headers are."""
    new = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        end = len(new) if draw.random() < 0.5 else min(len(new), 2000)
        if not end:
            break
        at = draw.randrange(end)
        size = draw.choice((1, 2, 4, 8, 30, 200))
        draw.choice(_DAMAGES)(new, at, size, draw)
    return bytes(new)


def _flip(new: bytearray, at: int, size: int, draw: Random) -> None:
    new[at] ^= 1 << draw.randrange(8)


def _number(new: bytearray, at: int, size: int, draw: Random) -> None:
    width = draw.choice((1, 2, 4, 8))
    new[at : at + width] = (draw.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")


def _cut(new: bytearray, at: int, size: int, draw: Random) -> None:
    del new[at:]


def _remove(new: bytearray, at: int, size: int, draw: Random) -> None:
    del new[at : at + size]


def _insert(new: bytearray, at: int, size: int, draw: Random) -> None:
    new[at:at] = draw.randbytes(size)


def _overwrite(new: bytearray, at: int, size: int, draw: Random) -> None:
    new[at : at + size] = draw.randbytes(size)


def _extend(new: bytearray, at: int, size: int, draw: Random) -> None:
    new += bytes(draw.choice((0, 255)) for _ in range(1)) * draw.choice((1, 8, 4096, 100_000))


def _duplicate(new: bytearray, at: int, size: int, draw: Random) -> None:
    new[at:at] = new[at : at + size]


def _swap(new: bytearray, at: int, size: int, draw: Random) -> None:
    other = draw.randrange(len(new))
    first, second = bytes(new[at : at + size]), bytes(new[other : other + size])
    width = min(len(first), len(second))
    new[at : at + width], new[other : other + width] = second[:width], first[:width]


_DAMAGES = (_flip, _flip, _number, _number, _cut, _remove, _insert, _overwrite, _extend,
            _duplicate, _swap)  # fmt: skip


# --- JSON ----------------------------------------------------------------------------------------


class _Raw(str):
    """JSON as it stands: what is nested too deeply to be built as a value."""


class _Twice(dict[str, Any]):
    """An object of which one name is written twice."""


def edited_json(content: bytes, draw: Random) -> bytes:
    """One to three values of an object changed, its nesting kept or made absurd."""
    if draw.random() < 0.06:
        return draw.choice(_WHOLE_TEXTS)
    value = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        _edit_inside(value, draw)
    return _text(value).encode("utf-8", "surrogatepass")


_WHOLE_TEXTS = (
    b"", b"[]", b"3", b"null", b'"x"', b"{", b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"r": ' + b"9" * 6000 + b"}", b"\xff\xfe{}", b"{}" * 2, b'{"r": NaN}', b"\xef\xbb\xbf{}",
)  # fmt: skip


def _edit_inside(value: Any, draw: Random) -> None:
    """Change one place of a JSON value, at a random depth."""
    while True:
        children = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not children:
            return
        key = draw.choice(children)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and draw.random() < 0.6:
            value = inner
            continue
        kind = draw.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[draw.choice(NAMES)] = inner
        elif kind == 2 and isinstance(value, dict):
            value[draw.choice(_FIELDS)] = draw.choice((*VALUES, *BOMBS))
        elif kind == 3 and isinstance(value, dict):
            field = draw.choice(_PATTERNS)
            value[field] = _bomb(field, draw)
        elif kind == 4:
            value[key] = _nested(draw.choice((5, 50, 600, 3000)), draw)
        elif kind == 5:
            value[key] = draw.choice(NAMES)
        elif kind == 6 and isinstance(inner, (int, float)) and not isinstance(inner, bool):
            value[key] = draw.choice((*NUMBERS, inner + 1, -inner, math.nan, math.inf, 1e-320))
        else:
            value[key] = copy.deepcopy(draw.choice(VALUES))
        return


_PATTERNS = ("target_modules", "rank_pattern", "alpha_pattern", "exclude_modules",
             "layers_pattern", "modules_to_save")  # fmt: skip
_FIELDS = (
    *_PATTERNS, "r", "lora_alpha", "lora_dropout", "bias", "use_dora", "use_rslora", "task_type",
    "peft_type", "layers_to_transform", "init_lora_weights", "fan_in_fan_out", "lora_bias",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "scale", "rank",
    "lora_parameters", "fine_tune_type", "weight_map", "dtype", "shape", "data_offsets", "model",
    "layout", "spec", "base", "scaling", "replaced", "no_bias", "provenance", "tokenizer",
)  # fmt: skip


def _bomb(field: str, draw: Random) -> Any:
    text = draw.choice(BOMBS)
    if field == "rank_pattern":
        return {text: draw.choice((4, 2**40, 0))}
    if field == "alpha_pattern":
        return {text: draw.choice((4, 1e300, math.nan))}
    return text if draw.random() < 0.5 else [text]


def _nested(depth: int, draw: Random) -> _Raw:
    opened = [draw.choice(("[", '{"a":')) for _ in range(depth)]
    closed = ["]" if one == "[" else "}" for one in reversed(opened)]
    return _Raw("".join([*opened, "1", *closed]))


def _text(value: Any) -> str:
    """JSON that may name things twice, hold NaN, lone surrogates, and whole numbers of any size."""
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, _Twice):
        pairs = [f"{json.dumps(k)}:{_text(v)}" for k, v in value.items()]
        return "{" + ",".join([*pairs, *pairs[:1]]) + "}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(k))}:{_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value)


# --- safetensors ---------------------------------------------------------------------------------


def edited_safetensors(content: bytes, draw: Random) -> bytes:
    """The header changed as text is, or tensors changed so that the file stays sound."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    roll = draw.random()
    if roll < 0.05:
        return draw.choice(_WHOLE_HEADERS)(data)
    if roll < 0.45:
        for _ in range(draw.randint(1, 2)):
            _edit_entry(header, draw)
    elif roll < 0.6 and "lorakit" in header.get("__metadata__", {}):
        _edit_own_header(header["__metadata__"], draw)
    else:
        return _resound(header, data, draw)
    if draw.random() < 0.05:
        header = _Twice(header)
    return _joined(_text(header), data)


def _joined(text: str, data: bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


_WHOLE_HEADERS: tuple[Callable[[bytes], bytes], ...] = (
    lambda data: _joined("{" + ",".join(f'"{i}":1' for i in range(20_000)) + ',"0":1}', data),
    lambda data: _joined("[" * 50_000, data),
    lambda data: _joined('{"a":' * 5_000 + "1" + "}" * 5_000, data),
    lambda data: _joined('{"a":{"dtype":"F32","shape":[' + "1," * 50_000 + '1],"data_offsets":[0,4]}}', b"\0" * 4),  # noqa: E501
    lambda data: _joined('{"a":{"dtype":"F32","shape":[' + "9999999999999999999," * 5_000 + '1],"data_offsets":[0,4]}}', b"\0" * 4),  # noqa: E501
    lambda data: _joined('{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}', b""),  # noqa: E501
    lambda data: _joined('{"a":{"dtype":"F32","shape":[0' + ",3037000499" * 2 + '],"data_offsets":[0,0]}}', b""),  # noqa: E501
    lambda data: _joined("{}", b""),
    lambda data: (2**63).to_bytes(8, "little") + data,
    lambda data: b"",
)  # fmt: skip


def _edit_entry(header: dict[str, Any], draw: Random) -> None:
    """What the header says of one tensor, so that it no longer fits the data."""
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return
    name = draw.choice(names)
    entry = header[name]
    if not isinstance(entry, dict):
        return
    kind = draw.randrange(9)
    if kind == 0:
        entry["dtype"] = draw.choice(("F64", "F16", "I64", "BOOL", "F8_E4M3", "C64", "f32", [], 3))
    elif kind == 1:
        entry["shape"] = draw.choice(
            (
                [2**40, 2**40], [-1, 4], [0.5], ["2"], [], 3, None, [2**63], [True, 4], [0, 2**62],
                [1] * 500, [10**400], {}, [[2]],
            )
        )  # fmt: skip
    elif kind == 2:
        entry["data_offsets"] = draw.choice(
            ([0, 8], [8, 0], [-8, 8], [0, 2**62], [0.0, 8.0], ["0", "8"], [0], None, [0, 8, 9])
        )
    elif kind == 3:
        other = header[draw.choice(names)]
        if isinstance(other, dict):
            entry["data_offsets"] = other.get("data_offsets")
    elif kind == 4:
        header[draw.choice(NAMES)] = header.pop(name)
    elif kind == 5:
        entry[draw.choice(("extra", "", "dtype "))] = draw.choice(VALUES)
    elif kind == 6:
        del header[name]
    elif kind == 7:
        header[name] = draw.choice(VALUES)
    else:
        header["__metadata__"] = draw.choice((*VALUES, {"lorakit": draw.choice(NAMES)}))


def _edit_own_header(metadata: dict[str, str], draw: Random) -> None:
    said = json.loads(metadata["lorakit"])
    if isinstance(said.get("spec"), dict) and draw.random() < 0.4:
        field = draw.choice(("targets", "exclude", "layers", "rank_pattern", "alpha_pattern",
                             "rank", "alpha", "dropout", "train_modules", "scaling", "variant"))  # fmt: skip  # noqa: E501
        bomb = draw.choice(BOMBS)
        said["spec"][field] = draw.choice(
            (bomb, [bomb], [[bomb, 4]], *VALUES, "0-999999999", "0-9999999999999999999")
        )
    else:
        _edit_inside(said, draw)
    metadata["lorakit"] = _text(said)


def _resound(header: dict[str, Any], data: bytes, draw: Random) -> bytes:
    """A sound file of other tensors: whatever their names, shapes and values mean."""
    metadata = header.pop("__metadata__", None)
    tensors = [
        [name, e["dtype"], e["shape"], data[slice(*e["data_offsets"])]]
        for name, e in header.items()
    ]
    for _ in range(draw.randint(1, 2)):
        if not tensors:
            break
        one = draw.choice(tensors)
        kind = draw.randrange(10)
        if kind == 0:
            tensors.remove(one)
        elif kind == 1:
            one[0] = draw.choice(NAMES)
        elif kind == 2:
            where, what = one[0].rpartition(".")[::2]
            one[0] = draw.choice((f"{where}.{where}.{what}", f"{what}.{where}", one[0] + ".x",
                                  one[0].replace("0", "9" * 30), one[0].upper()))  # fmt: skip
        elif kind == 3:
            one[2] = draw.choice(
                ([math.prod(one[2])], one[2][::-1], [1, *one[2]], [*one[2], 1, 1, 1])
            )
        elif kind == 4:
            one[1:] = ["F32", draw.choice(([0], [0, 4], [4, 0], [0, 2**40], [])), b""]
            if one[2] == []:
                one[3] = struct.pack("<f", draw.choice((0.0, -1.0, math.nan, math.inf, 3e38)))
        elif kind == 5:
            bad = struct.pack("<f", draw.choice((math.nan, math.inf, -math.inf, 3.4e38, -0.0)))
            one[3] = bad + one[3][4:] if len(one[3]) >= 4 else one[3]
        elif kind == 6 and one[1] == "F32":
            one[1] = draw.choice(("I32", "U8", "F16", "BOOL", "F64"))
            width = {"I32": 4, "U8": 1, "F16": 2, "BOOL": 1, "F64": 8}[one[1]]
            one[3] = (one[3] * 2)[: math.prod(one[2]) * width]
        elif kind == 7:
            rank = draw.choice((1, 64, 5_000))
            one[1:] = [
                "F32",
                draw.choice(([rank, 5], [6, rank], [rank, rank if rank < 99 else 2])),
                b"",
            ]
            one[3] = struct.pack("<f", 0.5) * math.prod(one[2])
        elif kind == 8:
            other = draw.choice(tensors)
            one[1:], other[1:] = other[1:], one[1:]
        else:
            tensors.append([one[0] + draw.choice((".x", "2", ".alpha", ".dora_scale")), *one[1:]])
    if metadata is not None and draw.random() < 0.3:
        metadata = None
    return sound(tensors, metadata)


def sound(tensors: list[list[Any]], metadata: Any = None) -> bytes:
    """A sound file: name, dtype, shape and bytes of each tensor."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, dtype, shape, raw in tensors:
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        if list(header)[-1] == name:
            data += raw
    return _joined(_text(header), data)


# --- GGUF ----------------------------------------------------------------------------------------

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _gguf_parts(content: bytes) -> tuple[list[list[Any]], list[list[Any]], bytes]:
    """Fields (name, code, raw value), tensors (name, dims, code, offset), and the data."""
    at = 8

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(form, content, at)
        at += struct.calcsize(form)
        return value

    def text() -> bytes:
        nonlocal at
        size = take("<Q")
        at += size
        return content[at - size : at]

    num_tensors, num_fields = take("<Q"), take("<Q")
    fields = []
    for _ in range(num_fields):
        name, code = text(), take("<I")
        begin = at
        if code == 8:
            text()
        else:
            at += _WIDTHS[code]
        fields.append([name, code, content[begin:at]])
    tensors = []
    for _ in range(num_tensors):
        name = text()
        dims = [take("<Q") for _ in range(take("<I"))]
        tensors.append([name, dims, take("<I"), take("<Q")])
    return fields, tensors, content[-(-at // 32) * 32 :]


def gguf_bytes(
    fields: list[list[Any]], tensors: list[list[Any]], data: bytes, counts: Any = None
) -> bytes:
    """A GGUF of these parts, whatever they say."""
    num_tensors, num_fields = counts or (len(tensors), len(fields))
    out = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields)
    for name, code, raw in fields:
        out += struct.pack("<Q", len(name)) + name + struct.pack("<I", code) + raw
    for name, dims, code, offset in tensors:
        out += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
        out += b"".join(struct.pack("<Q", n % 2**64) for n in dims)
        out += struct.pack("<IQ", code, offset % 2**64)
    return out + bytes(-len(out) % 32) + data


def _gguf_text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def edited_gguf(content: bytes, draw: Random) -> bytes:
    """Fields, counts, shapes, offsets or names changed."""
    fields, tensors, data = _gguf_parts(content)
    counts = None
    for _ in range(draw.randint(1, 3)):
        field, tensor = draw.choice(fields), draw.choice(tensors)
        kind = draw.randrange(14)
        if kind == 0:
            counts = (draw.choice(NUMBERS) % 2**64, len(fields))
        elif kind == 1:
            counts = (len(tensors), draw.choice(NUMBERS) % 2**64)
        elif kind == 2:
            tensor[1] = draw.choice(
                ([2**32, 2**32], [0, 4], [], [1] * 5, [2**63], tensor[1][::-1], [4, 2**40], [1, 1])
            )
        elif kind == 3:
            tensor[2] = draw.choice((1, 2, 8, 12, 28, 30, 99, 2**32 - 1))
        elif kind == 4:
            tensor[3] = draw.choice((0, 1, 32, 2**40, 2**63, 2**64 - 32))
        elif kind == 5:
            tensor[3] = draw.choice(tensors)[3]
        elif kind == 6:
            tensor[0] = draw.choice(NAMES).encode("utf-8", "surrogatepass")
        elif kind == 7:
            tensor[0] = draw.choice(tensors)[0]
        elif kind == 8:
            tensor[0] = tensor[0].replace(
                b"blk.0",
                draw.choice(
                    (
                        b"blk.-1",
                        b"blk.99999999999999999999",
                        b"token_embd",
                        b"output",
                        b"blk.\xd9\xa3",
                    )
                ),
            )
        elif kind == 9:
            field[1:] = draw.choice(_FIELD_VALUES)
        elif kind == 10:
            fields.append([draw.choice(_FIELD_NAMES), *draw.choice(_FIELD_VALUES)])
        elif kind == 11:
            fields.remove(field)
            fields = fields or [field]
        elif kind == 12:
            tensors.remove(tensor)
            tensors = tensors or [tensor]
        else:
            own = next((f for f in fields if f[0] == b"lorakit"), None)
            if own is not None:
                metadata = {"lorakit": own[2][8:].decode("utf-8", "surrogatepass")}
                try:
                    _edit_own_header(metadata, draw)
                except (ValueError, RecursionError):  # spoiled by the change before this one
                    continue
                own[1:] = [8, _gguf_text(metadata["lorakit"])]
    return gguf_bytes(fields, tensors, data, counts)


_FIELD_NAMES = (
    b"general.alignment", b"general.type", b"adapter.type", b"adapter.lora.alpha", b"lorakit",
    b"lorakit.head_count", b"lorakit.head_count_kv", b"general.architecture", b"\xff", b"",
    b"adapter.alora.invocation_tokens", b"general.base_model.0.name",
)  # fmt: skip
_FIELD_VALUES: tuple[list[Any], ...] = (
    [4, struct.pack("<I", 0)], [4, struct.pack("<I", 3)], [4, struct.pack("<I", 2**31)],
    [10, struct.pack("<Q", 2**63)], [11, struct.pack("<q", -1)], [6, struct.pack("<f", math.nan)],
    [6, struct.pack("<f", math.inf)], [12, struct.pack("<d", 1e308)], [7, b"\x02"], [7, b"\x01"],
    [8, _gguf_text("adapter")], [8, _gguf_text("")], [8, _gguf_text("{}")], [8, struct.pack("<Q", 2**63)],  # noqa: E501
    [9, struct.pack("<IQ", 4, 2**60)], [9, struct.pack("<IQ", 8, 2**60)], [9, struct.pack("<IQ", 9, 1)],  # noqa: E501
    [9, struct.pack("<IQI", 4, 1, 7)], [77, b""], [0, b"\xff"], [4, struct.pack("<I", 1)],
)  # fmt: skip


# --- pickles -------------------------------------------------------------------------------------


class Code:
    """Leaves a mark if a pickle of it is loaded in trust."""

    def __reduce__(self) -> Any:
        return open, (MARK, "w")


def edited_pickle(content: bytes, draw: Random) -> bytes:
    """Other tensors under other names, the archive's inside changed, or a pickle made to harm."""
    roll = draw.random()
    if roll < 0.25:
        return draw.choice(_HOSTILE)()
    if roll < 0.5:
        return _repacked(content, draw)
    state = torch.load(io.BytesIO(content), weights_only=True)
    inner = state["model"] if isinstance(state.get("model"), dict) else state
    for _ in range(draw.randint(1, 2)):
        _edit_state(inner, draw)
    new = io.BytesIO()
    torch.save(state, new, _use_new_zipfile_serialization=draw.random() < 0.8)
    return new.getvalue()


def _edit_state(state: dict[Any, Any], draw: Random) -> None:
    if not state:
        return
    key = draw.choice(list(state))
    old = state[key]
    kind = draw.randrange(6)
    if kind == 0:
        state.pop(key)
    elif kind == 1:
        state[draw.choice((*NAMES, 3, None, ("a", "b"), b"x"))] = state.pop(key)
    elif kind == 2:
        state[key] = draw.choice((1, "x", None, [old], {"a": old}, (old,), 1.5))
    elif kind == 3 and isinstance(old, torch.Tensor):
        shape = draw.choice(((2**40, 4), (4, 2**40), (10**6, 10**6), (2,), (1, 1, 1)))
        empty = draw.choice((torch.zeros(3, 0), torch.zeros(()), torch.zeros(0)))
        state[key] = empty if draw.random() < 0.3 else torch.zeros(1).expand(shape)
    elif kind == 4 and isinstance(old, torch.Tensor) and old.numel() < 10**6:
        value = draw.choice((math.nan, math.inf, -math.inf, 3e38))
        state[key] = torch.full(old.shape, value)
    elif isinstance(old, torch.Tensor) and old.is_floating_point() and 0 < old.numel() < 10**6:
        state[key] = draw.choice(_ODD_TENSORS)(old.contiguous())


_ODD_TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda t: t.to(torch.int64),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.T,
    lambda t: t[::2],
    lambda t: torch.nn.Parameter(t),
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.to(torch.uint16) if hasattr(torch, "uint16") else t,
    lambda t: torch.rand(5_000, 1),
    lambda t: torch.rand(1, 5_000),
)


def _repacked(content: bytes, draw: Random) -> bytes:
    """The same archive with one of its entries damaged, and its checksums right."""
    new = io.BytesIO()
    compression = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w", compression) as to:
        names = old.namelist()
        chosen = draw.choice(names[:3])
        for name in names:
            inside = old.read(name)
            if name == chosen:
                inside = damaged(inside, draw) if inside else b"x"
            odd = draw.random() < 0.02
            to.writestr("../" + name if odd else name, inside)
    return new.getvalue()


def _archive(pickled: bytes, data: bytes = bytes(64)) -> bytes:
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return new.getvalue()


def doubled_key() -> bytes:
    """A dictionary whose key is a tuple of a tuple of …, twice each: its hash takes 2⁶⁰ steps."""
    body = b"\x80\x02)q\x00" + b"".join(
        b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60)
    )
    return body[:-2] + b"q\x3c}h\x3cK\x01s."


def calling(module: str, name: str, arguments: Any) -> bytes:
    """A pickle that calls a function by its name."""
    inside = pickle.dumps(arguments, 2)[2:-1]
    return b"\x80\x02}X\x01\x00\x00\x00a" + f"c{module}\n{name}\n".encode() + inside + b"Rs."


def _stretched() -> bytes:
    """A tensor of 2⁴⁰ values in a file of one kilobyte."""
    new = io.BytesIO()
    torch.save({"x.lora_A": torch.zeros(1).expand(2**20, 2**20)}, new)
    return new.getvalue()


def _meta() -> bytes:
    new = io.BytesIO()
    torch.save({"x.lora_A": torch.zeros(2, 3, device="meta")}, new)
    return new.getvalue()


def _saved(value: Any, **options: Any) -> bytes:
    new = io.BytesIO()
    torch.save(value, new, **options)
    return new.getvalue()


_HOSTILE: tuple[Callable[[], bytes], ...] = (
    lambda: pickle.dumps(Code()),
    lambda: _saved({"x.lora_A": Code()}),
    lambda: _saved({"x.lora_A": Code()}, _use_new_zipfile_serialization=False),
    lambda: _archive(calling("os", "system", (f"touch {MARK}",))),
    lambda: _archive(calling("builtins", "bytearray", (2**40,))),
    lambda: _archive(calling("builtins", "bytearray", (300_000_000,))),
    lambda: _archive(calling("collections", "Counter", ("x",))),
    lambda: _archive(calling("torch", "Size", ((2**62,),))),
    lambda: _archive(doubled_key()),
    lambda: doubled_key(),
    lambda: _bomb_archive(),
    _stretched,
    _meta,
    lambda: _saved([1, 2]),
    lambda: _saved(OrderedDict()),
    lambda: _saved({}),
    lambda: _saved({"model": {}}),
    lambda: _saved({"a": {"b": {}}}),
    lambda: b"\x80\x02" + b"(" * 100_000 + b".",
    lambda: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    lambda: b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x.",
    lambda: b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b".",
)  # fmt: skip

_BOMB: list[bytes] = []


def _bomb_archive() -> bytes:
    """Half a megabyte that unpacks to 300 MB; made once."""
    if not _BOMB:
        new = io.BytesIO()
        with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("archive/data.pkl", "w") as file:
                for _ in range(300):
                    file.write(bytes(1_000_000))
            archive.writestr("archive/version", "3\n")
        _BOMB.append(new.getvalue())
    return _BOMB[0]


_EDITORS = {
    "safetensors": edited_safetensors,
    "gguf": edited_gguf,
    "pickle": edited_pickle,
}
