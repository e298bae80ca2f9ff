"""Generated text against transformers' own generate, one prompt at a time."""

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.spec import LoRASpec
from lorakit.errors import InputError, RoutingError
from lorakit.infer import answers, generate, stream
from lorakit.infer.generation import slots, slotted
from lorakit.infer.generation.sampling import Sampling, source
from lorakit.infer.generation.text import GrowingText
from lorakit.layers import attach
from lorakit.tasks.seq2seq import generated

TOKENS = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
PROMPTS = [[5, 9, 40], [7] * 11, [1, 2], [9, 8, 7, 6, 5, 4], [33, 200, 3, 77, 12, 13, 14], [60]]
IN_SLOTS = [
    "llama",
    "gpt2",
    "opt",
    "mistral-window",
    "gemma2-window-softcap",
    "gemma3-window",
    "cohere-scaled",
    "bloom-no-positions",
]


@pytest.fixture
def base(tiny, tokenizer):
    """``base(family)``: a tiny model, float64, and a tokenizer of bytes."""

    def make(family="llama", **settings):
        model = tiny(family, **{**TOKENS, **settings}).double()
        return SimpleNamespace(model=model, tokenizer=tokenizer)

    return make


def by_transformers(base, prompt, tokens, **settings):
    out = base.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        **settings,
    )
    ids = out[0, len(prompt) :].tolist()
    return ids[: ids.index(258)] if 258 in ids else ids


def decoded(base, ids):
    return base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", IN_SLOTS)
def test_greedy_answers_are_those_of_transformers(family, base, all_double, caplog):
    one = base(family)
    caplog.set_level("INFO", logger="lorakit")
    found = answers(one, None, PROMPTS, max_new_tokens=9, batch_size=3)
    assert caplog.messages == []
    for prompt, answer in zip(PROMPTS, found, strict=True):
        expected = by_transformers(one, prompt, 9)
        assert answer.text == decoded(one, expected)
        assert answer.num_tokens == len(expected)
        assert answer.finish == ("length" if len(expected) == 9 else "stop")


def test_answers_end_at_different_times_and_their_places_are_filled(base, all_double, monkeypatch):
    monkeypatch.setattr(slots, "_BLOCK", 4)  # so that columns are given back within a short test
    one = base("llama")
    with torch.no_grad():  # larger weights, so that an answer does not repeat one token
        for parameter in one.model.parameters():
            parameter.mul_(4)
    ends = (12, 34, 56, 78, 90, 111, 130, 150, 170, 190, 210, 230)  # many, so that rows differ
    random = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, 250, (int(n),), generator=random).tolist()
        for n in torch.randint(1, 14, (25,), generator=random)
    ]
    found = answers(one, None, prompts, max_new_tokens=20, batch_size=4, stop_ids=ends)
    lengths = set()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = by_transformers(one, prompt, 20, eos_token_id=list(ends))
        ids = ids[:-1] if ids[-1] in ends else ids
        assert answer.text == decoded(one, ids)
        lengths.add(len(ids))
    assert len(lengths) > 3


def test_rows_with_their_own_adapters(base, all_double):
    one = base("llama")
    handle = attach(one.model, LoRASpec(rank=2, targets=("q_proj", "down_proj")), "a", seed=1)
    handle.add(LoRASpec(rank=3), "b", seed=2)
    torch.manual_seed(0)
    for name in handle.names:
        for parameter in handle.parameters(name):
            parameter.data.normal_(std=0.4)
    mixes = ["a", None, "b", {"a": 0.5, "b": 0.5}, "a", None]
    found = generate(one, handle, PROMPTS, mixes=mixes, max_new_tokens=8, batch_size=4)
    assert len(set(found)) > 3
    for prompt, mix, text in zip(PROMPTS, mixes, found, strict=True):
        with handle.use(mix):
            assert text == decoded(one, by_transformers(one, prompt, 8))
        assert generate(one, handle, [prompt], adapter=mix, max_new_tokens=8) == [text]


def test_slots_are_tried_with_exact_products_and_used_as_the_process_has_it(
    base, reduced, precisions
):
    one = base("llama")
    one.model.float()
    before = precisions()
    found = precisions(one.model)
    answers(one, None, PROMPTS[:1], max_new_tokens=2)
    assert set(found[0]) in ({"ieee"}, {"none"}, {"ieee", "none"})
    assert found[-1] == before


def test_without_a_cache_of_slots_answers_come_in_whole_batches(base, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "lorakit.infer.generation.slots", None)
    caplog.set_level("INFO", logger="lorakit")
    assert answers(base("llama"), None, []) == []
    (answer,) = answers(base("llama"), None, PROMPTS[:1], max_new_tokens=2)
    assert answer.num_tokens == 2
    assert "does not take a cache of slots" in caplog.text


@pytest.mark.parametrize("family", ["mamba-state", "llama"])
def test_models_that_cannot_use_slots_go_through_generate(family, base, caplog, monkeypatch):
    one = base(family)
    if family == "llama":
        monkeypatch.setattr(slots.SlotLayer, "get_mask_sizes", lambda *_: (3, 0))
    caplog.set_level("INFO", logger="lorakit")
    found = generate(one, None, PROMPTS, max_new_tokens=6, batch_size=1)
    assert "generating in whole batches" in caplog.text
    assert found == [decoded(one, by_transformers(one, p, 6)) for p in PROMPTS]
    assert "".join(stream(one, None, PROMPTS[0], max_new_tokens=6)) == found[0]


def test_encoder_decoder(tokenizer):
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=259, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
        pad_token_id=256, eos_token_id=258, decoder_start_token_id=256,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        model.shared.weight.normal_()
    one = SimpleNamespace(model=model, tokenizer=tokenizer)
    handle = attach(model, LoRASpec(rank=2, targets=("q", "v")), "a")
    for parameter in handle.parameters("a"):
        parameter.data.normal_()
    mixes = ["a", None, "a", None, "a", None]
    found = generate(one, handle, PROMPTS, mixes=mixes, max_new_tokens=6, batch_size=4)
    for prompt, mix, text in zip(PROMPTS, mixes, found, strict=True):
        with handle.use(mix):
            out = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        ids = out[0, 1:].tolist()
        assert text == decoded(one, ids[: ids.index(258)] if 258 in ids else ids)


@pytest.fixture
def bart(tokenizer):
    """``bart(**settings)``: a tiny encoder-decoder that counts its positions, float64."""

    def make(**settings):
        torch.manual_seed(1)
        config = hf.BartConfig(
            vocab_size=259, d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=24, pad_token_id=256, bos_token_id=257,
            eos_token_id=258, decoder_start_token_id=258, forced_eos_token_id=None,
        )  # fmt: skip
        model = hf.BartForConditionalGeneration(config).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:  # large, so that answers differ
                    parameter.normal_(std=2.5 if parameter.ndim > 1 else 1)
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        return SimpleNamespace(model=model, tokenizer=tokenizer)

    return make


def test_a_whole_batch_holds_prompts_of_one_length(bart, all_double):
    one = bart()
    prompts = [*PROMPTS, [8, 9, 41], [50, 60], [8, 4, 2]]
    shapes = []
    encoder = one.model.get_encoder()
    hook = encoder.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    done = []
    found = answers(
        one, None, prompts, max_new_tokens=8, batch_size=2, on_done=lambda i, _: done.append(i)
    )
    hook.remove()
    trial = [(1, 4), (1, 4), (2, 4)]
    batches = [(1, 11), (1, 7), (1, 6), (2, 3), (1, 3), (2, 2), (1, 1)]
    assert sorted(shapes) == sorted(trial + batches)
    assert sorted(done) == list(range(len(prompts)))
    assert len({answer.text for answer in found}) > 3
    for prompt, answer in zip(prompts, found, strict=True):
        ids = one.model.generate(torch.tensor([prompt]), max_new_tokens=8)[0, 1:].tolist()
        assert answer.text == decoded(one, ids[: ids.index(258)] if 258 in ids else ids)


def test_a_model_that_mixes_the_rows_of_a_batch_gets_one_prompt_at_a_time(tokenizer, caplog):
    torch.manual_seed(0)
    model = hf.RwkvForCausalLM(
        hf.RwkvConfig(hidden_size=16, num_hidden_layers=2, context_length=64, **TOKENS)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    one = SimpleNamespace(model=model, tokenizer=tokenizer)
    caplog.set_level("INFO", logger="lorakit")
    prompts = [[5, 9, 40], [7, 7, 7], [1, 2, 3]]
    found = generate(one, None, prompts, max_new_tokens=6)
    assert "one prompt at a time: RwkvForCausalLM computes something else in a batch" in caplog.text
    assert found == [generate(one, None, [p], max_new_tokens=6)[0] for p in prompts]


@pytest.mark.parametrize("reading", ["answers", "eval"])
def test_habits_of_the_models_own_config_do_not_act(reading, bart):
    def read(one):
        if reading == "answers":
            return [(a.text, a.finish) for a in answers(one, None, PROMPTS, max_new_tokens=6)]
        batch = {"input_ids": torch.tensor([[5, 9, 40], [7, 7, 7]])}
        return generated(one.model, None, None, batch, 6).tolist()

    expected = read(bart())
    habits = {
        "num_beams": 3, "no_repeat_ngram_size": 1, "repetition_penalty": 5.0, "min_new_tokens": 6,
        "forced_eos_token_id": 258, "do_sample": True,
    }  # fmt: skip
    other = bart(**habits)
    before = other.model.generation_config.to_dict()
    assert read(other) == expected
    assert other.model.generation_config.to_dict() == before
    # without these the languages of mBART and the padding of Marian would be lost
    assert read(bart(forced_bos_token_id=65)) != expected
    assert read(bart(bad_words_ids=[[i] for i in range(200)])) != expected


# --- text and where it ends ------------------------------------------------------------------


def test_streamed_pieces_are_the_answer(base):
    one = base()
    [whole] = generate(one, None, ["Grüße"], max_new_tokens=12)
    pieces = list(stream(one, None, "Grüße", max_new_tokens=12))
    assert len(pieces) > 1
    assert "".join(pieces) == whole
    heard = {0: "", 1: ""}

    def on_text(i, piece):
        heard[i] += piece

    found = generate(one, None, ["Grüße", "x"], max_new_tokens=12, on_text=on_text)
    assert heard == dict(enumerate(found))


def test_leaving_a_stream_leaves_nothing_behind(base):
    one = base()
    one.model.train()
    handle = attach(one.model, LoRASpec(rank=2), "a")
    for _ in stream(one, handle, "Hello", adapter="a", max_new_tokens=12):
        with handle.use(None):  # between two pieces the model is free
            one.model(torch.tensor([[1, 2, 3]]))
        break
    assert one.model.training
    assert handle.active.names == {"a"}


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(base):
    one = base()
    [whole] = generate(one, None, ["abc"], max_new_tokens=30)
    stop = whole[6:9]
    at = whole.index(stop)
    [answer] = answers(one, None, ["abc"], max_new_tokens=30, stop=[stop])
    assert (answer.text, answer.finish) == (whole[:at], "stop")
    assert "".join(stream(one, None, "abc", max_new_tokens=30, stop=[stop])) == whole[:at]


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=2))
@settings(deadline=None, max_examples=60)
def test_growing_text(tokenizer, text, stop):
    growing = GrowingText(tokenizer, stop)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(growing.push(token))
        if growing.stopped:
            break
    pieces.append(growing.finish())
    starts = [text.find(s) for s in stop if s in text]
    # the first stop text that is complete ends it; another may begin before that one
    ends = [text.find(s) + len(s) for s in stop if s in text]
    joined = "".join(pieces)
    assert growing.text == joined
    assert growing.stopped == bool(starts)
    if not starts:
        assert joined == text
    else:
        assert text.startswith(joined)
        assert len(joined) in starts
        assert len(joined) <= min(ends)


# --- drawing -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mamba-state"])
def test_drawn_answers_depend_on_seed_and_place_alone(family, base):
    one = base(family)
    few = {"temperature": 1.0, "max_new_tokens": 8}
    found = generate(one, None, PROMPTS, seed=3, **few)
    assert generate(one, None, PROMPTS, seed=3, batch_size=2, **few) == found
    assert generate(one, None, PROMPTS[:2], seed=3, **few) == found[:2]
    assert generate(one, None, PROMPTS, seed=4, **few) != found
    assert len(set(generate(one, None, [PROMPTS[0]] * 3, seed=3, **few))) == 3
    assert generate(one, None, PROMPTS[1:2], seed=3, numbers=[1], **few) == found[1:2]
    for numbers in ([], [0, 1], [-1]):
        with pytest.raises(InputError, match=r"numbers are .*; expected one for each of 1 prompts"):
            generate(one, None, PROMPTS[:1], numbers=numbers, **few)
    random = torch.get_rng_state()
    generate(one, None, PROMPTS[:1], **few)
    assert torch.equal(torch.get_rng_state(), random)


def test_tokens_are_drawn_with_their_probability():
    logits = torch.tensor([2.0, 0.5, -1.0, 1.0])
    sampling = Sampling(temperature=0.7)
    draws = [source(0, i) for i in range(4000)]
    tokens = torch.tensor(sampling.choose(logits.expand(4000, -1), draws))
    shares = torch.bincount(tokens, minlength=4) / 4000
    expected = torch.softmax(logits / 0.7, 0)
    # five standard deviations of a share
    assert bool(((shares - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt()).all())


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=8),
    st.floats(0.01, 1),
    st.floats(0.1, 5),
    st.integers(0, 99),
)
def test_top_p_draws_from_the_nucleus(logits, top_p, temperature, seed):
    scaled = torch.tensor(logits, dtype=torch.float64) / temperature
    p = scaled.softmax(0)
    [token] = Sampling(temperature, top_p).choose(torch.tensor([logits]), [source(seed, 0)])
    likelier = float(p[p > p[token] + 1e-6].sum())
    assert likelier < top_p + 1e-6


def test_temperature_zero_takes_the_most_likely():
    assert Sampling().choose(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), []) == [1, 0]


def test_a_temperature_near_zero_takes_the_most_likely():
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    assert Sampling(1e-320).choose(logits, [source(0, i) for i in range(2)]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_chosen_from_logits_that_are_no_numbers(temperature):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, nan], [-inf, 1.0], [inf, 0.0], [-inf, -inf]])
    draws = [source(0, i) for i in range(4)]
    assert Sampling(temperature).choose(logits, draws) == [None, 1, None, None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "mamba-state"])
def test_a_row_that_is_no_number_ends_and_the_others_go_on(family, temperature, base, caplog):
    one = base(family)
    target = {"llama": "v_proj", "mamba-state": "in_proj"}[family]
    handle = attach(one.model, LoRASpec(rank=2, targets=(target,)), "good")
    handle.add(LoRASpec(rank=2, targets=(target,)), "huge")
    with torch.no_grad():
        for parameter in handle.parameters("huge"):
            parameter.fill_(1e200)
    settings = {"max_new_tokens": 6, "temperature": temperature, "batch_size": 3, "stop_ids": []}
    prompts = [[5, 9, 40], [7, 7, 7], [1, 2], [9, 9, 9], [8], [1, 1, 2]]
    mixes = ["good", "huge", None, "huge", None, "good"]
    found = answers(one, handle, prompts, mixes=mixes, **settings)
    alone = answers(one, handle, prompts, mixes=[None] * 6, **settings)
    for mix, answer, expected in zip(mixes, found, alone, strict=True):
        if mix == "huge":
            assert (answer.text, answer.num_tokens, answer.finish) == ("", 0, "not finite")
        else:  # "good" has not learnt yet
            assert answer == expected
    (told,) = [r.getMessage() for r in caplog.records if r.name.startswith("lorakit")]
    assert told.startswith("huge: after 0 tokens of the answer to ")


# --- limits and mistakes -------------------------------------------------------------------


def test_the_context_ends_an_answer(base):
    one = base(max_position_embeddings=16)
    found = answers(one, None, [[3] * 10, [4]], max_new_tokens=9, stop_ids=[])
    assert [(a.num_tokens, a.finish) for a in found] == [(6, "context"), (9, "length")]


def test_the_positions_of_a_decoder_end_an_answer(bart):
    one = bart()
    found = answers(one, None, [[3] * 24, [4]], max_new_tokens=256, stop_ids=[])
    assert [(a.num_tokens, a.finish) for a in found] == [(23, "context")] * 2
    with pytest.raises(InputError, match="prompt 2 has 25 tokens, and this model takes 24 at most"):
        answers(one, None, [[3], [3] * 25])


def test_all_mistakes_are_named_together(base):
    one = base(max_position_embeddings=16)
    with pytest.raises(InputError) as caught:
        generate(one, None, [[], [1] * 16, [1]], mixes=["a"], max_new_tokens=0, stop=[""])
    text = str(caught.value)
    for part in (
        "max_new_tokens is 0",
        "mixes has 1 entries for 3 prompts",
        "a stop text is empty",
        "an adapter is named, but none is attached",
        "prompt 1 is empty",
        "prompt 2 has 16 tokens; the context of this model is 16",
    ):
        assert part in text


def test_more_mistakes(base):
    one = base()
    with pytest.raises(InputError, match="give a list"):
        generate(one, None, "text")
    with pytest.raises(InputError, match=r"top_p=0\.5 cannot act"):
        generate(one, None, ["a"], top_p=0.5)
    with pytest.raises(InputError, match="temperature is nan"):
        generate(one, None, ["a"], temperature=float("nan"))
    with pytest.raises(InputError, match="batch_size is 0"):
        generate(one, None, ["a"], batch_size=0)
    handle = attach(one.model, LoRASpec(rank=2), "alpha")
    with pytest.raises(RoutingError, match="did you mean 'alpha'"):
        generate(one, handle, ["a"], adapter="alpa")
    with pytest.raises(InputError, match="give one of them"):
        generate(one, handle, ["a"], adapter="alpha", mixes=["alpha"])
    assert generate(one, None, []) == []


def test_rows_are_bounded_by_the_memory_of_their_cache(base, monkeypatch, caplog):
    one = base()
    # 2 layers · keys and values · 2 heads of 4 · 8 bytes
    assert slotted._cache_bytes_per_token(one.model) == 256
    monkeypatch.setattr(slotted, "_CACHE_BYTES", 256 * (11 + 5) * 2)
    caplog.set_level("INFO", logger="lorakit")
    found = generate(one, None, PROMPTS, max_new_tokens=5, batch_size=6)
    assert "2 rows at a time instead of 6" in caplog.text
    monkeypatch.undo()
    assert found == generate(one, None, PROMPTS, max_new_tokens=5)
