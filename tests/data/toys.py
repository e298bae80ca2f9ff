"""Tokenizers made here (byte-level BPE, so that any text comes back), and chat templates."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: BOS of its own, trimmed contents, a header of several tokens
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' "
    "+ m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
#: no generation prompt, white space before the answer, refuses roles that do not alternate
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
#: ignores add_generation_prompt although an answer has a header
HEADERLESS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
#: an empty thought before the last answer only, and thoughts of earlier answers left out
THINKING = (
    "{% for m in messages %}{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: nothing special behind an answer
UNENDED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}"
    "{% endif %}" + CHATML
)


@functools.cache
def _backend() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the cat sat on the mat and the dog sat on the cat\nassistant user system\n\nwhat is it"
    tokenizer.train_from_iterator([text] * 4, trainer)
    return tokenizer.to_str()


def make_tokenizer(template: str | None = CHATML, *, bos: bool = False, eos: str = "</s>") -> Any:
    """A fast tokenizer.

    Args:
        bos: whether it puts ``<s>`` before a text by itself.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_backend())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )
    made.chat_template = template
    return made


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One line a row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def supervised_text(tokenizer: Any, example: Any) -> list[str]:
    """The supervised stretches of an example, decoded."""
    found: list[list[int]] = []
    before = False
    for token, supervised in zip(example.ids.tolist(), example.supervised.tolist(), strict=True):
        if supervised:
            if not before:
                found.append([])
            found[-1].append(token)
        before = supervised
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in found]
