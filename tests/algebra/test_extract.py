"""Extraction against dense float64 singular value decompositions (Eckart & Young)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorakit.algebra.best_rank import Difference, decompose, factors_of, residual
from lorakit.algebra.extract import Choice, Place, Weight, extract_sites, pair_tensors
from lorakit.core.checkpoint import open_checkpoint
from lorakit.core.sites import Replace
from lorakit.errors import FormatError, InputError

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
#: module → (kind, transposed, groups, shape of the stored weight)
KINDS = {
    "linear": ("linear", False, 1, (6, 9)),
    "wide": ("linear", False, 1, (3, 11)),
    "conv1d_of_gpt2": ("linear", True, 1, (9, 6)),
    "embedding": ("embedding", False, 1, (13, 4)),
    "one": ("conv", False, 1, (5, 4, 3)),
    "two": ("conv", False, 1, (8, 3, 3, 2)),
    "three": ("conv", False, 1, (4, 2, 1, 2, 3)),
    "grouped": ("conv", False, 2, (6, 2, 3)),
}


def drawn(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tails(matrix):
    """√Σ σ² beyond each rank, by the singular values of the dense matrix."""
    values = torch.linalg.svdvals(matrix)
    return [math.sqrt(float(values[r:].square().sum())) for r in range(len(values) + 1)]


def dense(site, shape, groups=1):
    """What the site adds to a stored weight of this shape, from the table in ``core.sites``."""
    A, B = site.A.double(), site.B.double()
    if site.kind == "conv":
        rank = A.shape[0] // groups
        rows = B.shape[0] // groups
        full = torch.zeros(B.shape[0], *A.shape[1:], dtype=torch.float64)
        for g in range(groups):
            part = B[g * rows : (g + 1) * rows].flatten(1) @ A[g * rank : (g + 1) * rank].flatten(1)
            full[g * rows : (g + 1) * rows] = part.view(rows, *A.shape[1:])
        for g in range(groups):  # a group's weight has its own channels alone
            others = [c for c in range(A.shape[1]) if c // shape[1] != g]
            assert not full[g * rows : (g + 1) * rows, others].any()
        return torch.cat(
            [
                full[g * rows : (g + 1) * rows, g * shape[1] : (g + 1) * shape[1]]
                for g in range(groups)
            ]
        ) * site.scaling  # fmt: skip
    change = site.scaling * B @ A
    return change if tuple(change.shape) == tuple(shape) else change.T


def checkpoint(folder, tensors, *, shards=1):
    folder.mkdir(parents=True)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return open_checkpoint(folder)
    where = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[k::shards]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return open_checkpoint(folder)


def weight_of(name):
    kind, transposed, groups, _ = KINDS[name]
    path = f"{name}.weight"
    return Weight({path: (path,)}, {path: Place(name, kind, transposed, groups)})


# --- the decomposition -------------------------------------------------------------------------


@given(
    st.integers(1, 14), st.integers(1, 14), st.integers(0, 14),
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 9999),
)  # fmt: skip
def test_error_is_the_tail_of_the_singular_values(m, n, rank, first, second, seed):
    before, after = drawn((m, n), seed, first), drawn((m, n), seed + 1, second)
    change = after.double() - before.double()
    difference = Difference(before, after)
    spectrum = decompose(difference)
    rank = min(rank, spectrum.rank)
    left, right = factors_of(difference, spectrum, rank)
    best, size = tails(change)[rank], float(change.norm())
    error = float((change - left @ right.T).norm())
    assert error == pytest.approx(best, rel=1e-8, abs=1e-13 * size)
    assert math.sqrt(residual(difference, left, right)) == pytest.approx(error, abs=1e-13 * size)
    assert spectrum.tail(rank) == pytest.approx(best, rel=1e-8, abs=1e-13 * size)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=0), rtol=1e-9)  # balanced


@given(st.integers(2, 14), st.integers(2, 14), st.integers(0, 14), st.integers(0, 9999))
def test_squared_way_for_large_weights(m, n, rank, seed):
    """Of ill-conditioned differences too: its error is above the best by √(r·eps)·‖D‖ at most."""
    scale = torch.logspace(0, -6, n, dtype=torch.float64)
    before, after = drawn((m, n), seed) * scale, drawn((m, n), seed + 1) * scale
    difference = Difference(before, after)
    spectrum = decompose(difference, dense=0)
    left, right = factors_of(difference, spectrum, min(rank, spectrum.rank))
    change = after - before
    error = float((change - left @ right.T).norm())
    best = tails(change)[left.shape[1]]
    allowed = math.sqrt(14 * torch.finfo(torch.float64).eps) * float(change.norm())
    assert best * (1 - 1e-9) <= error <= best + allowed
    if best > 1e-3 * float(change.norm()):
        assert error == pytest.approx(best, rel=1e-8)
    full = factors_of(difference, spectrum, spectrum.rank)
    assert float((change - full[0] @ full[1].T).norm()) <= allowed


def test_blocks_of_rows_give_the_same(monkeypatch):
    before, after = drawn((9, 5), 0), drawn((9, 5), 1)
    whole = decompose(Difference(before, after), dense=0)
    monkeypatch.setattr("lorakit.algebra.best_rank._BLOCK", 10)
    parts = Difference(before, after)
    assert [len(block) for block in parts.blocks()] == [2, 2, 2, 2, 1]
    again = decompose(parts, dense=0)
    assert torch.allclose(whole.squares, again.squares, rtol=1e-12)
    long, short = factors_of(parts, again, 5)
    assert torch.allclose(long @ short.T, after - before, atol=1e-12)


# --- sites from files --------------------------------------------------------------------------


@settings(max_examples=40)  # each writes two files
@given(
    st.sampled_from(sorted(KINDS)), st.integers(1, 8), st.sampled_from(DTYPES),
    st.sampled_from(DTYPES), st.sampled_from([0, 1 << 20]), st.integers(0, 9999),
)  # fmt: skip
def test_every_kind_is_the_best_of_its_rank(tmp_path_factory, name, rank, one, other, way, seed):
    kind, _, groups, shape = KINDS[name]
    before, after = drawn(shape, seed, one), drawn(shape, seed + 1, other)
    folder = tmp_path_factory.mktemp("case")
    base = checkpoint(folder / "b", {f"{name}.weight": before})
    tuned = checkpoint(folder / "t", {f"{name}.weight": after})
    if rank < groups:
        return
    found = extract_sites(
        base,
        tuned,
        pair_tensors(base, tuned, [weight_of(name)]),
        Choice(rank),
        dtype=torch.float64,
        dense=way,
    )
    site, said = found.sites[name], found.errors[name]
    assert (site.kind, site.problems()) == (kind, [])
    change = after.double() - before.double()
    parts = change.chunk(groups)
    best = math.hypot(
        *(tails(p.flatten(1))[min(rank // groups, min(p.flatten(1).shape))] for p in parts)
    )
    size = float(change.norm())
    error = float((change - dense(site, shape, groups)).norm())
    assert error == pytest.approx(best, rel=1e-8, abs=2e-8 * size if way == 0 else 1e-13 * size)
    assert said.error * size == pytest.approx(error, rel=1e-8, abs=1e-12 * size)
    assert said.best * size == pytest.approx(best, rel=1e-8, abs=2e-8 * size)
    assert (said.rank, said.norm) == (site.rank, pytest.approx(size, rel=1e-12))


@settings(max_examples=40)  # each writes two files
@given(st.floats(0.01, 1.0), st.integers(0, 9999))
def test_energy_takes_the_smallest_rank(tmp_path_factory, energy, seed):
    folder = tmp_path_factory.mktemp("case")
    before, after = drawn((6, 9), seed), drawn((6, 9), seed + 1)
    base = checkpoint(folder / "b", {"linear.weight": before})
    tuned = checkpoint(folder / "t", {"linear.weight": after})
    pairs = pair_tensors(base, tuned, [weight_of("linear")])
    found = extract_sites(base, tuned, pairs, Choice(energy=energy))
    values = torch.linalg.svdvals(after - before).square()
    shares = (values.cumsum(0) / values.sum()).tolist()
    wanted = next(r for r, share in enumerate(shares, 1) if share >= energy * (1 - 1e-12))
    assert found.sites["linear"].rank == wanted


def test_narrow_factors_report_their_own_error(tmp_path):
    before, after = drawn((6, 9), 0), drawn((6, 9), 1)
    base = checkpoint(tmp_path / "b", {"linear.weight": before})
    tuned = checkpoint(tmp_path / "t", {"linear.weight": after})
    pairs = pair_tensors(base, tuned, [weight_of("linear")])
    found = extract_sites(base, tuned, pairs, Choice("full"), dtype=torch.bfloat16)
    error = float((after - before - dense(found.sites["linear"], (6, 9))).norm())
    said = found.errors["linear"]
    assert said.best == 0.0
    assert 1e-4 < said.error < 1e-2
    assert said.error == pytest.approx(error / float((after - before).norm()), rel=1e-9)


def test_a_change_of_low_rank_gets_no_more(tmp_path):
    before = drawn((6, 9), 0)
    after = before + drawn((6, 2), 1) @ drawn((2, 9), 2)
    base = checkpoint(tmp_path / "b", {"linear.weight": before})
    tuned = checkpoint(tmp_path / "t", {"linear.weight": after})
    pairs = pair_tensors(base, tuned, [weight_of("linear")])
    assert extract_sites(base, tuned, pairs, Choice(5)).sites["linear"].rank == 2


def test_shards_and_dtypes_may_differ(tmp_path):
    names = ("linear", "embedding", "two")
    before = {f"{n}.weight": drawn(KINDS[n][3], k, torch.bfloat16) for k, n in enumerate(names)}
    after = {n: t.float() + 0.1 * drawn(t.shape, 9, torch.float32) for n, t in before.items()}
    base = checkpoint(tmp_path / "b", before, shards=3)
    tuned = checkpoint(tmp_path / "t", after, shards=2)
    pairs = pair_tensors(base, tuned, [weight_of(n) for n in names])
    found = extract_sites(base, tuned, pairs, Choice("full"), dtype=torch.float64)
    for name in names:
        key = f"{name}.weight"
        change = after[key].double() - before[key].double()
        assert torch.allclose(dense(found.sites[name], change.shape), change, atol=1e-14)


def test_tied_weights_share_one_decomposition(tmp_path):
    """Two modules of one tensor: each gets the change in its own layout; it counts once."""
    before, after = drawn((13, 4), 0), drawn((13, 4), 1)
    base = checkpoint(tmp_path / "b", {"embedding.weight": before})
    tuned = checkpoint(tmp_path / "t", {"embedding.weight": after})
    both = ("embedding.weight",)
    weight = Weight(
        {"embedding.weight": both, "head.weight": both},
        {
            "embedding.weight": Place("embedding", "embedding"),
            "head.weight": Place("head", "linear"),
        },
    )
    found = extract_sites(base, tuned, pair_tensors(base, tuned, [weight]), Choice(2))
    table, head = found.sites["embedding"], found.sites["head"]
    assert torch.equal(table.A, head.B.T)
    assert torch.equal(table.B, head.A.T)
    assert found.change == pytest.approx(float((after - before).norm()), rel=1e-12)
    assert found.error == pytest.approx(found.errors["head"].error, rel=1e-12)


# --- what does not fit -------------------------------------------------------------------------


def pairs_of(tmp_path, before, after, names=("linear",)):
    base, tuned = checkpoint(tmp_path / "b", before), checkpoint(tmp_path / "t", after)
    return base, tuned, pair_tensors(base, tuned, [weight_of(n) for n in names])


def test_every_misfit_is_listed(tmp_path):
    before = {
        "linear.weight": drawn((6, 9), 0),
        "embedding.weight": drawn((13, 4), 0),
        "gone": drawn((3,), 0),
        "wide.weight": torch.ones(3, 11, dtype=torch.uint8),
    }
    after = {
        "linear.weight": drawn((6, 8), 0),
        "embedding.weight": drawn((15, 4), 0),
        "new": drawn((3,), 0),
        "wide.weight": torch.ones(3, 11),
    }
    with pytest.raises(FormatError) as error:
        pairs_of(tmp_path, before, after, ("linear", "embedding", "wide"))
    text = str(error.value)
    assert "linear.weight: (6, 9) in the base, (6, 8) tuned" in text
    assert "embedding.weight: (13, 4) in the base, (15, 4) tuned; its number of rows" in text
    assert "gone (3,): in the base, missing in the tuned checkpoint" in text
    assert "new (3,): in the tuned checkpoint, not in the base" in text
    assert "wide.weight: stored as torch.uint8 in the base, so it is quantised" in text
    assert "resize_token_embeddings" in text


def test_nan_and_inf_are_named(tmp_path):
    broken = drawn((6, 9), 1)
    broken[2, 3] = math.nan
    endless = drawn((5,), 1)
    endless[0] = math.inf
    before = {"linear.weight": drawn((6, 9), 0), "norm.weight": drawn((5,), 0)}
    base, tuned, pairs = pairs_of(
        tmp_path, before, {"linear.weight": broken, "norm.weight": endless}
    )
    with pytest.raises(FormatError, match=r"NaN(.|\n)*linear\.weight(.|\n)*norm\.weight"):
        extract_sites(base, tuned, pairs, Choice(2))


def test_equal_checkpoints_are_refused(tmp_path):
    same = {"linear.weight": drawn((6, 9), 0)}
    base, tuned, pairs = pairs_of(tmp_path, same, same)
    with pytest.raises(FormatError, match="hold the same 1 tensors"):
        extract_sites(base, tuned, pairs, Choice(2))


def test_remainder(tmp_path):
    before = {
        "linear.weight": drawn((6, 9), 0),
        "linear.bias": drawn((6,), 0),
        "norm.weight": drawn((5,), 0),
        "norm.bias": drawn((5,), 1),
        "token": drawn((2, 2), 0),
        "same.weight": drawn((4,), 0),
    }
    after = {n: t + 0.5 for n, t in before.items()}
    after["same.weight"] = before["same.weight"]
    after["norm.bias"] = before["norm.bias"]
    base, tuned, pairs = pairs_of(tmp_path, before, after)
    report = extract_sites(base, tuned, pairs, Choice("full"), dtype=torch.float64)
    assert set(report.sites) == {"linear"}
    assert set(report.remainder) == {"linear.bias", "norm.weight", "token"}
    assert report.unchanged == 2
    assert report.remainder["token"].norm == pytest.approx(1.0)
    lacking = 0.5 * math.sqrt(6 + 5 + 4)
    assert report.lacking == pytest.approx(lacking)
    assert report.error == pytest.approx(lacking / (0.5 * math.sqrt(54 + 6 + 5 + 4)))

    kept = extract_sites(base, tuned, pairs, Choice("full"), dtype=torch.float64, remainder="keep")
    whole = {p: s.tensors() for p, s in kept.sites.items() if isinstance(s, Replace)}
    assert set(whole) == {"linear.bias", "norm", "token"}
    assert set(whole["norm"]) == {"weight", "bias"}
    assert torch.equal(whole["linear.bias"][""], after["linear.bias"])
    assert torch.equal(whole["norm"]["weight"], after["norm.weight"])
    assert torch.equal(whole["token"][""], after["token"])
    assert kept.error < 1e-13

    with pytest.raises(InputError, match=r"linear\.bias(.|\n)*norm\.weight(.|\n)*token"):
        extract_sites(base, tuned, pairs, Choice("full"), remainder="refuse")


def test_numbers_that_are_not_floats(tmp_path):
    before = {"linear.weight": drawn((6, 9), 0), "steps": torch.tensor([1])}
    after = {"linear.weight": drawn((6, 9), 1), "steps": torch.tensor([2])}
    base, tuned, pairs = pairs_of(tmp_path, before, after)
    found = extract_sites(base, tuned, pairs, Choice(2))
    assert found.remainder["steps"].norm is None
    with pytest.raises(InputError, match="floats alone"):
        extract_sites(base, tuned, pairs, Choice(2), remainder="keep")


def test_only_norms_changed(tmp_path):
    before = {"linear.weight": drawn((6, 9), 0), "norm.weight": drawn((5,), 0)}
    after = before | {"norm.weight": drawn((5,), 1)}
    base, tuned, pairs = pairs_of(tmp_path, before, after)
    with pytest.raises(InputError, match=r"only these did(.|\n)*norm\.weight"):
        extract_sites(base, tuned, pairs, Choice(2))
    assert set(extract_sites(base, tuned, pairs, Choice(2), remainder="keep").sites) == {"norm"}


def test_too_small_a_rank_for_the_groups_is_remainder(tmp_path):
    before, after = ({"grouped.weight": drawn((6, 2, 3), k)} for k in (0, 1))
    base, tuned, pairs = pairs_of(tmp_path, before, after, ("grouped",))
    with pytest.raises(InputError, match=r"grouped\.weight"):
        extract_sites(base, tuned, pairs, Choice(1))


@pytest.mark.parametrize(
    "choice",
    [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"rank": True}, {"rank": "all"}, {"energy": 0.0},
     {"energy": 1.5}, {"energy": math.nan}],
)  # fmt: skip
def test_impossible_sizes(choice):
    with pytest.raises(InputError, match=r"rank|energy"):
        Choice(**choice)
