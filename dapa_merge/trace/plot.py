"""The pictures: heatmaps of traces, bars, the search's path, curves. Every function returns a figure.

This and `plot_style`, whose `render` makes a file of a figure, are the only modules that import matplotlib.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

# First of all, because it says what to install where matplotlib is not.
from dapa_merge.trace.plot_style import (
    BLACK,
    BLUE,
    CARD_LETTERS,
    CARD_WIDTH,
    COLOURS,
    GREY,
    LINE_HEIGHT,
    LINES,
    MAX_BARS,
    MAX_TICKS,
    ORANGE,
    PATTERNS,
    VERMILION,
    every_few,
    layer_ticks,
    marker_of,
    readable,
    spread_places,
    styled,
)

# isort: split
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from dapa_merge.trace.average import Mean


class Bar(NamedTuple):
    """A value with its 95 % interval; None for no interval, NaN for no value."""

    value: float
    interval: tuple[float, float] | None = None


def heatmap(
    effect: NDArray[numpy.floating],
    labels: Sequence[str],
    title: str,
    *,
    marked: Sequence[bool] | None = None,
    bound: float | None = None,
) -> Figure:
    """What restoring brings back, by layer and token.

    Args:
        effect: In nats, `[layers, tokens]`; NaN is left blank.
        labels: One for each token.
        title: What is shown.
        marked: Which labels are the subject's.
        bound: The effect at both ends of the scale, if not the largest of these.
    """
    num_layers, num_tokens = effect.shape
    with styled():
        figure = Figure(figsize=(CARD_WIDTH, max(2.4, 1.5 + 0.24 * num_tokens)), layout="constrained")
        axes = figure.add_subplot()
        bound = bound or float(numpy.nanmax(numpy.abs(effect), initial=0.0)) or 1.0
        image = axes.imshow(effect.T, aspect="auto", cmap="PuOr_r", vmin=-bound, vmax=bound, interpolation="nearest")
        axes.set_yticks(range(num_tokens), [readable(label) for label in labels], parse_math=False)
        for text, is_marked in zip(axes.get_yticklabels(), marked or [], strict=False):
            if is_marked:
                text.set_fontweight("bold")
                text.set_color(VERMILION)
        layer_ticks(axes, num_layers)
        axes.set_xlabel("layer")
        axes.spines[:].set_visible(True)
        axes.set_title(title, parse_math=False)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label("refusing restored (nats)")
        bar.outline.set_edgecolor("#666666")
    return figure


def bars_by_layer(panels: Sequence[tuple[str, Mapping[str, Mean]]], *, num_layers: int) -> Figure:
    """For each panel, bars by layer and module, with 95 % intervals; of many layers, lines.

    Args:
        panels: What a panel shows, and its means by module, each `[layers]`.
        num_layers: Of the model.
    """
    with styled():
        figure = Figure(figsize=(CARD_WIDTH, 0.5 + 2.5 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, by_module) in zip(rows, panels, strict=True):
            # So many bars would be too thin to tell apart.
            (_lines if num_layers > MAX_TICKS else _bars)(axes, by_module, num_layers)
            axes.axhline(0, color="#666666", linewidth=0.8)
            axes.set_title(title, parse_math=False)
            axes.set_xlim(-0.7, num_layers - 0.3)
        layer_ticks(rows[-1], num_layers)
        rows[-1].set_xlabel("layer")
        figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(panels[0][1]))
    return figure


def _bars(axes: Axes, by_module: Mapping[str, Mean], num_layers: int) -> None:
    width = 0.8 / len(by_module)
    for index, (module, mean) in enumerate(by_module.items()):
        at = numpy.arange(num_layers) + (index - (len(by_module) - 1) / 2) * width
        reach = numpy.nan_to_num(numpy.stack([mean.mean - mean.low, mean.high - mean.mean]))
        axes.bar(
            at, numpy.nan_to_num(mean.mean), width, yerr=reach.tolist(), label=module, color=COLOURS.get(module, GREY),
            hatch=PATTERNS.get(module, ""), edgecolor="white", linewidth=0,
            error_kw={"elinewidth": 0.8, "ecolor": BLACK},
        )  # fmt: skip


def _lines(axes: Axes, by_module: Mapping[str, Mean], num_layers: int) -> None:
    for (module, mean), (_, marker, line) in zip(by_module.items(), itertools.cycle(LINES), strict=False):
        colour, at = COLOURS.get(module, GREY), numpy.arange(num_layers)
        axes.plot(at, mean.mean, color=colour, marker=marker, linestyle=line, label=module, markersize=3.5, linewidth=1)
        axes.fill_between(at, mean.low, mean.high, color=colour, alpha=0.25, linewidth=0)


class Step(NamedTuple):
    """One test of a search.

    Attributes:
        units: The indices of the units that it transplanted, whole or in part.
        share: How large they are together, in [0, 1].
        holds: Whether they were enough.
        score: What share of the prompts that it asked was refused; None if the model was scored as a whole.
    """

    units: Sequence[int]
    share: float
    holds: bool
    score: float | None


def search_path(
    units: Sequence[str], steps: Sequence[Step], final: Sequence[int], threshold: float, measure: str
) -> Figure:
    """The search, test by test: which units were asked, how large a share, how far they refused, and what was kept.

    Args:
        units: All units, in order.
        steps: The tests, in order.
        final: Which units were kept.
        threshold: The score that was required.
        measure: What the score is.
    """
    num_units, num_steps = len(units), len(steps)
    with styled():
        mosaic_height = min(4.5, 0.16 * num_units)
        figure = Figure(figsize=(CARD_WIDTH, 3.4 + mosaic_height), layout="constrained")
        share, score, matrix = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 1.2, 0.6 + mosaic_height))
        at = numpy.arange(1, num_steps + 1)
        held = numpy.array([step.holds for step in steps], bool)
        shares = numpy.array([100 * step.share for step in steps])
        scores = numpy.array([math.nan if step.score is None else step.score for step in steps])
        for axes, values in ((share, shares), (score, scores)):
            axes.plot(at, values, color=GREY, linewidth=0.8, zorder=1)
            axes.scatter(at[held], values[held], marker="o", color=BLUE, zorder=2)
            axes.scatter(at[~held], values[~held], marker="x", color=VERMILION, zorder=2)
        share.set_ylim(-5, 108)
        share.set_ylabel("% of units")
        share.set_title("The search: what each test transplanted, and whether it held")
        score.axhline(threshold, color=BLACK, linestyle="--", linewidth=1)
        score.set_ylim(-0.05, 1.08)
        score.set_ylabel(f"{measure}\nof those asked")
        cells = numpy.zeros((num_units, num_steps))
        for index, step in enumerate(steps):
            cells[list(step.units), index] = 1 if step.holds else 2
        _mosaic(matrix, cells)
        for unit in final:
            # Not so thick that it hides what it frames.
            thickness = min(1.2, 20 * mosaic_height / num_units)
            matrix.axhspan(unit - 0.5, unit + 0.5, facecolor="none", edgecolor=BLACK, linewidth=thickness, zorder=3)
        shown = spread_places(final, every_few(num_units), math.ceil(LINE_HEIGHT * num_units / mosaic_height))
        matrix.set_yticks(shown, [units[index] for index in shown])
        for text, index in zip(matrix.get_yticklabels(), shown, strict=True):
            text.set_fontweight("bold" if index in set(final) else "normal")
        matrix.set_xlim(0.5, num_steps + 0.5)
        matrix.xaxis.set_major_locator(MaxNLocator(integer=True))
        matrix.set_xlabel("test")
        matrix.set_ylabel("unit")
        handles = [
            marker_of(share, "o", BLUE, "holds"),
            marker_of(share, "x", VERMILION, "fails"),
            score.plot([], [], color=BLACK, linestyle="--", linewidth=1, label="required")[0],
            Patch(facecolor="none", edgecolor=BLACK, linewidth=1.2, label="kept in the end"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def edit_curve(shares: Sequence[float], figures: Mapping[str, Sequence[Bar]], chosen: float | None) -> Figure:
    """The size of the edit against DSR, over-refusal and skills.

    Args:
        shares: Of the target's parameters, in [0, 1], ascending.
        figures: By name, a value in [0, 1] for each share.
        chosen: The share that the selection changes, if there is one.
    """
    with styled():
        figure = Figure(figsize=(CARD_WIDTH, 4), layout="constrained")
        axes = figure.add_subplot()
        percent = [100 * share for share in shares]
        for (name, values), (colour, marker, line) in zip(figures.items(), itertools.cycle(LINES), strict=False):
            heights = [bar.value for bar in values]
            axes.plot(percent, heights, color=colour, marker=marker, linestyle=line, label=readable(name), ms=5)
            with_interval = [bar for bar in values if bar.interval is not None]
            if len(with_interval) == len(values):
                low, high = zip(*(bar.interval or (0.0, 0.0) for bar in values), strict=True)
                axes.fill_between(percent, low, high, color=colour, alpha=0.12, linewidth=0)
        if chosen is not None:
            axes.axvline(100 * chosen, color=BLACK, linewidth=1, linestyle="--", label="the selection")
        axes.set_ylim(-0.04, 1.06)
        axes.set_xlabel("parameters changed (%)")
        axes.set_ylabel("share of the prompts")
        axes.set_title("How small can the edit be?")
        columns = CARD_LETTERS // (max(len(readable(name)) for name in (*figures, "the selection")) + 8)
        figure.legend(loc="outside lower center", ncols=min(columns, len(figures) + 1))
    return figure


def model_bars(models: Sequence[str], figures: Mapping[str, Sequence[Bar]], title: str) -> Figure:
    """Figures of some models side by side, each in [0, 1].

    Args:
        models: Their names; the first three are drawn in the colours of before, after and source.
        figures: By name, a value for each model.
        title: What is shown.
    """
    colours, patterns = (GREY, BLUE, ORANGE), ("", "//", "..")
    with styled():
        figure = Figure(figsize=(CARD_WIDTH, 3.6), layout="constrained")
        axes = figure.add_subplot()
        width = 0.8 / len(models)
        is_crowded = len(figures) * len(models) > MAX_BARS
        for index, model in enumerate(models):
            bars = [values[index] for values in figures.values()]
            at = numpy.arange(len(figures)) + (index - (len(models) - 1) / 2) * width
            reach = [[_reach(bar, side) for bar in bars] for side in (0, 1)]
            axes.bar(
                at, [bar.value for bar in bars], width * 0.94, yerr=reach, label=model, color=colours[index % 3],
                hatch=patterns[index % 3], edgecolor="white", linewidth=0,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": BLACK},
            )  # fmt: skip
            for place, bar in zip(at, bars, strict=True):
                top = bar.value if bar.interval is None else bar.interval[1]
                how: dict[str, Any] = {
                    "textcoords": "offset points",
                    "ha": "center",
                    "fontsize": 9,
                    "rotation": 90 * is_crowded,
                }
                axes.annotate(f"{bar.value:.3f}", (place, top), (0, 3), **how)
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


class GroupBar(NamedTuple):
    """A group of units: its score, what that is without a change, and the scores of its random controls."""

    name: str
    start: float
    score: float
    controls: Sequence[float]


def group_bars(panels: Sequence[tuple[str, Sequence[GroupBar]]], lines: Mapping[str, float], measure: str) -> Figure:
    """Scores of groups beside those of random selections of the same size.

    Args:
        panels: What a panel shows, and its groups: the same in each.
        lines: What is drawn across, by name: the target's score, and the full transplant's.
        measure: What the score is.
    """
    number = len(panels[0][1])
    with styled():
        figure = Figure(figsize=(CARD_WIDTH, 1.6 + 0.24 * number), layout="constrained")
        columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, groups) in zip(columns, panels, strict=True):
            at, scores = range(number), [group.score for group in groups]
            starts = [group.start for group in groups]
            axes.hlines(at, starts, scores, color=BLUE, linewidth=2.5, alpha=0.5, zorder=1)
            axes.scatter(scores, at, color=BLUE, s=28, zorder=2)
            controls = [(score, index) for index, group in enumerate(groups) for score in group.controls]
            if controls:
                axes.scatter(*zip(*controls, strict=True), marker="|", color=VERMILION, s=70, zorder=3)
            for (_, value), style in zip(lines.items(), ("--", ":"), strict=False):
                axes.axvline(value, color=BLACK, linewidth=1, linestyle=style, zorder=0)
            axes.set_xlim(-0.04, 1.04)
            axes.set_ylim(number - 0.4, -0.6)
            axes.set_xlabel(measure)
            axes.set_title(title, parse_math=False)
        columns[0].set_yticks(range(number), [group.name for group in panels[0][1]], parse_math=False)
        handles = [
            marker_of(columns[0], "o", BLUE, "the group"),
            marker_of(columns[0], "|", VERMILION, "random, as many units"),
            *(
                columns[0].plot([], [], color=BLACK, linestyle=style, linewidth=1, label=name)[0]
                for name, style in zip(lines, ("--", ":"), strict=False)
            ),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _reach(bar: Bar, side: int) -> float:
    return 0.0 if bar.interval is None else abs(bar.interval[side] - bar.value)


def _mosaic(axes: Axes, cells: NDArray[numpy.float64]) -> None:
    from matplotlib.colors import ListedColormap

    num_units, num_steps = cells.shape
    axes.imshow(
        cells, aspect="auto", interpolation="nearest", cmap=ListedColormap(["#F4F4F4", "#7FB8DE", "#EDB48C"]), vmin=0,
        vmax=2, extent=(0.5, num_steps + 0.5, num_units - 0.5, -0.5),
    )  # fmt: skip
    axes.spines[:].set_visible(True)
