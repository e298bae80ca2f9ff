"""Device and dtype for machines that are not here."""

from __future__ import annotations

import pytest
import torch

from lorakit.bases import choose_placement, placement
from lorakit.bases.placement import ProcessorFacts
from lorakit.errors import BaseError

BARE = frozenset({"fpu", "avx2"})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def pretend(**facts) -> None:
        monkeypatch.setattr(placement, "processor_facts", lambda: ProcessorFacts(**facts))

    return pretend


@pytest.mark.parametrize(
    ("facts", "device", "dtype", "words"),
    [
        (
            {"cpu_flags": BARE},
            "cpu",
            torch.float32,
            ["no GPU", "faster on this processor than bfloat16"],
        ),
        (
            {"cpu_flags": BARE | {"avx512_bf16"}},
            "cpu",
            torch.float32,
            ["faster on this processor than bfloat16"],
        ),
        (
            {"cpu_flags": BARE | {"avx512_bf16", "amx_bf16"}},
            "cpu",
            torch.float32,
            ["exact", "--dtype bfloat16"],
        ),
        ({"cpu_flags": frozenset({"asimd", "bf16"})}, "cpu", torch.float32, ["faster"]),
        ({}, "cpu", torch.float32, ["fast on every processor"]),
        ({"cuda": (("H200", True),)}, "cuda:0", torch.bfloat16, ["H200", "bfloat16"]),
        ({"cuda": (("T4", False),)}, "cuda:0", torch.float32, ["T4", "no bfloat16", "float16"]),
        ({"mps": True}, "mps", torch.float32, ["Apple"]),
        ({"mps": True, "cuda": (("A", True),)}, "cuda:0", torch.bfloat16, ["A computes"]),
    ],
)
def test_choices(machine, facts, device, dtype, words) -> None:
    machine(**facts)
    chosen = choose_placement()
    assert chosen.device == torch.device(device)
    assert chosen.dtype == dtype
    assert all(word in chosen.reason for word in words), chosen.reason
    assert "\n" not in chosen.reason
    assert not chosen.reason.endswith(".")


def test_what_is_asked_for_is_done(machine) -> None:
    machine(cuda=(("A", True), ("B", False)), mps=True, cpu_flags=BARE)
    assert choose_placement("cpu", "bf16").dtype == torch.bfloat16
    assert choose_placement("cuda").device == torch.device("cuda", 0)
    assert choose_placement("cuda:1").dtype == torch.float32  # the second card's own choice
    assert choose_placement(torch.device("mps"), torch.float16).dtype == torch.float16
    for name in ("float32", "fp32", "torch.float32"):
        assert choose_placement("cpu", name).dtype == torch.float32
    assert "asked for" in choose_placement("cpu", "float64").reason


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cuda", "auto", "no device cuda.*Here: cpu, mps"),
        ("gpu", "auto", "device is 'gpu'.*auto, cpu, cuda"),
        ("meta", "auto", "no device meta"),
        ("cpu", "int8", "dtype is 'int8'.*float32"),
        ("cpu", torch.int8, "dtype is torch.int8"),
        ("mps", "float64", "no float64"),
    ],
)
def test_what_cannot_be_done_raises(machine, device, dtype, message) -> None:
    machine(mps=True, cpu_flags=BARE)
    with pytest.raises(BaseError, match=message):
        choose_placement(device, dtype)


def test_a_card_that_is_not_there(machine) -> None:
    machine(cuda=(("A", True),))
    with pytest.raises(BaseError, match=r"no device cuda:1.*cuda:0 \(A\)"):
        choose_placement("cuda:1")


def test_this_machine() -> None:
    facts = placement.processor_facts()
    assert (len(facts.cuda) > 0) == torch.cuda.is_available()
    chosen = choose_placement("cpu")
    assert (
        torch.ones(2, 2, dtype=chosen.dtype, device=chosen.device) @ torch.ones(2, 2)
    ).sum() == 8


def test_flags_of_a_file(tmp_path, monkeypatch) -> None:
    x86 = tmp_path / "x86"
    x86.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16\n\nprocessor\t: 1\n")
    arm = tmp_path / "arm"
    arm.write_text("processor : 0\nFeatures : fp asimd bf16\n")
    real = placement.Path
    for file, expected in (
        (x86, {"fpu", "avx512_bf16", "amx_bf16"}),
        (arm, {"fp", "asimd", "bf16"}),
        (tmp_path / "none", set()),
    ):
        monkeypatch.setattr(placement, "Path", lambda name, file=file: real(file))
        assert placement._cpu_flags() == expected
