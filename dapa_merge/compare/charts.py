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
    method_of,
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
from dapa_merge.report.drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, Chart, readable, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colour of a kind of methods; within a kind, the marker tells them apart.
COLOURS = {SEARCH: BLUE, FIXED: PURPLE, CONTROL: VERMILION, BLEND: GREY, DELTA: GREEN, TRAINING: ORANGE}
MARKERS = "oPsD^vX<>ph"
# In the picture of a row, these are lines.
DRAWN_AS_LINES = (TARGET, DAPA, "random")
# The size of a mark in a panel of the clouds, in points of skill and of DSR, and where it may stand instead of its own
# place, in such sizes, nearest first.
MARK = (3.4, 4.8)
AROUND = sorted(((x, y) for x in range(-3, 7) for y in range(-4, 2)), key=lambda one: math.hypot(*one))
RANDOM = "random"
# Minimum reach of the axis of changes, in points, so that noise does not look large.
MIN_REACH = 5
OfPoint = Callable[[Point], "float | None"]


def look(group: str) -> tuple[str, str]:
    """Colour and marker of a group of arms; those that follow the selection of `auto` have a marker of their own."""
    method = method_of("gates" if group == "all" else group)
    if method is None:
        return BLACK, "*" if group == SOURCE else "o"
    alike = [key for key, one in METHODS.items() if one.kind == method.kind]
    if method.kind == CONTROL:
        alike = [name for key in alike for name in (key, f"{key} of {AUTO}")]
    return COLOURS[method.kind], MARKERS[alike.index(group if group in alike else method.key)]


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
                    axes.hlines(place, 100 * low, 100 * high, color=look(one.group)[0], linewidth=2, zorder=2)
                axes.scatter([100 * mean.value], [place], s=34, color=look(one.group)[0], marker="s", zorder=3)
            axes.axvline(0, color="#666666", linewidth=0.8, zorder=0)
            axes.set_title(title)
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, -MIN_REACH), max(high, MIN_REACH))
        columns[0].set_yticks(range(len(shown)), [readable(one.label) for one in shown], parse_math=False)
        columns[0].set_ylim(len(shown) - 0.5, -0.5)
        figure.suptitle("Change from the target, in points", x=0.01, ha="left")
        figure.supxlabel("dots: recipes; squares: their mean, with its 95 % interval", fontsize=9)
    return figure


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
        value, (colour, marker) = of_arm(arm), look(arm.group)
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
    with sheet(2.1 + 2.9 * num_lines) as figure:
        grid = list(figure.subplots(num_lines, num_columns, sharex=True, sharey=True, squeeze=False).flat)
        for number, (axes, row) in enumerate(zip(grid, panels, strict=False)):
            _cloud(axes, row)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
            if number % num_columns == 0:
                axes.set_ylabel("DSR (%)")
            if number + num_columns >= len(panels):
                axes.set_xlabel("skill (%)")
                axes.tick_params(labelbottom=True)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _cloud(axes: Axes, row: Row) -> None:
    """Draw the panel of a recipe; a mark that would cover another stands beside it, tied to its place by a line."""
    for is_random, colour in ((False, BLUE), (True, VERMILION)):
        points = [one for one in row.curve if (one.path != DAPA) == is_random and one.skill is not None]
        across, up = [100 * (one.skill or 0.0) for one in points], [100 * one.dsr for one in points]
        axes.scatter(across, up, s=7, color=colour, alpha=0.35, linewidth=0, zorder=1)
    taken: list[tuple[float, float]] = []
    drawn: set[tuple[str, str]] = set()
    for arm in row.arms:
        # What follows `auto` is often what follows DAPA.
        same = (arm.method.replace(AUTO, DAPA), arm.detail)
        if arm.figures is None or arm.skill is None or (same in drawn and arm.method not in BLENDS):
            continue
        drawn.add(same)
        colour, marker = look(arm.group)
        x, y = 100 * arm.skill, 100 * arm.figures.dsr
        if arm.method == RANDOM:
            # A cloud of its own.
            label = LABELS[arm.group]
            axes.scatter(x, y, s=16, color=colour, marker=marker, linewidth=0, alpha=0.8, label=label, zorder=2)
            continue
        low, high = arm.figures.dsr_interval
        axes.vlines(x, 100 * low, 100 * high, color=colour, linewidth=0.6, alpha=0.5, zorder=2)
        places = [(x + dx * MARK[0], min(y + dy * MARK[1], 104.0)) for dx, dy in AROUND]
        place = next((one for one in places if not any(_covers(one, other) for other in taken)), (x, y))
        taken.append(place)
        axes.plot([x, place[0]], [y, place[1]], color="#666666", linewidth=0.6, zorder=2)
        label = arm.method.replace("-", " ") if arm.method in BLENDS else LABELS.get(arm.group, arm.label)
        axes.scatter(
            *place, s=38, color=colour, marker=marker, edgecolor="white", linewidth=0.6, label=readable(label),
            zorder=3,
        )  # fmt: skip
    axes.set_title(readable(row.name))
    axes.set_xlim(-6, 108)
    axes.set_ylim(-7, 108)


def _covers(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(abs(ours - theirs) < 0.9 * size for ours, theirs, size in zip(one, other, MARK, strict=True))


def _rows_with_curves(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows if row.curve}


# The page shows a chart with the methods or, if it has a picture for each row, with the row; keys are names of rows.
CHARTS = (
    Chart("methods", "Every method: gain in DSR and change of skill", methods_figure),
    Chart(
        "clouds",
        "DSR against skill: every method on every recipe, with the 95 % interval of its DSR; marks that would cover "
        "each other stand side by side, tied to their places by lines; small dots are edits of every size, by DAPA "
        "(blue) and at random",
        clouds_figure,
    ),
    Chart("row_{}", lambda row: f"{row.name}: edits of every size", row_figure, _rows_with_curves),
)
