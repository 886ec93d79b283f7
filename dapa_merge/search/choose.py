"""Chooses directions before a search: rounds of ascent, each of which is measured by generation as a candidate.

The rounds are points: each is a selection of directions with its figures on the search's prompts. Where none of them is
within the limits, or one beyond them scores higher, points on lines between them are tried, and where the source
answers keep prompts as the target does, all of its directions as they are. The first part of the prompts
(`Parts.choice`) decides the weights, the second which point is taken; the report uses the third.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CannotRepair, UsageError
from dapa_merge.files import cache_folder
from dapa_merge.measure.statistics import pareto_front
from dapa_merge.plan.edit import Directions
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.constraints import SCORE
from dapa_merge.search.ascent import factors_of
from dapa_merge.search.identity import data_digest
from dapa_merge.search.journal import name_of
from dapa_merge.search.parts import MAX_PARTS, how_to_pick, nearest
from dapa_merge.search.requirement import Requirement
from dapa_merge.search.result import Baseline, Point
from dapa_merge.search.rounds import Rounds
from dapa_merge.search.slopes import Settings
from dapa_merge.search.spectrum import Spectrum, kept_spectra

DIVERGENCE = "divergence"
# A score of at least this share of the best one counts as high.
NEARLY = 0.96
# If the leading directions hold a smaller share of the squared norm, more are taken; if these do too, a user is warned.
MIN_SHARE = 0.5
# What hardly shows in what a model says, in nats a token.
SMALL_DIVERGENCE = 0.005
# Rounds without which no point is good enough: the first ones push hard.
MIN_ROUNDS = 2
# Rounds beyond those of the settings, which follow until one refuses as the source does or breaks another limit.
MORE_ROUNDS = 4
# A full transplant that diverges at most so far, in nats per token, has hardly a skill to lose. Copying back an
# abliterated model's differences costs 0.06, and those of LoRA fine-tunes 2.6 (tests/benchmarks/RESULTS.md).
NEAR = 0.1
# Points on lines between rounds: how often a line is halved, and how many there are on all lines.
MAX_HALVINGS = 3
MAX_BETWEEN = 6


@dataclass(frozen=True)
class Start:
    """Where an ascent can go on.

    Attributes:
        spectra: All directions that there are.
        state: Of the ascent: `Ascent.state`.
        num_rounds: Rounds that led there.
    """

    spectra: Sequence[Spectrum]
    state: torch.Tensor
    num_rounds: int


@dataclass(frozen=True)
class Chosen:
    """The points of a choice, and the plan of one of them.

    Attributes:
        points: In the order in which they were made: those of the rounds, and any whole or between them.
        number: Of the point that was taken, from 1.
        plan: The plan whose edit has that point's directions, and whose units are the matrices that have some.
        baseline: That point's measurements.
        start: Where the ascent was at that point.
    """

    points: tuple[Point, ...]
    number: int
    plan: Plan
    baseline: Baseline
    start: Start


@dataclass(frozen=True)
class _Offer:
    """A point, and what it consists of."""

    point: Point
    plan: Plan
    baseline: Baseline
    start: Start


def choose(rounds: Rounds, limits: Requirement, full: Baseline, pick: int | None = None) -> Chosen:
    """Choose directions for a plan's units, and the point of those within the limits to take.

    Args:
        rounds: Makes the points; each is measured by their bench, and recorded in their journal.
        limits: What a point must meet.
        full: The figures of the full transplant; beyond its score no better point is looked for.
        pick: The number of a point to take whatever its figures are; None for the best within the limits.

    Raises:
        CannotRepair: If there is nothing to choose by, no point meets the limits, or the picked one changes nothing.
        UsageError: If the target answers nothing to the keep prompts, or the picked point does not exist.
        CheckpointError: If a model has values, or computes gradients, that are not finite numbers.
    """
    spectra = _decomposed(rounds)
    offers = _of_rounds(rounds, limits, spectra, full)
    offers += _between(rounds, limits, offers, full.score)
    points = [offer.point for offer in offers]
    number = pick if pick is not None else _best(points, full.score)
    if number is None:
        near = nearest(points, limits)
        raise CannotRepair(_none(points, near, limits, rounds.plan), pick=None if near is None else near.number)
    if number > len(offers):
        raise UsageError(no_point(number, len(offers)))
    taken = offers[number - 1]
    if not taken.plan.units:
        raise CannotRepair(f"point {number} has no directions, so that it is the target; `--pick` another one")
    return Chosen(tuple(points), number, taken.plan, taken.baseline, taken.start)


def _decomposed(rounds: Rounds) -> list[Spectrum]:
    """The directions of the difference: more of every matrix where few of them hold less than half of it.

    Raises:
        CannotRepair: If the models are equal in all matrices.
        CheckpointError: If a model has values that are not finite.
    """
    plan, settings, helpers = rounds.plan, rounds.settings, rounds.helpers

    def decomposed(max_rank: int) -> list[Spectrum]:
        with task("decomposing the difference of the models", plan.num_parameters(plan.units), "parameters"):
            kept = kept_file(rounds.journal.parts, max_rank)
            find = None if helpers is None else lambda units: helpers.spectra(units, plan, max_rank)
            return kept_spectra(plan, plan.units, rounds.bench.device, kept, max_rank, find)

    spectra = decomposed(settings.max_rank)
    if not spectra:
        raise CannotRepair(
            f"no matrix of {plan.source.name} differs from the target {plan.target.name}; there is no direction to add"
        )
    if _held(spectra) < MIN_SHARE and settings.more_rank > settings.max_rank:
        spectra = decomposed(settings.more_rank)
    share = _held(spectra)
    LOG.info(
        f"{sum(one.rank for one in spectra)} directions of {len(spectra)} matrices hold {100 * share:.1f} % of their "
        f"differences (of the squared norm)"
    )
    if share < MIN_SHARE:
        LOG.warning("that is little: what the source learned may be in the rest, of which nothing can be added")
    return spectra


def _held(spectra: Sequence[Spectrum]) -> float:
    """The share of the differences' squared norm that directions hold."""
    held = [float((one.values.double() ** 2).sum()) for one in spectra]
    return sum(held) / sum(norm / one.share for norm, one in zip(held, spectra, strict=True))


def settle(rounds: Rounds, units: Sequence[Unit], chosen: Chosen) -> Plan:
    """Let what a search left make up for what it left out: two more rounds of these matrices alone.

    A selection that just meets the limits owes that to the prompts it was tested with; on others it falls short.

    Args:
        rounds: As for `choose`.
        units: What the search left.
        chosen: What they are a part of.

    Returns:
        The plan of the new directions; its units are some of `units`.
    """
    wanted, start = set(units), chosen.start
    spectra = [one for one in start.spectra if one.unit in wanted]
    columns = torch.cat([torch.full((one.rank**2,), one.unit in wanted) for one in start.spectra])
    name = f"settled {data_digest([chosen.number, [str(one.place) for one in spectra]])}"
    state = rounds.settled(spectra, start.state[:, columns], start.num_rounds, name)
    return planned(rounds.plan, spectra, state)[0]


def _of_rounds(rounds: Rounds, limits: Requirement, spectra: Sequence[Spectrum], full: Baseline) -> list[_Offer]:
    """The points of the rounds, each measured before the next is made, until one is good enough.

    That is one within the limits that scores as the source does and hardly diverges: later ones hardly do better.
    After the rounds of the settings any divergence within the limits will do, and a few more rounds follow at most: a
    point that just reaches the required score on these prompts often falls short of it on others. No round follows then
    one that breaks another limit: it would refuse still more. Before any that follow, if the full transplant is a
    repair that hardly diverges, its directions are tried as they are.
    """
    offers: list[_Offer] = []
    planned_rounds = rounds.settings.num_rounds
    is_near = limits.complaint(full.figures) is None and full.figures.get(DIVERGENCE, math.inf) <= NEAR

    def scores(offer: _Offer) -> bool:
        return offer.point.complaint is None and (offer.point.is_whole or offer.baseline.score >= full.score)

    for number in range(1, planned_rounds + MORE_ROUNDS + 1):
        start = Start(spectra, rounds.states(spectra, number)[-1], number)
        _measure_by_helpers(rounds, start, len(offers) + 1)
        offers.append(_offer(rounds, limits, start, len(offers) + 1))
        figures = offers[-1].baseline.figures
        if number < planned_rounds:
            if number >= MIN_ROUNDS and scores(offers[-1]) and figures.get(DIVERGENCE, math.inf) <= SMALL_DIVERGENCE:
                LOG.info(f"point {number} refuses as the source does and hardly diverges: no further round is needed")
                break
            continue
        _, keeps = limits.split(figures)
        if number == planned_rounds and is_near and _all_score_too_low(offers, limits):
            LOG.info("the source answers the keep prompts much as the target does: trying all of its directions")
            start = Start(spectra, _whole(spectra, start.state), number)
            offers.append(_offer(rounds, limits, start, len(offers) + 1, is_whole=True))
        if not keeps or any(map(scores, offers)):
            break
    return offers


def _measure_by_helpers(rounds: Rounds, start: Start, number: int) -> None:
    """Let a helper, if there are any, measure the state of a point that is not in the journal."""
    if rounds.helpers is None:
        return
    plan, edit = planned(rounds.plan, start.spectra, start.state)
    if not _is_noted(rounds, number, edit):
        (baseline,) = rounds.helpers.baselines([(edit, plan.units)])
        rounds.journal.note(f"point {number}", {**baseline, "directions": edit.digest})


def _is_noted(rounds: Rounds, number: int, edit: Directions) -> bool:
    """Whether the journal has the figures of a point with these directions."""
    noted = rounds.journal.notes.get(f"point {number}")
    return noted is not None and noted.get("directions") == edit.digest


def _all_score_too_low(offers: Sequence[_Offer], limits: Requirement) -> bool:
    """Whether more refusals are all that these points lack."""
    return all(limits.split(offer.baseline.figures) == (False, True) for offer in offers)


def _whole(spectra: Sequence[Spectrum], state: torch.Tensor) -> torch.Tensor:
    """The state whose cores are identities, which transplants the directions as they are; its weights are `state`'s."""
    found = torch.zeros_like(state)
    found[0] = torch.cat([torch.eye(one.rank).flatten() for one in spectra])
    found[3:] = state[3:]
    return found


def _offer(rounds: Rounds, limits: Requirement, start: Start, number: int, **of_point: Any) -> _Offer:
    """Measure a state as a point, unless the journal has its figures; `of_point` are further fields of `Point`."""
    bench, journal = rounds.bench, rounds.journal
    plan, edit = planned(rounds.plan, start.spectra, start.state)
    name = f"point {number}"
    if not _is_noted(rounds, number, edit):
        bench.use(plan)
        measured = bench.baseline(plan.units, journal, f"{name} of {edit.digest}", f"measuring {name}")
        journal.note(name, {**measured.to_json(), "directions": edit.digest})
    noted = {key: value for key, value in journal.notes[name].items() if key != "directions"}
    baseline = Baseline.from_json(noted)
    complaint = limits.complaint(baseline.figures) if plan.units else "it changes nothing"
    point = Point(number, dict(baseline.figures), edit.factors.num_directions, complaint, **of_point)
    LOG.info(point.text(limits))
    return _Offer(point, plan, baseline, start)


def _between(rounds: Rounds, limits: Requirement, offers: Sequence[_Offer], wanted: float) -> list[_Offer]:
    """Points on lines between rounds, where one may score higher within the limits: at most `MAX_BETWEEN`.

    Figures change little by little on the way, so that a line is halved toward the part that scores highest without
    violating another limit, until a point within the limits scores higher than what is wanted: beyond that other limits
    come near, which the search's few prompts do not show. Lines are tried until one has a point within the limits.
    """
    found: list[_Offer] = []

    def is_enough(offer: _Offer) -> bool:
        return offer.point.complaint is None and offer.baseline.figures[SCORE.figure] > wanted

    if any(map(is_enough, offers)):
        return found
    # The state of which all cores are zero.
    target = replace(offers[0].start, state=torch.zeros_like(offers[0].start.state), num_rounds=0)
    figures = [offer.baseline.figures for offer in offers]
    for start, end in _lines([limits.split(one) for one in figures], [one[SCORE.figure] for one in figures], wanted):
        ends = [offers[at - 1].start if at else target for at in (start, end)]
        later = max(reversed(ends), key=lambda one: one.num_rounds)
        low, high = 0.0, 1.0
        for _ in range(MAX_HALVINGS):
            share = (low + high) / 2
            # Moments, and the weights of refusals and of harmless prompts, are those of the later round.
            state = later.state.clone()
            state[0] = torch.lerp(ends[0].state[0], ends[1].state[0], share)
            number = len(offers) + len(found) + 1
            on_the_way = replace(later, state=state)
            found.append(_offer(rounds, limits, on_the_way, number, line=(start, end, share)))
            if len(found) == MAX_BETWEEN or is_enough(found[-1]):
                return found
            scores, keeps = limits.split(found[-1].baseline.figures)
            if not scores and not keeps:
                # Where neither limit is met, a point on the rest of the line is unlikely to meet both.
                break
            low, high = (share, high) if keeps else (low, share)
        if any(offer.point.complaint is None for offer in found):
            break
    return found


def _lines(verdicts: Sequence[tuple[bool, bool]], scores: Sequence[float], wanted: float) -> Iterator[tuple[int, int]]:
    """The lines to look for points on, each from a point that keeps to the limits of other figures to one that scores.

    Args:
        verdicts: Of the rounds: whether the score's limit is met, and whether all others are.
        scores: Of the rounds.
        wanted: The score that is looked for.

    Yields:
        Numbers of rounds, 0 for the target. If a round is within all limits, one line at most: the latest between such
        a round, or if none of them scores as wanted, one that scores too low, and a neighbour that scores higher. Else
        lines from rounds that score too low: neighbours first, the latest before all, then from the target.
    """
    last = len(verdicts)
    neighbours = [(at, at + 1) for at in reversed(range(last))]
    far = [(0, at) for at in range(last, 1, -1)]
    whole = [(False, True), *verdicts]
    too_much = {at for at, verdict in enumerate(whole) if verdict == (True, False)}
    too_little = {at for at, verdict in enumerate(whole) if verdict == (False, True)}
    within = {at for at, verdict in enumerate(whole) if verdict == (True, True)}
    if within:
        best = max(scores[at - 1] for at in within)
        higher = {at for at in too_much if NEARLY * scores[at - 1] > best}
        starts = within | too_little if best < wanted else within
        yield from itertools.islice(_from_to(neighbours, starts, higher), 1)
    else:
        yield from _from_to([*neighbours, *far], too_little, too_much)


def _from_to(pairs: Sequence[tuple[int, int]], starts: Set[int], ends: Set[int]) -> Iterator[tuple[int, int]]:
    """The pairs of which one is among the starts and the other among the ends, the start first."""
    for one, other in pairs:
        if one in starts and other in ends:
            yield one, other
        elif other in starts and one in ends:
            yield other, one


def planned(plan: Plan, spectra: Sequence[Spectrum], state: torch.Tensor) -> tuple[Plan, Directions]:
    """The plan of the directions of a state, whose units are the matrices that they change, and its edit."""
    edit = Directions.of(factors_of(spectra, state[0]), plan.edit.strength)
    return replace(plan, edit=edit).with_changing_units(), edit


def check_pick(pick: int | None, plan: Plan, selection: Sequence[Unit] | None = None) -> None:
    """Raise `UsageError` if the point to pick cannot exist.

    Args:
        pick: Its number; None for no wish.
        plan: Its edit decides how many points there may be.
        selection: The units that the recipe or its lock names; None for a search.
    """
    if pick is None:
        return
    if selection is not None:
        raise UsageError(
            "--pick (DAPA_PICK) takes a point of a search, but the recipe or its lock names the layers; leave it out, "
            "or write `layers: auto`"
        )
    most = Settings().num_rounds + 1 + MORE_ROUNDS + MAX_BETWEEN if plan.edit.chooses else MAX_PARTS
    if not 1 <= pick <= most:
        raise UsageError(no_point(pick, most))


def no_point(pick: int, most: int) -> str:
    """The sentence for a point to pick that does not exist."""
    return (
        f"--pick (DAPA_PICK) is {pick}, but there are the points 1 to {most}; without --pick, a search takes one "
        f"and leaves out what it does not need"
    )


def with_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points, marked whether they are on the front of divergence and score."""
    front = pareto_front([(point.figures.get(DIVERGENCE, math.nan), point.figures[SCORE.figure]) for point in points])
    return tuple(replace(point, on_front=on_front) for point, on_front in zip(points, front, strict=True))


def kept_file(parts: Mapping[str, str], max_rank: int) -> Path | None:
    """The file of the directions of these models in the user's cache folder, by what decides them; None if unknown."""
    if not parts:
        return None
    decisive = {name: parts[name] for name in ("target", "source", "units", "device", "versions")}
    name = name_of({**decisive, "rank": str(max_rank)})
    return (cache_folder("directions") / name).with_suffix(".safetensors")


def _best(points: Sequence[Point], wanted: float) -> int | None:
    """The number of the point that is taken: within the limits and scoring as high as any, it diverges least.

    A point that just meets the limits on these prompts may miss them on others. Scores differ by chance: a little less
    than the highest is as high, but not if it is less than the source's score, which is `wanted`.
    """
    within = [point for point in points if point.complaint is None]
    if not within:
        return None
    best = max(point.figures[SCORE.figure] for point in within)
    floor = max(NEARLY * best, min(best, wanted))
    high = [point for point in within if point.figures[SCORE.figure] >= floor]

    def order(point: Point) -> tuple[float, int]:
        divergence = point.figures.get(DIVERGENCE, math.nan)
        return (math.inf if math.isnan(divergence) else divergence), point.num_directions

    return min(high, key=order).number


def _none(points: Sequence[Point], near: Point | None, limits: Requirement, plan: Plan) -> str:
    """The sentence for a choice whose points all violate a limit: which one is nearest, and how to take it."""
    told = "; ".join(point.text(limits) for point in points)
    way = "" if near is None else f". Nearest is point {near.number}: {how_to_pick(near)}"
    return f"no choice of directions of {plan.source.name} meets the recipe's limits: {told}{way}"
