"""What a trace found, in numbers and in sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy

from dapa_merge import __version__, miniature
from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.report import jsonable, spans
from dapa_merge.search_view import search_json
from dapa_merge.trace.average import ROLES, Mean, layer_scores, mean_effect, mean_of
from dapa_merge.trace.groups import Finding
from dapa_merge.trace.overlap import Overlap, overlap, rank_correlation
from dapa_merge.trace_result import Traced

if TYPE_CHECKING:
    from dapa_merge.checkpoint.plan import Plan

PLANTED_TEXT = spans(miniature.PLANTED.split(","))
# How many units are named where nothing says how many matter.
NUM_NAMED = 4
ATTRIBUTION, REFUSING, HIDDEN = "attribution", "influence on refusing", "influence on the hidden state"


def summarize(found: Traced) -> dict[str, Any]:
    """Everything as plain data for `json.dumps`; a figure that is not finite is None."""
    influence = found.influence
    hidden, refusing = mean_of(influence.hidden), mean_of(influence.refusing)
    rankings = rankings_of(found)
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
                        "selected": None if found.selection is None else unit in _whole(found.selection),
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


def rankings_of(found: Traced) -> dict[str, dict[Unit, float]]:
    """How much each unit that could be selected matters, by each way to tell."""
    at = {unit: index for index, unit in enumerate(found.influence.units)}
    refusing, hidden = (mean_of(values).mean for values in (found.influence.refusing, found.influence.hidden))
    rankings: dict[str, dict[Unit, float]] = {
        ATTRIBUTION: {unit: found.attribution[unit] for unit in found.candidates},
        REFUSING: {unit: float(refusing[at[unit]]) for unit in found.candidates},
        HIDDEN: {unit: float(hidden[at[unit]]) for unit in found.candidates},
    }
    modules = {unit.module for unit in found.candidates}
    scores = {kind: layer_scores(found.traces, kind) for kind in found.settings.kinds}
    if modules <= scores.keys():
        # Each unit by what its own module puts out.
        rankings["tracing"] = {unit: scores[unit.module][unit.layer] for unit in found.candidates}
    if len(modules) == 1 and "mlp" in scores and not modules & {"mlp", "attention"}:
        rankings["tracing of MLPs"] = {unit: scores["mlp"][unit.layer] for unit in found.candidates}
    return rankings


def overlaps_of(rankings: Mapping[str, Mapping[Unit, float]], selection: Sequence[Unit] | None) -> dict[str, Overlap]:
    """Each ranking held against the selection, of blocks against the units that they are of; none of none."""
    if not selection:
        return {}
    return {name: overlap(scores, _whole(selection)) for name, scores in rankings.items()}


def correlations_of(rankings: Mapping[str, Mapping[Unit, float]]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of each two rankings."""
    names = list(rankings)
    return [
        {
            "of": [one, other],
            "spearman": rank_correlation(list(rankings[one].values()), list(rankings[other].values())),
        }
        for index, one in enumerate(names)
        for other in names[index + 1 :]
    ]


def planted_overlaps(found: Traced) -> dict[str, Overlap]:
    """How each way to tell does where the answer is known, on the packaged pair; of other models, none."""
    if not is_planted(found.plan):
        return {}
    planted = [unit for unit in found.units if str(unit) in miniature.PLANTED.split(",")]
    every = rankings_of_all(found)
    by_unit = {name: overlap(scores, planted) for name, scores in every.items()}
    if "mlp" not in found.settings.kinds:
        return dict(by_unit)
    by_layer = dict(enumerate(layer_scores(found.traces, "mlp")))
    return {**by_unit, "tracing of MLPs, by layer": overlap(by_layer, [unit.layer for unit in planted])}


def rankings_of_all(found: Traced) -> dict[str, dict[Unit, float]]:
    """How much each unit of every module matters, by attribution and by influence."""
    at = {unit: index for index, unit in enumerate(found.influence.units)}
    refusing, hidden = (mean_of(values).mean for values in (found.influence.refusing, found.influence.hidden))
    return {
        ATTRIBUTION: {unit: found.attribution[unit] for unit in found.units},
        REFUSING: {unit: float(refusing[at[unit]]) for unit in found.units},
        HIDDEN: {unit: float(hidden[at[unit]]) for unit in found.units},
    }


def is_planted(plan: Plan) -> bool:
    """Whether these are the two packaged models whose answer is known."""
    pairs = ((plan.target, "target"), (plan.source, "source"))
    return all(checkpoint.folder.samefile(miniature.path(member)) for checkpoint, member in pairs)


def sentences(found: Traced) -> list[str]:
    """What the numbers say, one thing each."""
    number = len(_whole(found.selection)) if found.selection else NUM_NAMED
    which = f"the {number} units that matter most are" if number > 1 else "the unit that matters most is"
    most = {
        name: f"{which} {spans(_in_order(sorted(scores, key=lambda unit: -scores[unit])[:number]))}"
        for name, scores in rankings_of_all(found).items()
    }
    said = [_contrast_sentence(found), *_by(most), _trace_sentence(found)]
    for family in ("module", "third", "selection"):
        said += _group_sentences(found, family)
    would = {
        name: f"one would have selected {spans(_in_order(one.top))}: Jaccard index {one.jaccard:.2f} with the "  # type: ignore[arg-type]
        f"selection ({one.by_chance:.2f} by chance), rank correlation {_correlation(one)}"
        for name, one in overlaps_of(rankings_of(found), found.selection).items()
    }
    said += _by(would)
    if found.why_none:
        said.append(f"Nothing was selected: {found.why_none}.")
    right = {
        name: f"{one.num_common} of the first {len(one.top)} are right, rank correlation {_correlation(one)}"
        for name, one in planted_overlaps(found).items()
    }
    return said + [f"Planted was {PLANTED_TEXT}. {sentence}" for sentence in _by(right)]


def _by(findings: Mapping[str, str]) -> list[str]:
    """A sentence for each finding, with the names of all ways to tell that come to the same."""
    names: dict[str, list[str]] = {}
    for name, finding in findings.items():
        names.setdefault(finding, []).append(name)
    return [f"By {_and(of_finding)}, {finding}." for finding, of_finding in names.items()]


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _contrast_sentence(found: Traced) -> str:
    if found.wanted.responses is not None:
        refusal, answer = found.wanted.responses
        return f"All {found.num_prompts} harmful prompts are traced with the responses {refusal!r} and {answer!r}."
    number = f"{len(found.contrasts)} of {found.num_prompts}"
    return f"{number} harmful prompts are refused by the source and answered by the target."


def _trace_sentence(found: Traced) -> str:
    total = mean_of(numpy.array([trace.total_effect for trace in found.traces]))
    clean = statistics.fmean(trace.clean for trace in found.traces)
    taken = f"{float(total.mean):.2f}"
    if len(found.traces) > 1:
        taken += f" (95 % interval {float(total.low):.2f} to {float(total.high):.2f})"
    best = {}
    for kind in found.settings.kinds:
        if kind != "hidden":
            mean = mean_effect(found.traces, kind).mean
            layer, role = numpy.unravel_index(int(numpy.nanargmax(mean)), mean.shape)
            best[kind] = f"{kind} {float(mean[layer, role]):.2f} (layer {layer}, {ROLES[role]})"
    restored = f"; restored alone, it comes back most by {', '.join(best.values())}" if best else ""
    return (
        f"In the {found.wanted.traced}, a refusal is likelier than an answer by {clean:.2f} nats, and noise on the "
        f"subject lowers that by {taken}, mean of {counted(len(found.traces), 'prompt')}{restored}."
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun, as `1 prompt` or `2 prompts`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _group_sentences(found: Traced, family: str) -> list[str]:
    groups = [one for one in found.findings if one.group.family == family]
    target, measure = found.target_score, found.measure
    if not groups:
        return []
    if groups[0].full <= target:
        of_what = "units that it was selected from" if family == "selection" else "units"
        return [
            f"All {of_what} together do not raise the {measure} ({target:.2f} to {groups[0].full:.2f}), so that no "
            f"share of a gain can be given for the {family}s."
        ]
    alone = [(one.group.name, one.sufficiency(target), one.control_sufficiency(target)) for one in groups]
    without = [(one.group.name, one.necessity(target), one.control_necessity(target)) for one in groups]
    return [
        f"Put in alone, these bring so much of the gain in {measure}: {_beside_controls(alone)}.",
        f"Left out, these lose so much of it: {_beside_controls(without)}.",
    ]


def _beside_controls(shares: Sequence[tuple[str, float | None, Sequence[float]]]) -> str:
    return ", ".join(
        f"{name} {_number(share)}" + (f" (random {min(controls):.2f} to {max(controls):.2f})" if controls else "")
        for name, share, controls in shares
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


def _whole(selection: Sequence[Unit]) -> list[Unit]:
    return list(dict.fromkeys(unit.whole for unit in selection))


def _in_order(units: Sequence[Unit]) -> list[Unit]:
    return sorted(units, key=lambda unit: (unit.module, unit.layer))


def _correlation(one: Overlap) -> str:
    return f"{_number(one.spearman)} (at best {_number(one.spearman_at_best)})"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"
