"""The charts of a trace: heatmaps, bars, and curves; `CHARTS` lists them in the order of the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
from numpy.typing import NDArray

from dapa_merge.measure.figures import Mean
from dapa_merge.report.charts import Bar, front_figure, search_figure
from dapa_merge.report.drawing import (
    BLACK,
    BLUE,
    CARD_LETTERS,
    COLOURS,
    GREY,
    LINES,
    PATTERNS,
    VERMILION,
    Chart,
    Panel,
    every_few,
    layer_maps,
    marker_of,
    readable,
    sheet,
)
from dapa_merge.trace.average import ROLES, mean_effect, mean_of
from dapa_merge.trace.case import WINDOWED
from dapa_merge.trace.causal import Trace
from dapa_merge.trace.influence import Influence
from dapa_merge.trace.summary import Traced, counted, rankings_of_directions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def heatmap(
    effect: NDArray[numpy.floating],
    labels: Sequence[str],
    title: str,
    *,
    marked: Sequence[bool] | None = None,
    bound: float | None = None,
) -> Figure:
    """Draw effects of restoring in nats, `[layers, tokens]`, up to `bound` or the largest one; NaN is left blank."""
    num_layers, num_tokens = effect.shape
    with sheet(max(2.4, 1.5 + 0.24 * num_tokens)) as figure:
        axes = figure.add_subplot()
        bound = bound or float(numpy.nanmax(numpy.abs(effect), initial=0.0)) or 1.0
        image = axes.imshow(effect.T, aspect="auto", cmap="PuOr_r", vmin=-bound, vmax=bound, interpolation="nearest")
        axes.set_yticks(range(num_tokens), [readable(label) for label in labels], parse_math=False)
        for text, is_marked in zip(axes.get_yticklabels(), marked or [], strict=False):
            if is_marked:
                text.set_fontweight("bold")
                text.set_color(VERMILION)
        axes.set_xticks(every_few(num_layers))
        axes.set_xlabel("layer")
        axes.spines[:].set_visible(True)
        axes.set_title(title, parse_math=False)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label("refusing restored (nats)")
        bar.outline.set_edgecolor("#666666")
    return figure


def bars_by_layer(panels: Sequence[tuple[str, Mapping[str, Mean]]], *, num_layers: int) -> Figure:
    """Draw panels of means by module, `[layers]`, as bars with 95 % intervals or, for many layers, as lines."""
    with sheet(0.5 + 2.5 * len(panels)) as figure:
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, by_module) in zip(rows, panels, strict=True):
            # More bars would be too thin to tell apart.
            (_lines if num_layers * len(by_module) > MAX_LAYER_BARS else _bars)(axes, by_module, num_layers)
            axes.axhline(0, color="#666666", linewidth=0.8)
            axes.set_title(title, parse_math=False)
            axes.set_xlim(-0.7, num_layers - 0.3)
        rows[-1].set_xticks(every_few(num_layers))
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


def edit_curve(shares: Sequence[float], figures: Mapping[str, Sequence[Bar]], chosen: float | None) -> Figure:
    """Draw figures in [0, 1], by name, against ascending shares of the target's parameters, and the chosen share."""
    with sheet(4) as figure:
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


class GroupBar(NamedTuple):
    """A group of units: the score without a change, with it, and those of random controls."""

    name: str
    start: float
    score: float
    controls: Sequence[float]


def group_bars(panels: Sequence[tuple[str, Sequence[GroupBar]]], lines: Mapping[str, float], measure: str) -> Figure:
    """Draw panels of the same groups and random selections of their size, with some scores as lines across."""
    number = len(panels[0][1])
    with sheet(1.6 + 0.24 * number) as figure:
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


KIND_NAMES = {
    "hidden": "hidden state",
    "mlp": "MLP",
    "attention": "attention",
    "gate": "gate projection",
    "up": "up projection",
    "down": "down projection",
}
# The kinds with pictures of single prompts.
EXAMPLE_KINDS = ("hidden", "mlp", "attention")
# The bars of 24 layers, of four modules each.
MAX_LAYER_BARS = 96
# The most tokens in a picture of one prompt, and before its subject.
MAX_BEFORE = 12
MAX_TOKENS = 80


class Restored(NamedTuple):
    """The restored outputs that a heatmap shows.

    Attributes:
        number: The number of the prompt, from 1; 0 for the mean of all.
    """

    found: Traced
    kind: str
    number: int = 0

    @property
    def title(self) -> str:
        width = self.num_layers
        window = f" of {width} layers" if width > 1 else ""
        whose = f"prompt {self.number}" if self.number else f"mean of {counted(len(self.found.traces), 'prompt')}"
        return f"Restoring the {KIND_NAMES[self.kind]}{window}, {whose}"

    @property
    def num_layers(self) -> int:
        """The number of layers that are restored at once."""
        settings = self.found.settings
        return settings.window if settings is not None and self.kind in WINDOWED else 1

    @property
    def trace(self) -> Trace:
        return self.found.traces[self.number - 1]


def _influence(found: Traced) -> Figure | None:
    if found.influence is None or found.attribution is None:
        return None
    num_layers = max(unit.layer for unit in found.units) + 1
    hidden, refusing = mean_of(found.influence.hidden), mean_of(found.influence.refusing)
    effects = numpy.array([found.attribution[unit] for unit in found.influence.units])
    nothing = numpy.full(len(effects), math.nan)
    panels: list[tuple[str, Mean]] = [
        ("Change of the prompt's last hidden state, relative to its length", hidden),
        ("Change of refusing (nats)", refusing),
        ("Change of refusing by attribution, to first order (nats)", Mean(effects, nothing, nothing, nothing)),
    ]
    by_module = [(title, _by_module(found, found.influence, mean, num_layers)) for title, mean in panels]
    return bars_by_layer(by_module, num_layers=num_layers)


def _by_module(found: Traced, measured: Influence, mean: Mean, num_layers: int) -> dict[str, Mean]:
    by_module = {}
    for module in dict.fromkeys(unit.module for unit in found.units):
        chosen = {unit.layer: index for index, unit in enumerate(measured.units) if unit.module == module}
        fields = []
        for values in (mean.mean, mean.low, mean.high, mean.number):
            row: Any = numpy.full(num_layers, math.nan)
            row[list(chosen)] = values[list(chosen.values())]
            fields.append(row)
        by_module[module] = Mean(*fields)
    return by_module


def _influence_caption(found: Traced) -> str:
    assert found.influence is not None
    number = len(found.influence.before)
    return (
        f"Each unit of the source alone in the target: mean over {counted(number, 'prompt')}, above with 95 % "
        f"intervals. A change of the hidden state says how sensitive the target is to a unit, a change of refusing "
        f"(log p(refusal) - log p(answer)) what the unit does for it. Attribution foresees by one backward pass which "
        f"units do that."
    )


def _groups(found: Traced) -> Figure | None:
    if not found.findings:
        return None
    # Layers, of which there are many, come last.
    shown = sorted(found.findings, key=lambda one: one.group.family == "layer")
    target, full = found.target_score, next(one.full for one in shown if one.group.family != "selection")
    inserted = [GroupBar(one.group.label, target, one.inserted, one.control_inserted) for one in shown]
    reverted = [GroupBar(one.group.label, one.full, one.reverted, one.control_reverted) for one in shown]
    panels = [("Alone in the target: sufficient?", inserted), ("Left out of all units: necessary?", reverted)]
    return group_bars(panels, {"target": target, "all units": full}, found.measure)


def _groups_caption(found: Traced) -> str:
    return (
        f"The {found.measure} with a group of units alone in the target (high: it is sufficient), and with everything "
        f"but the group (low: it is necessary), next to random selections of as many units "
        f"({found.wanted.num_controls} seeds). The selection is left out of the units that it was selected from."
    )


def _example(trace: Trace, kind: str, title: str) -> Figure:
    """Draw one prompt, token by token, without a long template; of a long one, the subject's beginning and the end."""
    first, stop = trace.subject
    labels, effect = list(trace.tokens), trace.effect(kind)
    marked = [first <= index < stop for index in range(len(labels))]
    if first > MAX_BEFORE or len(labels) > MAX_TOKENS:
        # Nothing is restored before the subject: half of the picture would be blank.
        kept = [*range(first, len(labels))]
        labels, marked, effect = [labels[index] for index in kept], [marked[index] for index in kept], effect[:, kept]
    if len(labels) > MAX_TOKENS:
        half = MAX_TOKENS // 2
        gap = numpy.full((len(effect), 1), math.nan)
        effect = numpy.concatenate([effect[:, :half], gap, effect[:, -half:]], axis=1)
        labels = [*labels[:half], f"({len(labels) - 2 * half} not shown)", *labels[-half:]]
        marked = [*marked[:half], False, *marked[-half:]]
    return heatmap(effect, labels, title, marked=marked)


def _mean_trace(shown: Restored) -> Figure:
    found = shown.found
    means = {kind: mean_effect(found.traces, kind).mean for kind in _means(found)}
    mean = means[shown.kind]
    # A short template leaves no further tokens.
    present = [index for index in range(len(ROLES)) if not numpy.isnan(mean[:, index]).all()]
    # One scale for all kinds, to be compared.
    bound = max(float(numpy.nanmax(numpy.abs(values), initial=0.0)) for values in means.values())
    return heatmap(mean[:, present], [ROLES[index] for index in present], shown.title, bound=bound)


def _trace_caption(shown: Restored) -> str:
    found, width = shown.found, shown.num_layers
    taken = float(numpy.mean([trace.total_effect for trace in found.traces]))
    window = f" Each column is a window of {width} layers that begins {counted(width // 2, 'layer')} before its own."
    return (
        f"The {found.wanted.traced}, with noise on the subject's embeddings and the {KIND_NAMES[shown.kind]} of the "
        f"clean run restored at one layer and token: the part that returns of the {taken:.2f} nats lost by the noise."
        f"{window if width > 1 else ''}"
    )


def _example_caption(shown: Restored) -> str:
    kind, prompt = KIND_NAMES[shown.kind], shown.trace.prompt
    return f"The {kind} for one prompt, token by token; the subject is bold: {prompt}"


def _means(found: Traced) -> dict[str, Restored]:
    return {} if found.settings is None else {kind: Restored(found, kind) for kind in found.settings.kinds}


def _examples(found: Traced) -> dict[str, Restored]:
    number = min(len(found.traces), found.wanted.num_examples)
    kinds = [kind for kind in EXAMPLE_KINDS if kind in _means(found)]
    return {f"{index}_{kind}": Restored(found, kind, index) for index in range(1, number + 1) for kind in kinds}


def _search(found: Traced) -> Figure | None:
    # Nothing was tested where a point was picked.
    if found.search is None or found.search.by_hand:
        return None
    return search_figure(found.search, found.plan, found.candidates)


def _curve(found: Traced) -> Figure | None:
    if not found.curve:
        return None
    points = found.curve
    rows = {
        "DSR": [Bar(*point.dsr) for point in points],
        "over-refusal": [Bar(*point.over_refusal) for point in points],
    }
    for name in points[0].skills:
        rows[name] = [Bar(*point.skills[name]) for point in points]
    chosen = found.plan.share(found.copied) if found.copied else None
    return edit_curve([point.share for point in points], rows, chosen)


def _curve_caption(found: Traced) -> str:
    first = "the selection first, then " if found.copied else ""
    return f"Edits of every size: {first}unit by unit in the order of attribution. Bands are 95 % intervals."


def _directions(found: Traced) -> Figure | None:
    if found.put_back is None:
        return None
    modules = list(dict.fromkeys(unit.module for unit in found.candidates))
    num_layers = max(unit.layer for unit in found.candidates) + 1
    panels = []
    for name, scores in rankings_of_directions(found).items():
        values = numpy.full((len(modules), num_layers), math.nan)
        for unit, score in scores.items():
            values[modules.index(unit.module), unit.layer] = score
        panels.append(Panel(name[0].upper() + name[1:], values))
    return layer_maps(panels, modules)


def _directions_caption(found: Traced) -> str:
    assert found.put_back is not None
    return (
        f"What {found.put_back.num_directions} chosen directions put back of each unit (squared norm), beside what "
        f"might have foretold it: their own gain in refusing, the size of the difference between the models, "
        f"attribution and influence of copied units, and what restoring a unit's output brings back in causal tracing"
        f"{'' if found.traces else ' (not traced yet)'}. Each map has its own scale; grey is not measured."
    )


CHARTS = (
    Chart("influence", _influence_caption, _influence),
    Chart("directions", _directions_caption, _directions),
    Chart("groups", _groups_caption, _groups),
    Chart("trace_{}", _trace_caption, _mean_trace, _means),
    Chart("example_{}", _example_caption, lambda shown: _example(shown.trace, shown.kind, shown.title), _examples),
    Chart(
        "search",
        "Every test of the search in order: the units from the source, their share of all units, and whether enough "
        "was refused. A test stops as soon as its verdict is certain, so its score covers only the prompts asked until "
        "then.",
        _search,
    ),
    Chart(
        "front",
        "The points that the search could pick from: how far each moves what the model says, and what it refuses.",
        lambda found: front_figure(found.search),
    ),
    Chart("edit_size", _curve_caption, _curve),
)
# After which stages a chart is drawn, by its name.
STAGES_OF_CHARTS = {
    "influence": ("influence",),
    "directions": ("directions", "traces"),
    "groups": ("groups",),
    "trace_{}": ("traces",),
    "example_{}": ("traces",),
    "search": ("search",),
    "front": ("search",),
    "edit_size": ("edits",),
}
