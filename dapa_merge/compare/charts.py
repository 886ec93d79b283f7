"""The charts of a comparison: methods over all recipes, and for each recipe edits of every size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dapa_merge.compare.methods import (
    AUTO,
    BLEND,
    BLENDS,
    CONTROL,
    DAPA,
    DELTA,
    FIXED,
    LABELS,
    METHODS,
    SEARCH,
    SOURCE,
    TARGET,
    TRAINING,
)
from dapa_merge.compare.result import (
    Arm,
    Average,
    Point,
    Row,
    RowMean,
    Value,
    averages,
    counted_arms,
    dsr_gain,
    mean_in_row,
    mean_skill,
    over_refusal_change,
    skill_change,
)
from dapa_merge.report.charts import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, Chart, readable, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colour of a kind of methods; within a kind, the marker tells them apart.
COLOURS = {SEARCH: BLUE, FIXED: PURPLE, CONTROL: VERMILION, BLEND: GREY, DELTA: GREEN, TRAINING: ORANGE}
MARKERS = "oPsD^vX<>ph"
# In the picture of a row, these are lines.
DRAWN_AS_LINES = (TARGET, DAPA, "random")
# Marks of a cloud that are nearer to each other, in points of skill or DSR, are moved apart.
LEAST_DISTANCE = 3.2
RANDOM = "random"
# Minimum reach of the axis of changes, in points, so that noise does not look large.
MIN_REACH = 5
OfPoint = Callable[[Point], "float | None"]


def look(arm: Arm) -> tuple[str, str]:
    """Colour and marker of a method; those that follow the selection of `auto` have a marker of their own."""
    if arm.method in (TARGET, SOURCE):
        return BLACK, "*" if arm.method == SOURCE else "o"
    kind = METHODS[arm.method].kind
    alike = [key for key, one in METHODS.items() if one.kind == kind]
    if kind == CONTROL:
        alike = [name for key in alike for name in (key, f"{key} of {AUTO}")]
    name = arm.group if arm.group in alike else arm.method
    return COLOURS[kind], MARKERS[alike.index(name)]


def methods_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw the changes by every method: a dot for each recipe, their mean and its interval."""
    if not rows:
        return None
    shown = [one for one in averages(rows) if one.group != TARGET]
    panels: list[tuple[str, Callable[[Average], RowMean | None], Value]] = [
        ("DSR", lambda one: one.gain, dsr_gain),
        ("over-refusal", lambda one: one.over_refusal, over_refusal_change),
    ]
    if any(one.skill is not None for one in shown):
        panels.append(("skill", lambda one: one.skill, skill_change))
    with sheet(1.4 + 0.3 * len(shown)) as figure:
        columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, mean_of, value_of) in zip(columns, panels, strict=True):
            for place, one in enumerate(shown):
                found = [mean_in_row(row, counted_arms(row, one.group), value_of) for row in rows]
                values = [100 * value for value in found if value is not None]
                axes.scatter(values, [place] * len(values), s=14, color=GREY, alpha=0.6, linewidth=0, zorder=1)
                mean = mean_of(one)
                if mean is None:
                    continue
                if mean.interval is not None:
                    low, high = mean.interval
                    axes.hlines(place, 100 * low, 100 * high, color=_colour(one.group), linewidth=2, zorder=2)
                axes.scatter([100 * mean.value], [place], s=34, color=_colour(one.group), marker="s", zorder=3)
            axes.axvline(0, color="#666666", linewidth=0.8, zorder=0)
            axes.set_title(title)
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, -MIN_REACH), max(high, MIN_REACH))
        columns[0].set_yticks(range(len(shown)), [readable(one.label) for one in shown], parse_math=False)
        columns[0].set_ylim(len(shown) - 0.5, -0.5)
        figure.suptitle("Change from the target, in points", x=0.01, ha="left")
        figure.supxlabel("dots: recipes; squares: their mean, with its 95 % interval", fontsize=9)
    return figure


def _colour(group: str) -> str:
    return BLUE if group in (DAPA, AUTO) else VERMILION if group.startswith(RANDOM) else BLACK


def row_figure(row: Row) -> Figure:
    """Draw edits of every size of one recipe: DSR, over-refusal, skill and perplexity, by DAPA and at random."""
    panels: list[tuple[str, OfPoint, Callable[[Arm], float | None]]] = [
        ("DSR", lambda point: point.dsr, _figure("dsr")),
        ("over-refusal", lambda point: point.over_refusal, _figure("over_refusal")),
        ("skill", lambda point: point.skill, lambda arm: arm.skill),
        ("perplexity", lambda point: point.perplexity, _figure("perplexity")),
    ]
    with sheet(6.2) as figure:
        grid = figure.subplots(2, 2, sharex=True).flat
        for axes, (title, of_point, of_arm) in zip(grid, panels, strict=True):
            _panel(axes, row, of_point, of_arm)
            axes.set_title(title)
            if title != "perplexity":
                axes.set_ylim(-0.04, 1.04)
        if not any(arm.skill is not None for arm in row.arms):
            figure.axes[2].set_visible(False)
            figure.axes[0].tick_params(labelbottom=True)
        for axes in figure.axes[2:]:
            axes.set_xlabel("parameters replaced (%)")
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.suptitle(readable(row.name), x=0.01, ha="left", parse_math=False)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _figure(name: str) -> Callable[[Arm], float | None]:
    return lambda arm: None if arm.figures is None else float(getattr(arm.figures, name))


def _panel(axes: Axes, row: Row, of_point: OfPoint, of_arm: Callable[[Arm], float | None]) -> None:
    paths: dict[str, list[tuple[float, float]]] = {}
    ringed = []
    for point, is_best in zip(row.curve, row.front(), strict=True):
        value = of_point(point)
        if value is None or not math.isfinite(value):
            continue
        paths.setdefault(point.path, []).append((100 * point.share, value))
        if is_best:
            ringed.append((100 * point.share, value))
    if DAPA in paths:
        axes.plot(*zip(*paths[DAPA], strict=True), color=BLUE, marker="o", ms=4, label="DAPA's order", zorder=3)
    at_random = [path for name, path in paths.items() if name != DAPA]
    if at_random:
        _random(axes, at_random)
    if ringed:
        across, up = zip(*ringed, strict=True)
        # For random edits, only their mean and the edits on the front are drawn.
        axes.scatter(across, up, s=6, color=BLACK, linewidth=0, zorder=4)
        axes.scatter(
            across, up, s=70, facecolor="none", edgecolor=BLACK, linewidth=0.9, label="Pareto front",
            zorder=4,
        )  # fmt: skip
    for arm in row.arms:
        value, (colour, marker) = of_arm(arm), look(arm)
        if arm.method in DRAWN_AS_LINES or value is None or not math.isfinite(value):
            continue
        # One entry for all weights of a blend.
        label = arm.method.replace("-", " ") if arm.method in BLENDS else arm.label
        axes.scatter([100 * arm.share], [value], color=colour, marker=marker, s=46, label=readable(label), zorder=5)
    target = next((value for arm in row.arms if arm.method == TARGET and (value := of_arm(arm)) is not None), None)
    if target is not None and math.isfinite(target):
        axes.axhline(target, color=GREY, linewidth=1, linestyle=":", label="target, untouched", zorder=0)
    if row.selected:
        whose = "auto's" if row.followed == AUTO else "DAPA's"
        axes.axvline(100 * row.selected, color=BLACK, linewidth=1, linestyle="--", label=f"{whose} selection", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _random(axes: Axes, paths: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Draw the mean and the range of random paths, whose edits are about equally large."""
    columns = list(zip(*paths, strict=True))
    shares = [sum(share for share, _ in column) / len(column) for column in columns]
    values = [[value for _, value in column] for column in columns]
    means = [sum(column) / len(column) for column in values]
    axes.plot(shares, means, color=VERMILION, marker="s", ms=3.5, linestyle="--", label="random", zorder=2)
    if len(paths) == 1:
        return
    low, high = [min(column) for column in values], [max(column) for column in values]
    axes.fill_between(shares, low, high, color=VERMILION, alpha=0.15, linewidth=0, label="random, range")


def clouds_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw DSR against skill, a panel for each recipe: every method, and behind them the edits of every size."""
    panels = [row for row in rows if mean_skill(row.before) is not None]
    if not panels:
        return None
    num_columns = min(len(panels), 3 if len(panels) > 4 else 2)
    num_lines = -(-len(panels) // num_columns)
    handles: dict[str, Any] = {}
    with sheet(2.0 + 3.1 * num_lines) as figure:
        grid = list(figure.subplots(num_lines, num_columns, sharex=True, sharey=True, squeeze=False).flat)
        for axes, row in zip(grid, panels, strict=False):
            _cloud(axes, row)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("skill (%)", fontsize=10)
        figure.supylabel("DSR (%)", fontsize=10)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _cloud(axes: Axes, row: Row) -> None:
    """Draw the panel of a recipe; marks that would cover each other are moved apart, to the right."""
    for is_random, colour in ((False, BLUE), (True, VERMILION)):
        points = [one for one in row.curve if (one.path != DAPA) == is_random and one.skill is not None]
        across, up = [100 * (one.skill or 0.0) for one in points], [100 * one.dsr for one in points]
        axes.scatter(across, up, s=7, color=colour, alpha=0.35, linewidth=0, zorder=1)
    taken: list[tuple[float, float]] = []
    for arm in row.arms:
        if arm.figures is None or arm.skill is None:
            continue
        colour, marker = look(arm)
        place = 100 * arm.skill, 100 * arm.figures.dsr
        low, high = arm.figures.dsr_interval
        axes.vlines(place[0], 100 * low, 100 * high, color=colour, linewidth=0.6, alpha=0.5, zorder=2)
        while any(math.dist(place, other) < LEAST_DISTANCE for other in taken):
            place = place[0] + LEAST_DISTANCE / 2, place[1]
        taken.append(place)
        label = arm.method.replace("-", " ") if arm.method in BLENDS else LABELS.get(arm.group, arm.label)
        axes.scatter(
            *place, s=44, color=colour, marker=marker, edgecolor="white", linewidth=0.6, label=readable(label),
            zorder=3,
        )  # fmt: skip
    axes.set_title(readable(row.name))
    axes.set_xlim(-4, 108)
    axes.set_ylim(-4, 106)


def _rows_with_curves(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows if row.curve}


# The page shows a chart with the methods or, if it has a picture for each row, with the row; keys are names of rows.
CHARTS = (
    Chart("methods", "Every method: gain in DSR and change of skill", methods_figure),
    Chart(
        "clouds",
        "DSR against skill: every method on every recipe, with the 95 % interval of its DSR; marks that would cover "
        "each other stand side by side, to the right; small dots are edits of every size, by DAPA (blue) and at random",
        clouds_figure,
    ),
    Chart("row_{}", lambda row: f"{row.name}: edits of every size", row_figure, _rows_with_curves),
)
