"""A tokenizer of transformers as the fields of a GGUF.

llama.cpp has the rules that cut text into words built in, each under a name, and a wrong name
changes how some text is read without a word. Its converter tells the rule from a hash of what the
tokenizer makes of a text, which knows published vocabularies alone; here it is told from the rule
itself, which ``tokenizer.json`` states. The rules are those of ``llama-vocab.cpp``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.bases.gguf_write import text, texts, truth, whole, wholes
from lorakit.errors import BaseError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_GPT2 = "GPT-2's rule"
_DIGITS = "every digit apart, then GPT-2's rule"
#: the rule as the tokenizers library states it → llama.cpp's name; the second where the tokenizer
#: takes a word that is a token before it merges
_RULES: dict[str, tuple[str | None, str | None]] = {
    _GPT2: ("gpt-2", None),
    _DIGITS: ("smollm", None),
    # Qwen 2 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": ("qwen2", None),
    # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": ("smaug-bpe", "llama-bpe"),
}
#: transformers' name of a special token → the field
_SPECIAL = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "unk_token_id": "unknown",
    "pad_token_id": "padding",
}
#: normalisers that llama.cpp leaves out and that change no text that is in the usual form already
_HARMLESS = ("NFC",)


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of text."""

    fields: Mapping[str, bytes]
    tokens: tuple[str, ...]
    """By number, without what fills it up to the size of the embedding."""
    notes: tuple[str, ...] = ()


def vocabulary_of(tokenizer: Any, num_rows: int) -> Vocabulary:
    """The fields of a byte-level BPE tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        num_rows: rows of the embedding; unused tokens fill the vocabulary up to it.

    Raises:
        BaseError: llama.cpp has no rule like its, or it has more tokens than the embedding rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BaseError(_refusal("it is not a fast tokenizer, so its rules cannot be read"))
    rules = json.loads(backend.to_str())
    rule = pre_tokenizer_name(rules)
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_number) >= num_rows:
        raise BaseError(
            f"The tokenizer has tokens up to number {max(by_number)}, the embedding {num_rows} "
            "rows. Give the tokenizer that belongs to this model, or resize the embedding."
        )
    tokens = [by_number.get(i, f"[PAD{i}]") for i in range(num_rows)]
    fields = {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(rule),
        "tokenizer.ggml.tokens": texts(tokens),
        "tokenizer.ggml.token_type": wholes(_types(rules, by_number, num_rows)),
        "tokenizer.ggml.merges": texts(_merges(rules)),
        **special_fields(tokenizer),
    }
    notes = []
    if rules.get("normalizer"):
        notes.append(
            f"the tokenizer brings text into the form {rules['normalizer']['type']} first, and "
            "llama.cpp does not: text in another form is read differently there"
        )
    num_known = max(by_number) + 1
    return Vocabulary(fields, tuple(tokens[:num_known]), tuple(notes))


def special_fields(tokenizer: Any) -> dict[str, bytes]:
    """What a GGUF says of special tokens and chats; these may change without the vocabulary."""
    fields = {}
    for ours, theirs in _SPECIAL.items():
        number = getattr(tokenizer, ours, None)
        if isinstance(number, int):
            fields[f"tokenizer.ggml.{theirs}_token_id"] = whole(number)
    ids = tokenizer("a")["input_ids"]
    for name, at, token in (
        ("bos", ids[:1], tokenizer.bos_token_id),
        ("eos", ids[-1:], tokenizer.eos_token_id),
    ):
        fields[f"tokenizer.ggml.add_{name}_token"] = truth(token is not None and at == [token])
    fields["tokenizer.ggml.add_space_prefix"] = truth(False)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        fields["tokenizer.chat_template"] = text(template)
    return fields


def pre_tokenizer_name(rules: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule that a ``tokenizer.json`` states.

    Raises:
        BaseError: it has none, with the way out.
    """
    model = rules.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte fallback (SentencePiece)" if model.get("byte_fallback") else None
        raise BaseError(_refusal(f"its kind is {kind or model.get('type')}, not byte-level BPE"))
    normalizer = rules.get("normalizer")
    if normalizer and normalizer.get("type") not in _HARMLESS:
        raise BaseError(_refusal(f"it changes text before cutting it ({normalizer.get('type')})"))
    rule = _rule(rules.get("pre_tokenizer") or {})
    plain, whole_words = _RULES.get(rule or "", (None, None))
    found = whole_words if model.get("ignore_merges") else plain
    if found is None:
        what = json.dumps(rules.get("pre_tokenizer"), ensure_ascii=False)
        more = " with ignore_merges" if model.get("ignore_merges") else ""
        raise BaseError(_refusal(f"llama.cpp has no name here for its cutting rule{more}: {what}"))
    return found


def _rule(pre: Mapping[str, Any]) -> str | None:
    """The rule: a key of the table, another expression, or ``None`` if it has another form."""
    steps = pre.get("pretokenizers", [pre])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if steps[-1].get("use_regex", True):
        before = [(s.get("type"), s.get("individual_digits")) for s in steps[:-1]]
        return {(): _GPT2, (("Digits", True),): _DIGITS}.get(tuple(before))
    if len(steps) != 2 or steps[0].get("type") != "Split" or steps[0].get("invert"):
        return None
    if steps[0].get("behavior") != "Isolated":
        return None
    found = steps[0].get("pattern", {}).get("Regex")
    return found if isinstance(found, str) else None


def _types(rules: Mapping[str, Any], by_number: Mapping[int, str], num_rows: int) -> list[int]:
    added = {token["id"]: token for token in rules.get("added_tokens", ())}
    return [
        (_CONTROL if added[i].get("special") else _USER_DEFINED)
        if i in added
        else (_NORMAL if i in by_number else _UNUSED)
        for i in range(num_rows)
    ]


def _merges(rules: Mapping[str, Any]) -> list[str]:
    pairs = rules["model"].get("merges", [])
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]


def _refusal(why: str) -> str:
    return (
        f"This tokenizer cannot be written into a GGUF here: {why}. Merge into a folder instead "
        "(lorakit merge --out DIR), and convert that with llama.cpp's convert_hf_to_gguf.py."
    )
