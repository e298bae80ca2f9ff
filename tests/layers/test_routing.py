"""Rows over the base, three adapters and blends equal separate runs, however the model is run."""

from __future__ import annotations

import math
import threading
import warnings

import pytest
import torch
from transformers import TextIteratorStreamer

from lorakit import LoRASpec
from lorakit.errors import RoutingError
from lorakit.layers import Routing, attach

from .. import models

LIMIT = 1e-12
ROWS = ["a", None, {"a": 0.3, "c": 0.7}, "b", {"b": -1.5}]


def adapted(model, seed=1):
    handle = attach(model, LoRASpec(rank=4, alpha=8), "a")
    handle.add(LoRASpec(rank=2, alpha=2), "b")
    handle.add(LoRASpec(rank=3, targets="attention"), "c")
    models.randomize(handle, 0.3, seed)
    return handle


@pytest.fixture
def llama():
    model = models.llama().double()
    return model, adapted(model)


@pytest.fixture
def ids():
    return torch.randint(3, 100, (len(ROWS), 7), generator=torch.Generator().manual_seed(3))


def separately(model, handle, run):
    """``run(i)`` for every row, each under its own uniform routing."""
    outputs = []
    for i, mix in enumerate(ROWS):
        with handle.use(mix):
            outputs.append(run(i))
    return outputs


def assert_rows_equal(joint, alone, limit=LIMIT):
    for i, expected in enumerate(alone):
        assert (joint[i] - expected[0]).abs().max() <= limit, f"row {i}: {ROWS[i]}"


def test_rows_in_a_plain_forward(llama, ids):
    model, handle = llama
    with torch.no_grad(), handle.use(rows=ROWS):
        joint = model(ids).logits
    with torch.no_grad():
        alone = separately(model, handle, lambda i: model(ids[i : i + 1]).logits)
    assert_rows_equal(joint, alone)
    # the rows really differ
    assert min((joint[1] - joint[i]).abs().max() for i in (0, 2, 3, 4)) > 1e-2


def test_a_blend_is_the_weighted_sum_of_the_deltas():
    """Not of logits: for one linear, y = x (W + 0.3 Δa + 0.7 Δc)ᵀ, computed from the values."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)).double()
    handle = attach(model, LoRASpec(rank=2, targets="0"), "a")
    handle.add(LoRASpec(rank=3, targets="0"), "c")
    models.randomize(handle)
    W = model[0].weight.detach().clone()
    for name, weight in (("a", 0.3), ("c", 0.7)):
        site = handle.snapshot(name).sites["0"]
        W += weight * site.scaling * site.B @ site.A
    x = torch.randn(4, 6, dtype=torch.float64)
    with handle.use({"a": 0.3, "c": 0.7}):
        assert (model(x) - x @ W.T).abs().max() <= LIMIT


def test_beam_search(llama, ids):
    model, handle = llama
    settings = {
        "max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip
    with handle.use(rows=ROWS):
        joint = model.generate(ids, **settings)
    alone = separately(model, handle, lambda i: model.generate(ids[i : i + 1], **settings))
    for i, expected in enumerate(alone):
        length = min(joint.shape[1], expected.shape[1])
        assert torch.equal(joint[i, :length], expected[0, :length])


def test_returned_sequences_multiply_rows(llama, ids):
    """Two beams, both returned: row i becomes rows 2i and 2i + 1."""
    model, handle = llama
    settings = {
        "max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "do_sample": False,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    with handle.use(rows=ROWS):
        joint = model.generate(ids, **settings)
    alone = separately(model, handle, lambda i: model.generate(ids[i : i + 1], **settings))
    assert torch.equal(joint, torch.cat(alone))


class _Numbers:
    """A tokenizer that prints ids."""

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


@pytest.mark.parametrize("mix", ["a", None, {"a": 0.3, "c": 0.7}])
def test_streaming_generation_keeps_the_routing_it_began_with(llama, ids, mix):
    """The thread outlives the ``with`` block; other routings come into use meanwhile."""
    model, handle = llama
    settings = {
        "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    with handle.use(mix):
        expected = model.generate(ids[:1], **settings)[0].tolist()
    streamer = TextIteratorStreamer(_Numbers())
    with handle.use(mix):
        thread = threading.Thread(
            target=lambda: model.generate(ids[:1], streamer=streamer, **settings)
        )
        thread.start()
        text = next(iter(streamer))  # generation has begun
    with handle.use("b"):  # in use now, but not by that thread
        text += "".join(streamer)
    thread.join()
    assert [int(number) for number in text.split()] == expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_under_the_same_routing(llama, ids, reentrant):
    """Two forwards with different routings, one backward, after both ``with`` blocks ended."""
    model, handle = llama
    model.train()

    def gradients():
        for name in handle.names:
            handle.flat(name).grad.zero_()
        with handle.use(rows=ROWS):
            first = model(ids, labels=ids).loss
        with handle.use("b"):
            second = model(ids[:2], labels=ids[:2]).loss
        (first + second).backward()
        return [handle.flat(name).grad.clone() for name in handle.names]

    expected = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers renamed the method and warns of cache
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        model.enable_input_require_grads()
        found = gradients()
    for a, b in zip(expected, found, strict=True):
        assert a.abs().max() > 0
        assert (a - b).abs().max() <= LIMIT


def test_forwards_in_inference_mode(llama, ids):
    model, handle = llama
    with torch.no_grad(), handle.use(rows=ROWS):
        expected = model(ids).logits
    with handle.use(rows=ROWS):
        for _ in range(2):
            with torch.inference_mode():
                assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits.detach(), expected)


def test_compiled_without_a_recompile_per_routing(llama, ids):
    import torch._dynamo.testing

    model, handle = llama
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    routings = [
        {"rows": ROWS},
        {"mix": "a"},
        {"mix": None},
        {"mix": {"a": 0.2, "b": 0.8}},
        {"rows": list(reversed(ROWS))},
    ]
    with torch.no_grad():
        for routing in routings:
            with handle.use(**routing):
                found, expected = compiled(ids).logits, model(ids).logits
            assert (found - expected).abs().max() <= LIMIT
    assert counter.frame_count == 1


def test_encoder_decoder(ids):
    model = models.t5().double()
    handle = adapted(model)
    with torch.no_grad(), handle.use(rows=ROWS):
        joint = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    with torch.no_grad():
        alone = separately(
            model,
            handle,
            lambda i: model(input_ids=ids[i : i + 1], decoder_input_ids=ids[i : i + 1, :5]).logits,
        )
    assert_rows_equal(joint, alone)
    settings = {
        "max_new_tokens": 6, "num_beams": 2, "do_sample": False, "pad_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip
    with handle.use(rows=ROWS):  # generate calls the encoder on its own, before it expands
        joint = model.generate(ids, **settings)
    for i, expected in enumerate(
        separately(model, handle, lambda i: model.generate(ids[i : i + 1], **settings))
    ):
        length = min(joint.shape[1], expected.shape[1])
        assert torch.equal(joint[i, :length], expected[0, :length])


def test_runs_of_tokens_in_a_packed_batch(llama, ids):
    model, handle = llama
    packed = ids[:3].reshape(1, -1)
    positions = torch.arange(7).repeat(3).unsqueeze(0)
    with torch.no_grad():
        with handle.use(Routing.tokens([("a", 7), (None, 7), ({"b": 0.5, "c": 1.0}, 7)])):
            joint = model(packed, position_ids=positions, use_cache=False).logits[0]
        for i, mix in enumerate(["a", None, {"b": 0.5, "c": 1.0}]):
            with handle.use(mix):
                alone = model(ids[i : i + 1]).logits[0]
            assert (joint[7 * i : 7 * i + 7] - alone).abs().max() <= LIMIT


@pytest.mark.parametrize("length", [5, 3])
def test_a_table_of_distances_has_no_rows(length):
    """T5 looks up [T, T], and T may be the number of rows."""
    model = models.t5()
    handle = attach(model, LoRASpec(rank=2, targets=("relative_attention_bias", "q")), "a")
    ids = torch.randint(3, 100, (3, length))
    with handle.use(rows=["a"] * 3):
        model(input_ids=ids, decoder_input_ids=ids)
    words = "relative_attention_bias looks up distances"
    with handle.use(rows=["a", None, None]), pytest.raises(RoutingError, match=words):
        model(input_ids=ids, decoder_input_ids=ids)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_raises(llama, weight):
    for routing in ({"mix": {"a": weight}}, {"rows": [{"b": 0.5, "a": weight}]}):
        with pytest.raises(RoutingError, match=r"'a' is (nan|inf), which is not finite"):
            llama[1].routing(**routing)


def test_guidance_tiles_the_batch():
    """r0 r1 r0 r1, as diffusers' guidance does; declared by the caller."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5)).double()
    handle = attach(model, LoRASpec(rank=2, targets="0"), "a")
    models.randomize(handle)
    x = torch.randn(2, 6, dtype=torch.float64)
    with handle.use(rows=["a", None], expand=2, order="tile"):
        tiled = model(torch.cat([x, x]))
        once = model(x)
    assert (tiled[:2] - once).abs().max() <= LIMIT
    assert (tiled[2:] - once).abs().max() <= LIMIT
    assert (once[1] - torch.nn.functional.linear(x, *model[0].parameters())[1]).abs().max() <= LIMIT


def test_tokens_flattened_by_the_model_follow_their_rows():
    class Flattens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.reshape(-1, 4)).view(x.shape)

    model = Flattens().double()
    handle = attach(model, LoRASpec(rank=2, targets="inner"), "a")
    models.randomize(handle)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    with handle.use(rows=["a", None, "a"]):
        joint = model(x)
    for i, mix in enumerate(["a", None, "a"]):
        with handle.use(mix):
            assert torch.equal(model(x[i : i + 1])[0], joint[i])


def test_two_overlapping_forwards_raise(llama, ids):
    model, handle = llama
    entered, leave = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def wait(*_):
        entered.set()
        leave.wait(10)

    hook = model.model.layers[0].register_forward_pre_hook(wait)
    first = threading.Thread(target=lambda: model(ids))
    first.start()
    assert entered.wait(10)
    try:
        model(ids)
    except RoutingError as error:
        failed.append(error)
    finally:
        leave.set()
        first.join()
        hook.remove()
    assert "second forward" in str(failed[0])
    with torch.no_grad(), handle.use(rows=ROWS):  # and the model still works
        joint = model(ids).logits
    with torch.no_grad():
        assert_rows_equal(joint, separately(model, handle, lambda i: model(ids[i : i + 1]).logits))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_no_trace(llama, ids, kind):
    """Ctrl-C runs no forward hooks, so the next forward must not trust that they ran."""
    model, handle = llama

    def explode(*_):
        raise kind("inside")

    hook = model.model.layers[1].register_forward_pre_hook(explode)
    with pytest.raises(kind, match="inside"), handle.use("a"):
        model(ids)
    hook.remove()
    with torch.no_grad():
        with handle.use(rows=ROWS):
            joint = model(ids).logits
        assert_rows_equal(joint, separately(model, handle, lambda i: model(ids[i : i + 1]).logits))


def test_threads_that_choose_at_once_raise(llama, ids):
    """A routing holds for the whole model, so each would run with the other's adapter."""
    _, handle = llama
    errors: list[BaseException] = []

    def choose():
        try:
            with handle.use("b"):
                pass
        except RoutingError as error:
            errors.append(error)

    with handle.use("a"):
        other = threading.Thread(target=choose)
        other.start()
        other.join()
        assert handle.active.names == {"a"}
    assert "another thread is inside a use(…) block" in str(errors[0])
    errors.clear()
    other = threading.Thread(target=choose)  # one after the other is fine
    other.start()
    other.join()
    assert not errors


def test_a_forward_inside_a_backward_hook_has_its_own_routing(llama, ids):
    model, handle = llama
    with torch.no_grad(), handle.use("b"):
        expected = model(ids).logits
    found = []

    def look(grad):
        with torch.no_grad(), handle.use("b"):
            found.append(model(ids).logits)

    with handle.use("a"):
        logits = model(ids).logits
    logits.register_hook(look)
    logits.sum().backward()
    assert torch.equal(found[0], expected)


def test_backwards_of_several_threads_are_not_guessed():
    """Autograd counts per thread: two forwards may have spanned the same numbers."""
    model = models.llama().double().train()
    handle = adapted(model)
    ids = torch.randint(3, 100, (1, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable()
    outputs = {}

    def run(name):
        handle.activate(name)
        outputs[name] = model(ids).logits.sum()

    for name in ("a", "b"):
        thread = threading.Thread(target=run, args=(name,))
        thread.start()
        thread.join()
    with pytest.raises(RoutingError, match="forwards of several threads await"):
        outputs["a"].backward()


def test_layers_compiled_one_by_one_see_a_scope(llama, ids):
    model, handle = llama
    expected = {}
    with torch.no_grad():
        for name in ("a", None):
            with handle.use(name):
                expected[name] = model(ids).logits
        for layer in model.model.layers:
            layer.compile(backend="eager")
        for name in ("a", None, "a"):
            with handle.forward_scope(Routing.uniform(name)):
                assert (model(ids).logits - expected[name]).abs().max() <= LIMIT


def test_an_expert_is_not_taken_for_rows():
    """The tokens that a router sends to an expert may be as many as there are rows."""

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            tokens = x.reshape(-1, 4)
            return torch.cat([self.experts[0](tokens[:2]), self.experts[1](tokens[2:])])

    model = Mixture().double()
    handle = attach(model, LoRASpec(rank=2, targets=r"experts\.\d"), "a")
    models.randomize(handle)
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    model(x)  # all rows alike: fine
    with pytest.raises(RoutingError, match="is an expert"), handle.use(rows=["a", None]):
        model(x)
    handle.add(LoRASpec(rank=2, targets=r"experts\.\d", dropout=0.5), "b")
    model.train()
    with handle.use(Routing.uniform("a").with_dropout_keys(torch.arange(8))):
        model(x)  # which drops nothing
    with (
        handle.use(Routing.uniform("b").with_dropout_keys(torch.arange(8))),
        pytest.raises(RoutingError, match="without dropout"),
    ):
        model(x)


def test_a_scope_joins_root_forwards_and_opens_once(llama, ids):
    model, handle = llama
    with torch.no_grad():
        with handle.use("b"):
            expected = model(ids).logits
        with handle.forward_scope(Routing.uniform("b")):
            assert torch.equal(model(ids).logits, expected)
            with (
                pytest.raises(RoutingError, match="inside another"),
                handle.forward_scope(Routing.uniform("a")),
            ):
                pass


def test_generate_reads_beams_from_a_positional_config(llama, ids):
    from transformers import GenerationConfig

    model, handle = llama
    settings = GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0, do_sample=False)
    with handle.use(rows=ROWS):
        assert model.generate(ids, settings).shape[0] == len(ROWS)


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        ({"rows": ["a", "b"]}, "the batch has 5 rows; the routing was given for 2"),
        ({"rows": []}, "expected a list with one entry per row"),
        ({"rows": "a"}, "expected a list with one entry per row"),
        ({"mix": "z"}, "no adapter 'z' is attached"),
        ({"mix": 3}, "expected a name, None for the bare base"),
        ({"mix": "a", "rows": ["a"]}, "not both"),
        ({"mix": Routing.uniform("a"), "rows": ["a"]}, "not both"),
        ({"rows": ["a"], "expand": 0}, "expected a number of at least 1"),
        ({"mix": Routing.tokens([("a", 3)])}, "the routing covers 3"),
    ],
)
def test_what_does_not_fit_raises(llama, ids, routing, words):
    model, handle = llama
    with pytest.raises(RoutingError) as caught, handle.use(**routing):
        model(ids)
    assert words in str(caught.value)
    model(ids)


def test_one_rows_nan_stays_in_its_adapter(llama, ids):
    """An input that is NaN in one row poisons neither the others' outputs nor their gradients."""
    model, handle = llama
    embedded = model.get_input_embeddings()(ids).detach()
    embedded[0] = float("nan")
    with handle.use(rows=ROWS):
        logits = model(inputs_embeds=embedded).logits
    assert torch.isfinite(logits[1:]).all()
    logits[1:].sum().backward()
    for name in ("b", "c"):
        assert all(torch.isfinite(p.grad).all() for p in handle.parameters(name))
