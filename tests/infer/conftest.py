"""Tiny random models of several families, and float64 throughout."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf

COMMON = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: name → (config class, model class, what differs from COMMON)
FAMILIES = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {}),
    "qwen2-biases": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {"head_dim": None}),
    "phi3-joined": (
        hf.Phi3Config,
        hf.Phi3ForCausalLM,
        {"head_dim": None, "partial_rotary_factor": 0.5},
    ),
    "mistral-window": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 3}),
    "gemma2-window-softcap": (
        hf.Gemma2Config,
        hf.Gemma2ForCausalLM,
        {
            "sliding_window": 3,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 0.3,
            "query_pre_attn_scalar": 4,
            # transformers 5.17 would take sdpa here, which leaves the bound of the scores out
            "attn_implementation": "eager",
        },
    ),
    "gemma3-window": (
        hf.Gemma3TextConfig,
        hf.Gemma3ForCausalLM,
        {
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 4,
        },
    ),
    "gpt2": (
        hf.GPT2Config,
        hf.GPT2LMHeadModel,
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_key_value_heads": None},
    ),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "granite-scaled": (hf.GraniteConfig, hf.GraniteForCausalLM, {"logits_scaling": 4.0}),
    "cohere-scaled": (hf.CohereConfig, hf.CohereForCausalLM, {"logit_scale": 0.25}),
    "bloom-no-positions": (hf.BloomConfig, hf.BloomForCausalLM, {"n_layer": 2, "n_head": 4}),
    "mamba-state": (
        hf.MambaConfig,
        hf.MambaForCausalLM,
        {"state_size": 4, "num_hidden_layers": 2, "expand": 2, "time_step_rank": 4},
    ),
}


def make(family, *, seed=0, **more):
    """A tiny random model in evaluation mode, float32."""
    config_class, model_class, changes = FAMILIES[family]
    settings = {k: v for k, v in {**COMMON, **changes, **more}.items() if v is not None}
    torch.manual_seed(seed)
    model = model_class(config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1 otherwise
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def byte_tokenizer():
    """One token a byte, then pad, bos and eos: 259 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<pad>", "<bos>", "<eos>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def tiny():
    """``tiny(family, seed=0)``: see :func:`make`."""
    return make


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def all_double(monkeypatch):
    """What models compute in float32 on purpose (norms, rotations, softmax) is float64 too.

    Otherwise a difference in the last bit of a float64 is rounded to one of float32's, and
    nothing could be compared below 1e-7.
    """
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def _by_backend(kind: str, precision: str) -> Callable[[], None]:
    return lambda: setattr(getattr(torch.backends, kind).matmul, "fp32_precision", precision)


@pytest.fixture(
    params=[
        pytest.param(lambda: torch.set_float32_matmul_precision("medium"), id="process"),
        pytest.param(_by_backend("cuda", "tf32"), id="cuda"),
        pytest.param(_by_backend("mkldnn", "bf16"), id="mkldnn"),
    ]
)
def reduced(request):
    """float32 products may round their factors, by each of the ways in which torch is told so."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    request.param()
    yield
    for backend, precision in zip(backends, ("ieee", "ieee"), strict=True):
        backend.fp32_precision = precision
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


@pytest.fixture
def precisions():
    """``precisions()``: what is allowed now; ``precisions(model)``: a list of what each later
    forward of the model finds allowed."""

    def now() -> tuple[str, ...]:
        backends = (torch.backends.cuda, torch.backends.mkldnn)
        return tuple(backend.matmul.fp32_precision for backend in backends)

    def watch(model=None):
        if model is None:
            return now()
        found: list[tuple[str, ...]] = []
        model.get_input_embeddings().register_forward_pre_hook(lambda *_: found.append(now()))
        return found

    return watch
