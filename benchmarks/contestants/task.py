"""The task that all contestants are given: the same base, rows, batches and start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LR = 1e-3
RANK, ALPHA = 16, 32.0


def load(task: dict[str, Any], quantize: Any = None) -> tuple[Any, Any, list[list[int]]]:
    """(base, token data, the rows of each step's batch)."""
    if task["base"].startswith("random:"):
        return _random(task)
    from lorakit.bases import context_length, load_base
    from lorakit.data import DataSpec, load_data, order

    torch.manual_seed(0)
    base = load_base(task["base"], dtype=task.get("dtype", "float32"), quantize=quantize)
    for parameter in base.model.parameters():
        parts = getattr(parameter, "__tensor_flatten__", None)  # torchao keeps several tensors
        for tensor in [getattr(parameter, name) for name in parts()[0]] if parts else [parameter]:
            tensor.sum()  # weights mapped from a file count as loaded, for everybody
    spec = DataSpec(path=(task["data"],), map={"prompt": "mr", "completion": "ref"}, format="plain")
    data = load_data(spec, base.tokenizer, context_length=context_length(base.model))
    rows = order(len(data), 0, 0).tolist()
    size = task["batch_size"]
    count = task["steps"] + 1
    return base, data, [rows[i * size : (i + 1) * size] for i in range(count)]


#: Llama shapes with random weights: hidden size, MLP, layers, heads, key heads
SHAPES = {
    "tiny": (64, 128, 2, 4, 2),
    "1b": (2048, 8192, 16, 32, 8),
    "3b": (3072, 8192, 28, 24, 8),
    "8b": (4096, 14336, 32, 32, 8),
}
VOCABULARY = 32_000


def random_model(shape: str, device: str) -> Any:
    """A Llama of a shape, bfloat16 on a GPU and float32 elsewhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, layers, heads, kv = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


class Drawn(list[Any]):
    """Examples that come from no file, as far as a training asks about them."""

    @property
    def lengths(self) -> Any:
        import numpy as np

        return np.array([len(example.ids) for example in self], dtype=np.int64)

    def where(self, index: int) -> str:
        return f"random row {index + 1}"


def _random(task: dict[str, Any]) -> tuple[Any, Any, list[list[int]]]:
    """Random tokens of unequal lengths, the second half of each example supervised."""
    import numpy as np

    from lorakit.data import Example

    model = random_model(task["base"].partition(":")[2], task["device"])
    generator = np.random.default_rng(0)
    size, count = task["batch_size"], task["steps"] + 1
    data = Drawn()
    for i in range(size * count):
        length = int(generator.integers(task["length"] // 2, task["length"] + 1))
        ids = generator.integers(3, VOCABULARY, length, dtype=np.int32)
        data.append(Example(ids, np.arange(length) >= length // 2, i + 1, "random", i))
    base = SimpleNamespace(model=model, tokenizer=SimpleNamespace(pad_token_id=0))
    return base, data, [list(range(i * size, (i + 1) * size)) for i in range(count)]


def job_rows(batches: list[list[int]], jobs: int) -> list[list[int]]:
    """Each job's rows, an equal part of every batch, in the order in which they come."""
    share = len(batches[0]) // jobs
    return [
        [row for batch in batches for row in batch[k * share : (k + 1) * share]]
        for k in range(jobs)
    ]


def start(task: dict[str, Any]) -> Path:
    """The folder of the initial adapter, the same for all."""
    return Path(task["start"])
