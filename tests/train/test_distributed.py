"""Several processes give what one gives, wherever the base's weights are, and end together."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorakit.errors import SpecError
from lorakit.formats import load_adapter
from lorakit.layers import attach
from lorakit.train import Trainer, TrainSettings
from lorakit.train.checkpoint import list_checkpoints
from lorakit.train.distributed import World, _fresh
from lorakit.train.job import Job, shared
from lorakit.train.trained import TrainedAdapter
from tests.train import processes
from tests.train.conftest import SPEC, open_shop

#: sums of float64 in another order, through ten steps of AdamW at a rate of 1e-2
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def files(base_folder, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Base, data, and a folder with the run of one process in ``alone``."""
    shop = open_shop(base_folder, tmp_path_factory.mktemp("processes"))
    processes.trainer(shop.base_folder, shop.data_file, shop.out / "alone").run()
    return shop.base_folder, shop.data_file, shop.out


def numbers(out: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "lr", "tokens", "supervised", "best")
    return [{n: row[n] for n in names if n in row} for row in rows if row["kind"] == kind]


def assert_same_run(out: Path, expected: Path, tolerance: float = TOLERANCE) -> None:
    found, whole = load_adapter(out / "adapter"), load_adapter(expected / "adapter")
    assert found.sites.keys() == whole.sites.keys()
    for path, site in whole.sites.items():
        for name in ("A", "B"):
            mine, other = getattr(found.sites[path], name), getattr(site, name)
            assert mine.dtype == torch.float64
            assert (mine - other).norm() <= tolerance * other.norm(), path
    for kind in ("step", "eval"):
        mine, others = numbers(out, kind), numbers(expected, kind)
        assert len(mine) == len(others)
        assert len(mine) >= 3
        for row, other in zip(mine, others, strict=True):
            assert row == pytest.approx(other, rel=tolerance)
    samples = [folder / "samples.jsonl" for folder in (out, expected)]
    assert len({path.read_text() if path.exists() else None for path in samples}) == 1
    assert not list(out.rglob("*.tmp"))


def test_two_processes_give_what_one_gives(files):
    """Replicated, and with the base in shards, of which each process holds half."""
    base, data, folder = files
    found = processes.together(processes.both_ways, base, data, folder)
    for rank in (0, 1):
        assert isinstance(found[rank], dict), found[rank]
        assert found[rank]["steps"] == 10
    assert found[0]["last_loss"] == found[1]["last_loss"]
    assert_same_run(folder / "replicated", folder / "alone")
    assert_same_run(folder / "sharded", folder / "alone")

    whole, local = found[0]["whole"], [each["local"] for each in found]
    linears = {n for n, shape in whole.items() if ".layers." in n and len(shape) == 2}
    assert len(linears) == 14
    assert local[0].keys() == local[1].keys() == linears
    for name in linears:
        assert local[0][name][0] + local[1][name][0] == whole[name][0]
    sizes = {n: 8 * torch.Size(shape).numel() for n, shape in whole.items()}
    apart = sum(sizes[n] for n in linears)
    # what is stored, not what a view shows; half of the layers' weights is really gone
    assert found[0]["bytes"] == sum(sizes.values()) - apart // 2
    assert found[0]["still_there"] == 0, "something holds the weights as they were"
    assert any("2 processes share each batch of 5" in note for note in found[0]["notes"])


def test_a_stop_of_one_stops_all_and_another_number_of_processes_goes_on(files):
    base, data, folder = files
    out = folder / "stopped"
    found = processes.together(processes.stopped, base, data, out, 1, 5)
    assert all(str(each).startswith("Interrupted: stopped by") for each in found), found
    assert all("after step 5 of 10" in each for each in found)
    assert list_checkpoints(out / "checkpoints")[-1].name == "step-00000005.safetensors"
    Trainer.resume(out)
    assert_same_run(out, folder / "alone")


def test_when_one_fails_the_others_end_and_the_state_is_saved(files):
    base, data, folder = files
    out = folder / "failed"
    first, second = processes.together(processes.one_fails, base, data, out, 1)
    assert second == "TrainingError: this process cannot go on"
    assert first.startswith("PeerLost: another process of this run has ended"), first
    assert list_checkpoints(out / "checkpoints")[-1].name == "step-00000004.safetensors"
    Trainer.resume(out)
    assert_same_run(out, folder / "alone")


def test_an_error_of_the_first_is_raised_by_all_and_said_once():
    found = processes.together(processes.asked_for_something_wrong)
    assert found == [("it is wrong", False), ("it is wrong", True)]


def test_each_start_has_a_part_of_the_store_that_no_earlier_one_used():
    """torchrun's agent keeps the store, where addresses of dead processes lie."""
    store = torch.distributed.HashStore()
    store.set("lorakit/asked/1", "one that died before it was heard")
    for start in range(3):
        with ThreadPoolExecutor() as threads:
            found = list(threads.map(lambda rank: _fresh(store, rank, 3), range(3)))
        assert not any(part.check(["address"]) for part in found)
        found[0].set("address", str(start))
        assert [part.get("address") for part in found] == [str(start).encode()] * 3


def test_shares_are_balanced_and_complete():
    lengths = [9, 1, 7, 3, 3, 5, 2]
    for size in (1, 2, 3, 7, 9):
        shares = shared(lengths, size)
        assert len(shares) == size
        assert sorted(i for share in shares for i in share) == list(range(7))
        assert all(share == sorted(share) for share in shares)
    assert [sum(lengths[i] for i in share) for share in shared(lengths, 2)] == [15, 15]


def test_windows_of_all_processes_make_the_batch_and_equally_many_forwards(shop):
    base = shop.base()
    data = shop.data(base)
    settings = TrainSettings(steps=10, batch_size=5, micro_batch_tokens=24, lr=1e-2, warmup=0)
    handle = attach(base.model, SPEC, "a", trainable=True)
    jobs = [
        Job(
            TrainedAdapter("a", handle),
            data,
            range(60),
            settings,
            world=World(rank, 3, sharded=True),
        )
        for rank in range(3)
    ]
    idle = 0
    for step in range(10):
        for job in jobs:
            job.step = step
        windows = [job.window() for job in jobs]
        found = sorted(e.id for window in windows for part in window.parts for e in part)
        assert found == sorted(example.id for example in windows[0].examples)
        assert len({len(window.parts) + window.idle for window in windows}) == 1
        assert len({(window.num_supervised, window.num_tokens) for window in windows}) == 1
        idle += sum(window.idle for window in windows)
        for job in jobs:
            assert max(map(size, job.window().parts)) <= size(job.largest_part())
    assert idle > 0


def size(part) -> int:
    return sum(len(example.ids) for example in part)


def test_what_cannot_act_is_refused(shop):
    with pytest.raises(SpecError, match="--shard spreads the base over processes, and there is"):
        shop.trainer(world=World(), shard=True)
    with pytest.raises(SpecError, match="batch_size is 3 and there are 4 processes"):
        shop.trainer(world=World(rank=1, size=4))
