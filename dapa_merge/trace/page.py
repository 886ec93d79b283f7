"""The page of a trace: one HTML file that opens without a network and without the files beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment

from dapa_merge.report.charts import Picture

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 56rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
figure { margin: 1.5rem 0; } img { width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
code { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>Target <code>{{ summary.target }}</code>, source <code>{{ summary.source }}</code>, prompts
<code>{{ summary.prompts }}</code>. dapa-merge {{ summary.version }}.</p>
<h2>What was found</h2>
<ul>
{% for sentence in summary.findings %}<li>{{ sentence }}</li>
{% endfor %}</ul>
{% for picture in pictures %}<figure>
<img alt="{{ picture.caption }}" src="data:image/png;base64,{{ picture.data }}">
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
{% for table in tables %}<h2>{{ table.title }}</h2>
<table>
<tr>{% for name in table.head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
<h2>What it cost</h2>
<p>Causal tracing took, for each of {{ summary.trace.num_prompts }} prompts,
{{ "%.0f"|format(cost.trace_runs_per_prompt) }} runs (worth {{ "%.0f"|format(cost.trace_passes_per_prompt) }} passes
through all layers) and {{ "%.2f"|format(cost.trace_seconds_per_prompt) }} s; module influence took
{{ "%.0f"|format(cost.influence) }} passes in all. Settings: {{ settings }}.
Everything is in <code>summary.json</code>, and the traces of single prompts are in
<code>traces/</code>.</p>
</body>
</html>
"""

# Of each kind that is traced.
NUM_CELLS = 3


class Table(NamedTuple):
    """Numbers of the page."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def page(summary: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole page.

    Args:
        summary: As `trace_summary.summarize` gives it.
        pictures: In their order.
    """
    template = Environment(autoescape=True, trim_blocks=False).from_string(PAGE)
    shown = [{"caption": one.caption, "data": base64.b64encode(one.files[".png"]).decode()} for one in pictures]
    return template.render(
        title=f"Where alignment lives: {_short(summary['target'])} and {_short(summary['source'])}",
        summary=summary,
        pictures=shown,
        tables=_tables(summary),
        cost=summary["passes"],
        settings="; ".join(f"{name} {_plain(value)}" for name, value in summary["trace"]["settings"].items()),
    )


def _tables(summary: Mapping[str, Any]) -> list[Table]:
    groups = summary["groups"]
    tables = [
        Table(
            f"Sufficient and necessary ({groups['measure']})",
            ("group", "units", "alone", "random alone", "everything", "left out", "random left out"),
            [
                (
                    one["group"],
                    str(one["num_units"]),
                    _number(one["inserted"]),
                    _range(one["random_inserted"]),
                    _number(one["full"]),
                    _number(one["reverted"]),
                    _range(one["random_reverted"]),
                )
                for one in groups["groups"]
            ],
        ),
        Table(
            "Units",
            ("unit", "attribution (nats)", "influence on refusing (nats)", "on the hidden state", "selected"),
            [
                (
                    one["unit"],
                    _number(one["attribution"]),
                    _interval(one["influence_on_refusing"]),
                    _interval(one["influence_on_hidden_state"]),
                    "yes" if one["selected"] else "",
                )
                for one in summary["units"]
            ],
        ),
    ]
    tables.append(_cells(summary["trace"]))
    if overlaps := summary["overlap"]["with_selection"]:
        head = ("by", "would have selected", "Jaccard", "by chance", "rank correlation", "at best")
        rows = [
            (
                name,
                ", ".join(one["top"]),
                *(_number(one[key]) for key in ("jaccard", "jaccard_by_chance", "spearman", "spearman_at_best")),
            )
            for name, one in overlaps.items()
        ]
        tables.append(Table("Would others have found the selection?", head, rows))
    pairs = [(*one["of"], _number(one["spearman"])) for one in summary["overlap"]["rank_correlations"]]
    tables.append(Table("How far the ways to tell agree", ("one", "other", "rank correlation"), pairs))
    return tables


def _cells(trace: Mapping[str, Any]) -> Table:
    """Of each kind the cells that restore most."""
    rows = []
    for kind, means in trace["kinds"].items():
        cells = [
            (value, layer, role)
            for layer, of_layer in enumerate(means["mean"])
            for role, value in enumerate(of_layer)
            if value is not None
        ]
        for value, layer, role in sorted(cells, reverse=True)[:NUM_CELLS]:
            low, high = (means[side][layer][role] for side in ("low", "high"))
            rows.append((kind, str(layer), trace["roles"][role], _interval({"mean": value, "low": low, "high": high})))
    return Table("What restores most (nats)", ("kind", "layer", "token", "mean (95 % interval)"), rows)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(cell: Mapping[str, float | None]) -> str:
    return f"{_number(cell['mean'])} ({_number(cell['low'])} to {_number(cell['high'])})"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}" if values else "-"


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
