"""What a trace found, in sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

from dapa_merge import miniature
from dapa_merge.report import layer_spans, spans
from dapa_merge.trace.average import ROLES, mean_effect, mean_of
from dapa_merge.trace.groups import Group
from dapa_merge.trace.overlap import Overlap
from dapa_merge.trace.settings import window_layers
from dapa_merge.trace_rankings import overlaps_of, planted_overlaps, rankings_by_effect, rankings_of, whole_units
from dapa_merge.trace_result import Traced

PLANTED_TEXT = spans(miniature.PLANTED.split(","))
# How many units are named where nothing says how many matter.
NUM_NAMED = 4
# So many scores of random selections are written out.
MAX_CONTROLS = 6


def sentences(found: Traced) -> list[str]:
    """What the numbers say, one thing each."""
    number = len(whole_units(found.selection)) if found.selection else NUM_NAMED
    which = f"the {number} units that matter most are" if number > 1 else "the unit that matters most is"
    most = {
        name: f"{which} {_spans(sorted(scores, key=lambda unit: -scores[unit])[:number])}"
        for name, scores in rankings_by_effect(found, found.units).items()
    }
    said = [_contrast_sentence(found), *_by(most), *_same_units(found), _trace_sentence(found)]
    for family in ("module", "third", "selection"):
        said += _group_sentences(found, family)
    if found.selection:
        said.append(f"The selection is {spans(found.selection)}.")
    would = {
        name: f"the first {len(one.top)} of {len(found.candidates)} are {_spans(one.top)}: Jaccard index "
        f"{one.jaccard:.2f} with the selection ({one.by_chance:.2f} by chance), rank correlation {_correlation(one)}"
        for name, one in overlaps_of(rankings_of(found), found.selection).items()
    }
    said += _by(would)
    if found.why_none:
        said.append(f"Nothing was selected: {found.why_none}.")
    right = {
        name: f"{one.num_common} of the first {len(one.top)} are right, rank correlation {_correlation(one)}"
        for name, one in planted_overlaps(found).items()
    }
    return said + [f"Of these models the answer is known: {PLANTED_TEXT}. {sentence}" for sentence in _by(right)]


def label_of(group: Group) -> str:
    """A group's name, with its layers where the name does not say which they are."""
    if group.family != "third":
        return group.name
    return f"{group.name} ({layer_spans(sorted({unit.layer for unit in group.units}))})"


def counted(number: int, noun: str) -> str:
    """A number with its noun, as `1 prompt` or `2 prompts`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
        return f"For all {found.num_prompts} harmful prompts, {refusal!r} is compared with {answer!r}."
    which = " that the search did not ask" if found.search is not None else ""
    before = _likelier(float(found.influence.before.mean()))
    return (
        f"{len(found.contrasts)} of {found.num_prompts} harmful prompts{which} are refused by the source and not by "
        f"the target, in which {before}."
    )


def _likelier(difference: float) -> str:
    """Of two responses the likelier one, by the mean of log p(refusal) - log p(answer)."""
    more, less = ("a refusal", "an answer") if difference >= 0 else ("an answer", "a refusal")
    return f"{more} is likelier than {less} by {abs(difference):.2f} nats"


def _same_units(found: Traced) -> list[str]:
    """What cannot do anything, because both models have the same."""
    same = [unit for index, unit in enumerate(found.influence.units) if not found.influence.hidden[:, index].any()]
    return [f"No prompt notices {_spans(same)} of the source: the target has the same."] if same else []


def _trace_sentence(found: Traced) -> str:
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
        return f"{said}, so that there is nothing to restore that is more than chance."
    best = []
    for kind in found.settings.kinds:
        if kind != "hidden":
            mean = mean_effect(found.traces, kind).mean
            layer, role = numpy.unravel_index(int(numpy.nanargmax(mean)), mean.shape)
            share = 100 * float(mean[layer, role]) / float(total.mean)
            window = window_layers(found.settings, kind, int(layer), len(mean))
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
            f"All {of_what} together do not raise the {measure} ({target:.2f} to {groups[0].full:.2f}), so that no "
            f"share of a gain can be given for the {family}s."
        ]
    alone = [(label_of(one.group), one.sufficiency(target), one.control_sufficiency(target)) for one in groups]
    without = [(label_of(one.group), one.necessity(target), one.control_necessity(target)) for one in groups]
    return [
        f"Put in alone, the share of the gain in {measure} is {_beside_controls(alone)}.",
        f"Left out, the share of it that is lost is {_beside_controls(without)}.",
    ]


def _beside_controls(shares: Sequence[tuple[str, float | None, Sequence[float]]]) -> str:
    """Each share beside those of random selections; said once where all have the same."""
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
