"""Plots of an evaluation report, or of a benchmark's rows, as SVG text for pages that carry everything inside."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, product
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from cmh_milvus.evaluation import CROSS_MODAL, DIRECTION_LABELS, Direction, EncoderResult, EvaluationReport

COLOURS = ("#0b6e4f", "#c8553d", "#3c6e9f", "#8d6a9f", "#b8860b", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "x")
LINES = ("-", "--", ":", "-.")  # a method with its default settings, then with others
GRID = "#e3e3e3"
LABEL_POINTS = 7.5  # size of a point's label

Row = Mapping[str, Any]
"""Columns of `cmh_milvus.benchmark.summary`."""


def topn_precision_plot(report: EvaluationReport) -> str:
    """Precision among the first N, a panel a direction."""
    figure, panels = _figure("N", "precision among the first N")
    for direction, axes in panels.items():
        for number, result in enumerate(report.results):
            measured = result.directions[direction]
            _line(axes, measured.top_n, measured.top_n_precision, result, number)
        axes.axhline(report.chance, color="#999", linestyle=":", label="chance")
        axes.set_xscale("log")
    panels["text_to_image"].legend(fontsize=8, frameon=False)
    return _svg(figure, "Precision among the first N")


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
    panels["text_to_image"].legend(fontsize=8, frameon=False)
    return _svg(figure, "Precision against recall of hash lookup")


def bits_plot(rows: Sequence[Row]) -> str:
    """MAP@all, mean of both directions, against code length: a panel a data set, a line a method."""
    lengths = sorted({row["n_bits"] for row in rows})
    figure, panels = _panels(rows, "bits", columns=3, height=3.0)
    styles = _styles(rows)
    for data, axes in panels.items():
        for method, own in _by(rows, "method", data=data):
            line = sorted(own, key=lambda row: row["n_bits"])
            colour, marker, dashes = styles[method]
            axes.errorbar(
                [row["n_bits"] for row in line],
                [row["MAP@all"] for row in line],
                [0.0 if math.isnan(row["MAP@all +-"]) else row["MAP@all +-"] for row in line],
                label=method,
                color=colour,
                marker=marker,
                linestyle=dashes,
                markersize=3.5,
                linewidth=1.2,
                elinewidth=0.8,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n_bits) for n_bits in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
    handles: dict[str, Any] = {}
    for axes in panels.values():
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    return _svg(figure, "MAP@all against code length")


def recall_plot(rows: Sequence[Row], n_bits: int) -> str:
    """MAP@all against own R@10 at one code length: a panel a data set, a labelled point a method.

    Points of one method with different settings are joined, and named by the settings that differ.
    """

    def recall(row: Row) -> float:
        return float(mean(row[f"own R@10 {DIRECTION_LABELS[direction]}"] for direction in CROSS_MODAL))

    chosen = [row for row in rows if row["n_bits"] == n_bits]
    figure, panels = _panels(chosen, "own R@10", columns=2, height=4.4)
    for axes in panels.values():
        axes.xaxis.set_major_locator(MaxNLocator(5))
    _scatter(figure, panels, chosen, recall)
    return _svg(figure, f"MAP@all against own R@10 at {n_bits} bits")


def seconds_plot(rows: Sequence[Row], n_bits: int) -> str:
    """MAP@all against training seconds at one code length: a panel a data set, a labelled point a method."""
    chosen = [row for row in rows if row["n_bits"] == n_bits]
    figure, panels = _panels(chosen, "training seconds", columns=2, height=4.4)
    for axes in panels.values():
        axes.set_xscale("log")
    _scatter(figure, panels, chosen, lambda row: max(row["seconds"], 0.01))
    return _svg(figure, f"MAP@all against training seconds at {n_bits} bits")


def base_method(name: str) -> str:
    """A method's name without its settings: "duet:pair_weight=0.1" -> "duet"."""
    return name.partition(":")[0]


def _by(rows: Iterable[Row], column: str, data: str) -> list[tuple[str, list[Row]]]:
    """Rows of a data set by another column, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["data"] == data:
            groups.setdefault(row[column], []).append(row)
    return list(groups.items())


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of each method; with other settings it keeps the first two."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    bases = list(dict.fromkeys(map(base_method, methods)))
    styles = {}
    for number, base in enumerate(bases):
        turn, place = divmod(number, len(COLOURS))
        marker = MARKERS[(place + turn) % len(MARKERS)]
        for line, method in enumerate(name for name in methods if base_method(name) == base):
            dashes = LINES[0] if line == 0 else LINES[1 + (line - 1) % (len(LINES) - 1)]
            styles[method] = (COLOURS[place], marker, dashes)
    return styles


def _panels(rows: Sequence[Row], x_label: str, *, columns: int, height: float) -> tuple[Figure, dict[str, Axes]]:
    """A panel for each data set, with its chance line."""
    chance = {row["data"]: row["chance"] for row in rows}
    columns = min(columns, len(chance))
    lines = math.ceil(len(chance) / columns)
    figure = Figure(figsize=(9.2, 0.4 + height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    panels = dict(zip(chance, grid.flat, strict=False))
    for unused in list(grid.flat)[len(chance) :]:
        unused.set_axis_off()
    for data, axes in panels.items():
        axes.set_title(data, fontsize=10)
        axes.set_xlabel(x_label)
        axes.set_ylabel("MAP@all")
        axes.grid(color=GRID, linewidth=0.6)
        axes.axhline(chance[data], color="#999", linestyle="--", linewidth=1, label="chance")
    return figure, panels


def _scatter(figure: Figure, panels: Mapping[str, Axes], rows: Sequence[Row], x_of: Callable[[Row], float]) -> None:
    styles = {base_method(method): (colour, marker) for method, (colour, marker, _) in _styles(rows).items()}
    for data, axes in panels.items():
        own = sorted((row for row in rows if row["data"] == data), key=lambda row: base_method(row["method"]))
        for base, group in groupby(own, key=lambda row: base_method(row["method"])):
            points = sorted((x_of(row), row["MAP@all"]) for row in group)
            colour, marker = styles[base]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1)
        axes.margins(x=0.18, y=0.08)
    figure.draw_without_rendering()  # the layout, which labels go by
    names = _point_names([row["method"] for row in rows])
    for data, axes in panels.items():
        _label_points(axes, [(names[row["method"]], x_of(row), row["MAP@all"]) for row in rows if row["data"] == data])


def _point_names(methods: Sequence[str]) -> dict[str, str]:
    """A method's name or, where it has settings, these; without those that all of its points with settings share."""
    settings = {method: method.partition(":")[2].split(",") for method in methods if ":" in method}
    names = {method: method for method in methods}
    for method, given in settings.items():
        alike = [set(other) for name, other in settings.items() if base_method(name) == base_method(method)]
        shared = set.intersection(*alike) if len(alike) > 1 else set()
        names[method] = ",".join([setting for setting in given if setting not in shared] or given)
    return names


def _label_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each point's name beside it, where it covers neither another name nor another point."""
    scale = axes.figure.dpi / 72  # pixels a typographic point
    height = 1.15 * LABEL_POINTS
    places = [tuple(axes.transData.transform((x, y)) / scale) for _, x, y in points]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places]  # left, bottom, right, top
    left, bottom, right, top = (edge / scale for edge in axes.get_window_extent().extents)
    for (name, x, y), (px, py) in zip(points, places, strict=True):
        width = 0.55 * LABEL_POINTS * len(name)
        shifts = [0.0] + [sign * step * height for step in (0.6, 1.2, 1.8, 2.4, 3.0, 4.0, 5.0) for sign in (1, -1)]
        options = [
            (start, shift)
            for shift, start in product(shifts, (6.0, -6.0 - width))
            if left <= px + start
            and px + start + width <= right
            and bottom <= py + shift - height / 2
            and py + shift + height / 2 <= top
        ] or [(6.0, 0.0)]
        boxes = {
            (start, shift): (px + start, py + shift - height / 2, px + start + width, py + shift + height / 2)
            for start, shift in options
        }
        start, shift = min(options, key=lambda option: sum(_overlap(boxes[option], other) for other in taken))
        taken.append(boxes[start, shift])
        axes.annotate(
            name,
            (x, y),
            xytext=(start if start > 0 else -6.0, shift),
            textcoords="offset points",
            fontsize=LABEL_POINTS,
            horizontalalignment="left" if start > 0 else "right",
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": "#aaa", "linewidth": 0.5} if abs(shift) > height else None,
        )


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Common area of two boxes (left, bottom, right, top)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _figure(x_label: str, y_label: str) -> tuple[Figure, dict[Direction, Axes]]:
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels: dict[Direction, Axes] = {"image_to_text": left, "text_to_image": right}
    for direction, axes in panels.items():
        axes.set_title(DIRECTION_LABELS[direction])
        axes.set_xlabel(x_label)
        axes.grid(color=GRID, linewidth=0.6)
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


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "cmh-milvus", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f'<svg role="img" aria-label="{title}"{text[text.index("<svg") + 4 :]}'
