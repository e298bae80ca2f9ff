"""TRL's SFTTrainer with its defaults, on PEFT; its own loop runs in a thread, a step at a time."""

from __future__ import annotations

import tempfile
import threading
from typing import Any

from benchmarks.contestants import task as shared


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base, data, batches = shared.load(task)
    model = PeftModel.from_pretrained(base.model, str(shared.start(task)), is_trainable=True)
    examples = [data[row] for rows in batches for row in rows]
    dataset = Dataset.from_list(
        [
            {"input_ids": e.ids.tolist(), "completion_mask": e.supervised.astype(int).tolist()}
            for e in examples
        ]
    )
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=task["batch_size"],
        max_steps=len(batches),
        learning_rate=shared.LR,
        lr_scheduler_type="constant",
        completion_only_loss=True,
        max_length=None,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    state: dict[str, Any] = {
        "may": threading.Semaphore(0),
        "done": threading.Semaphore(0),
        "tokens": [sum(len(data[row].ids) for row in rows) for rows in batches],
        "error": None,
    }

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            state["may"].acquire()

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                state["loss"] = logs["loss"]
                state["done"].release()

    trainer = SFTTrainer(
        model, settings, train_dataset=dataset, processing_class=base.tokenizer, callbacks=[Turns()]
    )

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:  # the main thread waits, and tells
            state["error"] = error
            state["done"].release()

    threading.Thread(target=train, daemon=True).start()
    return state


def step(state: dict[str, Any], i: int) -> dict[str, float]:
    state["may"].release()
    state["done"].acquire()
    if state["error"] is not None:
        raise state["error"]
    return {"loss": state["loss"], "tokens": float(state["tokens"][i])}
