"""Chooses directions before a search: rounds of ascent, each of which is measured by generation as a candidate.

The rounds are points: each is a selection of directions with its figures on the search's prompts. The first part of the
prompts (`Parts.choice`) decides the weights, the second which point is taken; the report uses the third.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy
import torch

from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CannotRepair, UsageError
from dapa_merge.files import cache_folder
from dapa_merge.measure.divergence import make_reference
from dapa_merge.measure.generate import generate, generate_ids
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.measure.statistics import pareto_front
from dapa_merge.plan.edit import Directions
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG, advance, task
from dapa_merge.recipe.constraints import SCORE
from dapa_merge.search.ascent import Ascent, Settings, Sides, factors_of, widened
from dapa_merge.search.attribution import Contrast, sides_of
from dapa_merge.search.bench import Bench
from dapa_merge.search.identity import data_digest
from dapa_merge.search.journal import Journal, name_of
from dapa_merge.search.requirement import Requirement
from dapa_merge.search.result import Baseline, Point
from dapa_merge.search.spectrum import Spectrum, kept_spectra

# Sequences whose activations are kept at once for a backward pass.
MAX_BACKWARD = 16
DIVERGENCE = "divergence"
# A score of at least this share of the best one counts as high.
NEARLY = 0.96
# With a smaller share of the squared norm in the leading directions, a user is warned.
MIN_SHARE = 0.5


@dataclass(frozen=True)
class Start:
    """Where an ascent can go on.

    Attributes:
        spectra: All directions that there are.
        state: Of the ascent, after a round: `Ascent.state`.
        number: The round's.
    """

    spectra: Sequence[Spectrum]
    state: torch.Tensor
    number: int


@dataclass(frozen=True)
class Chosen:
    """The points of a choice, and the plan of one of them.

    Attributes:
        points: In the order of the rounds.
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


def choose(
    plan: Plan,
    bench: Bench,
    journal: Journal,
    choice: PromptSet,
    limits: Requirement,
    settings: Settings,
    pick: int | None = None,
) -> Chosen:
    """Choose directions for a plan's units, and the point of those within the limits to take.

    Args:
        plan: Its edit is one that chooses, with nothing chosen.
        bench: Measures points.
        journal: Each round is recorded before the next begins.
        choice: The prompts that decide the weights.
        limits: What a point must meet.
        settings: Of the ascent.
        pick: The number of a point to take whatever its figures are; None for the best within the limits.

    Raises:
        CannotRepair: If there is nothing to choose by, no point meets the limits, or the picked one changes nothing.
        UsageError: If the target answers nothing to the keep prompts.
        CheckpointError: If a model has values, or computes gradients, that are not finite numbers.
    """
    with task("decomposing the difference of the models", plan.num_parameters(plan.units), "parameters"):
        spectra = kept_spectra(
            plan, plan.units, bench.device, kept_file(journal.parts, settings.max_rank), settings.max_rank
        )
    if not spectra:
        raise CannotRepair(
            f"no matrix of {plan.source.name} differs from the target {plan.target.name}; there is no direction to add"
        )
    _tell(spectra)
    points: list[Point] = []
    baselines, plans = [], []
    states = _rounds(plan, bench, journal, choice, spectra, settings)
    for state in states:
        of_point, edit = _planned(plan, spectra, state)
        name = f"point {len(points) + 1}"
        if name not in journal.notes or journal.notes[name].get("directions") != edit.digest:
            bench.use(of_point)
            with task(f"measuring {name}", bench.num_prompts, "prompts"):
                journal.note(name, {**bench.baseline(of_point.units).to_json(), "directions": edit.digest})
        noted = {key: value for key, value in journal.notes[name].items() if key != "directions"}
        baseline = Baseline.from_json(noted)
        baselines.append(baseline)
        plans.append(of_point)
        complaint = limits.complaint(baseline.figures) if of_point.units else "it changes nothing"
        points.append(Point(len(points) + 1, dict(baseline.figures), edit.factors.num_directions, complaint))
        LOG.info(points[-1].text(limits))
    number = pick if pick is not None else _best(points)
    if number is None:
        raise CannotRepair(_none(points, limits, plan))
    if not plans[number - 1].units:
        raise CannotRepair(f"point {number} has no directions, so that it is the target; `--pick` another one")
    start = Start(spectra, states[number - 1], number)
    return Chosen(tuple(points), number, plans[number - 1], baselines[number - 1], start)


def settle(
    plan: Plan,
    units: Sequence[Unit],
    start: Start,
    bench: Bench,
    journal: Journal,
    choice: PromptSet,
    settings: Settings,
) -> Plan:
    """Let what a search left make up for what it left out: two more rounds of these matrices alone.

    A selection that just meets the limits owes that to the prompts it was tested with; on others it falls short.

    Args:
        plan: As for `choose`.
        units: What the search left.
        start: The point that they are a part of.
        bench: Not measured with.
        journal: The rounds are recorded, and are not made again.
        choice: As for `choose`.
        settings: As for `choose`.

    Returns:
        The plan of the new directions; its units are some of `units`.
    """
    wanted = set(units)
    spectra = [one for one in start.spectra if one.unit in wanted]
    name = f"settled {data_digest([start.number, [str(one.place) for one in spectra]])}"
    if name not in journal.notes:
        columns = torch.cat([torch.full((one.rank**2,), one.unit in wanted) for one in start.spectra])
        bench.use(plan)
        with (
            _ascending(plan, bench, journal, choice, spectra, settings) as ascent,
            task("settling what is left", 2 * settings.num_steps, "steps"),
        ):
            ascent.go_on(start.state[:, columns], start.number)
            ascent.round(lambda: advance(1, "steps"))
            # The last steps are small: the state is then close to the middle of what it moved about.
            _round(ascent, journal, name, slows=True)
    return _planned(plan, spectra, _decoded(journal.notes[name]))[0]


def _planned(plan: Plan, spectra: Sequence[Spectrum], state: torch.Tensor) -> tuple[Plan, Directions]:
    """The plan of the directions of a state, whose units are the matrices that they change, and its edit."""
    edit = Directions.of(factors_of(spectra, state[0]), plan.edit.strength)
    return replace(plan, edit=edit).with_changing_units(), edit


def check_pick(pick: int | None, plan: Plan, selection: Sequence[Unit] | None = None) -> None:
    """Raise `UsageError` if the point to pick cannot exist.

    Args:
        pick: Its number; None for no wish.
        plan: The recipe's.
        selection: The units that the recipe or its lock names; None for a search.
    """
    if pick is None:
        return
    if not plan.edit.chooses:
        raise UsageError(
            f"--pick (DAPA_PICK) takes a point of an edit that chooses what it adds, which {plan.edit.name} does not; "
            f"leave it out"
        )
    if selection is not None:
        raise UsageError(
            "--pick (DAPA_PICK) takes a point of a choice, but the recipe or its lock names the layers; leave it out, "
            "or write `layers: auto`"
        )
    if not 1 <= pick <= (most := Settings().num_rounds):
        raise UsageError(
            f"--pick (DAPA_PICK) is {pick}, but a choice has the points 1 to {most}; without --pick, a search takes "
            f"one and leaves out what it does not need"
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


def _tell(spectra: Sequence[Spectrum]) -> None:
    """Say how much of the differences the directions hold: a difference without decay keeps little of itself."""
    held = [float((one.values.double() ** 2).sum()) for one in spectra]
    share = sum(held) / sum(norm / one.share for norm, one in zip(held, spectra, strict=True))
    LOG.info(
        f"{sum(one.rank for one in spectra)} directions of {len(spectra)} matrices hold {100 * share:.1f} % of their "
        f"differences (of the squared norm)"
    )
    if share < MIN_SHARE:
        LOG.warning("that is little: what the source learned may be in the rest, of which nothing can be added")


def _best(points: Sequence[Point]) -> int | None:
    """The number of the point that is taken: within the limits and scoring as high as any, it diverges least.

    A point that just meets the limits on these prompts may miss them on others.
    """
    within = [point for point in points if point.complaint is None]
    if not within:
        return None
    best = max(point.figures[SCORE.figure] for point in within)
    high = [point for point in within if point.figures[SCORE.figure] >= NEARLY * best]

    def order(point: Point) -> tuple[float, int]:
        divergence = point.figures.get(DIVERGENCE, math.nan)
        return (math.inf if math.isnan(divergence) else divergence), point.num_directions

    return min(high, key=order).number


def nearest(points: Sequence[Point], limits: Requirement) -> Point | None:
    """The point whose violations of the limits sum to least, the first one on a tie; None if all change nothing.

    See `Constraint.violation`: each is a share of the worst that there is, so that a DSR of 0 weighs as much as an
    over-refusal of 1.
    """
    some = [point for point in points if point.num_directions]
    return min(some, key=lambda point: limits.violation(point.figures), default=None)


def _none(points: Sequence[Point], limits: Requirement, plan: Plan) -> str:
    """The sentence for a choice whose points all violate a limit: which one is nearest, and how to take it."""
    told = "; ".join(point.text(limits) for point in points)
    way = ""
    if (found := nearest(points, limits)) is not None:
        way = f". Nearest is point {found.number}: `--pick {found.number}` takes it (DAPA_PICK for mergekit-yaml)"
    return f"no choice of directions of {plan.source.name} meets the recipe's limits: {told}{way}"


def _rounds(
    plan: Plan,
    bench: Bench,
    journal: Journal,
    choice: PromptSet,
    spectra: Sequence[Spectrum],
    settings: Settings,
) -> list[torch.Tensor]:
    """The states after each round; a round is in the journal before the next begins, and is not made again."""
    names = [f"round {number}" for number in range(1, settings.num_rounds + 1)]
    states = [_decoded(journal.notes[name]) for name in takewhile(journal.notes.__contains__, names)]
    if len(states) == len(names):
        return states
    with _ascending(plan, bench, journal, choice, spectra, settings) as ascent:
        if states:
            LOG.info(f"{len(states)} of {len(names)} rounds are in the journal already")
            ascent.go_on(states[-1], len(states))
        # All rounds first: a candidate's measurement needs the target's own tensors.
        left = names[len(states) :]
        with task("choosing directions", len(left) * settings.num_steps, "steps"):
            for name in left:
                states.append(_round(ascent, journal, name))
    return states


def _round(ascent: Ascent, journal: Journal, name: str, *, slows: bool = False) -> torch.Tensor:
    """The state after another round, which is recorded."""
    progress = ascent.round(lambda: advance(1, "steps"), slows=slows)
    state = ascent.state
    journal.note(name, _encoded(state))
    LOG.info(
        f"the choice's refusals have a smallest margin of {progress.margin:+.1f} logits, the divergence is "
        f"{progress.divergence:.4f}, and {100 * progress.harmless:.0f} % of the harmless prompts are answered otherwise"
    )
    return state


@contextmanager
def _ascending(
    plan: Plan,
    bench: Bench,
    journal: Journal,
    choice: PromptSet,
    spectra: Sequence[Spectrum],
    settings: Settings,
) -> Iterator[Ascent]:
    """An ascent that begins at the target, on the prompts of the choice, inside a `with` block."""
    said = _said(plan, bench, journal, choice, settings)
    sides = _sides(plan, bench, choice, settings, said)
    with widened(bench.live.model):
        keep = [
            make_reference(
                bench.live.model,
                bench.live.tokenizer,
                prompts,
                batch_size=bench.meter.batch_size,
                max_new_tokens=num_tokens,
                answers=answers,
            ).rows
            for (prompts, num_tokens), answers in zip(_kept(choice, settings), said["kept"], strict=True)
        ]
        yield Ascent(bench.live, spectra, sides, keep, settings, MAX_BACKWARD)


def _kept(choice: PromptSet, settings: Settings) -> list[tuple[tuple[str, ...], int]]:
    """The groups of prompts whose answers are to stay, the keep prompts last, and how many tokens of each."""
    groups = [(choice.harmless, settings.num_tokens), (choice.keep, settings.num_keep_tokens)]
    return groups[:1] if choice.keep == choice.harmless else groups


def _said(plan: Plan, bench: Bench, journal: Journal, choice: PromptSet, settings: Settings) -> dict[str, Any]:
    """What target and source answer to the prompts of the choice, from the journal if recorded.

    Returns:
        `harmful`: for each harmful prompt, the target's response and its outcome, and the source's; `kept`: the tokens
        of the target's answers to each group of `_kept`; `num_refusing`: how many keep prompts the source refuses.
    """
    if "choice" not in journal.notes:
        live, classifier, batch_size = bench.live, bench.meter.classifiers[0], bench.meter.batch_size
        num_tokens = max(bench.meter.max_new_tokens, settings.num_tokens)

        def responses(prompts: Sequence[str]) -> list[tuple[str, str]]:
            found = generate(live.model, live.tokenizer, prompts, max_new_tokens=num_tokens, batch_size=batch_size)
            outcomes = classifier.classify(prompts, found)
            return [(response, outcome.value) for response, outcome in zip(found, outcomes, strict=True)]

        groups = _kept(choice, settings)
        keep = groups[-1][0] if len(groups) > 1 else ()
        num_prompts = 2 * len(choice.harmful) + len(keep) + sum(len(prompts) for prompts, _ in groups)
        with task("reading the answers of target and source", num_prompts, "prompts"):
            before = responses(choice.harmful)
            kept = [
                generate_ids(live.model, live.tokenizer, prompts, max_new_tokens=number, batch_size=batch_size)
                for prompts, number in groups
            ]
            bench.use(plan.reference)
            with live.transplanted(plan.units):
                after, of_keep = responses(choice.harmful), responses(keep)
        journal.note(
            "choice",
            {
                "harmful": [[*was, *now] for was, now in zip(before, after, strict=True)],
                "kept": kept,
                "num_refusing": [outcome for _, outcome in of_keep].count(Outcome.REFUSED.value),
            },
        )
    said: dict[str, Any] = journal.notes["choice"]
    _check_kept(plan, bench, choice, said)
    return said


def _check_kept(plan: Plan, bench: Bench, choice: PromptSet, said: Mapping[str, Any]) -> None:
    """Say which keep prompts are of little use; raise `UsageError` if none is of any."""
    texts = bench.live.tokenizer.batch_decode(said["kept"][-1], skip_special_tokens=True)
    num_empty = sum(not text.strip() for text in texts)
    if num_empty == len(texts):
        raise UsageError(
            f"the target {plan.target.name} answers nothing to any of the {len(texts)} keep prompts of the choice; "
            f"name prompts that it answers with `keep`"
        )
    if num_empty:
        LOG.warning(f"the target answers nothing to {num_empty} of the {len(texts)} keep prompts of the choice")
    if said["num_refusing"]:
        LOG.warning(
            f"the source {plan.source.name} refuses {said['num_refusing']} of the {len(choice.keep)} keep prompts of "
            f"the choice; the result may refuse such prompts too"
        )


def _sides(plan: Plan, bench: Bench, choice: PromptSet, settings: Settings, said: Mapping[str, Any]) -> list[Sides]:
    """The contrasts of the choice's harmful prompts that the source refuses and the target answers."""
    contrasts = [
        Contrast(prompt, refusing=after, complying=before)
        for prompt, (before, was, after, now) in zip(choice.harmful, said["harmful"], strict=True)
        if was != Outcome.REFUSED.value and now == Outcome.REFUSED.value
    ]
    tokenizer = bench.live.tokenizer
    found = (sides_of(tokenizer, one, settings.num_tokens) for one in contrasts)
    sides = [(refusing, complying) for refusing, complying in filter(None, found)]
    if not sides:
        raise CannotRepair(
            f"the source {plan.source.name} refuses none of the {len(choice.harmful)} harmful prompts of the choice "
            f"that the target answers; there is nothing to learn from"
        )
    LOG.info(f"{len(sides)} of {len(choice.harmful)} prompts are refused by the source and answered by the target")
    return sides


def _encoded(state: torch.Tensor) -> dict[str, Any]:
    return {"state": base64.b64encode(state.numpy().astype("<f4").tobytes()).decode()}


def _decoded(note: Mapping[str, Any]) -> torch.Tensor:
    """`[5, elements]`, as `Ascent.state`."""
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(note["state"]), dtype="<f4").copy()).reshape(5, -1)
