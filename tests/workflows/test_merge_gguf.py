"""Merging into a GGUF: read again by gguf and by transformers, against W + ΔW in float64."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from lorakit.bases import load_base
from lorakit.bases.gguf_file import read_header
from lorakit.bases.gguf_tokenizer import gguf_tokenizer
from lorakit.bases.identity import identify
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Replace
from lorakit.errors import BaseError, FormatError, InputError, TrainingError
from lorakit.workflows.merge import gguf as merge_gguf
from lorakit.workflows.merge.gguf import merge_to_gguf
from lorakit.workflows.merge.gguf_check import step_of
from tests.bases import tiny
from tests.workflows import gguf_cases
from tests.workflows.gguf_cases import CASES

IDS = [1, 40, 50, 60, 70, 300, 2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))


def by_transformers(path: Path) -> Any:
    """What transformers itself makes of the file."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Name → values in float32, in the file's order of rows."""
    return {
        t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }


def same(one: Any, other: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(tiny.logits(one, IDS), tiny.logits(other, IDS), rtol=0, atol=atol)


# --- a folder


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "biases", "linear"])
def test_a_folder_becomes_a_file_that_transformers_reads(name: str, tmp_path: Path) -> None:
    made = gguf_cases.write_folder(tmp_path / "base", CASES[name])
    before = tiny.logits(made, IDS)
    changes = gguf_cases.adapter(made)
    out = tmp_path / "model.gguf"
    report = merge_to_gguf(tmp_path / "base", [(changes, 0.5)], out)
    gguf_cases.merged(made, changes, 0.5)
    assert (tiny.logits(made, IDS) - before).abs().max() > 0.5  # else it would prove nothing
    if name == "biases":  # transformers' reader leaves a Llama's biases out; llama.cpp's does not
        found = tensors(out)
        layer = made.model.layers[1]
        assert np.array_equal(found["blk.1.attn_output.bias"], layer.self_attn.o_proj.bias.detach())
        rows = layer.self_attn.q_proj.bias.detach().numpy().reshape(4, 2, 8).swapaxes(1, 2)
        assert np.array_equal(found["blk.1.attn_q.bias"], rows.reshape(-1))
    elif name == "linear":
        header = gguf.GGUFReader(out)
        assert header.fields["llama.rope.scaling.type"].contents() == "linear"
        assert header.fields["llama.rope.scaling.factor"].contents() == 2.0
    else:
        same(by_transformers(out), made)
    assert report.num_changed == 14
    assert report.checked.num_tensors == 14
    assert report.checked.worst <= 1.0


def test_the_permutation_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails where q and k keep transformers' rows."""
    from lorakit.bases import gguf_convert

    made = gguf_cases.write_folder(tmp_path / "base", CASES["llama"])
    monkeypatch.setattr(gguf_convert, "to_gguf_rows", lambda value, heads: value)
    changes = gguf_cases.adapter(made, only="v_proj")
    merge_to_gguf(tmp_path / "base", [(changes, 1.0)], tmp_path / "model.gguf")
    gguf_cases.merged(made, changes)
    with pytest.raises(AssertionError):
        same(by_transformers(tmp_path / "model.gguf"), made, 0.1)


def test_metadata_and_tokenizer(tmp_path: Path) -> None:
    made = gguf_cases.write_folder(tmp_path / "base", CASES["llama"])
    out = tmp_path / "model.gguf"
    merge_to_gguf(tmp_path / "base", [(gguf_cases.adapter(made), 1.0)], out)
    fields = {k: f.contents() for k, f in gguf.GGUFReader(out).fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "base",
        "general.file_type": 0,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 416,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["tokenizer.ggml.tokens"][415] == "[PAD415]"
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][415] == 5
    original = gguf_cases.tokenizer(CASES["llama"])
    again, notes = gguf_tokenizer(out, read_header(out))
    for text in gguf_cases.TEXTS:
        assert again(text)["input_ids"] == original(text)["input_ids"]
    assert notes == []


def test_llama3_factors_are_those_of_transformers(tmp_path: Path) -> None:
    made = gguf_cases.write_folder(tmp_path / "base", CASES["llama3"])
    merge_to_gguf(tmp_path / "base", [(gguf_cases.adapter(made), 1.0)], tmp_path / "m.gguf")
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    ours = plain / torch.from_numpy(tensors(tmp_path / "m.gguf")["rope_freqs.weight"])
    torch.testing.assert_close(ours, made.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)


def test_shards_and_bfloat16(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    made = gguf_cases.write_folder(
        folder, CASES["llama"], dtype=torch.bfloat16, max_shard_size="50KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    changes = gguf_cases.adapter(made, only="up_proj")
    out = tmp_path / "model.gguf"
    report = merge_to_gguf(folder, [(changes, 1.0)], out)
    assert set(report.by_type) == {"BF16", "F32"}
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "BF16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    # what no adapter touches is the same bit for bit
    state = by_transformers(out).state_dict()
    for name, value in made.state_dict().items():
        if "up_proj" not in name:
            assert torch.equal(state[name], value.float()), name


# --- a GGUF


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_gguf_keeps_its_types(kind: str, tmp_path: Path) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    path = tiny.write_gguf(tmp_path / "base.gguf", kind=quant)
    changes = gguf_cases.adapter(tiny.llama(), only="_proj")
    out = tmp_path / "model.gguf"
    report = merge_to_gguf(path, [(changes, 1.0)], out)
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(out)
    assert [(t.name, t.tensor_type) for t in before.tensors] == [
        (t.name, t.tensor_type) for t in after.tensors
    ]
    for key, field in before.fields.items():
        assert field.contents() == after.fields[key].contents(), key
    base = by_transformers(path)
    wanted = gguf_cases.merged(base, changes).state_dict()
    found = by_transformers(out).state_dict()
    for name, value in wanted.items():
        if value.dim() < 2 or "embed" in name or "lm_head" in name:
            assert torch.equal(found[name], value), name
            continue
        allowed = torch.stack([step_of(row.double(), kind) for row in value])
        assert ((found[name] - value).abs() <= allowed).all(), name
    assert report.num_changed == 14
    assert report.num_copied == len(before.tensors) - 14
    assert set(report.by_type) == {kind}
    cost = report.by_type[kind].error
    assert {"F32": cost < 1e-6, "Q8_0": 1e-4 < cost < 0.02}.get(kind, 0 < cost < 0.2)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16", "bf16", "f32"])
def test_another_type_on_request(kind: str, tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q5_1)
    changes = gguf_cases.adapter(tiny.llama(), only="q_proj")
    out = tmp_path / "model.gguf"
    report = merge_to_gguf(path, [(changes, 1.0)], out, quantize=kind)
    reader = gguf.GGUFReader(out)
    kinds = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    assert kinds.pop("token_embd.weight") == ("q8_0" if kind == "q4_0" else kind)
    assert {k for name, k in kinds.items() if "norm" not in name} == {kind}
    assert {k for name, k in kinds.items() if "norm" in name} == {"f32"}
    assert reader.fields["general.file_type"].contents() == {
        "f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32
    }[kind]  # fmt: skip
    assert any("Q8_0" in note for note in report.notes) == (kind == "q4_0")


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "base.gguf")
    one, two = (gguf_cases.adapter(tiny.llama(), rank=r, seed=r) for r in (2, 5))
    merge_to_gguf(path, [(one, 0.7), (two, -0.4)], tmp_path / "model.gguf")
    model = gguf_cases.merged(gguf_cases.merged(tiny.llama(), one, 0.7), two, -0.4)
    torch.testing.assert_close(
        tiny.logits(by_transformers(tmp_path / "model.gguf"), IDS[:4]),
        tiny.logits(model, IDS[:4]),
        rtol=0,
        atol=1e-5,
    )


def test_dora_a_norm_a_bias_and_the_embedding(tmp_path: Path) -> None:
    made = gguf_cases.write_folder(tmp_path / "base", CASES["qwen2"])
    torch.manual_seed(5)
    q, norm = "model.layers.1.self_attn.q_proj", "model.layers.0.input_layernorm"
    A, B, lengths = torch.randn(3, 64) / 8, torch.randn(64, 3) / 8, torch.rand(64) + 0.5
    down, bias = "model.layers.0.self_attn.k_proj", torch.randn(32)
    E, F = torch.randn(2, 416) / 8, torch.randn(64, 2) / 8
    adapter = Adapter(
        {
            q: LowRank(A, B, 2.0, magnitude=lengths),
            down: LowRank(torch.randn(1, 64), torch.zeros(32, 1), 0.5, bias=bias),
            norm: Replace({"weight": torch.full((64,), 0.7)}),
            "model.embed_tokens": LowRank(E, F, 3.0, kind="embedding"),
        }
    )
    report = merge_to_gguf(tmp_path / "base", [(adapter, 1.0)], tmp_path / "model.gguf")
    assert any("holds both" in note for note in report.notes)  # the head stays as it was
    with torch.no_grad():
        weight = made.get_submodule(q).weight
        whole = weight.double() + 2.0 * B.double() @ A.double()
        weight.copy_(lengths.double()[:, None] * whole / whole.norm(dim=1, keepdim=True))
        made.get_submodule(down).bias.add_(0.5 * bias)
        made.get_submodule(norm).weight.fill_(0.7)
        head = made.lm_head.weight.clone()
        made.model.embed_tokens.weight.add_(3.0 * (F @ E).T)
        made.lm_head.weight = torch.nn.Parameter(head)
    same(by_transformers(tmp_path / "model.gguf"), made)


# --- whole or not at all, and the same each time


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    made = gguf_cases.write_folder(tmp_path / "base", CASES["llama"])
    changes = gguf_cases.adapter(made)
    for name in ("one.gguf", "two.gguf"):
        merge_to_gguf(tmp_path / "base", [(changes, 1.0)], tmp_path / name, quantize="q4_1")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


_RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
from pathlib import Path
from lorakit.workflows.merge.gguf import merge_to_gguf
from tests.bases import tiny
from tests.workflows import gguf_cases
def slow(done, total):
    print("writing", flush=True)
    import time
    time.sleep(60)
changes = gguf_cases.adapter(tiny.llama())
try:
    merge_to_gguf(sys.argv[1], [(changes, 1.0)], sys.argv[2], progress=slow)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    base = tiny.write_gguf(tmp_path / "base.gguf")
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(base), str(tmp_path / "out" / "model.gguf")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "writing"
    assert len(os.listdir(tmp_path / "out")) == 1  # the temporary file
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert os.listdir(tmp_path / "out") == []


def test_a_wrong_file_is_noticed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_gguf(tmp_path / "base.gguf")
    right = merge_gguf._changed

    def wrong(before: Any, recipe: Any, begin: int) -> Any:
        after = right(before, recipe, begin)
        after[-1, 3] += 0.01
        return after

    monkeypatch.setattr(merge_gguf, "_changed", wrong)
    with pytest.raises(TrainingError, match=r"blk\.0\.\w+\.weight, row \d+: \S+ steps of F32 off"):
        merge_to_gguf(path, [(gguf_cases.adapter(tiny.llama()), 1.0)], tmp_path / "model.gguf")
    assert sorted(os.listdir(tmp_path)) == ["base.gguf"]


# --- what is refused


def test_misfits_are_all_listed(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "base.gguf")
    odd = LowRank(torch.ones(1, 7), torch.ones(32, 1), 1.0)
    adapter = Adapter(
        {
            "model.layers.0.self_attn.q_proj": odd,
            "model.layers.9.self_attn.q_proj": odd,
            "model.layers.0.mlp.router": odd,
            "model.layers.1.mlp.up_proj": LowRank(
                torch.ones(1, 32), torch.ones(64, 1), 1.0, bias=torch.ones(64)
            ),
        }
    )
    with pytest.raises(FormatError) as caught:
        merge_to_gguf(path, [(adapter, 1.0)], tmp_path / "model.gguf")
    for words in (
        "blk.0.attn_q.weight: the adapter's shape is (32, 7), the base's (32, 32)",
        "blk.9.attn_q.weight: the base has no such tensor",
        "model.layers.0.mlp.router.weight: llama.cpp has no name",
        "blk.1.ffn_up.bias: the base has no such tensor",
        "convert_hf_to_gguf",
    ):
        assert words in str(caught.value)


def test_k_quants_are_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "base.gguf")
    adapter = gguf_cases.adapter(tiny.llama())
    with pytest.raises(InputError, match=r"llama-quantize merged-f16\.gguf merged\.gguf Q4_K_M"):
        merge_to_gguf(path, [(adapter, 1.0)], tmp_path / "m.gguf", quantize="q4_k_m")
    one = merge_gguf.from_gguf(path, "base")
    stored = {name: replace(t, kind="Q4_K") for name, t in one.tensors.items() if t.num_rows > 1}
    with pytest.raises(BaseError, match=r"blk.0.attn_q.weight: Q4_K[\s\S]*llama-quantize"):
        merge_gguf.make_plan(
            replace(one, tensors={**one.tensors, **stored}), [(adapter, 1.0)], None
        )


def test_an_architecture_without_names_here(tmp_path: Path) -> None:
    folder = gguf_cases.write_folder(tmp_path / "base", CASES["llama"])
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "gptj"'))
    with pytest.raises(BaseError, match=r"'gptj'[\s\S]*llama, mistral[\s\S]*convert_hf_to_gguf"):
        merge_to_gguf(tmp_path / "base", [(gguf_cases.adapter(folder), 1.0)], tmp_path / "m.gguf")


def test_a_cutting_rule_without_a_name(tmp_path: Path) -> None:
    case = replace(CASES["llama"], rule=r"\p{L}+|\p{N}+|.")
    made = gguf_cases.write_folder(tmp_path / "base", case)
    with pytest.raises(BaseError, match=r"no name here for its cutting rule[\s\S]*convert_hf"):
        merge_to_gguf(tmp_path / "base", [(gguf_cases.adapter(made), 1.0)], tmp_path / "m.gguf")


def test_another_base_is_refused(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    mine = gguf_cases.adapter(tiny.llama()).with_(base=identify(tiny.llama(), "mine"))
    other = mine.with_(base=identify(tiny.llama(seed=9), "other"))
    report = merge_to_gguf(path, [(mine, 1.0)], tmp_path / "mine.gguf")
    assert any("stored as float32 and is used on Q8_0" in note for note in report.notes)
    with pytest.raises(BaseError, match="is another one"):
        merge_to_gguf(path, [(other, 1.0)], tmp_path / "other.gguf")
    report = merge_to_gguf(path, [(other, 1.0)], tmp_path / "o.gguf", allow_other_base=True)
    assert any("as allowed" in note for note in report.notes)


def test_a_number_that_float16_cannot_hold(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "base.gguf")
    up = LowRank(torch.full((1, 32), 300.0), torch.full((64, 1), 300.0), 1.0)
    adapter = Adapter({"model.layers.0.mlp.up_proj": up})
    with pytest.raises(TrainingError, match=r"blk.0.ffn_up.weight[\s\S]*not finite in F16"):
        merge_to_gguf(path, [(adapter, 1.0)], tmp_path / "m.gguf", quantize="f16")
    assert not (tmp_path / "m.gguf").exists()


def test_the_adapters_chat_template_goes_along(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "base.gguf")
    taught = tiny.tokenizer()
    taught.chat_template = "{{ messages[0]['content'] }} taught"
    taught.save_pretrained(tmp_path / "tokenizer")
    files = {f.name: f.read_bytes() for f in (tmp_path / "tokenizer").iterdir()}
    adapter = gguf_cases.adapter(tiny.llama()).with_(tokenizer_files=files)
    report = merge_to_gguf(path, [(adapter, 1.0)], tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents().endswith("taught")
    assert any("chat_template" in note for note in report.notes)
    other = gguf_cases.tokenizer(CASES["llama"])
    other.save_pretrained(tmp_path / "other")
    files = {f.name: f.read_bytes() for f in (tmp_path / "other").iterdir()}
    with pytest.raises(BaseError, match="another vocabulary"):
        merge_to_gguf(path, [(adapter.with_(tokenizer_files=files), 1.0)], tmp_path / "n.gguf")


def test_lorakit_loads_what_it_wrote(tmp_path: Path) -> None:
    made = gguf_cases.write_folder(tmp_path / "base", CASES["qwen2"])
    changes = gguf_cases.adapter(made)
    merge_to_gguf(tmp_path / "base", [(changes, 1.0)], tmp_path / "model.gguf")
    base = load_base(tmp_path / "model.gguf", device="cpu")
    same(base.model, gguf_cases.merged(made, changes))


@pytest.mark.parametrize("name", ["linear", "llama3", "llama", "qwen2"])
def test_what_transformers_leaves_out_is_taken_over(name: str, tmp_path: Path) -> None:
    """The scaling of the rotation, which its own reader drops without a word."""
    made = gguf_cases.write_folder(tmp_path / "base", CASES[name])
    changes = gguf_cases.adapter(made)
    merge_to_gguf(tmp_path / "base", [(changes, 1.0)], tmp_path / "model.gguf")
    merged = gguf_cases.merged(made, changes)
    same(load_base(tmp_path / "model.gguf", device="cpu").model, merged)
    if name in ("linear", "llama3"):
        with pytest.raises(AssertionError):
            same(by_transformers(tmp_path / "model.gguf"), merged, 1e-3)


def test_what_no_parameter_takes_is_refused(tmp_path: Path) -> None:
    made = gguf_cases.write_folder(tmp_path / "base", CASES["biases"])
    changes = gguf_cases.adapter(made)
    merge_to_gguf(tmp_path / "base", [(changes, 1.0)], tmp_path / "model.gguf")
    with pytest.raises(BaseError) as caught:
        load_base(tmp_path / "model.gguf", device="cpu")
    assert "blk.0.attn_q.bias: no parameter took it" in str(caught.value)
    assert "blk.1.ffn_down.bias" in str(caught.value)
    assert "safetensors format instead" in str(caught.value)
