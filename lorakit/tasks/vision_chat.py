"""``vision-chat``: answers to chats with pictures, by a language model that sees them.

Every assistant's turn is learnt. Where a turn begins and ends is found by writing the chat up to
there, as the base's processor writes it; what it writes for a beginning must be the beginning of
what it writes for the whole, and a row for which it is not is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.bases import Base
from lorakit.bases.load import Task as BaseTask
from lorakit.bases.quiet import quiet_transformers
from lorakit.data.columns import checked_text
from lorakit.data.rows import Row, RowError, shown
from lorakit.errors import BaseError, InputError
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.tasks.forwards import RowTask, token_losses
from lorakit.tasks.kinds import RowKind, limit_of
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import Fields, Made, RowData, RowExample, RowSpec, load_rows
from lorakit.tasks.seq2seq import generated
from lorakit.tasks.vision import AskedFile, file_content, opened

_ROLES = ("system", "user", "assistant")
#: a picture's place in a text, as LLaVA's rows have it, with the line breaks that set it apart
_PLACE = re.compile(r"\n?<image>\n?")


@dataclass(frozen=True)
class VisionChat(RowKind):
    """Chats with pictures."""

    name: ClassVar[str] = "vision-chat"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    base_task: ClassVar[BaseTask] = "vision-chat"
    fields: ClassVar[Fields] = Fields(
        {"messages": ("messages", "conversation", "conversations")},
        {"images": ("images", "image")},
        lengths=("max_length",),
    )
    text_metrics: ClassVar[bool] = True
    no_prompts: ClassVar[str | None] = (
        "a prompt of the task vision-chat is a chat with pictures; give rows of messages to "
        "lorakit eval --save"
    )

    def load_data(self, spec: RowSpec, base: Base) -> RowData:
        processor = _chat_processor(base)
        limit = limit_of(spec, base)

        def make(row: Row, values: Mapping[str, Any]) -> Made:
            messages, contents, pictures = chat_of(values, row.file)
            ids, learnt = encoded(processor, messages, contents)
            if limit is not None and len(ids) > limit:
                raise RowError(
                    f"longer than {limit:,} tokens",
                    f"{len(ids):,} tokens with its pictures; at most {limit:,} fit",
                )
            weight = int(learnt[1:].sum())
            if not weight:
                raise RowError("nothing supervised", "no turn of an assistant would be learnt")
            prompt = messages[: _last_answer(messages)]
            inputs = {
                "processor": processor,
                "messages": messages,
                "pictures": pictures,
                "learnt": learnt,
                "asked": _Asked(prompt, tuple(pictures)),
                "expected": _text_of(messages[_last_answer(messages)]),
            }
            seen = b"".join(hashlib.sha256(content).digest() for content in contents)
            key = json.dumps(prompt).encode() + seen
            return Made(inputs, len(ids), weight, key + json.dumps(messages).encode(), key)

        return load_rows(spec, self.fields, make, task=self.name, unit=self.unit)

    def on(self, model: nn.Module, handle: Handle | None, recompute: Recompute = "none") -> RowTask:
        return RowTask(
            model, handle, chat_batch, chat_sums, recompute=recompute,
            single="a chat's pictures are not rows of a batch",
        )  # fmt: skip

    @torch.no_grad()
    def predict(
        self,
        base: Base,
        handle: Handle | None,
        adapter: MixLike,
        inputs: Sequence[Any],
        max_new_tokens: int,
    ) -> list[str]:
        """Greedy answers to the chats of a data set."""
        processor, found = _chat_processor(base), []
        for asked in inputs:
            if not isinstance(asked, _Asked):
                raise InputError(str(self.no_prompts))
            contents = [picture.read() for picture in asked.pictures]
            batch = processed(processor, asked.messages, contents, ask=True)
            given = {
                name: tensor.to(base.placement.device, base.placement.dtype)
                if tensor.is_floating_point()
                else tensor.to(base.placement.device)
                for name, tensor in batch.items()
            }
            made = generated(base.model.eval(), handle, adapter, given, max_new_tokens)
            new = made[0, given["input_ids"].shape[1] :].tolist()
            found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
        return found


@dataclass(frozen=True)
class _Asked:
    """A chat up to its last answer."""

    messages: list[dict[str, Any]]
    pictures: tuple[AskedFile, ...]

    def __str__(self) -> str:
        return "\n".join(f"{one['role']}: {_text_of(one)}" for one in self.messages)


def chat_of(
    values: Mapping[str, Any], file: str
) -> tuple[list[dict[str, Any]], list[bytes], list[AskedFile]]:
    """A row's messages as processors take them, what its pictures hold, in order, and where each
    is read again.

    A message's content is text, or a list of ``{"type": "text", "text": …}`` and ``{"type":
    "image", "image": PATH}``; an ``<image>`` in a text is a picture without a path. Those are taken
    from the column ``images``, and where no message has a place for them they stand before the
    first user's text.

    Raises:
        RowError: malformed, a picture is missing or broken, or there is none.
    """
    messages, paths = _messages(values["messages"])
    column = values.get("images")
    listed = column if isinstance(column, list) else [] if column is None else [column]
    if listed and not paths:
        user = next((m for m in messages if m["role"] == "user"), None)
        if user is None:
            raise RowError("no user", "there is no message of a user to put the pictures into")
        user["content"][:0] = [{"type": "image"} for _ in listed]
        paths = [None] * len(listed)
    free = iter(listed)
    contents: list[bytes] = []
    pictures: list[AskedFile] = []
    for path in paths:
        value = path if path is not None else next(free, None)
        if value is None:
            raise RowError(
                "a missing picture",
                f"the messages have places for {len(paths)} pictures (an <image> in a text is "
                f"one), and only {len(contents)} are given",
            )
        content, picture = file_content(value, file, "picture")
        opened(content, picture.name)
        contents.append(content)
        pictures.append(picture)
    left = sum(1 for _ in free)
    if left:
        raise RowError("too many pictures", f"{left} pictures have no place in the messages")
    if not contents:
        raise RowError(
            "no picture", "there is no picture; rows of text alone are for a language model"
        )
    return messages, contents, pictures


def _messages(value: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages whose contents are lists, and the paths of their pictures (``None``: elsewhere)."""
    if not isinstance(value, list) or not value:
        raise RowError("no messages", f"the messages are {shown(value)}; expected a list")
    found: list[dict[str, Any]] = []
    paths: list[Any] = []
    for number, one in enumerate(value, 1):
        role = one.get("role") if isinstance(one, Mapping) else None
        if not isinstance(one, Mapping) or role not in _ROLES:
            raise RowError(
                "a broken message",
                f"message {number} is {shown(one)}; expected a role ({', '.join(_ROLES)}) and a "
                "content",
            )
        content = one.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        made: list[dict[str, Any]] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                text = checked_text(part.get("text"), f"message {number}", "content")
                for place, piece in enumerate(_PLACE.split(text)):
                    if place:
                        paths.append(None)
                        made.append({"type": "image"})
                    if piece.strip():
                        made.append({"type": "text", "text": piece})
            elif kind == "image":
                paths.append(next((part[k] for k in ("image", "path", "url") if part.get(k)), None))
                made.append({"type": "image"})
            else:
                raise RowError(
                    "a broken message",
                    f"message {number} holds {shown(part)}; expected text or an image",
                )
        found.append({"role": role, "content": made})
    if not any(one["role"] == "assistant" for one in found):
        raise RowError("no answer", "there is no message of an assistant, so nothing to learn")
    return found, paths


def processed(
    processor: Any, messages: Sequence[Any], pictures: Sequence[bytes], *, ask: bool
) -> dict[str, Tensor]:
    """The model's inputs of a chat.

    Args:
        ask: whether the beginning of an answer stands behind it.

    Raises:
        RowError: the base's template or its processor refuses the chat.
    """
    try:
        text = processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )
    except Exception as error:  # a template is a program: Jinja's errors, type errors, its own
        raise _refused("chat template", error) from None
    places = sum(p["type"] == "image" for m in messages for p in m["content"])
    images = [opened(content, "picture") for content in pictures[:places]]
    try:
        with quiet_transformers():
            made = processor(text=[text], images=[images] if images else None, return_tensors="pt")
    except (ValueError, IndexError, StopIteration) as error:  # as each counts pictures and marks
        raise _refused("processor", error) from None
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, Tensor)}


def _refused(by: str, error: Exception) -> RowError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return RowError(f"refused by the {by}", f"the base's {by} refuses it: {reason}")


def encoded(
    processor: Any, messages: list[dict[str, Any]], pictures: Sequence[bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a whole chat, [n], and which of them are learnt, bool [n].

    Raises:
        RowError: the base's template or its processor refuses the chat, or the template writes a
            chat's beginning otherwise than the whole.
    """
    whole = processed(processor, messages, pictures, ask=False)["input_ids"][0].numpy()
    learnt = np.zeros(len(whole), bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = processed(processor, messages[:i], pictures, ask=True)["input_ids"][0].numpy()
        after = processed(processor, messages[: i + 1], pictures, ask=False)["input_ids"][0].numpy()
        for part in (before, after):
            if len(part) > len(whole) or not np.array_equal(part, whole[: len(part)]):
                raise RowError(
                    "a template that looks back",
                    f"the base's chat template writes the chat up to message {i + 1} otherwise "
                    "than in the whole, so where the answer stands is not known",
                )
        learnt[len(before) : len(after)] = True
    return whole, learnt


def chat_batch(examples: Sequence[RowExample]) -> dict[str, Tensor]:
    """The inputs of one chat."""
    (example,) = examples
    inputs = example.inputs
    contents = [picture.read() for picture in inputs["pictures"]]
    batch = processed(inputs["processor"], inputs["messages"], contents, ask=False)
    learnt = torch.from_numpy(inputs["learnt"])[None]
    return {**batch, "_labels": torch.where(learnt, batch["input_ids"], -100)}


def chat_sums(output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, None]:
    """Summed negative log-likelihood of the learnt tokens, each from those before it, [1]."""
    return token_losses(output.logits[:, :-1], batch["_labels"][:, 1:]), None


def _chat_processor(base: Base) -> Any:
    processor = base.processor
    if processor is None or not hasattr(processor, "apply_chat_template"):
        raise BaseError(
            f"{base.ref} brings nothing that reads chats with pictures (processor_config.json, "
            "preprocessor_config.json, tokenizer.json). Copy them from its original."
        )
    if getattr(processor, "chat_template", None) is None:
        raise BaseError(
            f"{base.ref} has no chat template, so chats cannot be written for it. Copy its "
            "chat_template.jinja from the model that it was made of."
        )
    return processor


def _last_answer(messages: Sequence[Any]) -> int:
    return max(i for i, one in enumerate(messages) if one["role"] == "assistant")


def _text_of(message: Mapping[str, Any]) -> str:
    return " ".join(
        part["text"] if part["type"] == "text" else "[picture]" for part in message["content"]
    )
