"""The chart of the points that an edit offered: what it shows, and that it can be read."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from dapa_merge.report.charts import CHARTS, Place, Run, draw_front, points_front

LIMITS = {"score": 0.95, "over_refusal": 0.05, "divergence": math.nan}
TARGET, FAR = Place("target", 0.0, 0.0, 0.0), Place("all units copied", 8.73, 1.0, 0.0)
CASES = {
    "all as good": (
        [
            Place("1", 0.123, 1.0, 0.0), Place("2", 0.031, 1.0, 0.0), Place("3", 0.0232, 1.0, 0.0, False, True),
            Place("4", 0.0234, 1.0, 0.0), Place("5 (part of 3)", 0.016, 1.0, 0.0, True),
        ],
        [TARGET, FAR],
    ),
    "rising": (
        [
            Place("1", 0.004, 0.03, 0.0, True), Place("2", 0.02, 0.5, 0.04, True),
            Place("3", 0.05, 0.94, 0.21, True, True), Place("4", 0.3, 0.97, 0.3, True),
        ],
        [TARGET, Place("all units copied", 0.4, 0.65, 0.13)],
    ),
    "close together": (
        [
            Place("1", 0.04, 0.5, 0.0, True), Place("2", 0.05, 0.8, 0.04, True),
            Place("3", 0.051, 0.81, 0.06, True, True), Place("4", 0.0512, 0.82, 0.05, True),
            Place("5 (part of 3)", 0.0505, 0.8, 0.05),
        ],
        [Place("target", 0.0, 0.2, 0.01), Place("all units copied", 0.06, 0.65, 0.13)],
    ),
}  # fmt: skip


def boxes(figure) -> dict[str, object]:
    """Where each label of a point is, in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.canvas.draw()
    return {text.get_text(): Text.get_window_extent(text, renderer) for text in figure.axes[0].texts}


def draw(points, references, **limits):
    return points_front(points, len(points) - 1, references, {**LIMITS, **limits}, "DSR")


@pytest.mark.parametrize("name", CASES)
def test_every_point_has_a_label_and_no_label_is_on_another(name):
    points, references = CASES[name]
    figure = draw(points, references)
    found = boxes(figure)
    assert len(found) == len(points) + len(references)
    assert {point.label for point in points} <= set(found)
    for one, other in itertools.combinations(found.values(), 2):
        assert not one.overlaps(other)
    for box in found.values():
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1


def test_labels_do_not_overlap_wherever_six_points_are():
    generator = random.Random(0)
    for _ in range(10):
        points = [Place(str(number), generator.uniform(0.01, 0.1), generator.random(), 0.0) for number in range(6)]
        found = boxes(draw(points, [TARGET, FAR]))
        assert not any(one.overlaps(other) for one, other in itertools.combinations(found.values(), 2))


def test_divergences_of_several_magnitudes_are_drawn_logarithmically_and_others_are_not():
    assert draw(*CASES["rising"]).axes[0].get_xscale() == "symlog"
    assert "(logarithmic)" in draw(*CASES["rising"]).axes[1].get_xlabel()
    assert draw(*CASES["close together"]).axes[0].get_xscale() == "linear"


def test_what_is_far_away_is_named_at_the_edge_with_its_divergence():
    points, references = CASES["all as good"]
    figure = draw(points, references)
    assert "all units copied (divergence 8.73)" in boxes(figure)
    assert figure.axes[0].get_xlim()[1] < 0.2


def test_limits_are_lines_in_both_panels():
    points, references = CASES["rising"]
    upper, lower = draw(points, references, divergence=0.1).axes
    dashed = [line.get_xydata().tolist() for line in upper.lines if line.get_linestyle() == "--"]
    assert dashed == [[[0.0, 0.95], [1.0, 0.95]], [[0.1, 0.0], [0.1, 1.0]]]
    dashed = [line.get_xydata().tolist() for line in lower.lines if line.get_linestyle() == "--"]
    assert dashed == [[[0.0, 0.05], [1.0, 0.05]], [[0.1, 0.0], [0.1, 1.0]]]


@pytest.mark.parametrize("divergence", [0.0, math.nan, math.inf])
def test_points_that_do_not_diverge_or_cannot_be_compared_are_no_obstacle(divergence):
    points = [Place("1", divergence, 0.5, 0.0), Place("2", 0.0, 0.5, 0.0, True)]
    assert "2" in boxes(draw(points, [TARGET, Place("all units copied", divergence, 1.0, 0.0)]))


def test_without_points_nothing_is_drawn():
    assert draw_front(Run(None, None, None)) is None
    assert "dapa_front" in [chart.name for chart in CHARTS]


def test_no_label_of_an_axis_has_a_factor_in_a_corner():
    points = [Place(str(number), number * 2.5e-6, 1.0, 0.0) for number in (1, 2, 3)]
    figure = draw(points, [TARGET])
    figure.canvas.draw()
    lower = figure.axes[1]
    assert lower.xaxis.get_offset_text().get_text() == ""
    assert "5e\N{MINUS SIGN}06" in {text.get_text() for text in lower.get_xticklabels()}
