"""The tokenizer inside a GGUF file, with the cutting rule that its vocabulary was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.bases.gguf_file import GgufHeader

#: rules of llama.cpp that set every digit apart and then cut like GPT-2. transformers knows none of
#: them and falls back to GPT-2's rule alone, which cuts white space before a digit differently: two
#: line breaks before "1." become two tokens, where the model was trained on one.
_SINGLE_DIGITS = {
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
}
#: rules for which GPT-2's is right
_LIKE_GPT2 = {None, "", "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"}

#: text in which the known rules differ; the saved tokenizer must read it as the first one did
PROBE = "Line 1\n\n 22 l'été isn't  3.14\t“naïve” 日本語 \N{GRINNING FACE}\r\n    x_1 = {'a': -7}"


def gguf_tokenizer(path: Path, header: GgufHeader) -> tuple[Any, list[str]]:
    """Build the tokenizer that a GGUF describes.

    Returns:
        The tokenizer, and what the user should know about it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # transformers 5.17 reads none of these from the file and takes defaults
    for name, token in header.special_tokens.items():
        setattr(tokenizer, name, token)
    notes = []
    backend = tokenizer.backend_tokenizer
    if header.pre_tokenizer in _SINGLE_DIGITS:
        from tokenizers import pre_tokenizers

        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif _fell_back_to_gpt2(backend) and header.pre_tokenizer not in _LIKE_GPT2:
        notes.append(
            f"the tokenizer's cutting rule {header.pre_tokenizer!r} is not known here and GPT-2's "
            "is used: some text may be tokenised differently than in the model's training"
        )
    if header.context_length is not None:
        tokenizer.model_max_length = header.context_length
    return tokenizer, notes


def _fell_back_to_gpt2(backend: Any) -> bool:
    """Byte-level with the built-in rule; a known rule is a Split before a ByteLevel."""
    return type(backend.pre_tokenizer).__name__ == "ByteLevel" and "use_regex=True" in str(
        backend.pre_tokenizer
    )
