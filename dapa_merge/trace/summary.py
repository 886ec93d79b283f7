"""What a trace found, in numbers and in sentences."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import numpy

from dapa_merge import __version__
from dapa_merge.measure.figures import Mean
from dapa_merge.report.report import jsonable
from dapa_merge.report.tables import search_json
from dapa_merge.trace.average import ROLES, Overlap, mean_effect, mean_of
from dapa_merge.trace.edits import Finding
from dapa_merge.trace.result import Traced
from dapa_merge.trace.sentences import (
    correlations_of,
    overlaps_of,
    planted_overlaps,
    rankings_of,
    sentences,
    whole_units,
)


def summarize(found: Traced) -> dict[str, Any]:
    """Everything as plain data for `json.dumps`; a figure that is not finite is None."""
    influence = found.influence
    hidden, refusing = mean_of(influence.hidden), mean_of(influence.refusing)
    rankings = rankings_of(found)
    selected = None if found.selection is None else whole_units(found.selection)
    return dict(
        jsonable(
            {
                "version": __version__,
                "target": str(found.recipe.target),
                "source": str(found.recipe.source),
                "prompts": found.recipe.prompts,
                "num_prompts": found.num_prompts,
                "num_contrasts": len(found.contrasts),
                "findings": sentences(found),
                "units": [
                    {
                        "unit": str(unit),
                        "attribution": found.attribution[unit],
                        "influence_on_refusing": _cell(refusing, index),
                        "influence_on_hidden_state": _cell(hidden, index),
                        "selected": None if selected is None else unit in selected,
                    }
                    for index, unit in enumerate(influence.units)
                ],
                "trace": _trace_json(found),
                "groups": {
                    "measure": found.measure,
                    "target": found.target_score,
                    "groups": [_group_json(one, found.target_score) for one in found.findings],
                },
                "curve": [asdict(point) for point in found.curve],
                "selection": None if found.selection is None else list(map(str, found.selection)),
                "no_selection_because": found.why_none,
                "search": _search_json(found),
                "overlap": {
                    "with_selection": {
                        name: _overlap_json(one) for name, one in overlaps_of(rankings, found.selection).items()
                    },
                    "rank_correlations": correlations_of(rankings),
                },
                "planted": {name: _overlap_json(one) for name, one in planted_overlaps(found).items()} or None,
                "passes": {
                    "influence": influence.num_passes,
                    "trace_runs_per_prompt": statistics.fmean(trace.num_runs for trace in found.traces),
                    "trace_passes_per_prompt": statistics.fmean(trace.num_passes for trace in found.traces),
                    "trace_seconds_per_prompt": statistics.fmean(found.seconds),
                },
            }
        )
    )


def _search_json(found: Traced) -> dict[str, Any] | None:
    """The search, without what depends on what its journal held before."""
    if found.search is None:
        return None
    said = search_json(found.search, found.plan)
    return {name: value for name, value in said.items() if name not in ("tests_recorded", "tests_unneeded", "seconds")}


def _trace_json(found: Traced) -> dict[str, Any]:
    total = mean_of(numpy.array([trace.total_effect for trace in found.traces]))
    return {
        "model": found.wanted.traced,
        "settings": asdict(found.settings),
        "num_prompts": len(found.traces),
        "clean": statistics.fmean(trace.clean for trace in found.traces),
        "total_effect": _cell(total, ()),
        "roles": list(ROLES),
        "kinds": {
            kind: {name: values.tolist() for name, values in vars(mean_effect(found.traces, kind)).items()}
            for kind in found.settings.kinds
        },
        "prompts": [
            {
                "prompt": trace.prompt,
                "subject": list(trace.tokens[slice(*trace.subject)]),
                "clean": trace.clean,
                "total_effect": trace.total_effect,
            }
            for trace in found.traces
        ],
    }


def _group_json(one: Finding, target: float) -> dict[str, Any]:
    return {
        "group": one.group.name,
        "family": one.group.family,
        "num_units": len(one.group.units),
        "inserted": one.inserted,
        "reverted": one.reverted,
        "full": one.full,
        "sufficiency": one.sufficiency(target),
        "necessity": one.necessity(target),
        "random_inserted": list(one.control_inserted),
        "random_reverted": list(one.control_reverted),
    }


def _overlap_json(one: Overlap) -> dict[str, Any]:
    return {
        "top": list(map(str, one.top)),
        "num_common": one.num_common,
        "jaccard": one.jaccard,
        "jaccard_by_chance": one.by_chance,
        "spearman": one.spearman,
        "spearman_at_best": one.spearman_at_best,
    }


def _cell(mean: Mean, index: Any) -> dict[str, float]:
    return {"mean": float(mean.mean[index]), "low": float(mean.low[index]), "high": float(mean.high[index])}
