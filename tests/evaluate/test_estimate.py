"""The formulas of the estimate: sums, scaling laws, and what a fused layer really keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lorakit.core.spec import LoRASpec
from lorakit.errors import BaseError, InputError
from lorakit.evaluate.estimate import Plan, estimate
from lorakit.evaluate.estimate_advice import options, warnings
from lorakit.evaluate.estimate_machine import KNOWN_GPUS, Rates, known_gpu
from lorakit.evaluate.estimate_memory import (
    Part,
    Setting,
    kept_bytes,
    peak_memory,
    weight_bytes,
)
from lorakit.evaluate.estimate_shape import adapter_shape, full_shape, model_shape
from lorakit.evaluate.estimate_time import step_time
from lorakit.infer import PackedModel
from lorakit.infer.fused import attention
from lorakit.layers import attach

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def llama(device="meta", **changes):
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def qwen(device="meta"):
    with torch.device(device):
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)).eval()


@pytest.fixture(scope="module")
def shape():
    return model_shape(llama(), "tiny")


@pytest.fixture(scope="module")
def adapter(shape):
    return adapter_shape(llama(), LoRASpec(rank=8), shape)


RATES = known_gpu("L4").rates
PART = Part(tokens=400, supervised=150, squares=400 * 100, examples=4)


def test_the_shape_is_the_models(shape):
    model = llama("cpu")
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert (shape.hidden, shape.query, shape.key_value, shape.mlp) == (32, 32, 16, 80)
    assert shape.num_linear == 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 80)
    assert shape.plain_reason is None
    assert not shape.tied
    assert model_shape(llama(tie_word_embeddings=True), "tied").tied


@pytest.mark.parametrize(
    "spec",
    [
        LoRASpec(rank=8),
        LoRASpec(rank=4, targets="attention", layers="1-2"),
        LoRASpec(rank=8, variant="dora"),
        LoRASpec(rank=8, train_modules=("lm_head",)),
    ],
)
def test_trained_parameters_are_those_of_the_attached_adapter(spec, shape):
    handle = attach(llama("cpu"), spec, "a", trainable=True)
    assert adapter_shape(llama(), spec, shape).num_parameters == handle.flat("a").numel()


def test_components_add_up_to_the_peak(shape, adapter):
    found = peak_memory(shape, adapter, Setting(program=1000), PART)
    assert found.total == sum(found.components().values())
    assert set(found.components()) == {
        field.name for field in dataclasses.fields(found) if field.name != "when"
    }
    assert found.components()["program"] == 1000
    assert found.weights == 4 * shape.num_parameters
    assert found.gradients == 4 * adapter.num_parameters
    assert found.optimizer == 8 * adapter.num_parameters


def test_twice_the_tokens_keep_twice_the_activations(shape, adapter):
    double = Part(2 * PART.tokens, 2 * PART.supervised, 2 * PART.squares, 2 * PART.examples)
    for recompute in ("none", "mlp", "layers"):
        setting = Setting(recompute=recompute)
        one, two = (kept_bytes(shape, adapter, setting, part) for part in (PART, double))
        assert two == 2 * one


def test_recomputation_and_narrow_numbers_keep_less(shape, adapter):
    none, mlp, layers = (
        kept_bytes(shape, adapter, Setting(recompute=how), PART)
        for how in ("none", "mlp", "layers")
    )
    assert layers < mlp < none
    assert layers == 3 * 32 * PART.tokens * 4
    plain = dataclasses.replace(adapter, plain_reason="DoRA")
    assert kept_bytes(shape, plain, Setting(), PART) > none
    half = kept_bytes(shape, adapter, Setting(itemsize=2, device="cuda"), PART)
    assert 0.5 * none <= half < 0.55 * none  # the attention's sums stay float32
    mixed = kept_bytes(shape, adapter, Setting(itemsize=2), PART)
    assert half < mixed < none  # on a CPU adapters and attention do too


class _Kept:
    """Counts the bytes of distinct storages that the graph of a forward holds."""

    def __init__(self):
        self.seen = {}
        self.nodes = set()

    def add(self, value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            self.seen[storage.data_ptr()] = storage.nbytes()
            self.graph(value.grad_fn)
        elif isinstance(value, (list, tuple)):
            for one in value:
                self.add(one)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                self.add(getattr(value, field.name))
        elif isinstance(value, (attention._OneByOne, attention._Together)):
            for own in vars(value).values():
                if not dataclasses.is_dataclass(own):  # where tokens stand is left out of the count
                    self.add(own)

    def graph(self, node):
        if node is None or node in self.nodes:
            return
        self.nodes.add(node)
        if hasattr(node, "kept"):
            self.add(node.kept)
        for name in dir(node):
            if name.startswith("_saved_") and "fused" not in type(node).__name__.lower():
                self.add(getattr(node, name))
        self.add(list(getattr(node, "saved_tensors", ())))
        for following, _ in node.next_functions:
            self.graph(following)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "mlp", "layers"])
@pytest.mark.parametrize("lengths", [(120, 80), (14, 16, 11, 16)])
@pytest.mark.parametrize("make", [llama, qwen])
def test_activations_are_what_the_fused_layers_hold(make, lengths, recompute, dtype):
    """The count of tensors, against the storages that the graph of a real forward reaches."""
    model = make("cpu").to(dtype)
    handle = attach(model, LoRASpec(rank=8), "a", trainable=True)
    packed = PackedModel(model, handle, recompute=recompute)
    assert packed.fused is not None
    ids = torch.arange(sum(lengths)) % 90
    rows = torch.arange(sum(lengths) - 1)
    hidden = {}
    from lorakit.infer.inputs import Input

    part = Input(
        ids[None], torch.cat([torch.arange(n) for n in lengths])[None], lengths, rows, ids[1:]
    )
    with handle.forward_scope(handle.active):
        hidden["y"] = packed._hidden(part)
    kept = _Kept()
    kept.graph(hidden["y"].grad_fn)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own.add(handle.flat("a").untyped_storage().data_ptr())
    held = sum(size for where, size in kept.seen.items() if where not in own)
    shape = model_shape(make(), "tiny")
    adapter = adapter_shape(make(), LoRASpec(rank=8), shape)
    mine = kept_bytes(
        shape,
        adapter,
        Setting(recompute=recompute, itemsize=dtype.itemsize),
        Part(
            sum(lengths), len(rows), sum(n * n for n in lengths), len(lengths), longest=max(lengths)
        ),
    )
    final = len(rows) * shape.hidden * 4  # the final norm's float32 input belongs to no layer
    # positions, indices and the norms' sums are left out of the count
    assert mine + final == pytest.approx(held, rel=0.05)


def test_quantised_weights_are_smaller_and_their_file_is_told(shape, adapter):
    full, int8, nf4 = (weight_bytes(shape, Setting(quantize=how)) for how in (None, "int8", "nf4"))
    assert nf4 < int8 < full
    rest = 4 * (shape.num_parameters - shape.num_linear)
    assert (nf4 - rest) / shape.num_linear == pytest.approx(0.516, abs=0.001)
    found = peak_memory(shape, adapter, Setting(quantize="nf4"), PART)
    assert found.file == 4 * shape.num_linear
    assert found.needed == found.total - found.file
    assert peak_memory(shape, adapter, Setting(quantize="nf4", device="cuda"), PART).file == 0


def test_full_fine_tuning_has_states_of_every_weight(shape):
    found = peak_memory(shape, full_shape(shape), Setting(), PART)
    assert found.optimizer == 8 * shape.num_parameters
    assert found.gradients == 4 * shape.num_parameters
    assert found.adapter == 0


def test_a_large_adapter_peaks_in_the_optimizers_step(shape, adapter):
    assert peak_memory(shape, adapter, Setting(), PART).when == "backward"
    many = dataclasses.replace(adapter, num_parameters=10**8)
    assert peak_memory(shape, many, Setting(), PART).when == "optimizer step"


def test_time_grows_with_tokens_rank_and_recomputation(shape, adapter):
    def seconds(part=PART, who=adapter, **setting):
        return step_time(shape, who, Setting(**setting), [part], RATES).total

    now = seconds()
    assert seconds(recompute="layers") > seconds(recompute="mlp") > now
    assert seconds(part=dataclasses.replace(PART, tokens=800)) > now
    wide = dataclasses.replace(adapter, ranks=dict.fromkeys(adapter.ranks, 64))
    even = dataclasses.replace(RATES, thin={"8": 1e12, "64": 1e12})
    narrow, wide = (step_time(shape, a, Setting(), [PART], even) for a in (adapter, wide))
    assert wide.adapter == pytest.approx(8 * narrow.adapter)
    assert seconds(quantize="nf4") > now
    two = step_time(shape, adapter, Setting(), [PART, PART], RATES)
    one = step_time(shape, adapter, Setting(), [PART], RATES)
    assert two.products == pytest.approx(2 * one.products)
    assert two.optimizer == one.optimizer


def test_rates_lie_between_the_measured():
    rates = dataclasses.replace(
        RATES,
        gemm={f"{r}x{w}": r * w for r in (64, 256, 1024) for w in (640, 2048)},
        thin={"8": 1.0, "64": 2.0},
    )
    assert rates.gemm_rate(256, 640) == 256 * 640
    assert rates.gemm_rate(160, 640) == pytest.approx(160 * 640)
    assert rates.gemm_rate(1, 1) == 64 * 640
    assert rates.gemm_rate(10**6, 10**6) == 1024 * 2048
    assert rates.thin_rate(36) == pytest.approx(1.5)


def a_plan():
    return Plan(10, PART, ((PART,),), 400.0, 600, 4, 100)


def test_options_name_what_makes_it_fit(shape, adapter):
    def predict(changes, available):
        setting = Setting(recompute=changes.get("recompute", "none"))
        plan = dataclasses.replace(a_plan(), largest=PART)
        if "micro_batch_tokens" in changes:
            plan = dataclasses.replace(plan, largest=Part(100, 40, 10000, 1))
        return estimate(
            shape, adapter, setting, plan, rates=RATES, available=available, device="here"
        )

    now = predict({}, 10**12)
    candidates = [{"recompute": "layers"}, {"micro_batch_tokens": 100}, {"rank": 8}]
    found = options(now, candidates, lambda c: predict(c, 10**12))
    assert [one.flags for one in found] == ["--micro-batch-tokens 100", "--recompute layers"]
    assert all(one.fits and one.same_result for one in found)
    both = predict({"recompute": "layers", "micro_batch_tokens": 100}, 1).memory.needed
    tight = both + 10
    now = predict({}, tight)
    assert now.fits is False
    found = options(now, candidates, lambda c: predict(c, tight))
    assert [one.fits for one in found] == [False, False, True]
    assert set(found[-1].changes) == {"recompute", "micro_batch_tokens"}


def test_warnings_name_the_rank_and_the_batch(adapter):
    count = adapter.num_parameters

    def warned(**changes):
        facts = {"supervised": count, "batch_size": 32, "rank_that_holds": None}
        return warnings(adapter, **{**facts, **changes})

    assert warned() == []
    (text,) = warned(supervised=count + 1, rank_that_holds=16)
    assert f"{count:,} parameters" in text
    assert "--rank 16" in text
    (text,) = warned(batch_size=33)
    assert "--batch-size 33" in text


def test_known_gpus():
    assert known_gpu("24GB").memory == 24 * 2**30
    assert known_gpu("24GB").rates is None
    assert known_gpu("rtx-4090").name == "RTX 4090"
    assert known_gpu("NVIDIA H200").rates.measured is False
    for name in KNOWN_GPUS:
        assert known_gpu(name).name == name
    for wrong in ("A100", "", "0GB", "TPU"):
        with pytest.raises(InputError, match="Known: RTX 3060"):
            known_gpu(wrong)


def test_a_model_without_blocks_is_refused():
    class Config:
        def get_text_config(self):
            return self

    model = torch.nn.Linear(2, 2)
    model.config = Config()
    with pytest.raises(BaseError, match="no list of blocks"):
        model_shape(model, "odd")


def test_rates_survive_their_file(tmp_path, monkeypatch):
    from lorakit.evaluate import estimate_machine

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    made = []

    def fake(dtype, device):
        made.append(dtype)
        return dataclasses.replace(RATES, name=f"measured {len(made)}")

    monkeypatch.setattr(estimate_machine, "calibrate", fake)
    cpu = torch.device("cpu")
    first, now = estimate_machine.measured_rates(torch.float32, cpu)
    assert now
    assert isinstance(first, Rates)
    assert estimate_machine.measured_rates(torch.float32, cpu) == (first, False)
    assert estimate_machine.measured_rates(torch.bfloat16, cpu)[1]
    assert estimate_machine.measured_rates(torch.float32, cpu, fresh=True)[0].name == "measured 3"
    (path,) = (p for p in (tmp_path / "rates").iterdir() if "measured 3" in p.read_text())
    path.write_text("{")
    assert estimate_machine.measured_rates(torch.float32, cpu)[1]
