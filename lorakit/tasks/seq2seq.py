"""``seq2seq``: a text from a text, by an encoder and a decoder (translation, summarising)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.bases import Base
from lorakit.bases.quiet import quiet_transformers
from lorakit.data.columns import checked_text
from lorakit.data.rows import Row, RowError
from lorakit.errors import InputError
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.tasks.forwards import RowTask, padded, token_losses
from lorakit.tasks.kinds import RowKind, Texts, pad_id, random_ids, tokenizer_of
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import Fields, Made, RowData, RowExample, RowSpec, load_rows

#: prompts that are answered at a time
_TOGETHER = 16


@dataclass(frozen=True)
class Seq2Seq(RowKind):
    """Encoder-decoders such as T5 and BART."""

    name: ClassVar[str] = "seq2seq"
    peft_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    base_task: ClassVar[str] = "seq2seq"
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
            inputs = {
                "ids": np.array(ids, np.int32),
                "labels": np.array(labels, np.int32),
                "learnt": np.ones(len(labels), bool),
                "asked": prompt,
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
        tokenizer, found = tokenizer_of(base), []
        model, pad = base.model.eval(), pad_id(base.model)
        positions = getattr(model.config, "max_position_embeddings", None)  # T5 has no such limit
        if positions is not None:
            max_new_tokens = min(max_new_tokens, positions - 1)
        for start in range(0, len(inputs), _TOGETHER):
            ids = [tokenizer(str(text))["input_ids"] for text in inputs[start : start + _TOGETHER]]
            for text, one in zip(inputs[start:], ids, strict=False):
                if positions is not None and len(one) > positions:
                    raise InputError(
                        f"{str(text)[:40]!r} … has {len(one):,} tokens, and the base takes "
                        f"{positions:,}; shorten it"
                    )
            batch = {
                "input_ids": padded(ids, pad).to(base.placement.device),
                "attention_mask": padded([[1] * len(one) for one in ids], 0).to(
                    base.placement.device
                ),
            }
            made = generated(model, handle, adapter, batch, max_new_tokens)
            found += tokenizer.batch_decode(made, skip_special_tokens=True)
        return [text.strip() for text in found]


def generated(
    model: Any,
    handle: Handle | None,
    adapter: MixLike,
    batch: Mapping[str, Tensor],
    max_new_tokens: int,
    **options: Any,
) -> Tensor:
    """Token ids that a model generates greedily, [E, …]."""
    using = contextlib.nullcontext() if handle is None else handle.use(adapter)
    with using, quiet_transformers():
        made: Tensor = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **options
        )
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
    return found if isinstance(found, int) else tokenizer_of(base).eos_token_id


def answer_ids(texts: Texts, answer: str, end: int | None) -> list[int]:
    """Token ids of an answer, with the end behind them.

    Raises:
        RowError: longer than the limit.
    """
    ids: list[int] = list(texts.tokenizer(text_target=answer)["input_ids"])
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)
    if texts.limit is None or len(ids) <= texts.limit:
        return ids
    if texts.truncate:
        return [*ids[: texts.limit - 1], ids[-1]]
    raise RowError(
        f"longer than {texts.limit:,} tokens",
        f"completion: {len(ids):,} tokens; at most {texts.limit:,} fit",
    )
