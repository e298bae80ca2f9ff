"""Losses of packed batches against the stock model's padded forward."""

import dataclasses
import weakref

import pytest
import torch
import torch.nn.functional as F

from lorakit.core.spec import LoRASpec
from lorakit.errors import BaseError, RoutingError
from lorakit.infer import segments
from lorakit.infer.chunked_loss import stretches
from lorakit.infer.packed import PackedModel
from lorakit.layers import Routing, attach, token_keys

PACKS = ["llama", "qwen3", "mistral-window", "gemma2-window-softcap", "gemma3-window", "gpt2"]


@dataclasses.dataclass
class Batch:
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    supervised: torch.Tensor
    labels: torch.Tensor


def batch_of(lengths, *, seed=0, vocabulary=61):
    """Random tokens; of each example a random half is supervised, at least one."""
    random = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, vocabulary, (n,), generator=random) for n in lengths]
    supervised, labels, start = [], [], 0
    for row in ids:
        chosen = torch.rand(len(row) - 1, generator=random) < 0.5
        chosen[-1] = True
        where = chosen.nonzero()[:, 0]
        supervised.append(where + start)
        labels.append(row[where + 1])
        start += len(row)
    return Batch(
        torch.cat(ids)[None],
        torch.cat([torch.arange(n) for n in lengths])[None],
        tuple(lengths),
        torch.cat(supervised),
        torch.cat(labels),
    )


def stock_losses(model, batch):
    """Per example: its summed loss, by the model's own padded forward and cross-entropy."""
    ids = batch.input_ids[0].split(batch.lengths)
    width = max(batch.lengths)
    padded = torch.stack([F.pad(row, (0, width - len(row))) for row in ids])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in ids])
    logits = model(input_ids=padded, attention_mask=mask).logits
    labels = torch.full_like(padded, -100)
    starts = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
    for position, label in zip(batch.supervised, batch.labels, strict=True):
        example = int((starts <= position).sum()) - 1
        labels[example, position - starts[example]] = label
    each = F.cross_entropy(logits.transpose(1, 2).double(), labels, reduction="none")
    return each.sum(1)


def gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def without_fused(notes):
    """The notes, but that on fused layers, which is about speed alone."""
    return [note for note in notes if not note.startswith("layers are not fused")]


def largest_difference(a, b):
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", PACKS)
def test_packed_loss_and_gradients_are_those_of_the_padded_model(family, tiny, all_double):
    model = tiny(family).double()
    batch = batch_of((9, 2, 13, 5))
    packed = PackedModel(model, chunk=4)
    assert (packed.mode, without_fused(packed.notes)) == ("packed", [])
    loss, count = packed.supervised_loss(batch)
    expected = stock_losses(model, batch)
    assert count == len(batch.labels)
    assert loss.dtype == torch.float64
    assert abs(float((loss - expected.sum()).detach())) <= 1e-10
    assert largest_difference(gradients(model, loss), gradients(model, expected.sum())) <= 1e-10
    sums, counts = packed.per_example_loss(batch)
    assert float((sums - expected).detach().abs().max()) <= 1e-10
    assert int(counts.sum()) == count
    mean, _ = packed.supervised_loss(batch, reduction="mean")
    assert mean.item() == pytest.approx(loss.item() / count, abs=1e-12)


@pytest.mark.parametrize(
    ("family", "mode", "said"),
    [
        ("bloom-no-positions", "padded", "batches are not packed"),
        ("mamba-state", "padded", "batches are not packed"),
        ("opt", "packed", None),
        ("granite-scaled", "packed", None),
        ("cohere-scaled", "packed", None),
    ],
)
def test_other_models_find_their_way(family, mode, said, tiny, all_double):
    model = tiny(family).double()
    batch = batch_of((6, 3, 8))
    packed = PackedModel(model)
    assert packed.mode == mode
    assert (said is None and without_fused(packed.notes) == []) or said in "\n".join(packed.notes)
    loss, _ = packed.supervised_loss(batch)
    expected = stock_losses(model, batch).sum()
    assert abs(float((loss - expected).detach())) <= 1e-10
    assert largest_difference(gradients(model, loss), gradients(model, expected)) <= 1e-10


@pytest.mark.parametrize("mode", ["packed", "padded", "single"])
@pytest.mark.parametrize("family", ["llama", "gemma3-window"])
def test_every_mode_gives_the_same(family, mode, tiny, all_double):
    model = tiny(family).double()
    batch = batch_of((6, 3, 8))
    loss, _ = PackedModel(model, mode=mode).supervised_loss(batch)
    assert abs((loss - stock_losses(model, batch).sum()).item()) <= 1e-10


def test_a_model_that_does_more_than_its_head_keeps_its_own_forward(tiny, monkeypatch):
    model = tiny("llama").double()
    plain = type(model).forward

    def shifted(self, *args, logits_to_keep=0, **kwargs):
        out = plain(self, *args, logits_to_keep=logits_to_keep, **kwargs)
        out.logits = out.logits * torch.linspace(1, 2, out.logits.shape[-1])
        return out

    monkeypatch.setattr(type(model), "forward", shifted)
    for mode in ("packed", "padded", "single"):
        packed = PackedModel(model, mode=mode, chunk=4)
        assert "the model's own forward is used" in packed.notes[0]
        batch = batch_of((6, 3, 8))
        loss, _ = packed.supervised_loss(batch)
        # norms run in float32 here
        assert loss.item() == pytest.approx(stock_losses(model, batch).sum().item(), abs=1e-4)


def test_the_model_is_as_it_was_after_the_trial(tiny):
    model = tiny("llama").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    implementation = model.config._attn_implementation
    random = torch.get_rng_state()
    PackedModel(model).supervised_loss(batch_of((4, 3)))
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert torch.equal(torch.get_rng_state(), random)
    assert not segments._running


def test_an_encoder_decoder_is_refused():
    import transformers as hf

    config = hf.T5Config(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    with pytest.raises(BaseError, match="encoder-decoder"):
        PackedModel(hf.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_checkpointing_is_done_by_the_fused_layers_or_padded(fused, tiny, all_double):
    """All weights are trained here, so the layers run as they are, and again in the backward."""
    model = tiny("llama").double().train()
    # the name that transformers 5.23 warns about is the only one that 5.17 has
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    packed = PackedModel(model, fused=fused)
    assert packed.mode == ("packed" if fused else "padded")
    assert "gradient checkpointing" in packed.notes[0]
    calls = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = batch_of((6, 3, 8))
    loss, _ = packed.supervised_loss(batch)
    mine = gradients(model, loss)
    hook.remove()
    assert len(calls) == 2
    assert all(m.gradient_checkpointing for m in model.model.layers)
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    expected = stock_losses(model, batch).sum()
    assert largest_difference(mine, gradients(model, expected)) <= 1e-10


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.0], "long_factor": [1.5, 3.0],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_an_example_does_not_see_the_length_of_another(kind, tiny, all_double):
    """Longer than the trial's sequences, these encodings change with the longest position."""
    settings = {"max_position_embeddings": 8, "rope_parameters": ROPES[kind]}
    batch = batch_of((6, 30, 8, 12))
    parts = batch.input_ids[0].split(batch.lengths)
    packed = PackedModel(tiny("llama", **settings).double())
    assert packed.mode == "single"
    assert kind in packed.notes[0]
    for _ in range(2):  # nor that of one before
        losses = packed.position_losses(batch)
        starts = torch.tensor([0, *batch.lengths]).cumsum(0)
        for number, ids in enumerate(parts):
            logits = tiny("llama", **settings).double()(ids[None]).logits[0]
            mine = (starts[number] <= batch.supervised) & (batch.supervised < starts[number + 1])
            where = batch.supervised[mine] - starts[number]
            expected = F.cross_entropy(logits[where], batch.labels[mine], reduction="none")
            assert largest_difference([losses[mine]], [expected]) <= 1e-10, number


def test_kinds_of_encodings_of_some_layers_are_found():
    from lorakit.infer.probing import rope_kinds

    model = torch.nn.Linear(1, 1)
    model.config = type("Config", (), {})()
    assert rope_kinds(model) == set()
    model.config.rope_scaling = {"type": "linear", "factor": 2.0}
    model.config.rope_parameters = {
        "full_attention": {"rope_type": "longrope"},
        "sliding_attention": {"rope_type": "default"},
    }
    assert rope_kinds(model) == {"linear", "longrope", "default"}


def test_a_batch_without_supervised_tokens_costs_nothing(tiny):
    batch = batch_of((4, 3))
    empty = dataclasses.replace(batch, supervised=batch.supervised[:0], labels=batch.labels[:0])
    packed = PackedModel(tiny("llama"))
    loss, count = packed.supervised_loss(empty)
    assert (loss.item(), count) == (0.0, 0)
    assert packed.per_example_loss(empty)[0].tolist() == [0.0, 0.0]


# --- with adapters ---------------------------------------------------------------------------


def attached(model, **settings):
    """Two adapters whose B is not zero."""
    settings.setdefault("targets", ("q_proj", "down_proj", "embed_tokens", "lm_head"))
    handle = attach(model, LoRASpec(rank=2, alpha=4, **settings), "a", seed=1)
    handle.add(LoRASpec(rank=3, alpha=3, **settings), "b", seed=2)
    torch.manual_seed(3)
    for name in handle.names:
        for parameter in handle.parameters(name):
            parameter.data.normal_(std=0.3)
    return handle


@pytest.mark.parametrize("mode", ["packed", "padded", "single"])
@pytest.mark.parametrize("mix", [None, "a", {"a": 0.7, "b": -0.3}])
def test_an_adapted_model_head_included(mode, mix, tiny, all_double):
    model = tiny("qwen3").double()
    handle = attached(model)
    batch = batch_of((6, 3, 8))
    packed = PackedModel(model, handle, mode=mode, chunk=4)
    loss, _ = packed.supervised_loss(batch, Routing.uniform(mix))
    with handle.use(mix):
        expected = stock_losses(model, batch).sum()
    assert abs(float((loss - expected).detach())) <= 1e-10
    if mix is not None:
        assert largest_difference(gradients(model, loss), gradients(model, expected)) <= 1e-10


@pytest.mark.parametrize("mode", ["packed", "padded", "single"])
def test_examples_with_different_adapters(mode, tiny, all_double):
    model = tiny("qwen3").double()
    handle = attached(model)
    batch = batch_of((6, 3, 8))
    mixes = ["b", None, {"a": 0.5, "b": 2.0}]
    routing = Routing.tokens(list(zip(mixes, batch.lengths, strict=True)))
    loss, _ = PackedModel(model, handle, mode=mode).supervised_loss(batch, routing)
    with handle.use(rows=mixes):
        expected = stock_losses(model, batch).sum()
    assert abs(float((loss - expected).detach())) <= 1e-10
    assert largest_difference(gradients(model, loss), gradients(model, expected)) <= 1e-10


def test_a_padded_row_has_one_mix(tiny):
    model = tiny("qwen3")
    handle = attached(model)
    routing = Routing.tokens([("a", 2), ("b", 5)])
    with pytest.raises(RoutingError, match="one mix"):
        PackedModel(model, handle, mode="padded").supervised_loss(batch_of((4, 3)), routing)


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("q_proj",)])
def test_keyed_dropout_is_the_same_in_every_mode(targets, tiny, all_double):
    model = tiny("qwen3").double().train()
    handle = attached(model, dropout=0.5, targets=targets)
    batch = batch_of((6, 3, 8))
    example = torch.repeat_interleave(torch.arange(3), torch.tensor(batch.lengths))[None]
    keys = token_keys(0, 1, example, batch.position_ids)
    routing = Routing.uniform("a").with_dropout_keys(keys)
    losses = [
        PackedModel(model, handle, mode=mode).supervised_loss(batch, routing)[0].item()
        for mode in ("packed", "padded", "single")
    ]
    assert max(losses) - min(losses) <= 1e-10
    model.eval()
    without, _ = PackedModel(model, handle).supervised_loss(batch, routing)
    assert abs(without.item() - losses[0]) > 1e-6


def test_a_head_trained_whole(tiny, all_double):
    model = tiny("qwen3").double()
    handle = attach(model, LoRASpec(rank=2, targets=("q_proj",), train_modules=("lm_head",)))
    torch.manual_seed(0)
    for parameter in handle.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    batch = batch_of((6, 3, 8))
    loss, _ = PackedModel(model, handle, chunk=4).supervised_loss(batch)
    expected = stock_losses(model, batch).sum()
    assert abs(float((loss - expected).detach())) <= 1e-10
    right = gradients(model, expected)
    assert largest_difference(gradients(model, loss), right) <= 1e-10
    assert all(float(g.abs().max()) > 0 for g in right)


def test_gradients_reach_the_flat_buffer(tiny, all_double):
    model = tiny("qwen3").double()
    handle = attached(model)
    flat = handle.flat("a")
    batch = batch_of((6, 3, 8))
    loss, count = PackedModel(model, handle, chunk=4).supervised_loss(batch, Routing.uniform("a"))
    (loss / count).backward()
    with handle.use("a"):
        expected = torch.autograd.grad(
            stock_losses(model, batch).sum() / count, handle.parameters("a")
        )
    together = torch.cat([g.reshape(-1) for g in expected])
    assert float((flat.grad - together).abs().max()) <= 1e-10


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(segments, "_ROWS", 4)
    monkeypatch.setattr(segments, "_causal", {})


def test_a_long_segment_is_looked_at_in_blocks(tiny, all_double, small_blocks):
    for family in ("llama", "mistral-window"):
        model = tiny(family).double()
        packed = PackedModel(model)
        for lengths in ((11, 3), (9, 11), (11, 3)):
            batch = batch_of(lengths)
            loss, _ = packed.supervised_loss(batch)
            assert abs((loss - stock_losses(model, batch).sum()).item()) <= 1e-10


def test_a_causal_mask_never_exists_whole(small_blocks):
    """Of the blocks that are looked at, none outlives the look."""
    blocks = []

    def causal(batch, head, query, key):
        assert all(block() is None for block in blocks)
        seen = key <= query
        blocks.append(weakref.ref(seen))
        return seen

    assert segments._visible(causal, 5, 30, torch.device("cpu")) is None
    assert len(blocks) == 8


LOOKS = []  # global: what a mask closes over is part of what it is


def test_a_verdict_is_remembered_for_the_same_mask_alone(small_blocks):
    def windowed(window, owner):
        def mask(batch, head, query, key):
            LOOKS.append(window)
            same = owner[batch, query] == owner[batch, key]
            return (key <= query) & (key > query - window) & same

        return mask

    def visible(window, owner, start, length):
        LOOKS.clear()
        mask = segments._visible(windowed(window, owner), start, length, torch.device("cpu"))
        return mask, bool(LOOKS)

    owner = torch.tensor([0] * 10 + [1] * 20 + [2])[None]
    assert visible(20, owner, 10, 20) == (None, True)
    assert visible(20, owner.clone(), 10, 20) == (None, False)
    assert visible(21, owner, 10, 20) == (None, True)
    assert visible(20, owner, 11, 19) == (None, True)
    mask, _ = visible(3, owner, 10, 20)
    assert int(mask.sum()) == 1 + 2 + 18 * 3
    owner[0, 15] = 9  # no longer one value in the segment
    mask, _ = visible(20, owner, 10, 20)
    assert not mask[6, 5]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 9, 100])
def test_stretches_of_the_loss_are_even_and_the_first_is_the_longest(count):
    found = stretches(count, 4)
    sizes = [one.stop - one.start for one in found]
    assert [row for one in found for row in range(count)[one]] == list(range(count))
    assert max(sizes) == sizes[0] <= 4
    assert max(sizes) - min(sizes) <= 1
    assert len(found) == max(1, -(-count // 4))
