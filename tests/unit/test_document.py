"""Text from anywhere stays text, in both forms of a document."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from retune.document import Bullets, Code, Facts, Heading, Link, Signature, Table, Text, html, markdown

PIECES = st.lists(
    st.sampled_from([*"|[]()`*_~#<>&\\!-+=:;/'\" \n1.a", "<b>", "javascript:x", "](", "---", "**", "&lt;", "<!--", "https://x.y"]),
    max_size=12,
)
WORDS = PIECES.map("".join).filter(str.strip)
READER = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def plain_text(text: str) -> str:
    return " ".join(text.split())


def inline_tokens(text: str):
    return [child for token in READER.parse(text) if token.children for child in token.children]


@given(WORDS)
def test_text_means_nothing_to_markdown(words):
    """Read by a Markdown parser, every block is of one kind and holds the words, letter by letter."""
    document = markdown("t", [Table(["head"], [[f"x{words}x"]]), Bullets([f"x{words}x"]), Facts([("name", [f"x{words}x"])])])
    tokens = READER.parse(document)
    assert {token.type.removesuffix("_open") for token in tokens if token.nesting == 1} <= {
        *("heading", "table", "thead", "tbody", "tr", "th", "td", "bullet_list", "list_item", "paragraph"),
    }
    inline = inline_tokens(document)
    assert {token.type for token in inline} == {"text", "strong_open", "strong_close"}
    found = [plain_text("".join(child.content for child in token.children)) for token in tokens if token.type == "inline"]
    expected = plain_text(f"x{words}x")
    assert found == ["t", "head", expected, expected, f"name: {expected}"]


@given(WORDS)
def test_text_means_nothing_to_html(words):
    class Reader(HTMLParser):
        tags, words = (), ""

        def handle_starttag(self, tag, attrs):
            self.tags = (*self.tags, tag)

        def handle_data(self, data):
            self.words += data

    reader, empty = Reader(), Reader()
    for each, text in ((reader, words), (empty, "x")):
        each.feed(html(text, [Heading(2, text), Text([text], "bad"), Table([text], [[Code(text)]]), Bullets([Link(text, text)])]))
        each.close()
    with_link = words.strip() == words and words.startswith(("https://", "#"))
    assert with_link or reader.tags == empty.tags
    assert reader.words.count(words) >= 5


@pytest.mark.parametrize("address", ["javascript:alert(1)", "", "https://a b", 'https://a"><b>', "data:text/html,x"])
def test_only_web_addresses_and_places_in_the_document_are_links(address):
    assert "<a " not in html("t", [Text([Link("x", address)])])
    assert "](" not in markdown("t", [Text([Link("x", address)])])


def test_links_lead_where_they_say():
    assert '<a href="https://a.b/?c=1&amp;d=&quot;">x</a>' in html("t", [Text([Link("x", 'https://a.b/?c=1&d="')])])
    assert '<a href="#entry-1">x</a>' in html("t", [Text([Link("x", "#entry-1")])])
    assert "[x](<https://a.b/c%7Cd>)" in markdown("t", [Text([Link("x", "https://a.b/c|d")])])


def test_a_column_of_figures_is_set_right_and_one_of_words_is_not():
    page = html("t", [Table(["name", "value", "interval"], [["a", "1,234", "-0.1 to +2e-05"], ["b", "", ""]])])
    assert '<td>a</td><td class="n">1,234</td><td class="n">-0.1 to +2e-05</td>' in page


def test_there_is_a_place_to_sign():
    assert "<div>Name</div><div>Date</div>" in html("t", [Signature(["Name", "Date"])])
    assert "Name: ____" in markdown("t", [Signature(["Name", "Date"])])
