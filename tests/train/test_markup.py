"""Markup: nothing from outside becomes HTML."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.train.report.markup import Html, escape, fill, join


class Reader(HTMLParser):
    """The standard library's parser, as an independent witness of what a browser would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


#: text that XML and HTML can hold
texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"]))


@given(texts, texts)
def test_text_and_attributes_come_back_as_they_were(text: str, attribute: str) -> None:
    page = read(fill('<p title="{attribute}">{text}</p>', text=text, attribute=attribute))
    assert page.tags == [("p", {"title": attribute})]
    assert page.text == text


@given(st.text(), st.lists(st.text()))
def test_no_text_makes_a_tag(text: str, others: list[str]) -> None:
    page = read(join([fill("<b>{t}</b>", t=text), *others], "<br>"))
    assert [tag for tag, _ in page.tags] == ["b", *["br"] * len(others)]


def test_markup_passes_and_braces_of_css_stay() -> None:
    assert fill("<style>a { b: c } {Up} {x}</style>", x=Html("<i>")) == (
        "<style>a { b: c } {Up} <i></style>"
    )
    assert fill("{a}", a="{b}") == "{b}"  # what was filled in is not filled again


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(KeyError, match="name"):
        fill("{name}")


def test_signs_that_html_forbids_are_replaced() -> None:
    assert escape("a\x00b\x1b[1m\ud800\tc\n") == "a�b�[1m�\tc\n"
