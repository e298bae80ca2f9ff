"""Changes to the tokenizer travel with the adapter."""

from __future__ import annotations

import pytest

from lorakit.errors import FormatError
from lorakit.formats import load_adapter, save_adapter
from lorakit.formats import tokenizer_files as module
from lorakit.formats.tokenizer_files import is_tokenizer_file, tokenizer_files_in

from ..tokenizers_ import chat_tokenizer
from .small import small_adapter


def test_a_real_tokenizer_comes_back(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    files = tokenizer_files_in(tmp_path / "tokenizer")
    assert set(files) == {path.name for path in (tmp_path / "tokenizer").iterdir()}
    folder = save_adapter(small_adapter(tokenizer_files=files), tmp_path / "adapter")
    assert load_adapter(folder).tokenizer_files == files
    again = type(tokenizer).from_pretrained(folder)
    assert again("w1 <new>")["input_ids"] == tokenizer("w1 <new>")["input_ids"]
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("tokenizer.json", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("additional_chat_templates/../../x.jinja", False),
        ("/etc/vocab.txt", False),
        ("../vocab.txt", False),
        ("adapter_config.json", False),
        ("optimizer.pt", False),
    ],
)
def test_names(name, belongs):
    assert is_tokenizer_file(name) is belongs


def test_a_file_too_large_is_no_tokenizers(tmp_path, monkeypatch):
    folder = save_adapter(small_adapter(), tmp_path / "a")
    monkeypatch.setattr(module, "MAX_BYTES", 3)
    with pytest.raises(FormatError, match=r"chat_template\.jinja has 7 bytes"):
        load_adapter(folder)
