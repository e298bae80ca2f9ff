"""LyCORIS' files: the change of every kind of module against its definition, densely in float64.

The definitions are those of the papers, written with einsum on whole weights; the library itself
is compared in ``tests/interop/runtimes/check_lycoris.py``.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.adapter import Adapter
from lorakit.core.safetensors_io import write_safetensors
from lorakit.errors import FormatError
from lorakit.formats.format import Hints, Source
from lorakit.formats.lycoris import FORMAT

from .pictures import delta, read

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LINEAR_PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
CONV_PATH = "unet.mid_block.resnets.0.conv1"


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def read_one(folder, name, parts, **hints):
    path = folder / "x.safetensors"
    write_safetensors(path, {f"{name}.{part}": tensor for part, tensor in parts.items()}, {})
    return read(FORMAT, path, Hints(**hints))


def check(site, expected, rtol=1e-6):
    """ΔW of the site is the expected weight, ``[d_out, d_in, …]``."""
    assert site.problems() == []
    assert site.B.shape[0] == expected.shape[0]
    assert tuple(site.A.shape[1:]) == tuple(expected.shape[1:])
    error = (delta(site) - expected.double().flatten(1)).norm() / expected.double().norm()
    assert error <= rtol


seeds = st.integers(0, 2**32)
sizes = st.integers(1, 6)


@settings(max_examples=40)
@given(seed=seeds, r=sizes, d_in=sizes, d_out=sizes, alpha=st.sampled_from([None, 0.5, 3.0]))
def test_loha(tmp_path_factory, seed, r, d_in, d_out, alpha):
    new = drawn(seed)
    a1, b1, a2, b2 = new(d_out, r), new(r, d_in), new(d_out, r), new(r, d_in)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    if alpha is not None:
        parts["alpha"] = torch.tensor(alpha)
    reading = read_one(tmp_path_factory.mktemp("x"), LINEAR, parts)
    site = reading.adapter.low_rank[LINEAR_PATH]
    scale = 1.0 if alpha is None else alpha / r
    check(site, scale * (a1.double() @ b1.double()) * (a2.double() @ b2.double()), 1e-5)
    assert site.rank == r * r
    assert reading.notes == ()


@pytest.mark.parametrize("tucker", [False, True])
def test_loha_of_a_convolution(tmp_path, tucker):
    new, r, d_in, d_out = drawn(0), 3, 4, 5
    if tucker:
        halves = [(new(r, d_out), new(r, d_in), new(r, r, 3, 3)) for _ in range(2)]
        dense = [
            torch.einsum("ijxy,jn,im->mnxy", t.double(), b.double(), a.double())
            for a, b, t in halves
        ]
    else:
        halves = [(new(d_out, r), new(r, d_in * 9), None) for _ in range(2)]
        dense = [(a.double() @ b.double()).reshape(d_out, d_in, 3, 3) for a, b, _ in halves]
    parts = {}
    for i, (a, b, t) in enumerate(halves, 1):
        parts |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b}
        parts |= {} if t is None else {f"hada_t{i}": t}
    site = read_one(tmp_path, CONV, parts).adapter.low_rank[CONV_PATH]
    assert site.kind == "conv"
    check(site, dense[0] * dense[1])


LOKR = {
    "both in factors": {"w1_a": (3, 2), "w1_b": (2, 2), "w2_a": (4, 2), "w2_b": (2, 5)},
    "the first full": {"w1": (3, 2), "w2_a": (4, 2), "w2_b": (2, 5)},
    "the first wide": {"w1": (2, 7), "w2_a": (4, 2), "w2_b": (2, 5)},
    "the second full": {"w1_a": (3, 2), "w1_b": (2, 2), "w2": (4, 5)},
    "a convolution": {"w1": (3, 2), "w2_a": (4, 2), "w2_b": (2, 5 * 9)},
    "a convolution, tucker": {"w1": (3, 2), "w2_a": (2, 4), "w2_b": (2, 5), "t2": (2, 2, 3, 3)},
    "a convolution, the second full": {"w1_a": (3, 2), "w1_b": (2, 2), "w2": (4, 5, 3, 3)},
}


def dense_lokr(parts):
    """Kronecker's product of whole matrices, with the kernel as the last axes of the second."""
    parts = {name: tensor.double() for name, tensor in parts.items()}
    w1 = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    if "w2" in parts:
        w2 = parts["w2"]
    elif "t2" in parts:
        w2 = torch.einsum("ijxy,im,jn->mnxy", parts["t2"], parts["w2_a"], parts["w2_b"])
    else:
        w2 = parts["w2_a"] @ parts["w2_b"]
        w2 = w2.reshape(w2.shape[0], -1, 3, 3) if w2.shape[1] % 9 == 0 else w2
    a, c = w1.shape
    b, d = w2.shape[:2]
    return torch.einsum("ac,bd...->abcd...", w1, w2).reshape(a * b, c * d, *w2.shape[2:])


@pytest.mark.parametrize("kind", LOKR)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_lokr(tmp_path, kind, alpha):
    new = drawn(1)
    parts = {name: new(*shape) for name, shape in LOKR[kind].items()}
    stored = {f"lokr_{name}": tensor for name, tensor in parts.items()}
    if alpha is not None:
        stored["alpha"] = torch.tensor(alpha)
    conv = "convolution" in kind
    reading = read_one(tmp_path, CONV if conv else LINEAR, stored)
    site = reading.adapter.low_rank[CONV_PATH if conv else LINEAR_PATH]
    check(site, (1.0 if alpha is None else alpha / 2) * dense_lokr(parts))
    assert reading.notes == ()


def best_error(weight, rank):
    """Eckart–Young, from the dense weight."""
    s = torch.linalg.svdvals(weight.double().flatten(1))
    return float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt())


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ({"lokr_w1": (3, 2), "lokr_w2": (4, 5)}, LINEAR),
        ({"lokr_w1": (3, 2), "lokr_w2": (4, 5, 3, 3)}, CONV),
        ({"lokr_w1": (3, 2), "lokr_w2_a": (4, 3), "lokr_w2_b": (3, 5)}, LINEAR),
        (
            {"hada_w1_a": (9, 3), "hada_w1_b": (3, 8), "hada_w2_a": (9, 3), "hada_w2_b": (3, 8)},
            LINEAR,
        ),
        ({"diff": (6, 5)}, LINEAR),
        ({"diff": (6, 5, 3, 3)}, CONV),
    ],
)
@pytest.mark.parametrize("rank", [1, 3])
def test_at_a_rank(tmp_path, parts, name, rank):
    """The error that is said is the one there, and the best that the rank allows."""
    new = drawn(2)
    stored = {part: new(*shape) for part, shape in parts.items()}
    if "diff" in stored:
        weight = stored["diff"]
    elif name == LINEAR and "hada_w1_a" in stored:
        weight = (stored["hada_w1_a"] @ stored["hada_w1_b"]) * (
            stored["hada_w2_a"] @ stored["hada_w2_b"]
        )
    else:
        weight = dense_lokr({part.removeprefix("lokr_"): t for part, t in stored.items()})
    reading = read_one(tmp_path, name, stored, rank=rank)
    (path,) = reading.adapter.sites
    site = reading.adapter.low_rank[path]
    assert site.rank == rank
    said = reading.adapter.provenance["lycoris"]["errors"][path]
    # float32 in the file: the square of its rounding is far below the errors here
    assert said == pytest.approx(best_error(weight, rank), abs=1e-6)
    check(site, weight, rtol=said + 1e-5)
    assert "1 sites are approximated" in reading.notes[0]
    assert f"rank {rank}" in reading.notes[1] or f"at {rank}" in reading.notes[1]


def test_a_rank_above_the_exact_one_changes_nothing(tmp_path):
    new = drawn(3)
    parts = {f"lokr_{n}": new(*s) for n, s in LOKR["the first full"].items()}
    reading = read_one(tmp_path, LINEAR, parts, rank=64)
    assert reading.notes == ()
    check(
        reading.adapter.low_rank[LINEAR_PATH],
        dense_lokr({n.removeprefix("lokr_"): t for n, t in parts.items()}),
    )


def test_locon_with_a_middle(tmp_path):
    new = drawn(4)
    up, down, mid = new(5, 2, 1, 1), new(2, 4, 1, 1), new(2, 2, 3, 3)
    parts = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid}
    reading = read_one(tmp_path, CONV, parts | {"alpha": torch.tensor(1.0)})
    dense = torch.einsum(
        "ijxy,mi,jn->mnxy", mid.double(), up.double().flatten(1), down.double().flatten(1)
    )
    check(reading.adapter.low_rank[CONV_PATH], 0.5 * dense)


def test_bias_magnitude_and_scalar(tmp_path):
    new = drawn(5)
    parts = {f"lokr_{n}": new(*s) for n, s in LOKR["the first full"].items()}
    more = {"alpha": torch.tensor(1.0), "scalar": torch.tensor(0.25)}
    plain = read_one(tmp_path, LINEAR, parts | more | {"diff_b": new(12)})
    site = plain.adapter.low_rank[LINEAR_PATH]
    assert site.scaling == 0.125
    torch.testing.assert_close(site.scaling * site.bias, read_back(tmp_path, "diff_b"))
    dora = read_one(tmp_path, LINEAR, parts | {"dora_scale": torch.rand(12, 1)})
    assert dora.adapter.low_rank[LINEAR_PATH].magnitude.shape == (12,)
    assert dora.adapter.spec.variant == "dora"


def read_back(folder, part):
    path = folder / "x.safetensors"
    return Source(path, path).tensors[f"{LINEAR}.{part}"]


def test_the_prefix_of_its_own(tmp_path):
    parts = {"lora_down.weight": torch.ones(1, 2), "lora_up.weight": torch.ones(3, 1)}
    reading = read_one(tmp_path, "lycoris_mid_block_resnets_0_time_emb_proj", parts)
    assert list(reading.adapter.sites) == ["unet.mid_block.resnets.0.time_emb_proj"]


@pytest.mark.parametrize(("family", "kind"), [("sd1", "conv"), ("sdxl", "linear")])
def test_one_by_one_projections_go_by_the_model(tmp_path, family, kind):
    new = drawn(6)
    parts = {f"lokr_{n}": new(*s) for n, s in LOKR["the first full"].items()}
    reading = read_one(tmp_path, "lora_unet_mid_block_attentions_0_proj_in", parts, family=family)
    assert reading.adapter.low_rank["unet.mid_block.attentions.0.proj_in"].kind == kind
    said = read_one(tmp_path, "lora_unet_mid_block_attentions_0_proj_in", parts)
    assert "nothing tells SD1 from SDXL" in said.notes[0]


@pytest.mark.parametrize(
    ("name", "parts", "words"),
    [
        (LINEAR, {"lokr_w1": (3, 2), "lokr_w2": (4, 5)}, "of two full matrices, whose rank is 8"),
        (LINEAR, {"diff": (4, 5)}, "is a full difference of shape"),
        (LINEAR, {"hada_w1_a": (4, 2), "hada_w1_b": (2, 5)}, "lacks hada_w2_a, hada_w2_b"),
        (
            LINEAR,
            {"hada_w1_a": (4, 2), "hada_w1_b": (2, 5), "hada_w2_a": (3, 2), "hada_w2_b": (2, 5)},
            "do not fit together",
        ),
        (LINEAR, {"lokr_w1": (3, 2), "oft_blocks": (2, 2)}, "has oft_blocks"),
        (LINEAR, {"lokr_w1": (3, 2), "diff": (2, 2)}, "parts of lokr and diff"),
        (LINEAR, {"diff_b": (2,)}, "has diff_b"),
        (LINEAR, {**{f"lokr_{n}": s for n, s in LOKR["the first full"].items()},
                  "dora_scale": (1, 10)}, "a length of each output's weights"),
        (CONV, {"lokr_w1": (3, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}, "3×3 kernel"),
        ("lora_unet_norm_out", {"diff": (4,)}, "no module of Stable Diffusion"),
    ],
)  # fmt: skip
def test_malformed(tmp_path, name, parts, words):
    with pytest.raises(FormatError, match=words):
        read_one(tmp_path, name, {part: torch.ones(shape) for part, shape in parts.items()})


def test_it_is_read_only(tmp_path):
    new = drawn(7)
    parts = {f"lokr_{n}": new(*s) for n, s in LOKR["the first full"].items()}
    adapter = read_one(tmp_path, LINEAR, parts).adapter
    assert isinstance(adapter, Adapter)
    with pytest.raises(FormatError, match="only read here"):
        FORMAT.write(adapter, Hints())
