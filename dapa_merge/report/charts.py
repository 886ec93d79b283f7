"""The charts of a run.

A new one is an entry in `CHARTS`: then `run` draws it, the model card shows it, and a later transplant does not copy
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from dapa_merge.checkpoint.units import join_ranges
from dapa_merge.report.drawing import (
    BLACK,
    BLUE,
    CARD_LETTERS,
    GREY,
    LINE_HEIGHT,
    ORANGE,
    VERMILION,
    Chart,
    every_few,
    marker_of,
    plotting,
    readable,
    sheet,
    spread_places,
)
from dapa_merge.search.workers import in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dapa_merge.checkpoint.units import Unit
    from dapa_merge.plan.plan import Plan
    from dapa_merge.report.report import Report
    from dapa_merge.search.result import Search


# Selections of a search, without which its chart shows no path.
MIN_PATH = 2


class Run(NamedTuple):
    """The data of a run that its charts show.

    Attributes:
        search: The search; None if the recipe names its layers.
    """

    report: Report
    plan: Plan
    search: Search | None


def draw_models(run: Run) -> Figure | None:
    """Draw target, result and source side by side; None if nothing was measured."""
    report = run.report
    measured = [("before", report.before), ("after", report.after), ("source", report.source_alone)]
    columns = [(name, figures) for name, figures in measured if figures is not None]
    if not columns:
        return None
    rows: dict[str, list[Bar]] = {
        "DSR": [Bar(one.dsr, one.dsr_interval) for _, one in columns],
        "over-refusal": [Bar(one.over_refusal, one.over_refusal_interval) for _, one in columns],
    }
    if kept := [one.kept for _, one in columns if one.kept is not None]:
        rows["as before"] = [Bar(one.share_same, one.same_interval) for one in kept]
    for index, skill in enumerate(columns[0][1].skills):
        rows[skill.name] = [Bar(one.skills[index].score, one.skills[index].interval) for _, one in columns]
    return model_bars([name for name, _ in columns], rows, "Before and after the repair, with 95 % intervals")


def draw_search(run: Run) -> Figure | None:
    """Draw the path of a run's search; None if there was none, or if its first test ended it."""
    # Nothing was tested where a point was picked.
    if run.search is None or run.search.by_hand or len(run.search.path) < MIN_PATH:
        return None
    units = {*run.plan.units, *(unit.whole for asked in run.search.path for unit in asked.units)}
    # An edit that chooses has directions of fewer units in the end than the search began with.
    candidates = run.plan.units if len(units) == len(run.plan.units) else in_order(units)
    return search_figure(run.search, run.plan, candidates)


def draw_front(run: Run) -> Figure | None:
    """Draw the points that a run could pick from; None if there were none."""
    return front_figure(run.search)


def front_figure(search: Search | None) -> Figure | None:
    """Draw the points that a search could pick from; None if there were none."""
    if search is None or search.picked is None or search.result is None or search.limits is None:
        return None
    limits = {constraint.figure: limit for constraint, limit in search.limits.limits}
    places = [
        Place(point.name, *_place(point.figures), point.on_front, point.number == search.picked)
        for point in search.points
    ]
    references = [Place("target", 0.0, *_place(search.target.figures)[1:])]
    if search.reference is not None:
        references.append(Place(f"all units {search.plan.reference.edit.done}", *_place(search.reference.figures)))
    return points_front(places, search.result.number - 1, references, limits, search.limits.measure)


def _place(figures: Mapping[str, float]) -> tuple[float, float, float]:
    return figures.get("divergence", math.nan), figures["score"], figures.get("over_refusal", math.nan)


# The names begin with `files.CHART_PREFIX`, by which a transplant knows them.
CHARTS = (
    Chart("dapa_figures", "Before, after, and the source alone, with 95 % intervals", draw_models),
    Chart("dapa_search", "The search: every selection that was tested, and its score", draw_search),
    Chart(
        "dapa_front",
        "The points to pick from: how far each moves what the model says (divergence), and what it refuses",
        draw_front,
    ),
)


def search_figure(search: Search, plan: Plan, candidates: Sequence[Unit]) -> Figure:
    """Draw the path of a search among some units; a block of rows is drawn in the line of its unit."""
    at = {unit: index for index, unit in enumerate(candidates)}
    total = plan.num_parameters(candidates)
    steps = [
        Step(
            sorted({at[unit.whole] for unit in asked.units}),
            plan.num_parameters(asked.units) / total,
            asked.holds,
            asked.score,
        )
        for asked in search.path
    ]
    final = sorted({at[unit.whole] for unit in search.minimum.units})
    limits = search.requirement
    return search_path(list(map(str, candidates)), steps, final, limits.min_score, limits.measure)


class Bar(NamedTuple):
    """A value with its 95 % interval; None for no interval, NaN for no value."""

    value: float
    interval: tuple[float, float] | None = None


class Place(NamedTuple):
    """A point as it is drawn.

    Attributes:
        divergence: In nats per token.
        score: DSR, or the evaluator's score.
        over_refusal: In [0, 1].
        on_front: Whether the line of the front goes through it.
        is_taken: Whether it is the one that was taken.
    """

    label: str
    divergence: float
    score: float
    over_refusal: float
    on_front: bool = False
    is_taken: bool = False


class Step(NamedTuple):
    """One test of a search.

    Attributes:
        units: The indices of the units that it edited, whole or in part.
        share: Their share of all units by size, in [0, 1].
        score: The share of the asked prompts that were refused; None if the model was scored as a whole.
    """

    units: Sequence[int]
    share: float
    holds: bool
    score: float | None


def search_path(
    units: Sequence[str], steps: Sequence[Step], final: Sequence[int], threshold: float, measure: str
) -> Figure:
    """Draw a search test by test: the units, their share of all, the score, and the units that were kept."""
    num_units, num_steps = len(units), len(steps)
    mosaic_height = min(4.5, 0.16 * num_units)
    with sheet(3.4 + mosaic_height) as figure:
        share, score, matrix = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 1.2, 0.6 + mosaic_height))
        shares = [100 * step.share for step in steps]
        scores = [math.nan if step.score is None else step.score for step in steps]
        for axes, values in ((share, shares), (score, scores)):
            axes.plot(range(1, num_steps + 1), values, color=GREY, linewidth=0.8, zorder=1)
            for holds, marker, colour in ((True, "o", BLUE), (False, "x", VERMILION)):
                at = [index for index, step in enumerate(steps) if step.holds == holds]
                found = [values[index] for index in at]
                axes.scatter([index + 1 for index in at], found, marker=marker, color=colour, zorder=2)
        share.set_ylim(-5, 108)
        share.set_ylabel("% of units")
        share.set_title("The search: what each test edited, and whether it held")
        score.axhline(threshold, color=BLACK, linestyle="--", linewidth=1)
        score.set_ylim(-0.05, 1.08)
        score.set_ylabel(f"{measure}\nof those asked")
        cells = [[(2 - step.holds) * (unit in step.units) for step in steps] for unit in range(num_units)]
        colours = plotting().colors.ListedColormap(["#F4F4F4", "#7FB8DE", "#EDB48C"])
        matrix.imshow(
            cells, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=2,
            extent=(0.5, num_steps + 0.5, num_units - 0.5, -0.5),
        )  # fmt: skip
        matrix.spines[:].set_visible(True)
        for first, stop in join_ranges([(unit, unit + 1) for unit in final]):
            # A thicker line would hide the framed cell; a frame for each of many neighbours would hide them all.
            thickness = min(1.2, 20 * mosaic_height / num_units)
            matrix.axhspan(first - 0.5, stop - 0.5, facecolor="none", edgecolor=BLACK, linewidth=thickness, zorder=3)
        shown = spread_places(final, every_few(num_units), math.ceil(LINE_HEIGHT * num_units / mosaic_height))
        matrix.set_yticks(shown, [units[index] for index in shown])
        bold = set(final) if len(final) < num_units else ()
        for text, index in zip(matrix.get_yticklabels(), shown, strict=True):
            text.set_fontweight("bold" if index in bold else "normal")
        matrix.set_xlim(0.5, num_steps + 0.5)
        # At least one place, or the axis of a single test would be labelled in between.
        matrix.xaxis.set_major_locator(plotting().ticker.MaxNLocator(integer=True, min_n_ticks=1))
        matrix.set_xlabel("test")
        matrix.set_ylabel("unit")
        # A frame around all of them would not be seen.
        kept = f"kept in the end: {len(final) if len(final) < num_units else 'all'} of {num_units} units"
        handles = [
            marker_of(share, "o", BLUE, "holds"),
            marker_of(share, "x", VERMILION, "fails"),
            score.plot([], [], color=BLACK, linestyle="--", linewidth=1, label="required")[0],
            plotting().patches.Patch(facecolor="none", edgecolor=BLACK, linewidth=1.2, label=kept),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


# With more bars, their values are rotated.
MAX_BARS = 15
# Divergences of points that differ by more are drawn on a logarithmic axis.
WIDE = 8
# Where the label of a marker may stand, in inches from it.
LABEL_OFFSETS = [
    (far * x, far * y)
    for far in (1, 2)
    for x, y in (
        (0, 0.17), (0, -0.17), (0.17, 0.14), (0.17, -0.14), (-0.17, 0.14), (-0.17, -0.14), (0.28, 0), (-0.28, 0),
    )
]  # fmt: skip


def points_front(
    points: Sequence[Place], result: int, references: Sequence[Place], limits: Mapping[str, float], measure: str
) -> Figure:
    """Draw what an edit offered: the score against the divergence, and below it the over-refusal.

    Args:
        points: In order.
        result: The index of the one that was written.
        references: Other models, such as the target; those far to the right are named at the edge.
        limits: By the name of the figure; NaN for no limit.
        measure: The name of the score.
    """
    known = [point for point in points if math.isfinite(point.divergence)]
    others = [point for point in references if math.isfinite(point.divergence)]
    places = [point.divergence for point in known if point.divergence > 0] or [1.0]
    is_wide = max(places) > WIDE * min(places)
    marks = [*places, limits.get("divergence", math.nan), *(point.divergence for point in others)]
    right = max(place for place in marks if place <= 2 * max(places)) * (1.6 if is_wide else 1.12)
    with sheet(5.2) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        if is_wide:
            upper.set_xscale("symlog", linthresh=min(places), linscale=0.5)
        else:
            # Without a factor of all labels, which stands in a corner where it is overlooked.
            lower.xaxis.set_major_formatter(plotting().ticker.StrMethodFormatter("{x:g}"))
        upper.set_xlim(-0.2 * min(places) if is_wide else -0.04 * right, right)
        _draw_limits(upper, lower, limits)
        front = sorted((point.divergence, point.score) for point in known if point.on_front)
        upper.plot(*zip(*front, strict=True), color=BLUE, linewidth=1.2, marker="o", label="on the front", zorder=2)
        if len(front) < len(known):
            upper.scatter([], [], s=34, color="white", edgecolor=BLUE, linewidth=1.2, label="other points")
        result_place = points[result]
        for axes, figure_of, colour in (
            (upper, attrgetter("score"), BLUE), (lower, attrgetter("over_refusal"), ORANGE),
        ):  # fmt: skip
            how: dict[str, Any] = {"edgecolor": colour, "linewidth": 1.2, "zorder": 3}
            for point in known:
                face = colour if point.on_front else "white"
                axes.scatter(point.divergence, figure_of(point), s=34, facecolor=face, **how)
            for point in others:
                marker = "D" if point.divergence <= right else ">"
                at = min(point.divergence, right)
                axes.scatter(at, figure_of(point), marker=marker, s=38, color=GREY, zorder=3, clip_on=False)
            how = {"facecolor": "none", "edgecolor": BLACK, "linewidth": 1.1, "zorder": 4}
            axes.scatter(result_place.divergence, figure_of(result_place), marker="*", s=420, label="the result", **how)
            for point in known:
                if point.is_taken and point is not result_place:
                    axes.scatter(point.divergence, figure_of(point), s=150, label="taken before the search", **how)
        upper.set_ylim(-0.12, 1.16)
        upper.set_yticks([0, 0.25, 0.5, 0.75, 1])
        most = max([0.1, *(point.over_refusal for point in (*known, *others))])
        lower.set_ylim(-0.14 * most, 1.25 * most)
        lower.yaxis.set_major_locator(plotting().ticker.MaxNLocator(3))
        names = [(point.label, point.divergence, point.score) for point in known]
        for point in others:
            is_far = point.divergence > right
            label = f"{point.label} (divergence {point.divergence:.2f})" if is_far else point.label
            names.append((label, min(point.divergence, right), point.score))
        _label_all(upper, names, front, limits.get("score", math.nan))
        upper.set_ylabel(measure)
        lower.set_ylabel("over-refusal")
        lower.set_xlabel(f"divergence from the target, in nats per token{' (logarithmic)' if is_wide else ''}")
        upper.set_title(f"Points to pick from: {measure} and over-refusal against divergence", parse_math=False)
        handles, labels = upper.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def _draw_limits(upper: Axes, lower: Axes, limits: Mapping[str, float]) -> None:
    how: dict[str, Any] = {"color": BLACK, "linestyle": "--", "linewidth": 1, "zorder": 1}
    for axes, name in ((upper, "score"), (lower, "over_refusal")):
        if not math.isnan(limit := limits.get(name, math.nan)):
            axes.axhline(limit, label="limits" if axes is upper else None, **how)
    if (limit := limits.get("divergence", math.nan)) <= upper.get_xlim()[1]:
        for axes in (upper, lower):
            axes.axvline(limit, **how)


def _label_all(
    axes: Axes, names: Sequence[tuple[str, float, float]], line: Sequence[tuple[float, float]], level: float
) -> None:
    """Write labels at their points so that none is on another, nor on a point, a line or a level, if there is room."""
    width, height = 6.9, 2.6
    to_axes = axes.transData - axes.transAxes

    def inches(x: float, y: float) -> tuple[float, float]:
        left, bottom = to_axes.transform((x, y))
        return width * left, height * bottom

    taken = [_Box(*inches(x, y), 0.26, 0.26) for _, x, y in names]
    if math.isfinite(level):
        taken.append(_Box(width / 2, inches(0, level)[1], width, 0.03))
    corners = [inches(*point) for point in line]
    for (left, bottom), (right, top) in pairwise(corners):
        taken += [
            _Box(left + (right - left) * part / 40, bottom + (top - bottom) * part / 40, 0.04, 0.04)
            for part in range(41)
        ]
    # Long ones first: they fit in fewer places.
    for label, *place in sorted(names, key=lambda name: (-len(name[0]), name[1])):
        x, y = inches(*place)
        wide = 0.075 * len(label)
        boxes = []
        for right, up in LABEL_OFFSETS:
            centre = x + right + (wide / 2 if right > 0 else -wide / 2 if right < 0 else 0)
            boxes.append((right, up, _Box(centre, y + up, wide, LINE_HEIGHT)))
        inside = [one for one in boxes if one[2].is_in(width, height)] or boxes
        right, up, box = min(inside, key=lambda one: sum(one[2].shared(other) for other in taken))
        taken.append(box)
        axes.annotate(
            label, (place[0], place[1]), (72 * right, 72 * up), textcoords="offset points", va="center", fontsize=9,
            ha="left" if right > 0 else "right" if right < 0 else "center", parse_math=False, zorder=5,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip


class _Box(NamedTuple):
    """A rectangle by its centre, in inches."""

    x: float
    y: float
    width: float
    height: float

    def shared(self, other: _Box) -> float:
        """The area of both."""
        sides = (
            (self.width + other.width) / 2 - abs(self.x - other.x),
            (self.height + other.height) / 2 - abs(self.y - other.y),
        )
        return max(0.0, min(sides[0], self.width, other.width)) * max(0.0, min(sides[1], self.height, other.height))

    def is_in(self, width: float, height: float) -> bool:
        """Whether a sheet with its corner at 0 has it all."""
        return (
            abs(self.x - width / 2) <= (width - self.width) / 2
            and abs(self.y - height / 2) <= (height - self.height) / 2
        )


def model_bars(models: Sequence[str], figures: Mapping[str, Sequence[Bar]], title: str) -> Figure:
    """Draw figures in [0, 1], by name, with a value for each model; the first three are before, after and source."""
    colours, patterns = (GREY, BLUE, ORANGE), ("", "//", "..")
    with sheet(3.6) as figure:
        axes = figure.add_subplot()
        width = 0.8 / len(models)
        is_crowded = len(figures) * len(models) > MAX_BARS
        for index, model in enumerate(models):
            bars = [values[index] for values in figures.values()]
            at = [place + (index - (len(models) - 1) / 2) * width for place in range(len(figures))]
            reach = [[_reach(bar, side) for bar in bars] for side in (0, 1)]
            axes.bar(
                at, [bar.value for bar in bars], width * 0.94, yerr=reach, label=model, color=colours[index % 3],
                hatch=patterns[index % 3], edgecolor="white", linewidth=0,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": BLACK},
            )  # fmt: skip
            for place, bar in zip(at, bars, strict=True):
                top = bar.value if bar.interval is None else bar.interval[1]
                how: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "rotation": 90 * is_crowded}
                axes.annotate(f"{bar.value:.3f}", (place, top), (0, 3), fontsize=9, **how)
        labels = [readable(name) for name in figures]
        axes.set_xticks(range(len(figures)), labels, parse_math=False)
        if (max(map(len, labels)) + 1) * len(labels) > CARD_LETTERS:
            for text in axes.get_xticklabels():
                text.set(rotation=25, ha="right", rotation_mode="anchor")
        axes.set_ylim(0, 1.2 if is_crowded else 1.14)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_ylabel("share")
        axes.set_title(title, parse_math=False)
        figure.legend(loc="outside lower center", ncols=len(models))
    return figure


def _reach(bar: Bar, side: int) -> float:
    return 0.0 if bar.interval is None else abs(bar.interval[side] - bar.value)
