"""The pictures of a trace: which there are, and what they are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy

from dapa_merge.trace import plot
from dapa_merge.trace.average import ROLES, Mean, mean_effect, mean_of
from dapa_merge.trace_result import Traced
from dapa_merge.trace_sentences import counted, label_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dapa_merge.checkpoint.architecture import Unit
    from dapa_merge.checkpoint.plan import Plan
    from dapa_merge.report import Report
    from dapa_merge.search_flow import Search
    from dapa_merge.trace.causal import Trace

NAMES = {
    "hidden": "hidden state",
    "mlp": "MLP",
    "attention": "attention",
    "gate": "gate projection",
    "up": "up projection",
    "down": "down projection",
}
# Of which a prompt has a picture of its own.
EXAMPLE_KINDS = ("hidden", "mlp", "attention")
# Of a prompt, so many tokens have a line in its picture.
MAX_TOKENS = 80


def figures_of(found: Traced) -> Iterator[tuple[str, str, Figure]]:
    """The name, the caption and the figure of each picture, in the order of a page."""
    yield "influence", _influence_caption(found), _influence(found)
    yield "groups", _groups_caption(found), _groups(found)
    for kind in found.settings.kinds:
        yield f"trace_{kind}", _trace_caption(found, kind), _mean_trace(found, kind)
    for number, trace in enumerate(found.traces[: found.wanted.num_examples], 1):
        for kind in (kind for kind in EXAMPLE_KINDS if kind in found.settings.kinds):
            title = f"Restoring the {NAMES[kind]}{_window(found, kind)}, prompt {number}"
            caption = f"The {NAMES[kind]} for one prompt, token by token; the subject is bold: {trace.prompt}"
            yield f"example_{number}_{kind}", caption, _example(trace, kind, title)
    if found.search is not None:
        yield "search", SEARCH_CAPTION, search_figure(found.search, found.plan, found.candidates)
    if found.curve:
        yield "edit_size", _curve_caption(found), _curve(found)


SEARCH_CAPTION = (
    "Every test of the search in order: which units were the source's, how large a share that was, and whether enough "
    "was refused. A test stops as soon as its verdict is certain, so that its share is of the prompts asked until then."
)


def search_figure(search: Search, plan: Plan, candidates: tuple[Unit, ...]) -> Figure:
    """The path of a search among some units; a block of rows is drawn in the line of its unit."""
    at = {unit: index for index, unit in enumerate(candidates)}
    total = plan.num_parameters(candidates)
    steps = [
        plot.Step(
            sorted({at[unit.whole] for unit in asked.units}),
            plan.num_parameters(asked.units) / total,
            asked.holds,
            asked.score,
        )
        for asked in search.path
    ]
    final = sorted({at[unit.whole] for unit in search.minimum.units})
    limits = search.requirement
    return plot.search_path(list(map(str, candidates)), steps, final, limits.min_score, limits.measure)


def report_figure(report: Report) -> Figure | None:
    """Before, after and source side by side; None if nothing was measured."""
    measured = [("before", report.before), ("after", report.after), ("source", report.source_alone)]
    columns = [(name, figures) for name, figures in measured if figures is not None]
    if not columns:
        return None
    rows: dict[str, list[plot.Bar]] = {
        "DSR": [plot.Bar(one.dsr, one.dsr_interval) for _, one in columns],
        "over-refusal": [plot.Bar(one.over_refusal, one.over_refusal_interval) for _, one in columns],
    }
    for index, skill in enumerate(columns[0][1].skills):
        rows[skill.name] = [plot.Bar(one.skills[index].score, one.skills[index].interval) for _, one in columns]
    return plot.model_bars([name for name, _ in columns], rows, "Before and after the repair, with 95 % intervals")


def _influence(found: Traced) -> Figure:
    num_layers = max(unit.layer for unit in found.units) + 1
    hidden, refusing = mean_of(found.influence.hidden), mean_of(found.influence.refusing)
    effects = numpy.array([found.attribution[unit] for unit in found.influence.units])
    nothing = numpy.full(len(effects), math.nan)
    panels: list[tuple[str, Mean]] = [
        ("Change of the prompt's last hidden state, relative to its length", hidden),
        ("Change of refusing (nats)", refusing),
        ("Change of refusing by attribution, to first order (nats)", Mean(effects, nothing, nothing, nothing)),
    ]
    return plot.bars_by_layer(
        [(title, _by_module(found, mean, num_layers)) for title, mean in panels], num_layers=num_layers
    )


def _by_module(found: Traced, mean: Mean, num_layers: int) -> dict[str, Mean]:
    by_module = {}
    for module in dict.fromkeys(unit.module for unit in found.units):
        chosen = {unit.layer: index for index, unit in enumerate(found.influence.units) if unit.module == module}
        fields = []
        for values in (mean.mean, mean.low, mean.high, mean.number):
            row: Any = numpy.full(num_layers, math.nan)
            row[list(chosen)] = values[list(chosen.values())]
            fields.append(row)
        by_module[module] = Mean(*fields)
    return by_module


def _influence_caption(found: Traced) -> str:
    number = len(found.influence.before)
    return (
        f"Each unit of the source alone in the target: mean over {counted(number, 'prompt')}, above with 95 % "
        f"intervals. A change of the hidden state says how sensitive the target is to a unit, a change of refusing "
        f"(log p(refusal) - log p(answer)) what the unit does for it. Attribution foresees by one backward pass which "
        f"units do that."
    )


def _groups(found: Traced) -> Figure:
    # The few first, then the layers.
    shown = sorted(found.findings, key=lambda one: one.group.family == "layer")
    target, full = found.target_score, next(one.full for one in shown if one.group.family != "selection")
    inserted = [plot.GroupBar(label_of(one.group), target, one.inserted, one.control_inserted) for one in shown]
    reverted = [plot.GroupBar(label_of(one.group), one.full, one.reverted, one.control_reverted) for one in shown]
    panels = [("Alone in the target: sufficient?", inserted), ("Left out of the full transplant: necessary?", reverted)]
    return plot.group_bars(panels, {"target": target, "full transplant": full}, found.measure)


def _groups_caption(found: Traced) -> str:
    return (
        f"The {found.measure} with a group of units alone in the target (high: it is sufficient), and with everything "
        f"but the group (low: it is necessary), beside random selections of as many units "
        f"({found.wanted.num_controls} seeds). The selection is left out of what it was selected from."
    )


def _example(trace: Trace, kind: str, title: str) -> Figure:
    """One prompt, token by token; of a long one the end, and as much as there is room for of what is before."""
    first, stop = trace.subject
    labels, effect = list(trace.tokens), trace.effect(kind)
    marked = [first <= index < stop for index in range(len(labels))]
    if len(labels) > MAX_TOKENS:
        # Nothing is restored before the subject.
        kept = [*range(first, len(labels))]
        labels, marked, effect = [labels[index] for index in kept], [marked[index] for index in kept], effect[:, kept]
    if len(labels) > MAX_TOKENS:
        half = MAX_TOKENS // 2
        gap = numpy.full((len(effect), 1), math.nan)
        effect = numpy.concatenate([effect[:, :half], gap, effect[:, -half:]], axis=1)
        labels = [*labels[:half], f"({len(labels) - 2 * half} not shown)", *labels[-half:]]
        marked = [*marked[:half], False, *marked[-half:]]
    return plot.heatmap(effect, labels, title, marked=marked)


def _mean_trace(found: Traced, kind: str) -> Figure:
    means = {one: mean_effect(found.traces, one).mean for one in found.settings.kinds}
    title = f"Restoring the {NAMES[kind]}{_window(found, kind)}, mean of {counted(len(found.traces), 'prompt')}"
    mean = means[kind]
    # A short template leaves no further tokens.
    present = [index for index in range(len(ROLES)) if not numpy.isnan(mean[:, index]).all()]
    # One scale for all kinds, to be compared.
    bound = max(float(numpy.nanmax(numpy.abs(values), initial=0.0)) for values in means.values())
    return plot.heatmap(mean[:, present], [ROLES[index] for index in present], title, bound=bound)


def _window(found: Traced, kind: str) -> str:
    width = _width(found, kind)
    return f" of {width} layers" if width > 1 else ""


def _window_note(found: Traced, kind: str) -> str:
    width = _width(found, kind)
    if width == 1:
        return ""
    return f" Each column is a window of {width} layers that begins {counted(width // 2, 'layer')} before its own."


def _width(found: Traced, kind: str) -> int:
    """How many layers are restored at once."""
    from dapa_merge.trace.settings import WINDOWED

    return found.settings.window if kind in WINDOWED else 1


def _trace_caption(found: Traced, kind: str) -> str:
    taken = float(numpy.mean([trace.total_effect for trace in found.traces]))
    return (
        f"The {found.wanted.traced}, with noise on the subject's embeddings and the {NAMES[kind]} of the clean run "
        f"restored at one layer and token: how much of the {taken:.2f} nats that the noise takes comes back."
        f"{_window_note(found, kind)}"
    )


def _curve(found: Traced) -> Figure:
    points = found.curve
    rows = {
        "DSR": [plot.Bar(*point.dsr) for point in points],
        "over-refusal": [plot.Bar(*point.over_refusal) for point in points],
    }
    for name in points[0].skills:
        rows[name] = [plot.Bar(*point.skills[name]) for point in points]
    chosen = None if found.selection is None else found.plan.share(found.selection)
    return plot.edit_curve([point.share for point in points], rows, chosen)


def _curve_caption(found: Traced) -> str:
    first = "the selection first, then " if found.selection else ""
    return f"Edits of every size: {first}unit by unit in the order of attribution. Bands are 95 % intervals."
