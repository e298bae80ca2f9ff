"""All weights of a base: against a plain loop, saved, resumed, and refused where it cannot be."""

from __future__ import annotations

import copy
import json
import signal

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit.bases import load_base
from lorakit.bases.identity import check_base
from lorakit.core.spec import LoRASpec
from lorakit.data import indices_at, pack
from lorakit.errors import BaseError, Interrupted, SpecError, TrainingError
from lorakit.infer import PackedModel
from lorakit.layers import attach
from lorakit.train import Trainer, TrainSettings, train_together
from lorakit.train.checkpoint import best_path, latest_checkpoint, list_checkpoints
from lorakit.train.distributed import World
from lorakit.train.full import Full, TrainedBase, _each_alone
from lorakit.train.job import Job
from lorakit.train.settings import Facts
from tests.train import tiny
from tests.train.conftest import open_shop
from tests.train.test_resume import Signal

#: relative; float64 throughout
TOLERANCE = 1e-9
PLAIN = {"validation_fraction": 0.0, "eval_every": None, "warmup": 0, "clip": 0.5}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(shop, request, monkeypatch):
    """In float64 throughout: transformers' norm would fall to float32."""

    def forward(self, x):
        return (
            self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    found = load_base(str(shop.base_folder), device="cpu", dtype="float64")
    if request.param:
        found.model.config.tie_word_embeddings = True
        found.model.tie_weights()
    return found


def plain_gradient(model, examples, *, backward=True):
    """Of the mean loss over all supervised tokens; each example alone, nothing packed."""
    count, total = sum(int(e.supervised[1:].sum()) for e in examples), 0.0
    for example in examples:
        ids = torch.tensor(example.ids.tolist())
        wanted = torch.tensor(example.supervised.tolist())[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1][wanted]
        loss = F.cross_entropy(logits, ids[1:][wanted], reduction="sum") / count
        if backward:
            loss.backward()
        total += loss.item()
    return total


def examples_of(data, size, step):
    return [data[int(i)] for i in indices_at(len(data), 0, step * size, size)]


def difference(mine, theirs):
    mine, theirs = dict(mine), dict(theirs)
    assert mine.keys() == theirs.keys()
    with torch.no_grad():
        return max(float((t - theirs[n]).norm() / theirs[n].norm()) for n, t in mine.items())


@pytest.mark.parametrize(("micro", "recompute"), [(1, "none"), (4, "layers"), (8, "none")])
def test_gradients_are_those_of_a_plain_loop(shop, base, micro, recompute):
    data = shop.data(base)
    reference = copy.deepcopy(base.model)
    settings = TrainSettings(steps=5, batch_size=8, micro_batch=micro, lr=1e-3, warmup=0)
    trained = TrainedBase(base.model)
    job = Job(trained, data, range(len(data)), settings)
    packed = PackedModel(base.model, recompute=recompute)
    window = job.window()
    assert len(window.parts) == 8 // micro
    for part in window.parts:
        batch = pack(part)
        loss, _ = packed.supervised_loss(batch)
        (loss / window.num_supervised).backward()
    gradient = job.collect_gradient()
    plain_gradient(reference, window.examples)
    expected = torch.cat([p.grad.reshape(-1) for p in reference.parameters()])
    assert expected.numel() == job.num_parameters
    assert (gradient - expected).norm() <= TOLERANCE * expected.norm()
    for (name, theirs), (begin, end) in zip(
        reference.named_parameters(), trained._spans.values(), strict=True
    ):
        mine = gradient[begin:end].view(theirs.shape)
        assert (mine - theirs.grad).norm() <= TOLERANCE * theirs.grad.norm(), name


@pytest.mark.parametrize("micro", [1, 4])
def test_weights_after_five_steps_are_those_of_a_plain_loop(shop, base, micro):
    data = shop.data(base)
    reference = copy.deepcopy(base.model)
    options = {"steps": 5, "batch_size": 8, "lr": 1e-2, "weight_decay": 0.1, **PLAIN}
    result = shop.trainer(what=Full(), base=base, data=data, micro_batch=micro, **options).run()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 5)
        optimizer.zero_grad()
        loss = plain_gradient(reference, examples_of(data, 8, step))
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
    assert difference(base.model.named_parameters(), reference.named_parameters()) <= TOLERANCE
    assert result.last_loss == pytest.approx(loss, rel=TOLERANCE)
    # and so says the file, which transformers reads
    saved = transformers.AutoModelForCausalLM.from_pretrained(result.model, dtype="auto")
    assert difference(saved.named_parameters(), reference.named_parameters()) <= TOLERANCE
    tied = base.model.config.tie_word_embeddings
    assert saved.config.tie_word_embeddings == tied
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) == tied


def test_everything_moves_and_rates_can_differ(shop):
    base = shop.base()
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    pattern = {"norm": 2.0, "embed_tokens": 1e-30}
    shop.trainer(what=Full(), base=base, steps=3, lr_pattern=pattern).run()
    after = dict(base.model.named_parameters())
    same = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert same == ["model.embed_tokens.weight"]
    assert not any(p.requires_grad and p.grad is not None for p in after.values())
    with pytest.raises(SpecError, match=r"'lm_tail' matches no module"):
        shop.trainer("b", what=Full(), lr_pattern={"lm_tail": 2.0}).run()
    with pytest.raises(SpecError, match="lora_plus_ratio needs an adapter's B"):
        shop.trainer("c", what=Full(), lora_plus_ratio=4.0).run()


# --- the run folder -------------------------------------------------------------------------------


def weights(folder):
    return {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_and_its_resume(shop, dtype):
    """An interrupted one gives the same bytes; of a bfloat16 base a float32 copy is trained."""

    def trainer(out, **options):
        base = load_base(str(shop.base_folder), device="cpu", dtype=dtype)
        made = shop.trainer(out, what=Full(), base=base, lr=1e-3, samples=1, **options)
        made._origin.base["dtype"] = dtype
        return made

    whole = trainer("whole")
    assert any("6,416 weights" in note for note in whole.notes)
    assert any(note.startswith("keep_checkpoints is 1") for note in whole.notes)
    assert any(note.startswith("on the disk: ") for note in whole.notes)
    result = whole.run()
    assert result.adapter is None
    assert result.best_loss < result.base_loss
    with pytest.raises(Interrupted):
        trainer("run", callbacks=[Signal(7, signal.SIGTERM)]).run()
    out = shop.out / "run"
    assert len(list_checkpoints(out / "checkpoints")) == 1
    assert (out / "model" / "config.json").is_file()
    Trainer.resume(out)
    assert weights(out / "model") == weights(result.model)
    expected = json.loads((shop.out / "whole" / "samples.jsonl").read_text())
    assert json.loads((out / "samples.jsonl").read_text()) == expected
    assert set(expected) == {"prompt", "reference", "base", "full"}
    again = Trainer.resume(out)  # it has ended
    assert (again.model, again.adapter) == (out / "model", None)

    saved = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert saved.dtype == getattr(torch, dtype)
    state = latest_checkpoint(out / "checkpoints")[0]
    flat = state.tensors["job.flat"]
    assert flat.dtype == torch.float32
    assert result.best_step == state.step
    found = torch.cat([p.detach().reshape(-1) for p in saved.parameters()])
    assert torch.equal(found, flat.to(saved.dtype))
    if dtype == "float32":  # evaluations run fused; they saw the weights that were trained
        data, held = whole.validation
        with torch.no_grad():
            loss = plain_gradient(saved, [data[i] for i in held], backward=False)
        assert loss == pytest.approx(result.best_loss, rel=1e-5)
    if dtype == "bfloat16":  # most steps are too small for its digits and must not be lost
        assert not torch.equal(found.float(), flat)
    page = (out / "report.html").read_text()
    assert "All weights of" in page
    assert "Trained model" in page
    assert "--full" in page
    (best,) = (out / "checkpoints").glob("best-*")
    assert best == best_path(out / "checkpoints", result.best_step)


def test_the_base_is_another_one_afterwards(shop):
    base = shop.base()
    stale = shop.trainer("stale", base=base)
    before = base.identity
    result = shop.trainer("full", what=Full(), base=base, steps=4).run()
    with pytest.raises(BaseError, match="changed in memory"):
        stale.run()
    assert base.identity != before
    tuned = load_base(str(result.model), device="cpu", dtype="float32")
    assert tuned.identity.samples == base.identity.samples
    adapter = shop.trainer("after", base=base, steps=2).run().adapter
    from lorakit.formats import load_adapter

    with pytest.raises(BaseError):
        check_base(load_adapter(adapter), before)
    # a run that ends before its first step leaves the base as it was
    again = shop.base()
    with pytest.raises(SpecError):
        shop.trainer("bad", what=Full(), base=again, lora_plus_ratio=2.0).run()
    assert again.identity == before


def test_the_best_is_kept_and_the_last_is_not(shop):
    """A rate that ruins it: the base itself was the best."""
    base = shop.base()
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    result = shop.trainer(what=Full(), base=base, lr=3.0, clip=0.0).run()
    assert result.best_step == 0
    saved = transformers.AutoModelForCausalLM.from_pretrained(result.model, dtype="auto")
    for model in (saved, base.model):
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_step_too_large_is_not_made(shop, monkeypatch):
    """No copy is made to go back to, so it is refused beforehand."""
    from lorakit.train import job

    monkeypatch.setattr(job, "rate_at", lambda step, *_: 1e300 if step == 3 else 1e-3)
    base = shop.base()
    with pytest.raises(TrainingError, match=r"in step 4: .* might not be finite"):
        shop.trainer(what=Full(), base=base).run()
    state = latest_checkpoint(shop.out / "run" / "checkpoints")[0]
    assert state.step == 3
    assert all(bool(tensor.isfinite().all()) for tensor in state.tensors.values())


def test_tensors_to_be_saved_share_nothing_but_are_no_copies(shop):
    base = shop.base()
    base.model.config.tie_word_embeddings = True
    base.model.tie_weights()
    job = Job(TrainedBase(base.model), shop.data(base), range(9), TrainSettings(steps=2, lr=1e-3))
    state = base.model.state_dict()
    alone = _each_alone(state)
    assert {n: t.data_ptr() for n, t in alone.items()} == {
        n: t.data_ptr() for n, t in state.items()
    }
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == 1
    storages = {t.untyped_storage().data_ptr() for t in alone.values()}
    assert len(storages) == len(state) - 1  # head and embedding are one
    assert job.num_parameters == sum(t.numel() for t in alone.values()) - alone[
        "lm_head.weight"
    ].numel()  # fmt: skip


# --- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused(shop):
    half = load_base(str(shop.base_folder), device="cpu", dtype="float16")
    with pytest.raises(BaseError, match=r"weights are float16.*--dtype bfloat16"):
        shop.trainer(what=Full(), base=half)
    attached = shop.base()
    attach(attached.model, LoRASpec(rank=2), "a")
    with pytest.raises(BaseError, match="adapters are attached"):
        shop.trainer(what=Full(), base=attached)
    twice = shop.base()
    twice.model.lm_head.weight = torch.nn.Parameter(twice.model.model.embed_tokens.weight.data)
    with pytest.raises(BaseError, match="share memory and are not one parameter"):
        shop.trainer(what=Full(), base=twice)
    with pytest.raises(SpecError, match="--shard spreads a frozen base"):
        shop.trainer(what=Full(), world=World(0, 2, sharded=True))


def test_packed_weights_are_refused(shop, tmp_path):
    pytest.importorskip("torchao")
    wide = open_shop(tiny.write_base(tmp_path / "wide", width=64), tmp_path)
    base = load_base(str(wide.base_folder), device="cpu", quantize="int8-torchao")
    with pytest.raises(BaseError, match=r"int8.*has no gradient"):
        wide.trainer(what=Full(), base=base)


@pytest.mark.parametrize("first", [True, False])
def test_it_is_trained_alone(shop, first):
    base = shop.base()
    data = shop.data(base)
    full = shop.trainer("full", what=Full(), base=base, data=data, steps=2)
    adapter = shop.trainer("adapter", base=base, data=data, steps=2)
    both = train_together([full, adapter] if first else [adapter, full])
    assert both[0].steps == 2
    assert isinstance(both[1], SpecError)
    assert "trains all weights of the base" in str(both[1])


def test_the_usual_rate_is_a_tenth_of_lora(shop):
    full, notes = TrainSettings(steps=9).resolve(Facts(600, 30, 576, full=True))
    lora, _ = TrainSettings(steps=9).resolve(Facts(600, 30, 576))
    assert full.lr == pytest.approx(lora.lr / 10, rel=0.05)
    assert (full.keep_checkpoints, lora.keep_checkpoints) == (1, 2)
    assert any("for all weights a tenth" in note for note in notes)
