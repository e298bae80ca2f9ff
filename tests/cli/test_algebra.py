"""``lorakit combine`` and ``lorakit compress``: files in, files and numbers out."""

from __future__ import annotations

import json

import pytest
import torch

from lorakit.cli.compress import allowance, number_of_parameters
from lorakit.cli.main import main
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from lorakit.core.spec import LoRASpec
from lorakit.formats import load_adapter, save_adapter

PATHS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "up_proj")]


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a", "b")):
        random = torch.Generator().manual_seed(number)
        sites = {
            path: LowRank(
                torch.randn(4, 7, generator=random), torch.randn(6, 4, generator=random), 2.0
            )
            for path in PATHS
        }
        spec = LoRASpec(rank=4, alpha=8, targets=("q_proj", "up_proj"))
        save_adapter(Adapter(sites, spec), tmp_path / name)
    return tmp_path


def dense(path, site):
    site = load_adapter(path).sites[site]
    return site.scaling * site.B.double() @ site.A.double()


def test_combine_is_the_weighted_sum(folder, capfd):
    a, b, out = (str(folder / name) for name in ("a", "b", "mix"))
    given = [f"{a}=0.7", f"{b}=-0.3", "--json", "--out"]
    assert main(["combine", *given, out, "--dtype", "exact"]) == 0
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    for path in PATHS:
        expected = 0.7 * dense(a, path) - 0.3 * dense(b, path)
        assert (dense(out, path) - expected).norm() <= 1e-10 * expected.norm()
    assert (found["method"], found["relative_error"], found["ranks"]) == ("linear", 0.0, [8])
    assert [(one["name"], one["weight"]) for one in found["adapters"]] == [("a", 0.7), ("b", -0.3)]
    assert found["dtypes"] == ["float32", "float64"]
    assert "float64 holds the sum exactly" in printed.err
    assert main(["combine", *given, out + "32"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["dtypes"] == ["float32"]
    assert 0 < found["relative_error"] < 2**-23
    assert main(["combine", a, f"{b}=-0.5", "--json", "--out", out + "twos"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["dtypes"], found["relative_error"]) == (["float32"], 0.0)


def test_a_rounded_sum_says_so_and_what_rounds_nothing(folder, capfd):
    given = [f"{folder / 'a'}=0.7", str(folder / "b"), "--out", str(folder / "mix")]
    assert main(["combine", *given]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert ", rank 8, " in lines[0]
    assert "rounded to float32 by" in lines[0]
    assert "--dtype exact" in lines[0]
    assert [line.split()[:2] for line in lines[2:]] == [["q_proj", "2"], ["up_proj", "2"]]


def test_combine_with_a_rank_shows_what_is_lost(folder, capfd):
    given = [str(folder / "a"), str(folder / "b"), "--out", str(folder / "mix")]
    assert main(["combine", *given, "--rank", "3", "--layers"]) == 0
    printed = capfd.readouterr()
    assert "8 → 3" in printed.out
    assert all(path in printed.out for path in PATHS)
    assert "of the change is lost to the rank" in printed.out
    assert "1·a + 1·b" in printed.err
    assert main(["combine", *given, "--method", "ties", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["density"] == 0.2
    assert all(0 < one["relative_error"] < 1 for one in found["sites"].values())


@pytest.mark.parametrize(
    ("size", "ranks"),
    [(["--rank", "2"], {2}), (["--energy", "1"], {4}), (["--parameters", "104"], None)],
)
def test_compress(folder, capfd, size, ranks):
    out = str(folder / "small")
    assert main(["compress", str(folder / "a"), *size, "--out", out, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    smaller = load_adapter(out)
    assert found["parameters_left"] == smaller.num_parameters
    assert found["parameters_before"] == 4 * 4 * 13
    if ranks is not None:
        assert {site.rank for site in smaller.low_rank.values()} == ranks
    else:
        assert smaller.num_parameters == 104
    for path, site in smaller.low_rank.items():
        whole = dense(folder / "a", path)
        error = float((whole - dense(out, path)).norm() / whole.norm())
        assert found["sites"][path]["relative_error"] == pytest.approx(error, rel=1e-4, abs=1e-9)
        assert found["sites"][path]["rank"] == site.rank
    assert main(["compress", str(folder / "a"), *size, "--out", out]) == 0
    printed = capfd.readouterr().out
    assert "parameters" in printed.splitlines()[0]
    assert "up_proj" in printed
    assert "model.layers.1" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "A", "--out", "O"], "is required"),
        (["compress", "A", "--rank", "2", "--energy", "0.5", "--out", "O"], "not allowed with"),
        (["compress", "A", "--rank", "0", "--out", "O"], "at least 1"),
        (["compress", "A", "--parameters", "many", "--out", "O"], "such as 200k"),
        (["compress", "A", "--parameters", "3", "--out", "O"], "the adapter has 13 already"),
        (["compress", "A", "--rank", "2", "--base", "x", "--out", "O"], "only with --until-loss"),
        (["compress", "A", "--until-loss", "+1%", "--out", "O"], "give --base and --data"),
        (["compress", "A", "--until-loss", "little", "--out", "O"], "such as +1%"),
        (["combine", "A=0", "--out", "O"], "every weight is 0"),
        (["combine", "A=x", "--out", "O"], "the weight is 'x'"),
        (["combine", "A", "A", "--out", "O"], "have this name"),
        (["combine", "A", "--density", "0.5", "--out", "O"], "method 'linear' does not use"),
        (["combine", "missing", "--out", "O"], "does not exist"),
    ],
)
def test_wrong_input_exits_with_two(folder, capfd, arguments, message):
    given = [one.replace("A", str(folder / "a"), 1) if one[0] == "A" else one for one in arguments]
    given = [str(folder / "out") if one == "O" else one for one in given]
    assert main(given) == 2
    printed = capfd.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (folder / "out").exists()


def test_sizes_as_written():
    assert [number_of_parameters(t) for t in ("200000", "200k", "1.5M", "2B")] == [
        200_000,
        200_000,
        1_500_000,
        2_000_000_000,
    ]
    assert [allowance(t) for t in ("+1%", "2.5%", "+0.02")] == [
        (0.01, True),
        (0.025, True),
        (0.02, False),
    ]
