"""Memory that is full: the same adapter from smaller forwards, and clear words where none fits."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import load_file

from lorakit.bases import load_base
from lorakit.errors import BaseError, Interrupted, TrainingError
from lorakit.infer import PackedModel
from lorakit.tasks.causal import shortened
from lorakit.train import RunResult, Trainer, train_together
from lorakit.train.job import Job
from lorakit.train.loop import trial as trial_module
from lorakit.train.loop.forwards import tokens_of
from lorakit.train.loop.trial import Trial
from lorakit.train.room import PeakMemory, available_bytes, is_memory_error, num_tokens
from tests.train.test_resume import Signal

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
}


@pytest.fixture
def small(monkeypatch):
    """``small(n, error, where)``: from now on more than n tokens of one forward do not fit."""
    own = PackedModel.group_losses

    def limit(most: int, error: Exception, where: str = "forward"):
        seen: list[int] = []

        class Full(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, dy):
                raise error

        def group_losses(self, batch, *args, **kwargs):
            seen.append(batch.num_tokens)
            too_many = batch.num_tokens > most
            if too_many and where == "forward":
                raise error
            losses = own(self, batch, *args, **kwargs)
            return Full.apply(losses) if too_many else losses

        monkeypatch.setattr(PackedModel, "group_losses", group_losses)
        return seen

    return limit


def weights(trainer: Trainer):
    return load_file(trainer._folder.adapter / "adapter_model.safetensors")


def rows(trainer: Trainer):
    lines = trainer._folder.metrics.read_text().splitlines()
    return [json.loads(line) for line in lines]


def precise(shop):
    """In float64: AdamW divides by the gradient's size, and so blows up float32's rounding."""
    return load_base(str(shop.base_folder), device="cpu", dtype="float64")


def assert_same(mine, expected) -> None:
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((mine[name] - tensor).norm()) <= 1e-6 * float(tensor.norm()), name


@pytest.mark.parametrize(
    ("kind", "where", "optimizer"),
    [("cuda", "forward", "adamw"), ("cpu", "backward", "adamw"), ("cuda", "backward", "sgd")],
)
def test_a_full_memory_leaves_the_adapter_as_it_would_be(shop, small, kind, where, optimizer):
    options = {"batch_size": 6, "optimizer": optimizer}
    base = precise(shop) if optimizer == "adamw" else shop.base()
    free = shop.trainer("free", base=base, **options)
    free.run()
    seen = small(40, ERRORS[kind], where)
    full = shop.trainer("full", base=base, **options)
    result = full.run()
    assert result.steps == 12
    assert max(seen) > 40
    assert_same(weights(full), weights(free))
    assert torch.cat([t.flatten() for t in weights(free).values()]).norm() > 0.1
    notes = [r for r in rows(full) if r["kind"] == "note" and "micro_batch_tokens" in r]
    assert notes
    assert notes[-1]["micro_batch_tokens"] <= 40 or max(seen[-20:]) <= 40
    assert "with the same result" in notes[0]["text"]
    steps = [r for r in rows(full) if r["kind"] == "step"]
    same = [r for r in rows(free) if r["kind"] == "step"]
    assert [r["tokens"] for r in steps] == [r["tokens"] for r in same]  # the effective batch


def test_the_new_size_is_kept_by_a_resume(shop, small):
    seen = small(40, ERRORS["cuda"])
    trainer = shop.trainer("run", batch_size=6, callbacks=[Signal(6)])
    with pytest.raises(Interrupted):
        trainer.run()
    failed = sum(tokens > 40 for tokens in seen)
    assert failed
    Trainer.resume(trainer._folder.path)
    assert sum(tokens > 40 for tokens in seen) == failed  # nothing too large was tried again
    whole = shop.trainer("whole", batch_size=6)
    whole.run()
    mine, expected = weights(trainer), weights(whole)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


@pytest.mark.parametrize("most", [8, 14])
def test_one_example_that_does_not_fit_is_named(shop, small, most):
    """The very first already, or one in the middle of the run."""
    small(most, ERRORS["cuda"])
    trainer = shop.trainer("run", batch_size=6)
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    text = str(caught.value)
    assert ("Stopped in step" in text) is (most == 14)
    assert "data.jsonl line" in text
    for word in ("tokens", "--max-length", "--recompute", "--quantize", "CUDA out of memory"):
        assert word in text


def test_another_error_is_not_taken_for_a_full_memory(shop, small):
    small(40, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        shop.trainer("run", batch_size=6).run()
    assert is_memory_error(MemoryError())
    assert not is_memory_error(ValueError("out of memory"))


def test_the_largest_forward_is_tried_first_on_a_gpu(shop, small, monkeypatch):
    """And leaves no trace in the result."""
    plain = shop.trainer("plain", batch_size=6)
    plain.run()
    told = []

    def compare(self, shares):  # what a GPU does instead
        told.append(sum(num_tokens(share.examples) for share in shares))
        assert self._forwards.with_room(shares) is not None

    monkeypatch.setattr(Trial, "_compare_with_free", compare)
    seen = small(10**9, ERRORS["cuda"])
    tried = shop.trainer("tried", batch_size=6)
    tried.run()
    assert told[0] == max(seen)
    mine, expected = weights(tried), weights(plain)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


def test_a_cpu_run_is_cut_to_what_is_free_or_refused(shop, monkeypatch):
    """300 bytes a token, 1000 of them constant; the optimizer is still to take its own."""
    averages = 7_777
    monkeypatch.setattr(Job, "bytes_to_come", averages)
    free = shop.trainer("free", batch_size=6, base=precise(shop))
    free.run()

    def need(self, shares):
        return 1000 + 300 * sum(num_tokens(share.examples) for share in shares)

    monkeypatch.setattr(Trial, "_measured", need)
    room = {"bytes": int((1000 + 300 * 45) / 0.9) + 1}
    monkeypatch.setattr(trial_module, "available_bytes", lambda: room["bytes"] + averages)
    cut = shop.trainer("cut", batch_size=6, base=precise(shop))
    cut.run()
    (note,) = [r for r in rows(cut) if r["kind"] == "note" and "micro_batch_tokens" in r]
    assert note["micro_batch_tokens"] == 45
    assert_same(weights(cut), weights(free))
    room["bytes"] = int((1000 + 300 * 12) / 0.9)
    with pytest.raises(TrainingError, match=r"room for about 1[12] tokens.*--max-length"):
        shop.trainer("refused", batch_size=6).run()
    room["bytes"] = 10**9
    enough = shop.trainer("enough", batch_size=6)
    enough.run()
    assert not [r for r in rows(enough) if "micro_batch_tokens" in r]


def test_a_run_that_joins_is_not_tried_where_others_tell_that_it_fits_by_far(monkeypatch, shop):
    tried = []
    measured = Trial._compare_with_free
    monkeypatch.setattr(
        Trial, "_compare_with_free", lambda self, shares: tried.append(1) or measured(self, shares)
    )
    monkeypatch.setattr(Trial, "_measured", lambda _, shares: 1000 * tokens_of(shares))
    monkeypatch.setattr(trial_module, "_TELLING_TOKENS", 1)
    base = precise(shop)

    def entered(free: int, *names: str) -> int:
        monkeypatch.setattr(trial_module, "available_bytes", lambda: free)
        trainers = [shop.trainer(f"{free}-{name}", batch_size=6, base=base) for name in names]
        before = len(tried)
        assert all(isinstance(r, RunResult) for r in train_together(trainers))
        return len(tried) - before

    assert entered(10**12, "a", "b", "c") == 1
    assert entered(2 * 1000 * 2048, "a", "b") == 2  # it fits, but not by far
    assert entered(10**12, "d") == 1  # another loop knows nothing
    lengths: dict[int, int] = {}
    longer = property(lambda job: lengths.setdefault(id(job), 100 + len(lengths)))
    monkeypatch.setattr(Job, "longest", longer)
    assert entered(10**12, "e", "f", "g") == 3  # texts longer than those that were measured


def test_recomputing_changes_nothing(shop):
    """Neither in fused layers nor, where none fits, in the model's own."""
    kept = shop.trainer("kept")
    kept.run()
    for how in ("mlp", "layers"):
        again = shop.trainer(how, recompute=how)
        again.run()
        mine, expected = weights(again), weights(kept)
        assert all(torch.equal(mine[name], expected[name]) for name in expected)
    with pytest.raises(BaseError, match="CUDA GPU"):
        shop.trainer("offload", recompute="offload").run()


def test_recomputing_by_the_model_itself_is_said_and_undone(shop, monkeypatch):
    from lorakit.infer.fused.family import DoesNotFit

    kept = shop.trainer("kept")
    kept.run()

    def unknown(self, *_, **__):
        raise DoesNotFit("of an unknown kind")

    monkeypatch.setattr("lorakit.infer.packed.FusedBody.__init__", unknown)
    base = shop.base()
    again = shop.trainer("again", recompute="mlp", base=base)
    again.run()
    assert_close(weights(again), weights(kept))
    notes = " ".join(r["text"] for r in rows(again) if r["kind"] == "note") + " ".join(again.notes)
    assert "own gradient checkpointing is on" in notes
    assert not any(getattr(m, "gradient_checkpointing", False) for m in base.model.modules())


def assert_close(mine, expected) -> None:
    for name, tensor in expected.items():
        assert float((mine[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name


def test_what_is_free(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    assert available_bytes(tmp_path, tmp_path / "none") == 500 * 1024
    group = tmp_path / "group"
    group.mkdir()
    (group / "memory.max").write_text("400000\n")
    (group / "memory.current").write_text("300000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert available_bytes(tmp_path, group) == 150000
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path, group) == 500 * 1024
    assert available_bytes(tmp_path / "nothing", tmp_path / "none") is None


def test_the_peak_is_measured(shop):
    with PeakMemory() as memory:
        block = torch.ones(40 << 18)  # 40 MB
        time.sleep(0.1)  # a peak shorter than a look at it is missed
        del block
    assert memory.grown is not None
    assert 36 << 20 <= memory.grown <= 60 << 20
    data = shop.data(shop.base())
    part = [data[0], data[1]]
    cut = shortened(part, 0.5)
    assert [len(e.ids) for e in cut] == [round(len(e.ids) / 2) for e in part]
    assert all(0 < e.supervised.sum() <= len(e.ids) for e in cut)
