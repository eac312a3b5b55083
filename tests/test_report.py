"""The HTML page."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cmh_milvus.comparison import Candidate, compare
from cmh_milvus.report.page import Answer, SizeLine, Strip, render_page, write_page


@pytest.fixture(scope="module")
def report(emoji_features, emoji_codes):
    noise = {m: np.random.default_rng(0).integers(0, 256, c.shape, dtype=np.uint8) for m, c in emoji_codes.items()}
    return compare(emoji_features, [Candidate("ours", emoji_codes, seconds=3.0), Candidate("noise <b>", noise)])


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all were closed."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use", "rect"})

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(html):
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    return tags.seen


def test_page_shows_all_and_loads_nothing(report):
    picture = "data:image/webp;base64,AAAA"
    html = render_page(
        "Emoji",
        report,
        intro="Hello.",
        text_queries=[Strip("a ship", [Answer(3, "boat", picture, held_out=True)])],
        picture_queries=[Strip("boat", [Answer(4, "a small boat")], picture)],
        sizes=[SizeLine("code", 8), SizeLine("float", 2048)],
    )
    tags = parse(html)
    for tag, attributes in tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), "the page must be self-contained"
    assert sum(tag == "svg" for tag, _ in tags) == 2
    ours = report.results[0].directions["image_to_text"]
    for shown in ("a ship", "a small boat", f"{ours.estimates['MAP@all'].mean:.3f}", "chance", "256", "200 queries"):
        assert shown in html
    assert any("held" in attributes.get("class", "").split() for _, attributes in tags)


def test_what_comes_from_data_is_escaped(report):
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
    html = render_page(
        evil, report, intro=evil, text_queries=[Strip(evil, [Answer(1, evil, "data:,")])],
        picture_queries=[Strip(evil, [Answer(1, evil)], "data:,")],
    )  # fmt: skip
    tags = parse(html)
    assert not any(tag == "script" or "onerror" in attributes for tag, attributes in tags)
    assert "noise &lt;b&gt;" in html
    assert not re.search(r"<b>", html)


def test_same_report_gives_the_same_page(report):
    assert render_page("x", report) == render_page("x", report)


def test_page_is_written_whole(report, tmp_path):
    write_page(tmp_path / "new" / "page.html", render_page("x", report))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
