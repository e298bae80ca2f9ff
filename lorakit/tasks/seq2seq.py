"""``seq2seq``: a text from a text, by an encoder and a decoder (translation, summarising)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.bases import Base, most_positions
from lorakit.bases.load import Task as BaseTask
from lorakit.bases.quiet import quiet_transformers
from lorakit.data.columns import checked_text
from lorakit.data.rows import Row, RowError
from lorakit.infer.generation.config import plain_generation
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.tasks.forwards import RowTask, padded, token_losses
from lorakit.tasks.kinds import Asked, RowKind, Texts, asked_of, pad_id, random_ids
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import Fields, Made, RowData, RowExample, RowSpec, load_rows

#: prompts that are answered at a time
_TOGETHER = 16


@dataclass(frozen=True)
class Seq2Seq(RowKind):
    """Encoder-decoders such as T5 and BART."""

    name: ClassVar[str] = "seq2seq"
    peft_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    base_task: ClassVar[BaseTask] = "seq2seq"
    fields: ClassVar[Fields] = Fields(
        {
            "prompt": ("prompt", "input", "source", "document", "article", "question", "text"),
            "completion": ("completion", "output", "target", "summary", "answer", "response"),
        },
        templated="prompt",
    )
    text_metrics: ClassVar[bool] = True

    def load_data(self, spec: RowSpec, base: Base) -> RowData:
        texts = Texts(spec, base, "prompt")
        end = end_id(base)

        def make(row: Row, values: Mapping[str, Any]) -> Made:
            prompt = texts.text(row.values, values)
            answer = checked_text(values["completion"], "the completion", "completion")
            ids = texts.ids(prompt, what="prompt")
            labels = answer_ids(texts, answer, end)
            asked = Asked((prompt,), np.array(ids, np.int32))
            inputs = {
                "ids": asked.ids,
                "labels": np.array(labels, np.int32),
                "learnt": np.ones(len(labels), bool),
                "asked": asked,
                "expected": answer,
            }
            content = f"{prompt}\0{answer}".encode()
            return Made(inputs, len(ids) + len(labels), len(labels), content, prompt.encode())

        return load_rows(spec, self.fields, make, task=self.name, unit=self.unit)

    def on(self, model: nn.Module, handle: Handle | None, recompute: Recompute = "none") -> RowTask:
        pad = pad_id(model)

        def batch(examples: Sequence[RowExample]) -> dict[str, Tensor]:
            ids = [example.inputs["ids"] for example in examples]
            return {
                "input_ids": padded(ids, pad),
                "attention_mask": padded([np.ones(len(one), np.int64) for one in ids], 0),
                **decoder_batch(model, examples),
            }

        probe = [
            RowExample(i, i, "", n + m, m, {
                "ids": random_ids(model, n),
                "labels": np.array(random_ids(model, m, seed=1)),
                "learnt": np.ones(m, bool),
            })
            for i, (n, m) in enumerate(((7, 3), (4, 5)))
        ]  # fmt: skip
        return RowTask(model, handle, batch, decoder_sums, recompute=recompute, probe=probe)

    @torch.no_grad()
    def predict(
        self,
        base: Base,
        handle: Handle | None,
        adapter: MixLike,
        inputs: Sequence[Any],
        max_new_tokens: int,
    ) -> list[str]:
        """Greedy answers."""
        model, pad = base.model.eval(), pad_id(base.model)
        room = most_positions(model)
        if room is not None:
            max_new_tokens = min(max_new_tokens, room - 1)
        together = _TOGETHER if self.on(model, handle).mode == "padded" else 1
        every = [asked_of(base, text, room).ids for text in inputs]
        found: list[str] = []
        for start in range(0, len(every), together):
            ids = every[start : start + together]
            batch = {
                "input_ids": padded(ids, pad).to(base.placement.device),
                "attention_mask": padded([[1] * len(one) for one in ids], 0).to(
                    base.placement.device
                ),
            }
            made = generated(model, handle, adapter, batch, max_new_tokens)
            found += base.require_tokenizer().batch_decode(made, skip_special_tokens=True)
        return [text.strip() for text in found]


def generated(
    model: Any,
    handle: Handle | None,
    adapter: MixLike,
    batch: Mapping[str, Tensor],
    max_new_tokens: int,
) -> Tensor:
    """Token ids that a model generates greedily, [E, …], by no other habit of its own."""
    using = contextlib.nullcontext() if handle is None else handle.use(adapter)
    with using, quiet_transformers(), plain_generation(model, max_new_tokens=max_new_tokens):
        made: Tensor = model.generate(**batch)
    return made


def decoder_batch(model: Any, examples: Sequence[RowExample]) -> dict[str, Tensor]:
    """The decoder's inputs, and the labels that are learnt."""
    labels = padded([example.inputs["labels"] for example in examples], -100)
    learnt = padded([example.inputs["learnt"].astype(np.int64) for example in examples], 0)
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    # a model without that shifts the labels that it is given, and its own loss is not used
    given = {"decoder_input_ids": prepare(labels=labels)} if prepare else {"labels": labels}
    return {**given, "_labels": torch.where(learnt.bool(), labels, -100)}


def decoder_sums(output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, None]:
    """Summed negative log-likelihood of each row's labels, [E]."""
    return token_losses(output.logits, batch["_labels"]), None


def end_id(base: Base) -> int | None:
    """The token at which an answer is over."""
    found = getattr(base.model.config, "eos_token_id", None)
    if isinstance(found, list):
        found = found[0] if found else None
    return found if isinstance(found, int) else base.require_tokenizer().eos_token_id


def answer_ids(texts: Texts, answer: str, end: int | None) -> list[int]:
    """Token ids of an answer, with the end behind them.

    Raises:
        RowError: longer than the limit.
    """
    ids: list[int] = list(texts.tokenizer(text_target=answer)["input_ids"])
    if end is not None and end not in ids[-2:]:  # behind mBART's end stands the language
        ids.append(end)
    if texts.limit is None or len(ids) <= texts.limit:
        return ids
    if texts.truncate:
        behind = 2 if ids[-2] == end else 1
        return [*ids[: texts.limit - behind], *ids[-behind:]]
    raise RowError(
        f"longer than {texts.limit:,} tokens",
        f"completion: {len(ids):,} tokens; at most {texts.limit:,} fit",
    )
