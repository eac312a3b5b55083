"""Plots of an evaluation report as SVG text, for pages that carry everything inside."""

from __future__ import annotations

import io

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmh_milvus.evaluation import DIRECTION_LABELS, Direction, EncoderResult, EvaluationReport

COLOURS = ("#0b6e4f", "#c8553d", "#3c6e9f", "#8d6a9f", "#b8860b", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "x")


def topn_precision_plot(report: EvaluationReport) -> str:
    """Precision among the first N, a panel a direction."""
    figure, panels = _figure("N", "precision among the first N")
    for direction, axes in panels.items():
        for number, result in enumerate(report.results):
            measured = result.directions[direction]
            _line(axes, measured.top_n, measured.top_n_precision, result, number)
        axes.axhline(report.chance, color="#999", linestyle=":", label="chance")
        axes.set_xscale("log")
    return _svg(figure, panels)


def precision_recall_plot(report: EvaluationReport) -> str:
    """Hash lookup: recall against precision as the radius grows, a panel a direction; empty lookups left out."""
    figure, panels = _figure("recall", "precision")
    for direction, axes in panels.items():
        for number, result in enumerate(report.results):
            measured = result.directions[direction]
            if not measured.radius_recall:
                continue  # float vectors have no radius
            points = [
                (recall, precision)
                for recall, precision, empty in zip(
                    measured.radius_recall, measured.radius_precision, measured.radius_empty, strict=True
                )
                if empty < 1
            ]
            _line(axes, [r for r, _ in points], [p for _, p in points], result, number)
        axes.axhline(report.chance, color="#999", linestyle=":", label="chance")
        axes.set_xlim(0, 1)
    return _svg(figure, panels)


def _figure(x_label: str, y_label: str) -> tuple[Figure, dict[Direction, Axes]]:
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels: dict[Direction, Axes] = {"image_to_text": left, "text_to_image": right}
    for direction, axes in panels.items():
        axes.set_title(DIRECTION_LABELS[direction])
        axes.set_xlabel(x_label)
        axes.grid(color="#e3e3e3", linewidth=0.6)
        axes.set_ylim(0, 1)
    left.set_ylabel(y_label)
    return figure, panels


def _line(axes: Axes, x: list[int] | list[float], y: list[float], result: EncoderResult, number: int) -> None:
    axes.plot(
        x,
        y,
        label=result.name,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=3,
        linewidth=1.4,
    )


def _svg(figure: Figure, panels: dict[Direction, Axes]) -> str:
    panels["text_to_image"].legend(fontsize=8, frameon=False)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "cmh-milvus", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
