"""From one format to another: what is detected, kept, listed, and left alone on the disk."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys

import pytest
import torch
from hypothesis import given, settings

from lorakit.cli.main import main
from lorakit.core.safetensors_io import read_safetensors, write_safetensors
from lorakit.core.sites import LowRank, Replace
from lorakit.errors import FormatError
from lorakit.formats import load_adapter, save_adapter
from lorakit.formats.convert import convert, plan, plan_reading
from lorakit.formats.format import Hints, Reading
from lorakit.formats.registry import WRITE_ONLY, available, detect, get, read
from lorakit.formats.runtimes import RUNTIMES
from tests.formats.language_models import (
    HEADS,
    KV_HEADS,
    LLAMA,
    PATHS,
    QWEN,
    adapter,
    adapters,
    assert_same_changes,
    deltas,
)
from tests.formats.small import contents

PHI3 = {
    "model_type": "phi3",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}

#: rounding of float32, of a value and of a product: what folding a scale costs
FLOAT32 = 2.0**-22


def written(given_adapter, to, hints, folder):
    """The adapter in a format, on the disk."""
    planned = plan_reading(Reading(given_adapter), source="peft", to=to, hints=hints)
    assert planned.lost == {}
    out = folder / "out" if planned.target.folder else folder / next(iter(planned.files))
    return planned.write(out, overwrite=True)


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2"])
@pytest.mark.parametrize("to", ["gguf", "mlx", "loralib", "peft"])
@settings(max_examples=15)
@given(original=adapters())
def test_round_trip(to, config, original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a")
    planned = plan_reading(Reading(original), source="peft", to=to, hints=Hints(base=config))
    path = written(original, to, Hints(base=config), folder)
    alpha = next((n for n in planned.notes if "lora_alpha=" in n), None)
    hints = Hints(alpha=None if alpha is None else float(alpha.rpartition("=")[2]))
    form, source = detect(path)
    assert form.name == to
    reading = form.read(source, hints)
    assert reading.lost == {}
    assert_same_changes(original, reading.adapter, 0.0 if to == "peft" else 4 * FLOAT32)
    # once there, nothing moves any more: the same bytes again
    again = plan_reading(Reading(reading.adapter), source=to, to=to, hints=Hints(base=config))
    second = again.write(folder / ("second" if form.folder else f"second{path.suffix}"))
    first = contents(path) if form.folder else path.read_bytes()
    if to != "loralib":  # which says nothing of the settings, by which the notes choose
        assert (contents(second) if form.folder else second.read_bytes()) == first


def test_an_adapter_of_each_file_is_loaded_by_its_path(tmp_path):
    original = adapter()
    for to in ("gguf", "mlx"):
        path = written(original, to, Hints(base=LLAMA), tmp_path / to)
        assert_same_changes(original, load_adapter(path), FLOAT32)


def test_loading_a_peft_folder_imports_no_other_format(tmp_path, monkeypatch):
    folder = save_adapter(adapter(), tmp_path / "a")
    for name in ("registry", "opening"):
        monkeypatch.setitem(sys.modules, f"lorakit.formats.{name}", None)  # an import now raises
    load_adapter(folder)
    with pytest.raises(ImportError):
        load_adapter(folder / "adapter_model.safetensors")


# --- GGUF ----------------------------------------------------------------------------------------


def llama_cpp_permutation(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's own words for it, on a whole weight."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_gguf_as_its_own_reader_has_it(tmp_path, config):
    from gguf import GGUFReader

    original = adapter(scaling=32 / 3)
    path = written(original, "gguf", Hints(base=config), tmp_path)
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == config["model_type"]
    assert fields["adapter.lora.alpha"] == 0.0
    tensors = {t.name: torch.tensor(t.data.copy()) for t in reader.tensors}
    assert len(tensors) == 2 * len(PATHS)
    expected = deltas(original)
    for number in range(3):
        for ours, theirs, heads in (
            ("self_attn.q_proj", "attn_q", HEADS),
            ("self_attn.k_proj", "attn_k", KV_HEADS),
            ("self_attn.v_proj", "attn_v", 0),
            ("self_attn.o_proj", "attn_output", 0),
            ("mlp.down_proj", "ffn_down", 0),
        ):
            name = f"blk.{number}.{theirs}.weight"
            got = tensors[f"{name}.lora_b"].double() @ tensors[f"{name}.lora_a"].double()
            plain = expected[f"model.layers.{number}.{ours}"]
            moved = llama_cpp_permutation(plain, heads) if heads else plain
            if config is QWEN:
                moved = plain
            assert (got - moved).abs().max() <= 1e-5
            if heads and config is LLAMA:  # the check fails where the rows are left alone
                assert (got - plain).abs().max() > 0.1


def test_gguf_with_an_alpha(tmp_path):
    """As llama.cpp's own converter writes it: alpha/rank, by each tensor's rank."""
    from gguf import GGUFWriter

    A, B = torch.randn(3, 16), torch.randn(16, 3)
    writer = GGUFWriter(tmp_path / "a.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 12.0)
    writer.add_tensor("blk.1.attn_v.weight.lora_a", A.numpy())
    writer.add_tensor("blk.1.attn_v.weight.lora_b", B.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    site = load_adapter(tmp_path / "a.gguf").sites["model.layers.1.self_attn.v_proj"]
    assert site.scaling == 4.0
    assert torch.equal(site.A, A)
    assert torch.equal(site.B, B)


def test_gguf_of_another_writer_needs_the_heads(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    B = torch.randn(16, 3)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", torch.randn(3, 16).numpy())
    writer.add_tensor("blk.0.attn_q.weight.lora_b", llama_cpp_permutation(B, HEADS).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"give the base.*--base"):
        load_adapter(tmp_path / "a.gguf")
    found = read(tmp_path / "a.gguf", hints=Hints(base=LLAMA)).adapter
    assert torch.equal(found.sites["model.layers.0.self_attn.q_proj"].B, B)


def test_gguf_refuses_what_aborts_llama_cpp():
    full = adapter()
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    embedding = LowRank(torch.randn(2, 11), torch.randn(16, 2), 1.0, "embedding")
    sites = dict(full.sites) | {
        "lm_head": LowRank(torch.randn(2, 16), torch.randn(11, 2), 1.0),
        "model.embed_tokens": embedding,
        q: dataclasses.replace(full.sites[q], magnitude=torch.ones(16)),
        v: dataclasses.replace(full.sites[v], bias=torch.ones(8)),
        "model.norm": Replace({"weight": torch.ones(16)}),
    }
    lost = get("gguf").write(full.with_(sites=sites), Hints(base=LLAMA)).lost
    assert set(lost) == {"lm_head", "model.embed_tokens", q, f"{v}.bias", "model.norm"}
    untied = get("gguf").write(
        full.with_(sites=sites), Hints(base={**LLAMA, "tie_word_embeddings": False})
    )
    assert "lm_head" not in untied.lost


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "--base"),
        ({"model_type": "bert"}, "'bert'"),
        ({**LLAMA, "num_attention_heads": None}, "num_attention_heads is None"),
        ({**LLAMA, "num_attention_heads": 8}, r"16 outputs; the base's 8 heads of 2|make"),
        ({**LLAMA, "num_hidden_layers": 2}, "has 2 layers"),
    ],
)
def test_gguf_of_a_base_that_is_not_the_adapters(config, words):
    if config.get("num_attention_heads") == 8:
        config = {**config, "head_dim": 4}
    with pytest.raises(FormatError, match=words):
        get("gguf").write(adapter(), Hints(base=config))


def test_a_gguf_model_is_no_adapter(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"GGUF of the type 'model'.*--base"):
        load_adapter(tmp_path / "a.gguf")


# --- MLX -----------------------------------------------------------------------------------------


def test_mlx_as_mlx_lm_reads_it(tmp_path):
    full = adapter()
    q = "model.layers.0.self_attn.q_proj"
    sites = dict(full.sites) | {q: dataclasses.replace(full.sites[q], scaling=0.3)}
    mixed = full.with_(sites=sites)
    path = written(mixed, "mlx", Hints(base=LLAMA), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    tensors, _ = read_safetensors(path / "adapters.safetensors")
    scale = config["lora_parameters"]["scale"]
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 3
    assert set(config["lora_parameters"]["keys"]) == {p.split(".", 3)[3] for p in PATHS}
    for module, delta in deltas(mixed).items():
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        assert a.shape == (delta.shape[1], config["lora_parameters"]["rank"])
        got = scale * (a.double() @ b.double()).T
        assert (got - delta).abs().max() <= 1e-5


def test_mlx_keeps_one_scale_as_it_is(tmp_path):
    original = adapter(scaling=32 / 3, dtype=torch.bfloat16)
    path = written(original, "mlx", Hints(base=LLAMA), tmp_path)
    found = load_adapter(path)
    assert {site.scaling for site in found.low_rank.values()} == {32 / 3}
    assert_same_changes(original, found)
    assert found.dtypes == {torch.bfloat16}


def test_mlx_dora_is_all_or_nothing(tmp_path):
    full = adapter()
    dora = {
        path: dataclasses.replace(site, magnitude=torch.rand(site.B.shape[0]) + 1)
        for path, site in full.sites.items()
    }
    path = written(full.with_(sites=dora), "mlx", Hints(base=LLAMA), tmp_path)
    assert json.loads((path / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    found = load_adapter(path)
    for module, site in dora.items():
        assert torch.equal(found.sites[module].magnitude, site.magnitude)
    one = next(iter(dora))
    lost = get("mlx").write(full.with_(sites=dict(full.sites) | {one: dora[one]}), Hints()).lost
    assert set(lost) == {one}


def test_mlx_scale_that_the_config_leaves_out(tmp_path):
    path = written(adapter(), "mlx", Hints(base=LLAMA), tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    del config["lora_parameters"]["scale"]
    (path / "adapter_config.json").write_text(json.dumps(config))
    assert {s.scaling for s in load_adapter(path).low_rank.values()} == {20.0}
    (path / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match="--alpha"):
        load_adapter(path)


# --- loralib -------------------------------------------------------------------------------------


def merged_linear_delta(A, B, enabled, alpha):
    """loralib's MergedLinear, in its own words: a grouped convolution, then rows of zeros."""
    rank = B.shape[1]
    product = torch.nn.functional.conv1d(
        A.unsqueeze(0), B.unsqueeze(-1), groups=sum(enabled)
    ).squeeze(0)
    rows = torch.zeros(len(enabled), B.shape[0] // sum(enabled), dtype=torch.bool)
    rows[list(enabled)] = True
    whole = torch.zeros(rows.numel(), A.shape[1], dtype=A.dtype)
    whole[rows.flatten()] = product
    return whole * (alpha / rank)


@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, True), (False, True)])
def test_loralib_merged_linear(tmp_path, enabled):
    n, rank, part, d_in = sum(enabled), 2, 5, 7
    if n == 1:
        pytest.skip("one part has the shapes of a plain linear layer")
    A = torch.randn(n * rank, d_in, dtype=torch.float64)
    B = torch.randn(n * part, rank, dtype=torch.float64)
    torch.save({"h.0.c_attn.lora_A": A, "h.0.c_attn.lora_B": B}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt", hints=Hints(alpha=8, enabled=enabled))
    expected = merged_linear_delta(A, B, enabled, 8)
    assert (deltas(found.adapter)["h.0.c_attn"] - expected).abs().max() <= 1e-12
    if n < 3:
        with pytest.raises(FormatError, match="does not say which"):
            read(tmp_path / "a.pt", hints=Hints(alpha=8))
    with pytest.raises(FormatError, match="--alpha"):
        load_adapter(tmp_path / "a.pt")


def test_loralib_biases_come_along(tmp_path):
    full = adapter()
    bias = "model.layers.0.self_attn.q_proj.bias"
    both = full.with_(sites=dict(full.sites) | {bias: Replace({"": torch.ones(16)})})
    path = written(both, "loralib", Hints(), tmp_path)
    state = torch.load(path, weights_only=True)
    assert torch.equal(state[bias], torch.ones(16))
    found = read(path, hints=Hints(alpha=4)).adapter
    assert torch.equal(found.sites[bias].tensors_by_name[""], torch.ones(16))
    assert_same_changes(both, found)


# --- torchtune and litgpt ------------------------------------------------------------------------


def torchtune_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """torchtune's ``hf_to_tune``, on a whole weight."""
    return llama_cpp_permutation(weight, heads)


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_torchtune(tmp_path, config):
    original = adapter()
    names = {
        "self_attn.o_proj": "attn.output_proj",
        "mlp.gate_proj": "mlp.w1",
        "mlp.down_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w3",
    }
    state = {}
    for path, site in original.low_rank.items():
        _, _, number, module = path.split(".", 3)
        name = f"layers.{number}.{names.get(module, module.replace('self_attn', 'attn'))}"
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(module.rpartition(".")[2], 0)
        moved = heads and config is LLAMA
        state[f"{name}.lora_a.weight"] = site.A
        state[f"{name}.lora_b.weight"] = torchtune_rows(site.B, heads) if moved else site.B
    torch.save(state, tmp_path / "adapter_0.pt")
    found = read(tmp_path / "adapter_0.pt", hints=Hints(alpha=4, base=config)).adapter
    assert_same_changes(original, found)
    with pytest.raises(FormatError, match=r"--alpha(.|\n)*--base"):
        load_adapter(tmp_path / "adapter_0.pt")


def litgpt_delta(A, B, sizes, scaling):
    """litgpt's LoRAQKVLinear: a part of A times its part of B, one below the other."""
    parts = zip(A.chunk(len(sizes)), B.split(sizes), strict=True)
    return torch.cat([scaling * b @ a for a, b in parts])


@pytest.mark.parametrize("enabled", [(True, True, True), (True, False, True), (True, False, False)])
def test_litgpt(tmp_path, enabled):
    sizes = [n for n, on in zip((16, 8, 8), enabled, strict=True) if on]
    A = torch.randn(2 * sum(enabled), 16, dtype=torch.float64)
    B = torch.randn(sum(sizes), 2, dtype=torch.float64)
    o = adapter(dtype=torch.float64).sites["model.layers.1.self_attn.o_proj"]
    state = {
        "transformer.h.1.attn.qkv.lora_A": A,
        "transformer.h.1.attn.qkv.lora_B": B,
        "transformer.h.1.attn.proj.lora_A": o.A,
        "transformer.h.1.attn.proj.lora_B": o.B,
    }
    torch.save({"model": state}, tmp_path / "lit_model.pth.lora")
    found = read(tmp_path, hints=Hints(alpha=6, base=LLAMA)).adapter
    rows = litgpt_delta(A, B, sizes, 3.0).split(sizes)
    names = [name for name, on in zip("qkv", enabled, strict=True) if on]
    got = deltas(found)
    assert len(got) == len(names) + 1
    for name, delta in zip(names, rows, strict=True):
        path = f"model.layers.1.self_attn.{name}_proj"
        assert (got[path] - delta).abs().max() <= 1e-12
    assert (got["model.layers.1.self_attn.o_proj"] - 3 * o.B @ o.A).abs().max() <= 1e-12


def test_older_litgpt_adds_its_rows_group_by_group(tmp_path):
    sizes = [16, 8, 8]
    A = torch.randn(6, 16, dtype=torch.float64)
    B = torch.randn(32, 2, dtype=torch.float64)
    state = {"transformer.h.0.attn.attn.lora_A": A, "transformer.h.0.attn.attn.lora_B": B}
    torch.save(state, tmp_path / "lit_model.pth.lora")
    found = deltas(read(tmp_path, hints=Hints(alpha=2, base=LLAMA)).adapter)
    added = litgpt_delta(A, B, sizes, 1.0).view(2, 4, 4, 16)  # group; q, q, k, v; row of a head
    expected = {"q": added[:, :2], "k": added[:, 2], "v": added[:, 3]}
    for name, delta in expected.items():
        got = found[f"model.layers.0.self_attn.{name}_proj"]
        assert (got - delta.reshape(-1, 16)).abs().max() <= 1e-12


def test_litgpt_that_leaves_its_parts_open(tmp_path):
    state = {
        "transformer.h.0.attn.qkv.lora_A": torch.randn(2, 16),
        "transformer.h.0.attn.qkv.lora_B": torch.randn(8, 2),
    }
    torch.save(state, tmp_path / "lit_model.pth.lora")
    with pytest.raises(FormatError, match="--enabled"):
        read(tmp_path, hints=Hints(alpha=2, base=LLAMA))
    found = read(tmp_path, hints=Hints(alpha=2, base=LLAMA, enabled=(False, False, True)))
    assert set(found.adapter.sites) == {"model.layers.0.self_attn.v_proj"}


# --- Phi-3, whose joined projections some keep apart ---------------------------------------------


def phi3_parts(sizes):
    """A and B of each part, in float64."""
    return [(torch.randn(2, 16).double(), torch.randn(size, 2).double()) for size in sizes]


def test_phi3_of_torchtune_is_joined(tmp_path):
    parts = phi3_parts([16, 8, 8, 24, 24])
    names = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3"]
    state = {}
    for name, (A, B) in zip(names, parts, strict=True):
        state[f"layers.1.{name}.lora_a.weight"] = A
        state[f"layers.1.{name}.lora_b.weight"] = B
    torch.save(state, tmp_path / "adapter_0.pt")
    reading = read(tmp_path / "adapter_0.pt", hints=Hints(alpha=4, base=PHI3))
    found = deltas(reading.adapter)
    block = "model.layers.1."
    assert set(found) == {f"{block}self_attn.qkv_proj", f"{block}mlp.gate_up_proj"}
    rows = [2.0 * B @ A for A, B in parts]
    assert torch.equal(found[f"{block}self_attn.qkv_proj"], torch.cat(rows[:3]))
    assert torch.equal(found[f"{block}mlp.gate_up_proj"], torch.cat(rows[3:]))
    assert "2 sites are joined" in reading.notes[0]
    hints = Hints(alpha=4, base=PHI3 | {"num_attention_heads": 8, "head_dim": 4})
    with pytest.raises(FormatError, match=r"16 outputs; expected 32"):
        read(tmp_path / "adapter_0.pt", hints=hints)


def test_phi3_of_litgpt_is_joined(tmp_path):
    """Query and value alone were trained; gate and up are two modules there."""
    (q, v, gate, up) = phi3_parts([16, 8, 24, 24])
    block = "transformer.h.0."
    state = {
        f"{block}attn.qkv.lora_A": torch.cat([q[0], v[0]]),
        f"{block}attn.qkv.lora_B": torch.cat([q[1], v[1]]),
        f"{block}mlp.fc_1.lora_A": gate[0],
        f"{block}mlp.fc_1.lora_B": gate[1],
        f"{block}mlp.fc_2.lora_A": up[0],
        f"{block}mlp.fc_2.lora_B": up[1],
    }
    torch.save(state, tmp_path / "lit_model.pth.lora")
    hints = Hints(alpha=2, base=PHI3, enabled=(True, False, True))
    found = deltas(read(tmp_path, hints=hints).adapter)
    block = "model.layers.0."
    assert set(found) == {f"{block}self_attn.qkv_proj", f"{block}mlp.gate_up_proj"}
    expected = torch.cat([q[1] @ q[0], torch.zeros(8, 16).double(), v[1] @ v[0]])
    assert torch.equal(found[f"{block}self_attn.qkv_proj"], expected)
    expected = torch.cat([gate[1] @ gate[0], up[1] @ up[0]])
    assert torch.equal(found[f"{block}mlp.gate_up_proj"], expected)


def test_phi3_for_onnx_comes_apart():
    """The builder's graph has a query, key and value of the joined site's rank."""
    block = "model.layers.0."
    (qkv, gate_up) = phi3_parts([32, 48])
    sites = {
        f"{block}self_attn.qkv_proj": LowRank(qkv[0].float(), qkv[1].float(), 0.5),
        f"{block}mlp.gate_up_proj": LowRank(gate_up[0].float(), gate_up[1].float(), 1.0),
    }
    original = adapter().with_(sites=sites)
    result = get("onnx").write(original, Hints(base=PHI3))
    assert result.lost == {}
    tensors = onnx_tensors(result.files["adapter.onnx_adapter"])
    whole = deltas(original)
    for path, names in {
        "self_attn.qkv_proj": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    }.items():
        got = []
        for name in names:
            a, b = (tensors[f"{block}{name}.lora_{x}.MatMul.weight"].double() for x in "AB")
            assert a.shape == (16, 2)
            got.append((a @ b).T)
        torch.testing.assert_close(torch.cat(got), whole[block + path], rtol=0, atol=1e-5)
    lost = get("onnx").write(original, Hints()).lost
    assert list(lost) == [f"{block}self_attn.qkv_proj"]
    assert "--base" in lost[f"{block}self_attn.qkv_proj"]


# --- ONNX Runtime --------------------------------------------------------------------------------


def onnx_tensors(content: bytes) -> dict[str, torch.Tensor]:
    """A reader of FlatBuffers, by their documentation alone."""

    def u32(at):
        return struct.unpack_from("<I", content, at)[0]

    def field(table, number):
        vtable = table - struct.unpack_from("<i", content, table)[0]
        offset = struct.unpack_from("<H", content, vtable + 4 + 2 * number)[0]
        assert offset
        return table + offset

    def follow(at):
        return at + u32(at)

    assert content[4:8] == b"TORT"
    root = follow(0)
    assert [u32(field(root, n)) for n in range(3)] == [1, 1, 1]
    vector = follow(field(root, 3))
    found = {}
    for number in range(u32(vector)):
        table = follow(vector + 4 + 4 * number)
        text, dims, data = (follow(field(table, n)) for n in (0, 1, 3))
        assert u32(field(table, 2)) == 1  # float32
        assert (dims + 4) % 8 == (data + 4) % 8 == 0
        name = content[text + 4 : text + 4 + u32(text)].decode()
        shape = struct.unpack_from(f"<{u32(dims)}q", content, dims + 4)
        raw = bytearray(content[data + 4 : data + 4 + u32(data)])
        found[name] = torch.frombuffer(raw, dtype=torch.float32).reshape(shape)
    return found


def test_onnx_adapter():
    original = adapter(scaling=0.3)
    result = get("onnx").write(original, Hints())
    tensors = onnx_tensors(result.files["adapter.onnx_adapter"])
    assert len(tensors) == 2 * len(PATHS)
    for path, delta in deltas(original).items():
        name = path.replace("self_attn", "attn")
        a, b = (tensors[f"{name}.lora_{x}.MatMul.weight"].double() for x in "AB")
        assert ((a @ b).T - delta).abs().max() <= 1e-5
    assert get("onnx").write(original, Hints()).files == result.files


# --- what is written, refused and said -----------------------------------------------------------


def test_every_format_has_its_name():
    for name in available():
        assert get(name).name == name
    with pytest.raises(FormatError, match="are peft, kohya"):
        get("pfet")


def test_files_that_nobody_knows(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x.weight": torch.ones(2, 2)}, {})
    with pytest.raises(FormatError, match=r"a model's own weights.*Formats that are read: peft"):
        load_adapter(tmp_path / "a.safetensors")


def test_write_only_formats_are_not_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    for name in WRITE_ONLY:
        with pytest.raises(FormatError, match="not read"):
            read(tmp_path / "a.bin", format=name)


def test_losses_are_listed_and_nothing_is_written(tmp_path, capsys):
    full = adapter()
    save_adapter(
        full.with_(sites=dict(full.sites) | {"model.norm": Replace({"weight": torch.ones(16)})}),
        tmp_path / "a",
    )
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    out = tmp_path / "a.gguf"
    command = [
        *("convert", str(tmp_path / "a"), "--to", "gguf", "--out", str(out)),
        *("--base", str(tmp_path / "config.json"), "--json"),
    ]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "model.norm: trained whole" in said.err
    assert json.loads(said.out)["lost"].keys() == {"model.norm"}
    assert not out.exists()
    assert main([*command, "--allow-loss"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["out"] == str(out)
    assert facts["sites"] == len(full.sites)
    assert f"Wrote {len(full.sites)} sites" in said.err
    assert "lost: model.norm" in said.err
    assert_same_changes(full, load_adapter(out), FLOAT32)


def test_the_command_wants_one_target(tmp_path, capsys):
    save_adapter(adapter(), tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 2
    assert "either --to FORMAT or --for PROGRAM" in capsys.readouterr().err


def test_what_lies_at_the_place_stays(tmp_path):
    save_adapter(adapter(), tmp_path / "a")
    folder = tmp_path / "b"
    convert(tmp_path / "a", folder, to="mlx")
    before = contents(folder)
    with pytest.raises(FormatError, match="not empty"):
        convert(tmp_path / "a", folder, to="mlx")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"holds notes\.txt"):
        convert(tmp_path / "a", folder, to="mlx", overwrite=True)
    (folder / "notes.txt").unlink()
    convert(tmp_path / "a", folder, to="mlx", overwrite=True)
    assert contents(folder) == before
    with pytest.raises(FormatError, match="wrong suffix"):
        convert(tmp_path / "a", tmp_path / "b.safetensors", to="loralib")
    convert(tmp_path / "a", tmp_path / "b.pt", to="loralib")
    with pytest.raises(FormatError, match="exists already"):
        convert(tmp_path / "a", tmp_path / "b.pt", to="loralib")


# --- portable and runtimes -----------------------------------------------------------------------


@settings(max_examples=25)
@given(original=adapters())
def test_portable_has_no_scale_left(original):
    planned = plan_reading(Reading(original), source="peft", to="peft", portable=True)
    config = json.loads(planned.files["adapter_config.json"])
    assert config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    assert {site.scaling for site in planned.adapter.low_rank.values()} == {1.0}
    assert config["rank_pattern"] == {}
    assert config["r"] == config["lora_alpha"]
    assert_same_changes(original, planned.adapter, FLOAT32)
    for site in planned.adapter.low_rank.values():
        assert site.A.dtype == site.B.dtype


def test_folding_keeps_16_bits_where_that_is_exact():
    for scaling, dtype in ((2.0, torch.bfloat16), (0.3, torch.float32)):
        planned = plan_reading(
            Reading(adapter(scaling=scaling, dtype=torch.bfloat16)),
            source="peft",
            to="peft",
            portable=True,
        )
        assert planned.adapter.dtypes == {dtype}


@settings(max_examples=15)
@given(original=adapters())
def test_vllm_gets_one_rank_that_it_takes(original):
    planned = plan_reading(Reading(original), source="peft", runtime="vllm")
    config = json.loads(planned.files["adapter_config.json"])
    assert config["r"] == config["lora_alpha"]
    assert config["r"] in (1, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    assert_same_changes(original, planned.adapter, FLOAT32)


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_runtimes_refuse_what_they_would_drop(name):
    full = adapter()
    q = "model.layers.0.self_attn.q_proj"
    bias = dict(full.sites) | {q: dataclasses.replace(full.sites[q], bias=torch.ones(16))}
    whole = dict(full.sites) | {"model.norm": Replace({"weight": torch.ones(16)})}
    dora = dict(full.sites) | {q: dataclasses.replace(full.sites[q], magnitude=torch.ones(16))}
    for sites, path in ((bias, q), (whole, "model.norm"), (dora, q)):
        with pytest.raises(FormatError, match=rf"(?s){path}: .*lorakit merge"):
            plan_reading(
                Reading(full.with_(sites=sites)),
                source="peft",
                runtime=name,
                hints=Hints(base=LLAMA),
            )


def test_vllm_refuses_ranks_beyond_its_list():
    A, B = torch.zeros(600, 16), torch.zeros(16, 600)
    large = adapter().with_(sites={"model.layers.0.self_attn.q_proj": LowRank(A, B, 1.0)})
    with pytest.raises(FormatError, match=r"rank is 600.*lorakit compress --rank 512"):
        plan_reading(Reading(large), source="peft", runtime="vllm")


def test_a_program_takes_its_own_format(tmp_path):
    save_adapter(adapter(), tmp_path / "a")
    with pytest.raises(FormatError, match="takes the format gguf, not mlx"):
        plan(tmp_path / "a", to="mlx", runtime="ollama")
    with pytest.raises(FormatError, match="no program known here"):
        plan(tmp_path / "a", runtime="llamacpp")
