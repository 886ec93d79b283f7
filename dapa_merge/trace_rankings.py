"""How much each unit matters by each way to tell, and how far that agrees with a selection, or with a known answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dapa_merge import miniature
from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.digest import tensors_digest
from dapa_merge.checkpoint.files import Checkpoint, open_checkpoint
from dapa_merge.trace.average import layer_scores, mean_of
from dapa_merge.trace.overlap import Overlap, overlap, rank_correlation
from dapa_merge.trace_result import Traced

if TYPE_CHECKING:
    from dapa_merge.checkpoint.plan import Plan

ATTRIBUTION, REFUSING, HIDDEN = "attribution", "influence on refusing", "influence on the hidden state"
TRACING, TRACING_MLPS = "tracing of single projections", "tracing of MLPs"


def rankings_of(found: Traced) -> dict[str, dict[Unit, float]]:
    """How much each unit that could be selected matters, by each way to tell."""
    rankings = rankings_by_effect(found, found.candidates)
    modules = {unit.module for unit in found.candidates}
    scores = {kind: layer_scores(found.traces, kind) for kind in found.settings.kinds}
    if modules <= scores.keys():
        # Each unit by what its own module puts out.
        rankings[TRACING] = {unit: scores[unit.module][unit.layer] for unit in found.candidates}
    if len(modules) == 1 and "mlp" in scores and not modules & {"mlp", "attention"}:
        rankings[TRACING_MLPS] = {unit: scores["mlp"][unit.layer] for unit in found.candidates}
    return rankings


def overlaps_of(rankings: Mapping[str, Mapping[Unit, float]], selection: Sequence[Unit] | None) -> dict[str, Overlap]:
    """Each ranking held against the selection, of blocks against the units that they are of; none of none."""
    if not selection:
        return {}
    return {name: overlap(scores, whole_units(selection)) for name, scores in rankings.items()}


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
    every = rankings_by_effect(found, found.units)
    by_unit = {name: overlap(scores, planted) for name, scores in every.items()}
    if "mlp" not in found.settings.kinds:
        return dict(by_unit)
    by_layer = dict(enumerate(layer_scores(found.traces, "mlp")))
    return {**by_unit, f"{TRACING_MLPS}, by layer": overlap(by_layer, [unit.layer for unit in planted])}


def rankings_by_effect(found: Traced, units: Sequence[Unit]) -> dict[str, dict[Unit, float]]:
    """How much each of some units matters, by attribution and by influence."""
    at = {unit: index for index, unit in enumerate(found.influence.units)}
    refusing, hidden = (mean_of(values).mean for values in (found.influence.refusing, found.influence.hidden))
    return {
        ATTRIBUTION: {unit: found.attribution[unit] for unit in units},
        REFUSING: {unit: float(refusing[at[unit]]) for unit in units},
        HIDDEN: {unit: float(hidden[at[unit]]) for unit in units},
    }


def is_planted(plan: Plan) -> bool:
    """Whether these are the two packaged models whose answer is known, wherever a copy of them lies."""
    pairs = ((plan.target, "target"), (plan.source, "source"))
    return all(_is_same(checkpoint, open_checkpoint(str(miniature.path(member)))) for checkpoint, member in pairs)


def _is_same(one: Checkpoint, other: Checkpoint) -> bool:
    # The small number first: others are not read for this.
    return one.num_bytes == other.num_bytes and tensors_digest(one) == tensors_digest(other)


def whole_units(selection: Sequence[Unit]) -> list[Unit]:
    """The units that a selection is of, each once."""
    return list(dict.fromkeys(unit.whole for unit in selection))
