"""What belongs to one adapter: order, accumulation, clipping, optimizer steps, dropout keys."""

from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from lorakit.core.spec import LoRASpec
from lorakit.data import pack
from lorakit.infer import PackedModel
from lorakit.layers import attach
from lorakit.tasks.causal import routing_of
from lorakit.train.job import Job
from lorakit.train.mode import training_mode
from lorakit.train.settings import TrainSettings
from lorakit.train.trained import TrainedAdapter

SPEC = LoRASpec(rank=3, alpha=6, dropout=0.2)


class Bench:
    """A job on a tiny base whose adapter has a delta, in float64 unless said otherwise."""

    def __init__(self, shop, *, double=True, spec=SPEC, mode=None, fused=True, **settings):
        base = shop.base()
        self.model = base.model.double() if double else base.model
        self.handle = attach(self.model, spec, "a")
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.handle.parameters("a"):
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        data = shop.data(base)
        defaults = {"steps": 20, "lr": 0.01, "warmup": 0, "batch_size": 8}
        self.settings = TrainSettings(**{**defaults, **settings})
        self.job = Job(TrainedAdapter("a", self.handle), data, range(len(data)), self.settings)
        self.flat = self.handle.flat("a")
        # fused layers keep float64 where the model's own norms fall to float32
        self.packed = PackedModel(self.model, self.handle, mode=mode, fused=fused)

    def gradient(self) -> torch.Tensor:
        """The gradient of the next step, as the loop accumulates it."""
        window = self.job.window()
        self.job.clear_gradient()
        paths = list(self.job.snapshot().sites)
        for part in window.parts:
            batch = pack(part)
            with training_mode(self.model, paths):
                loss, _ = self.packed.supervised_loss(batch, routing_of([self.job.stretch(part)]))
                (loss / window.num_supervised).backward()
        return self.job.collect_gradient().clone()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("micro", "parts"), [(1, 8), (2, 4), (4, 2), (3, 3)])
def test_accumulation_equals_the_large_batch(shop, double, micro, parts):
    """Examples are of unequal length, and dropout is on."""
    whole = Bench(shop, double=double)
    cut = Bench(shop, double=double, micro_batch=micro)
    window = cut.job.window()
    assert len(window.parts) == parts
    assert len({len(example.ids) for example in window.examples}) > 3
    expected, found = whole.gradient(), cut.gradient()
    difference = (found - expected).norm() / expected.norm()
    # float32: sums of 8 terms in another order; the bar of the project is 1e-6
    assert difference <= (1e-13 if double else 1e-6)


@pytest.mark.parametrize("mode", ["padded", "single"])
def test_a_model_that_cannot_be_packed_drops_out_the_same(shop, mode):
    expected, found = Bench(shop, fused=False).gradient(), Bench(shop, mode=mode).gradient()
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    without = Bench(shop, spec=LoRASpec(rank=3, alpha=6), fused=False).gradient()
    assert (without - expected).norm() > 0.05 * expected.norm()


def test_parts_hold_no_more_tokens_than_asked(shop):
    bench = Bench(shop, micro_batch_tokens=30)
    window = bench.job.window()
    sizes = [sum(len(example.ids) for example in part) for part in window.parts]
    assert sum(sizes) == window.num_tokens
    assert max(sizes) <= 30
    assert min(a + len(b[0].ids) for a, b in zip(sizes, window.parts[1:], strict=False)) > 30
    alone = Bench(shop, micro_batch_tokens=1)
    assert [len(part) for part in alone.job.window().parts] == [1] * 8


def test_the_stream_visits_every_example_once_an_epoch(shop):
    bench = Bench(shop, batch_size=7)
    job, seen = bench.job, []
    for _ in range(20):
        first = [example.id for example in job.window().examples]
        assert first == [example.id for example in job.window().examples]
        seen += first
        job.step += 1
    assert Counter(seen[:60]) == Counter(range(60))
    assert Counter(seen[60:120]) == Counter(range(60))
    assert seen[:60] != seen[60:120]


def test_dropout_depends_on_step_and_seed_alone(shop):
    def routing_keys(bench, examples):
        batch = pack(examples)
        return dict(
            zip(
                [e.id for e in examples],
                routing_of([bench.job.stretch(examples)])
                .dropout_keys[0]
                .split(list(batch.lengths)),
                strict=True,
            )
        )

    bench = Bench(shop)
    data = [bench.job._data[i] for i in range(6)]
    together = routing_keys(bench, data)
    backwards = routing_keys(bench, data[::-1])
    assert all(torch.equal(together[i], backwards[i]) for i in together)
    everything = torch.cat(list(together.values()))
    assert len(everything.unique()) == len(everything)
    bench.job.step = 1
    later = routing_keys(bench, data)
    assert not any(torch.equal(together[i], later[i]) for i in together)
    other = routing_keys(Bench(shop, seed=1), data)
    assert not any(torch.equal(together[i], other[i]) for i in together)
    without = Bench(shop, spec=LoRASpec(rank=3))
    assert routing_of([without.job.stretch(data)]).dropout_keys is None


def adamw(gradients, start, *, lr, betas, eps, decay, clip):
    """Loshchilov & Hutter, arXiv 1711.05101, algorithm 2, with clipping by the global norm."""
    x = start.astype(np.float64).copy()
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, (g, rate) in enumerate(zip(gradients, lr, strict=True), start=1):
        g = g * min(1.0, clip / (np.linalg.norm(g) + 1e-6)) if clip else g
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        x = x - rate * decay * x
        x = x - rate * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return x


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_against_a_formula(shop, clip, optimizer):
    extra = {"betas": (0.8, 0.95), "weight_decay": 0.1} if optimizer == "adamw" else {}
    bench = Bench(
        shop, spec=LoRASpec(rank=2), clip=clip, optimizer=optimizer, schedule="linear", **extra
    )
    start = bench.flat.detach().numpy().copy()
    gradients = []
    for _ in range(4):
        gradients.append(bench.gradient().numpy().copy())
        bench.job.take_step(1.0, bench.job.gradient_norm())
    rates = [0.01 * (1 - i / 20) for i in range(4)]
    if optimizer == "adamw":
        expected = adamw(
            gradients, start, lr=rates, betas=(0.8, 0.95), eps=1e-8, decay=0.1, clip=clip
        )
    else:
        expected = start.copy()
        for g, rate in zip(gradients, rates, strict=True):
            limit = min(1.0, clip / (np.linalg.norm(g) + 1e-6)) if clip else 1.0
            expected -= rate * limit * g
    np.testing.assert_allclose(bench.flat.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_a_job_goes_on_from_its_state(shop):
    def steps(bench, number):
        for _ in range(number):
            bench.gradient()
            bench.job.take_step(1.0, bench.job.gradient_norm())

    whole = Bench(shop)
    whole.job.observe(3.0)
    steps(whole, 5)
    whole.job.observe(2.0)
    steps(whole, 5)
    first = Bench(shop)
    first.job.observe(3.0)
    steps(first, 5)
    first.job.observe(2.0)
    second = Bench(shop)
    with torch.no_grad():
        second.flat.zero_()
    tensors = {name: tensor.clone() for name, tensor in first.job.tensors().items()}
    second.job.load(tensors, first.job.state())
    steps(second, 5)
    for name, tensor in whole.job.tensors().items():
        assert torch.equal(second.job.tensors()[name], tensor), name
    assert second.job.state() == whole.job.state()


def test_what_is_best(shop):
    job = Bench(shop, patience=2, eval_every=1).job
    assert job.observe(3.0)
    job.step = 1
    assert not job.observe(3.0)
    assert not job.stopped_early
    job.step = 2
    assert job.observe(2.5)
    for step, loss in ((3, math.nan), (4, math.inf)):
        job.step = step
        assert not job.observe(loss)
    assert job.stopped_early
    assert job.done
    assert (job.best.step, job.best.loss, job.start_loss) == (2, 2.5, 3.0)


def test_training_mode_is_for_the_adapted_alone(shop):
    bench = Bench(shop)
    paths = list(bench.job.snapshot().sites)
    bench.model.train()
    with training_mode(bench.model, paths):
        on = {name for name, module in bench.model.named_modules() if module.training}
        assert on == set(paths)
    assert all(module.training for module in bench.model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gradient_checkpointing_acts_and_changes_nothing(shop, monkeypatch, family, reentrant):
    """OPT's layers drop out by themselves, which must stay off."""
    if family == "opt":
        config = transformers.OPTConfig(
            vocab_size=54, hidden_size=16, ffn_dim=32, num_hidden_layers=2, dropout=0.5,
            num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16,
        )  # fmt: skip
        base = shop.base()
        base.model = transformers.OPTForCausalLM(config).eval()
        monkeypatch.setattr(type(shop), "base", lambda _: copy.deepcopy(base))
    bench = Bench(shop, mode="padded")
    expected = bench.gradient()
    # the name that transformers 5.23 warns about is the only one that 5.17 has
    enable = getattr(
        bench.model, "activation_checkpointing_enable", bench.model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})
    layers = [m for m in bench.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    forwards = []
    run = layers[0]._gradient_checkpointing_func

    def counted(forward, *inputs):
        def again(*inputs):
            forwards.append(torch.is_grad_enabled())
            return forward(*inputs)

        return run(again, *inputs)

    for layer in layers:
        layer._gradient_checkpointing_func = counted
    modes = [module.training for module in bench.model.modules()]
    found = bench.gradient()
    assert len(layers) == 2
    assert len(forwards) == 4  # each layer once forward, once for the gradient
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert all(layer._gradient_checkpointing_func is counted for layer in layers)
    assert [module.training for module in bench.model.modules()] == modes
