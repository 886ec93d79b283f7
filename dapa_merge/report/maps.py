"""Maps of the units of a model: a row for each module, a column for each layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy

from dapa_merge.report.charts import MAX_TICKS, every_few, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MAPS_IN_A_ROW = 2


class Panel(NamedTuple):
    """A measure of units: its name, and a score for each module and layer, `[modules, layers]`; NaN for no unit."""

    title: str
    scores: NDArray[numpy.floating]


def layer_maps(panels: Sequence[Panel], modules: Sequence[str]) -> Figure:
    """Draw measures of units side by side, each as shares of its own largest score."""
    colours, least = ("PuOr_r", -1) if any((panel.scores < 0).any() for panel in panels) else ("Oranges", 0)
    num_rows, num_layers = -(-len(panels) // MAPS_IN_A_ROW), panels[0].scores.shape[1]
    # A map has half the room of a chart for the labels of layers.
    ticks = every_few(num_layers)[:: 1 if num_layers <= MAX_TICKS // 2 else 2]
    with sheet(max(2.2, 0.4 + num_rows * (0.6 + 0.16 * len(modules)))) as figure:
        grid = figure.subplots(num_rows, MAPS_IN_A_ROW, sharey=True, squeeze=False)
        for axes, panel in itertools.zip_longest(grid.flat, panels):
            if panel is None:
                axes.set_visible(False)
                continue
            shares = panel.scores / (float(numpy.nanmax(numpy.abs(panel.scores), initial=0.0)) or 1.0)
            axes.imshow(shares, aspect="auto", cmap=colours, vmin=least, vmax=1, interpolation="nearest")
            axes.set_facecolor("#dddddd")
            axes.set_yticks(range(len(modules)), modules, parse_math=False)
            axes.set_xticks(ticks)
            axes.tick_params(labelsize=8)
            axes.set_title(panel.title, parse_math=False, fontsize=10)
            axes.spines[:].set_visible(True)
        figure.supxlabel("layer", fontsize=10)
        bar = figure.colorbar(grid.flat[0].images[0], ax=grid, fraction=0.03, pad=0.02, aspect=50)
        bar.set_label("share of the largest")
        bar.outline.set_edgecolor("#666666")
    return figure
