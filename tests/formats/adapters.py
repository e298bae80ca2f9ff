"""Adapters drawn by Hypothesis, and what it means that two are equal."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank, Replace, Site
from lorakit.core.spec import LoRASpec

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = ("q_proj", "k_proj", "down_proj", "fc", "conv", "embed", "dense", "x", "Ä-1", "a+b")

numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)
scalings = st.one_of(
    st.sampled_from([1.0, 2.0, 0.5, 32 / 3, math.pi, 0.1, -1.5, 0.0, 4 / math.sqrt(6)]),
    st.floats(1e-6, 1e6),
)
json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
dtypes = st.sampled_from(DTYPES)
sizes = st.integers(1, 5)


def tensor(draw, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    dtype = draw(dtypes) if dtype is None else dtype
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def low_rank_sites(draw, *, biases: bool = False, magnitudes: bool = False) -> LowRank:
    kinds = ["linear", "conv"] if biases else ["linear", "conv", "embedding"]
    kind = draw(st.sampled_from(kinds))
    rank, d_in, d_out = draw(sizes), draw(sizes), draw(sizes)
    kernel: list[int] = []
    groups = 1
    if kind == "conv":
        kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        groups = draw(st.sampled_from([n for n in range(1, rank + 1) if rank % n == 0]))
    dtype = draw(dtypes)
    A = tensor(draw, rank, d_in, *kernel, dtype=dtype)
    B = tensor(draw, d_out, rank // groups, *(1 for _ in kernel), dtype=dtype)
    bias = tensor(draw, d_out) if biases and draw(st.booleans()) else None
    magnitude = tensor(draw, d_out) if magnitudes else None
    return LowRank(A, B, draw(scalings), kind, bias, magnitude)


@st.composite
def paths(draw, *, min_size: int = 1, max_size: int = 6) -> list[str]:
    """Module paths, none inside another."""
    block = st.tuples(
        st.sampled_from(["", "model.layers.", "h.", "encoder.blocks."]),
        st.integers(0, 11),
        st.sampled_from(["", "attn.", "mlp."]),
        st.sampled_from(NAMES),
    ).map(lambda t: f"{t[0]}{t[1]}.{t[2]}{t[3]}" if t[0] else t[3])
    found = draw(st.lists(block, min_size=min_size, max_size=max_size, unique=True))
    return [p for p in found if not any(p.startswith(o + ".") for o in found)]


@st.composite
def specs(draw) -> LoRASpec:
    patterns = st.dictionaries(st.sampled_from([*NAMES[:6], r"layers\.\d\..*", "^model.*"]), sizes)
    return LoRASpec(
        rank=draw(st.integers(1, 64)),
        alpha=draw(st.sampled_from([8, 32, 32.0, 0.3, 100 / 3])),
        targets=draw(
            st.sampled_from(["all-linear", "attention", r".*_proj", "q_proj", ("fc", "x"), NAMES])
        ),
        exclude=draw(st.sampled_from([(), ("lm_head",), (r".*\.0\..*",)])),
        layers=draw(st.sampled_from([None, "0-3", "2-", "1,4"])),
        rank_pattern=draw(patterns),
        alpha_pattern=draw(patterns),
        scaling=draw(st.sampled_from(["alpha/r", "alpha/sqrt(r)"])),
        dropout=draw(st.sampled_from([0.0, 0.05, 0.1])),
        bias=draw(st.sampled_from(["none", "lora", "all"])),
        train_modules=draw(st.sampled_from([(), ("head",), ("score", "norm")])),
        init=draw(st.sampled_from(["kaiming", "gaussian", "orthogonal"])),
        variant=draw(st.sampled_from(["lora", "dora"])),
    )


@st.composite
def identities(draw) -> BaseIdentity:
    return BaseIdentity(
        name=draw(st.text(min_size=1, max_size=10)),
        architecture=draw(st.sampled_from(["LlamaForCausalLM", "GPT2LMHeadModel"])),
        shapes={"model.embed_tokens.weight": (32, 16)},
        samples={"model.embed_tokens.weight": tuple(draw(st.lists(numbers, max_size=3)))},
        storage="bfloat16",
        revision=draw(st.sampled_from([None, "0123abc"])),
    )


@st.composite
def adapters(draw) -> Adapter:
    """Any adapter that the PEFT folder can hold."""
    biases, magnitudes = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    sites: dict[str, Site] = {
        path: draw(low_rank_sites(biases=biases, magnitudes=magnitudes)) for path in draw(paths())
    }
    for path in list(sites):
        if draw(st.integers(0, 3)) == 0:
            sites[f"{path}.bias"] = Replace({"": tensor(draw, 3)})
    if draw(st.booleans()):
        sites["norm.bias"] = Replace({"": tensor(draw, 2)})
    if draw(st.booleans()):
        sites["head"] = Replace({"dense.weight": tensor(draw, 2, 3), "dense.bias": tensor(draw, 2)})
    if draw(st.booleans()):
        sites["model.score"] = Replace({"weight": tensor(draw, 2, 3)})
    return Adapter(
        sites=sites,
        spec=draw(specs()),
        base=draw(st.none() | identities()),
        provenance=draw(st.dictionaries(st.text(max_size=6), json_data, max_size=3)),
        tokenizer_files=draw(
            st.dictionaries(
                st.sampled_from(
                    ["tokenizer.json", "vocab.txt", "additional_chat_templates/tool.jinja"]
                ),
                st.binary(max_size=20),
            )
        ),
        task_type=draw(st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"])),
    )


def assert_equal(first: Adapter, second: Adapter) -> None:
    """The same values to the last bit, and the same facts."""
    assert set(first.sites) == set(second.sites)
    for path, site in first.sites.items():
        other = second.sites[path]
        assert type(site) is type(other), path
        if isinstance(site, LowRank):
            assert (site.kind, site.scaling) == (other.kind, other.scaling), path
        assert set(site.tensors()) == set(other.tensors()), path
        for name, value in site.tensors().items():
            assert value.dtype == other.tensors()[name].dtype, f"{path} {name}"
            assert torch.equal(value, other.tensors()[name]), f"{path} {name}"
    assert first.spec == second.spec
    assert list(first.spec.rank_pattern) == list(second.spec.rank_pattern)
    assert first.base == second.base
    assert dict(first.provenance) == dict(second.provenance)
    assert dict(first.tokenizer_files) == dict(second.tokenizer_files)
    assert first.task_type == second.task_type
