"""The page as text; how it looks in a browser is tested with the command."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from hcsdl.report.answer import Answer
from hcsdl.report.page import Head, Section, Table, data_uri, render_page
from tests.report.test_picture import draw

pytestmark = pytest.mark.xeon_only


def render(**changes: object) -> str:
    given = {
        "head": Head("A <b>title</b>", "made of things", ["It is `LEAKY`."], "NSC means that."),
        "answers": [Answer("Which fails?", "That <one> & run `hcsdl embed`.", "3 of 4.", "shown")],
        "sections": [
            Section("shown", "Shown", "In it:", [draw()], [Table("Numbers", ["what", "how"], [["a", "<1"]])]),
            Section("partly", "Partly", tables=[Table("Pairs", [], [["a", "b"]])], missing=["One is left out: `hcsdl score`."]),
            Section("empty", "Empty", missing=["Nothing here: `hcsdl train`."]),
            Section("silent", "Silent"),
        ],
        "images": {"a_picture": data_uri(b"bytes", "image/png")},
    }
    return render_page(**(given | changes))


def test_everything_given_stands_in_the_page_and_is_escaped():
    page = render()
    for text in (
        "A &lt;b&gt;title",
        "That &lt;one&gt; &amp; run <code>hcsdl embed</code>",
        "&lt;1",
        "It is <code>LEAKY</code>",
        "Lines rise",
        "Up is more.",
    ):
        assert text in page
    assert 'src="data:image/png;base64,Ynl0ZXM="' in page and "<script" not in page and "http" not in page


def test_contents_and_what_is_left_out():
    page = render()
    assert '<a href="#shown">Shown</a>' in page and '<a href="#shown">See the figures</a>' in page
    assert "Silent" not in page and page.index("Not in this report</h2>") < page.index(
        "<strong>Empty.</strong> Nothing here: <code>hcsdl train</code>"
    )
    assert page.index('<section id="partly">') < page.index("One is left out") < page.index('<section id="absent">')
    assert "See the figures" not in render(answers=[Answer("q", "a", "e", "empty")])


def test_tags_are_balanced():
    open_tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, _: list) -> None:
            if tag not in ("meta", "link", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Reader().feed(render())
    assert not open_tags
