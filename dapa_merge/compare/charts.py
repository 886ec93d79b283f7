"""The charts of a comparison: methods over all recipes, and for each recipe edits of every size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dapa_merge.compare.methods import AUTO, BLENDS, DAPA, SOURCE, TARGET
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
    over_refusal_change,
    skill_change,
)
from dapa_merge.report.charts import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, Chart, readable, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colour and marker of a method next to the curves.
MARKERS = {
    SOURCE: (BLACK, "*"),
    AUTO: (BLUE, "P"),
    "fixed": (GREEN, "^"),
    "gates": (PURPLE, "D"),
    "all": (PURPLE, "D"),
    "random-search": (VERMILION, "X"),
    "mlp": (ORANGE, "v"),
    "mlp of auto": (ORANGE, "<"),
    "linear": (GREY, "x"),
    "task-arithmetic": (GREY, "1"),
    "ties": (GREY, "+"),
}
RANDOM = "random"
# Minimum reach of the axis of changes, in points, so that noise does not look large.
MIN_REACH = 5
OfPoint = Callable[[Point], "float | None"]


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
        value, look = of_arm(arm), MARKERS.get(arm.key, MARKERS.get(arm.method))
        if look is None or value is None or not math.isfinite(value):
            continue
        # One entry for all weights of a blend.
        label = arm.method.replace("-", " ") if arm.method in BLENDS else arm.label
        axes.scatter([100 * arm.share], [value], color=look[0], marker=look[1], s=46, label=readable(label), zorder=5)
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


def _rows_with_curves(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows if row.curve}


# The page shows a chart with the methods or, if it has a picture for each row, with the row; keys are names of rows.
CHARTS = (
    Chart("methods", "Every method: gain in DSR and change of skill", methods_figure),
    Chart("row_{}", lambda row: f"{row.name}: edits of every size", row_figure, _rows_with_curves),
)
