"""The findings of a trace: as data, as the numbers of `summary.json`, and as sentences.

The sentences say how much each unit matters by each measure, and how far the measures agree with a selection, or with
the right answer where it is known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy

from dapa_merge import __version__, miniature
from dapa_merge.checkpoint.digest import tensors_digest
from dapa_merge.checkpoint.open import Checkpoint, open_checkpoint
from dapa_merge.checkpoint.units import Unit
from dapa_merge.measure.figures import Mean
from dapa_merge.plan.edit import may_choose
from dapa_merge.plan.plan import Plan
from dapa_merge.recipe.parameters import layer_spans, spans
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.report.report import jsonable
from dapa_merge.report.tables import search_json
from dapa_merge.search.attribution import Contrast
from dapa_merge.search.result import Search
from dapa_merge.trace.average import (
    ROLES,
    Agreement,
    Overlap,
    agreement,
    holding,
    layer_scores,
    mean_effect,
    mean_of,
    rank_correlation,
    ranking_overlap,
)
from dapa_merge.trace.case import Settings, window_layers
from dapa_merge.trace.causal import Trace
from dapa_merge.trace.edits import THIRDS, CurvePoint, Finding, third_of
from dapa_merge.trace.influence import Influence, PutBack
from dapa_merge.trace.options import TraceOptions
from dapa_merge.trace.replay import telling_kind

PLANTED_TEXT = spans(miniature.PLANTED.split(","))
# Units that are named if there is no selection.
NUM_NAMED = 4
# With more random selections, their scores are summarized.
MAX_CONTROLS = 6
# The measures of how much a unit matters.
ATTRIBUTION, REFUSING, HIDDEN = "attribution", "influence on refusing", "influence on the hidden state"
TRACING, TRACING_MLPS = "tracing of single projections", "tracing of MLPs"
# Those that directions are held against.
PUT_BACK, GAIN = "what the directions put back", "gain of the directions"
CHANGE, SHARE = "put_back", "share_of_difference"
DIFFERENCE, CAUSAL = "size of the difference", "causal tracing"
# The units that hold so much of what directions put back are those that other measures should find.
TOP_SHARE = 0.5
# Smaller shares are not named.
LEAST_SHARE = 0.005


@dataclass(frozen=True)
class Traced:
    """Everything that a trace found so far; what belongs to a stage that is not made is empty or None.

    Attributes:
        units: Units that do not overlap: gate, up, down and attention of every layer.
        candidates: The units that could be selected.
        arithmetic: In what the models compute; None if as their configs say.
        stages: The names of those to make.
        done: The names of those that are made, in order.
        begun: The name of one of which a part is here.
        contrasts: The prompts that the source refuses and the target answers, with both responses.
        attribution: The first-order effect of each of the plan's units, in nats.
        measure: The name of the score in `target_score` and the findings.
        target_score: The target's score, in [0, 1].
    """

    recipe: Recipe
    wanted: TraceOptions
    plan: Plan
    units: tuple[Unit, ...]
    candidates: tuple[Unit, ...]
    num_prompts: int
    stages: tuple[str, ...]
    arithmetic: str | None = None
    done: tuple[str, ...] = ()
    begun: str | None = None
    selection: tuple[Unit, ...] | None = None
    why_none: str | None = None
    search: Search | None = None
    contrasts: tuple[Contrast, ...] = ()
    attribution: dict[Unit, float] | None = None
    influence: Influence | None = None
    put_back: PutBack | None = None
    measure: str = ""
    target_score: float = math.nan
    findings: tuple[Finding, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    settings: Settings | None = None
    traces: tuple[Trace, ...] = ()
    seconds: tuple[float, ...] = ()

    def having(self, stage: str) -> Traced:
        """The same, with another stage made."""
        return replace(self, done=(*self.done, stage))

    @property
    def copied(self) -> tuple[Unit, ...]:
        """The selection, if copying is what the recipe does with it; that of directions is not a selection of units."""
        return () if may_choose(self.recipe.edit) else self.selection or ()


def summarize(found: Traced) -> dict[str, Any]:
    """Turn everything into plain data for `json.dumps`; figures that are not finite become None."""
    rankings = rankings_of(found)
    with_selection = {name: _overlap_json(one) for name, one in overlaps_of(rankings, found.copied).items()}
    return dict(
        jsonable(
            {
                "version": __version__,
                "target": str(found.recipe.target),
                "source": str(found.recipe.source),
                "prompts": found.recipe.prompts,
                "arithmetic": found.arithmetic,
                "stages": {
                    "done": list(found.done),
                    "follow": [name for name in found.stages if name not in found.done],
                },
                "num_prompts": found.num_prompts,
                "num_contrasts": len(found.contrasts),
                "findings": sentences(found),
                "units": _units_json(found),
                "influence_sums": {
                    name: {"mean": float(one.mean), "low": float(one.low), "high": float(one.high)}
                    for name, one in sums_of(found).items()
                },
                "trace": _trace_json(found),
                "groups": _groups_json(found),
                "curve": [asdict(point) for point in found.curve],
                "selection": None if found.selection is None else list(map(str, found.selection)),
                "no_selection_because": found.why_none,
                "search": _search_json(found),
                "directions": _directions_json(found),
                "overlap": {"with_selection": with_selection, "rank_correlations": correlations_of(rankings)},
                "planted": {name: _overlap_json(one) for name, one in planted_overlaps(found).items()} or None,
                "passes": _passes_json(found),
            }
        )
    )


def _units_json(found: Traced) -> list[dict[str, Any]]:
    if found.influence is None:
        return []
    hidden, refusing = mean_of(found.influence.hidden), mean_of(found.influence.refusing)
    selected = None if found.selection is None else whole_units(found.selection)
    return [
        {
            "unit": str(unit),
            "attribution": (found.attribution or {}).get(unit),
            "influence_on_refusing": _cell(refusing, index),
            "influence_on_hidden_state": _cell(hidden, index),
            "selected": None if selected is None else unit in selected,
        }
        for index, unit in enumerate(found.influence.units)
    ]


def _groups_json(found: Traced) -> dict[str, Any] | None:
    if not found.findings:
        return None
    target = found.target_score
    return {"measure": found.measure, "target": target, "groups": [one.to_json(target) for one in found.findings]}


def _passes_json(found: Traced) -> dict[str, float | None]:
    runs, passes = ([getattr(trace, name) for trace in found.traces] for name in ("num_runs", "num_passes"))
    per_prompt = {"runs": runs, "passes": passes, "seconds": found.seconds}
    return {
        "influence": None if found.influence is None else found.influence.num_passes,
        **{f"trace_{name}_per_prompt": statistics.fmean(of) if of else None for name, of in per_prompt.items()},
    }


def _directions_json(found: Traced) -> dict[str, Any] | None:
    """What directions put back, by unit and by module, and how far other measures rank the units alike."""
    back = found.put_back
    if back is None:
        return None
    total = float(back.changes.sum())
    by_module, by_third = shares_of(found)
    with numpy.errstate(invalid="ignore"):
        shares = back.changes / back.differences
    return {
        "num_directions": back.num_directions,
        "score": back.score,
        "share_of_difference": total / float(back.differences.sum()),
        "by_module": by_module,
        "by_third": by_third,
        "top": list(map(str, top_of(found))),
        "units": [
            {
                "unit": str(unit),
                "share_of_change": float(back.changes[index]) / total,
                "share_of_difference": float(shares[index]),
                "gain": float(back.gains[index]),
            }
            for index, unit in enumerate(back.units)
        ],
        "agreement": {
            of_what: {name: {**vars(one), "top": list(map(str, one.top))} for name, one in by_measure.items()}
            for of_what, by_measure in agreements_of(found).items()
        },
    }


def _search_json(found: Traced) -> dict[str, Any] | None:
    """The search, without values that depend on earlier contents of its journal."""
    if found.search is None:
        return None
    said = search_json(found.search, found.plan)
    return {name: value for name, value in said.items() if name not in ("tests_recorded", "tests_unneeded", "seconds")}


def _trace_json(found: Traced) -> dict[str, Any] | None:
    if found.settings is None:
        return None
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


def _overlap_json(one: Overlap) -> dict[str, Any]:
    return {**vars(one), "top": list(map(str, one.top))}


def _cell(mean: Mean, index: Any) -> dict[str, float]:
    return {"mean": float(mean.mean[index]), "low": float(mean.low[index]), "high": float(mean.high[index])}


def sentences(found: Traced) -> list[str]:
    """State the findings, one sentence each."""
    said = [_contrast_sentence(found)] if found.contrasts else []
    if found.influence is not None:
        number = len(whole_units(found.copied)) or NUM_NAMED
        which = f"the {number} units that matter most are" if number > 1 else "the unit that matters most is"
        most = {
            name: f"{which} {_spans(sorted(scores, key=lambda unit: -scores[unit])[:number])}"
            for name, scores in rankings_by_effect(found, found.units).items()
        }
        said += [*_by(most), _sums_sentence(found), *_same_units(found)]
    said += [] if found.settings is None else [_trace_sentence(found, found.settings)]
    for family in ("module", "third", "selection"):
        said += _group_sentences(found, family)
    if found.copied:
        said.append(f"The selection is {spans(found.copied)}.")
    would = {
        name: f"the first {len(one.top)} of {len(found.candidates)} are {_spans(one.top)}: Jaccard index "
        f"{one.jaccard:.2f} with the selection ({one.jaccard_by_chance:.2f} by chance), rank correlation "
        f"{_correlation(one)}"
        for name, one in overlaps_of(rankings_of(found), found.copied).items()
    }
    said += _by(would)
    said += _directions_sentences(found)
    if found.why_none:
        said.append(f"Nothing was selected: {found.why_none}.")
    right = {
        name: f"{one.num_common} of the first {len(one.top)} are right, rank correlation {_correlation(one)}"
        for name, one in planted_overlaps(found).items()
    }
    return said + [f"Of these models the answer is known: {PLANTED_TEXT}. {sentence}" for sentence in _by(right)]


def _directions_sentences(found: Traced) -> list[str]:
    if (back := found.put_back) is None:
        return []
    parts = [
        ", ".join(f"{100 * share:.0f} % {name}" for name, share in of.items() if share >= LEAST_SHARE)
        for of in shares_of(found)
    ]
    share, top = 100 * float(back.changes.sum() / back.differences.sum()), top_of(found)
    agreements = agreements_of(found)
    chance = next(iter(agreements[CHANGE].values())).jaccard_by_chance
    would = "; ".join(f"{name} {one.jaccard:.2f}, {_ranked(one)}" for name, one in agreements[CHANGE].items())
    of_shares = "; ".join(f"{name} {_ranked(one)}" for name, one in agreements[SHARE].items())
    return [
        f"With {back.num_directions} directions the target has a {found.measure} of {back.score:.2f}. They put back "
        f"{share:.1f} % of the squared norm of the difference: {parts[0]}; {parts[1]} layers.",
        f"Half of what they put back is in {counted(len(top), 'unit')} of {len(back.units)}: {_spans(top)}.",
        f"Would other measures have found these units? Jaccard index of the first {len(top)} ({chance:.2f} by chance), "
        f"and rank correlation of all (95 % interval): {would}.",
        f"With the share that is put back of each unit's own difference, the rank correlations are: {of_shares}.",
    ]


def _ranked(one: Agreement) -> str:
    return f"{_number(one.spearman)} ({_number(one.low)} to {_number(one.high)})"


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 prompt`, `2 prompts`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _by(findings: Mapping[str, str]) -> list[str]:
    """One sentence for each finding, naming all measures that agree on it."""
    names: dict[str, list[str]] = {}
    for name, finding in findings.items():
        names.setdefault(finding, []).append(name)
    return [f"By {_and(of_finding)}, {finding}." for finding, of_finding in names.items()]


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _contrast_sentence(found: Traced) -> str:
    if found.wanted.responses is not None:
        refusal, answer = found.wanted.responses
        return f"For all {found.num_prompts} harmful prompts, {refusal!r} is compared with {answer!r}."
    which = " that the search did not ask" if found.search is not None else ""
    before = ""
    if found.influence is not None:
        before = f", in which {_likelier(float(found.influence.before.mean()))}"
    return (
        f"{len(found.contrasts)} of {found.num_prompts} harmful prompts{which} are refused by the source and not by "
        f"the target{before}."
    )


def _likelier(difference: float) -> str:
    """The likelier response, by the mean of log p(refusal) - log p(answer)."""
    more, less = ("a refusal", "an answer") if difference >= 0 else ("an answer", "a refusal")
    return f"{more} is likelier than {less} by {abs(difference):.2f} nats"


def _sums_sentence(found: Traced) -> str:
    sums = ", ".join(
        f"{name} {_number(float(one.mean))} ({_number(float(one.low))} to {_number(float(one.high))})"
        for name, one in sums_of(found).items()
    )
    return f"The influences on refusing of single units add up to (nats, with 95 % intervals): {sums}."


def _same_units(found: Traced) -> list[str]:
    """A sentence about units without any effect, because they are the same in both models."""
    measured = found.influence
    assert measured is not None
    same = [unit for index, unit in enumerate(measured.units) if not measured.hidden[:, index].any()]
    return [f"No prompt notices {_spans(same)} of the source: the target has the same."] if same else []


def _trace_sentence(found: Traced, settings: Settings) -> str:
    total = mean_of(numpy.array([trace.total_effect for trace in found.traces]))
    clean = statistics.fmean(trace.clean for trace in found.traces)
    taken = f"{abs(float(total.mean)):.2f}"
    if len(found.traces) > 1:
        sign = 1 if float(total.mean) >= 0 else -1
        low, high = sorted((sign * float(total.low), sign * float(total.high)))
        taken += f" (95 % interval {low:.2f} to {high:.2f})"
    moves = "lowers" if float(total.mean) >= 0 else "raises"
    said = (
        f"In the {found.wanted.traced}, {_likelier(clean)}, mean of {counted(len(found.traces), 'traced prompt')}; "
        f"noise on the subject {moves} refusing by {taken}"
    )
    if not float(total.mean) > 0 or float(total.low) <= 0:
        return f"{said}, so there is nothing to restore beyond chance."
    best = []
    for kind in settings.kinds:
        if kind != "hidden":
            mean = mean_effect(found.traces, kind).mean
            layer, role = numpy.unravel_index(int(numpy.nanargmax(mean)), mean.shape)
            share = 100 * float(mean[layer, role]) / float(total.mean)
            window = window_layers(settings, kind, int(layer), len(mean))
            where = f"layer{'s' if len(window) > 1 else ''} {layer_spans(list(window))}"
            best.append(f"{kind} {share:.0f} % ({ROLES[role]}, {where})")
    return f"{said}. Restoring one output at one token brings back at most: {', '.join(best)}." if best else f"{said}."


def _group_sentences(found: Traced, family: str) -> list[str]:
    groups = [one for one in found.findings if one.group.family == family]
    target, measure = found.target_score, found.measure
    if not groups:
        return []
    if groups[0].full <= target:
        of_what = "units that it was selected from" if family == "selection" else "units"
        return [
            f"All {of_what} together do not raise the {measure} ({target:.2f} to {groups[0].full:.2f}), so no share of "
            f"a gain can be given for the {family}s."
        ]
    alone = [(one.group.label, *one.sufficiency(target)) for one in groups]
    without = [(one.group.label, *one.necessity(target)) for one in groups]
    return [
        f"Put in alone, the share of the gain in {measure} is {_with_controls(alone)}.",
        f"Left out, the share of it that is lost is {_with_controls(without)}.",
    ]


def _with_controls(shares: Sequence[tuple[str, float | None, Sequence[float]]]) -> str:
    """Each share with those of random selections, which are given once if they are the same for all."""
    controls = [tuple(sorted(of_one)) for _, _, of_one in shares]
    if len(set(controls)) == 1:
        said = ", ".join(f"{_number(share)} by {name}" for name, share, _ in shares)
        return f"{said}; random units, as many: {_values(controls[0])}" if controls[0] else said
    return ", ".join(
        f"{_number(share)} by {name}" + (f" (random units, as many: {_values(of_one)})" if of_one else "")
        for (name, share, _), of_one in zip(shares, controls, strict=True)
    )


def _values(controls: Sequence[float]) -> str:
    if len(controls) <= MAX_CONTROLS:
        return ", ".join(map(_number, controls))
    return f"{controls[0]:.2f} to {controls[-1]:.2f}, median {statistics.median(controls):.2f}"


def _spans(units: Iterable[Any]) -> str:
    def place(unit: Any) -> tuple[str, int]:
        return unit.module, unit.layer

    return spans(sorted(units, key=place))


def _correlation(one: Overlap) -> str:
    return f"{_number(one.spearman)} of at most {_number(one.spearman_at_best)}"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def rankings_of(found: Traced) -> dict[str, dict[Unit, float]]:
    """The scores of the units that could be selected, by measure."""
    rankings, settings = rankings_by_effect(found, found.candidates), found.settings
    if settings is None:
        return rankings
    modules = {unit.module for unit in found.candidates}
    scores = {kind: layer_scores(found.traces, kind) for kind in settings.kinds}
    if modules <= scores.keys():
        # Each unit is scored by the output of its own module.
        rankings[TRACING] = {unit: scores[unit.module][unit.layer] for unit in found.candidates}
    if len(modules) == 1 and "mlp" in scores and not modules & {"mlp", "attention"}:
        rankings[TRACING_MLPS] = {unit: scores["mlp"][unit.layer] for unit in found.candidates}
    return rankings


def overlaps_of(rankings: Mapping[str, Mapping[Unit, float]], selection: Sequence[Unit] | None) -> dict[str, Overlap]:
    """Compare each ranking with the whole units of the selection; empty without a selection."""
    if not selection:
        return {}
    return {name: ranking_overlap(scores, whole_units(selection)) for name, scores in rankings.items()}


def correlations_of(rankings: Mapping[str, Mapping[Unit, float]]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of every pair of rankings."""
    names = list(rankings)
    return [
        {"of": [one, other], "spearman": rank_correlation(list(rankings[one].values()), list(rankings[other].values()))}
        for index, one in enumerate(names)
        for other in names[index + 1 :]
    ]


def planted_overlaps(found: Traced) -> dict[str, Overlap]:
    """Compare each ranking with the known answer of the packaged pair; empty for other models."""
    if not is_planted(found.plan):
        return {}
    planted = [unit for unit in found.units if str(unit) in miniature.PLANTED.split(",")]
    every = rankings_by_effect(found, found.units)
    by_unit = {name: ranking_overlap(scores, planted) for name, scores in every.items()}
    if found.settings is None or "mlp" not in found.settings.kinds:
        return dict(by_unit)
    by_layer = dict(enumerate(layer_scores(found.traces, "mlp")))
    return {**by_unit, f"{TRACING_MLPS}, by layer": ranking_overlap(by_layer, [unit.layer for unit in planted])}


def rankings_by_effect(found: Traced, units: Sequence[Unit]) -> dict[str, dict[Unit, float]]:
    """The scores of some units by attribution and by influence; empty before they are measured."""
    if found.influence is None or found.attribution is None:
        return {}
    effects = found.attribution
    at = {unit: index for index, unit in enumerate(found.influence.units)}
    refusing, hidden = (mean_of(values).mean for values in (found.influence.refusing, found.influence.hidden))
    return {
        ATTRIBUTION: {unit: effects[unit] for unit in units},
        REFUSING: {unit: float(refusing[at[unit]]) for unit in units},
        HIDDEN: {unit: float(hidden[at[unit]]) for unit in units},
    }


def sums_of(found: Traced) -> dict[str, Mean]:
    """The sums of the influences on refusing of the units that do not overlap, by module and by third of the layers."""
    if found.influence is None:
        return {}
    at = {unit: index for index, unit in enumerate(found.influence.units)}
    thirds = third_of(max(unit.layer for unit in found.units) + 1)
    columns: dict[str, list[int]] = {name: [] for name in (*(unit.module for unit in found.units), *THIRDS)}
    for unit in found.units:
        for name in (unit.module, thirds[unit.layer]):
            columns[name].append(at[unit])
    refusing = found.influence.refusing
    return {name: mean_of(refusing[:, of].sum(axis=1)) for name, of in columns.items()}


def rankings_of_directions(found: Traced) -> dict[str, dict[Unit, float]]:
    """The scores of the candidates by what directions put back of them, and by every measure that might foretell it."""
    back = found.put_back
    assert back is not None
    rankings = {
        PUT_BACK: dict(zip(back.units, back.changes.tolist(), strict=True)),
        GAIN: dict(zip(back.units, back.gains.tolist(), strict=True)),
        DIFFERENCE: dict(zip(back.units, back.differences.tolist(), strict=True)),
        **rankings_by_effect(found, found.candidates),
    }
    if found.settings is not None:
        scores = {kind: layer_scores(found.traces, kind) for kind in found.settings.kinds}
        kinds = {unit: telling_kind(unit.module, scores) for unit in found.candidates}
        rankings[CAUSAL] = {
            unit: math.nan if kind is None else scores[kind][unit.layer] for unit, kind in kinds.items()
        }
    return rankings


def agreements_of(found: Traced) -> dict[str, dict[str, Agreement]]:
    """How far each measure ranks the units as the directions do, by what is put back, and by its share of each unit.

    Large matrices differ more, so that their directions add more: by the share, all units are equal.
    """
    back, rankings, top = found.put_back, rankings_of_directions(found), top_of(found)
    assert back is not None
    changes = rankings.pop(PUT_BACK)
    with numpy.errstate(invalid="ignore"):
        shares = dict(zip(back.units, (back.changes / back.differences).tolist(), strict=True))
    largest = sorted(shares, key=lambda unit: -shares[unit] if shares[unit] > 0 else 0.0)[: len(top)]
    return {
        of_what: {name: agreement(scores, by_unit, first) for name, scores in rankings.items()}
        for of_what, by_unit, first in ((CHANGE, changes, top), (SHARE, shares, largest))
    }


def top_of(found: Traced) -> list[Unit]:
    """The fewest units that hold half of what directions put back."""
    back = found.put_back
    assert back is not None
    return holding(dict(zip(back.units, back.changes.tolist(), strict=True)), TOP_SHARE)


def shares_of(found: Traced) -> tuple[dict[str, float], dict[str, float]]:
    """The shares of what directions put back by module, and by third of the layers."""
    back = found.put_back
    assert back is not None
    thirds = third_of(max(unit.layer for unit in back.units) + 1)
    by_module: dict[str, float] = dict.fromkeys((unit.module for unit in back.units), 0.0)
    by_third: dict[str, float] = dict.fromkeys(THIRDS, 0.0)
    for unit, change in zip(back.units, back.changes / back.changes.sum(), strict=True):
        by_module[unit.module] += float(change)
        by_third[thirds[unit.layer]] += float(change)
    return by_module, by_third


def is_planted(plan: Plan) -> bool:
    """Whether these are the two packaged models with a known answer, or copies of them."""
    pairs = ((plan.target, "target"), (plan.source, "source"))
    return all(_is_same(checkpoint, open_checkpoint(str(miniature.path(member)))) for checkpoint, member in pairs)


def _is_same(one: Checkpoint, other: Checkpoint) -> bool:
    # The cheap test comes first, so that other models are not read.
    return one.num_bytes == other.num_bytes and tensors_digest(one) == tensors_digest(other)


def whole_units(selection: Sequence[Unit]) -> list[Unit]:
    """The whole units of a selection, each once."""
    return list(dict.fromkeys(unit.whole for unit in selection))
