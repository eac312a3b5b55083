"""The HTML page of an evaluation: figures, plots, what was searched and what came back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import markupsafe

from cmh_milvus.evaluation import CROSS_MODAL, DIRECTION_LABELS, DIRECTIONS, EvaluationReport
from cmh_milvus.report.plots import precision_recall_plot, topn_precision_plot


@dataclass(frozen=True)
class Answer:
    """One search result as the page shows it.

    Attributes:
        distance: Hamming distance in bits.
        caption: The item's text.
        picture: Data URI of its thumbnail, or "" for a text.
        held_out: The item was in no way part of training.
    """

    distance: int
    caption: str
    picture: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class Strip:
    """A query and its answers.

    Attributes:
        query: Text of the query, or the caption of the query picture.
        picture: Data URI of the query picture, or "".
        answers: Nearest first.
    """

    query: str
    answers: Sequence[Answer]
    picture: str = ""


@dataclass(frozen=True)
class SizeLine:
    """Bytes that an item's vector takes in one form."""

    form: str
    bytes_per_item: int


def template(name: str) -> jinja2.Template:
    """A template of this package; what is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cmh_milvus.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render_page(
    title: str,
    report: EvaluationReport,
    *,
    intro: str = "",
    text_queries: Sequence[Strip] = (),
    picture_queries: Sequence[Strip] = (),
    sizes: Sequence[SizeLine] = (),
) -> str:
    """The page as HTML text; everything it needs is inside, and everything that came from data is escaped.

    Args:
        title: Heading.
        report: Figures.
        intro: A paragraph below the heading.
        text_queries: Texts and the pictures found.
        picture_queries: Pictures and the texts found.
        sizes: For the table of bytes an item, smallest first.
    """
    return template("page.html.j2").render(
        title=title,
        intro=intro,
        report=report,
        cross_modal=CROSS_MODAL,
        within=[direction for direction in DIRECTIONS if direction not in CROSS_MODAL],
        direction_labels=DIRECTION_LABELS,
        topn_plot=markupsafe.Markup(topn_precision_plot(report)),  # noqa: S704  (matplotlib escapes its text)
        pr_plot=markupsafe.Markup(precision_recall_plot(report)),  # noqa: S704
        text_queries=text_queries,
        picture_queries=picture_queries,
        sizes=sizes,
    )


def write_page(path: Path, html: str) -> None:
    """Write a page; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
