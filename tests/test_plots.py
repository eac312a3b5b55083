"""Plots show the figures that they name."""

import numpy as np
import pytest

from cmh_milvus.comparison import Candidate, compare
from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.evaluation import CROSS_MODAL, DIRECTION_LABELS
from cmh_milvus.report import plots
from tests.test_benchmark import row


@pytest.fixture
def report(rng):
    """Queries whose nearest items lie some bits away, so that small radii are empty."""
    labels = rng.random((60, 4)) < 0.3
    codes = {name: rng.integers(0, 256, (60, 4), dtype=np.uint8) for name in ("image", "text")}
    rows = np.arange(60)
    x = rng.standard_normal((60, 3)).astype(np.float32)
    split = Split(rows[:9], rows[9:], rows[9:], rows[:0])
    return compare(
        PairedFeatures("x", [str(i) for i in rows], x, x, labels, tuple("abcd"), split, "f"), [Candidate("a", codes)]
    )


def test_curves_are_those_of_their_direction(report, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        plots, "_line", lambda axes, x, y, result, number: drawn.update({axes.get_title(): (axes, x, y)})
    )
    measured = {DIRECTION_LABELS[direction]: report.results[0].directions[direction] for direction in CROSS_MODAL}
    plots.topn_precision_plot(report)
    assert drawn.keys() == measured.keys()
    for label, (axes, x, y) in drawn.items():
        assert (x, y) == (measured[label].top_n, measured[label].top_n_precision)
        assert list(axes.lines[-1].get_ydata()) == [report.chance] * 2
    plots.precision_recall_plot(report)
    for label, (axes, x, y) in drawn.items():
        first = measured[label].radius_empty.index(next(e for e in measured[label].radius_empty if e < 1))
        assert first > 0, "some radii are empty for all queries"
        assert (x, y) == (measured[label].radius_recall[first:], measured[label].radius_precision[first:])
        assert list(axes.lines[-1].get_ydata()) == [report.chance] * 2


def test_benchmark_plots_show_means_of_both_directions_and_deviations(monkeypatch):
    seen = []
    monkeypatch.setattr(plots.Axes, "errorbar", lambda self, x, y, e, **_: seen.append((x, y, e)))
    plots.bits_plot([row(n_bits=128, value=0.7), row(n_bits=16, value=0.5), row(value=0.6, deviation=float("nan"))])
    assert seen == [([16, 64, 128], [0.5, 0.6, 0.7], [0.01, 0.0, 0.01])]
    points = []
    monkeypatch.setattr(plots, "_scatter", lambda figure, panels, rows, x_of: points.extend(map(x_of, rows)))
    plots.recall_plot([row() | {"own R@10 I→T": 0.2, "own R@10 T→I": 0.4}], 64)
    plots.seconds_plot([row(seconds=4.0), row(n_bits=16, seconds=9.0)], 64)
    assert points == pytest.approx([0.3, 4.0])
