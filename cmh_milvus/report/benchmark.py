"""Tables and plots of a benchmark: methods side by side on several data sets."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import markupsafe

from cmh_milvus.evaluation import CROSS_MODAL, DIRECTION_LABELS
from cmh_milvus.report.page import template
from cmh_milvus.report.plots import Row, bits_plot, recall_plot, seconds_plot

DEFAULT_LENGTH = 64  # of the plots that show one code length
LABELS = [DIRECTION_LABELS[direction] for direction in CROSS_MODAL]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file that `cmh-milvus benchmark --format csv` printed."""
    texts, whole = {"data", "method", "device"}, {"n_bits", "seeds"}

    def value(key: str, text: str) -> Any:
        if key in texts:
            return text
        return int(text) if key in whole else float(text) if text else None

    with path.open(encoding="utf-8", newline="") as file:
        return [{key: value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def plotted_length(rows: Sequence[Row]) -> int:
    """The code length of plots that show one: 64 if it was run, else the longest."""
    lengths = {row["n_bits"] for row in rows}
    return DEFAULT_LENGTH if DEFAULT_LENGTH in lengths else max(lengths)


def benchmark_table(rows: Sequence[Row], lead: Sequence[str]) -> str:
    """An HTML table.

    Args:
        rows: Lines, in order; columns of `cmh_milvus.benchmark.summary`.
        lead: The first columns, of "data", "method" and "n_bits".
    """
    return template("benchmark_table.html.j2").render(rows=rows, lead=lead, labels=LABELS, with_paper=_with_paper(rows))


def render_benchmark(title: str, rows: Sequence[Row]) -> str:
    """A page of tables and plots, everything inside.

    Args:
        title: Heading.
        rows: Columns of `cmh_milvus.benchmark.summary`.
    """
    n_bits = plotted_length(rows)
    plots = {"bits": bits_plot(rows), "recall": recall_plot(rows, n_bits), "seconds": seconds_plot(rows, n_bits)}
    chance = {row["data"]: row["chance"] for row in rows}
    return template("benchmark.html.j2").render(
        title=title,
        n_bits=n_bits,
        chance=chance,
        plots={name: markupsafe.Markup(svg) for name, svg in plots.items()},  # noqa: S704  (matplotlib escapes its text)
        tables={
            data: markupsafe.Markup(  # noqa: S704  (its template escapes)
                benchmark_table([row for row in rows if row["data"] == data], ("method", "n_bits"))
            )
            for data in chance
        },
        with_paper=_with_paper(rows),
    )


def _with_paper(rows: Sequence[Row]) -> bool:
    return any(row[f"paper {label}"] is not None for row in rows for label in LABELS)
