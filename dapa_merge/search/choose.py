"""Chooses directions before a search: rounds of ascent, each of which is measured by generation as a candidate.

The rounds are points: each is a selection of directions with its figures on the search's prompts. The first part of the
prompts (`Parts.choice`) decides the weights, the second which point is taken; the report uses the third.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import platformdirs
import torch

from dapa_merge.errors import CannotRepair
from dapa_merge.measure.divergence import make_reference
from dapa_merge.measure.generate import generate
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.plan.edit import Directions
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG, advance, task
from dapa_merge.search.ascent import Ascent, Settings, factors_of, widened
from dapa_merge.search.attribution import Contrast, sides_of
from dapa_merge.search.bench import Bench
from dapa_merge.search.journal import Journal, name_of
from dapa_merge.search.requirement import Requirement
from dapa_merge.search.result import Baseline, Point
from dapa_merge.search.spectrum import MAX_RANK, Spectrum, kept_spectra

# Sequences whose activations are kept at once for a backward pass.
MAX_BACKWARD = 16
DIVERGENCE = "divergence"


@dataclass(frozen=True)
class Chosen:
    """The points of a choice, and the plan of one of them.

    Attributes:
        points: In the order of the rounds.
        number: Of the point that was taken, from 1.
        plan: The plan whose edit has that point's directions, and whose units are the matrices that have some.
        baseline: That point's measurements.
    """

    points: tuple[Point, ...]
    number: int
    plan: Plan
    baseline: Baseline


def choose(
    plan: Plan,
    bench: Bench,
    journal: Journal,
    choice: PromptSet,
    limits: Requirement,
    settings: Settings,
    pick: int | None = None,
) -> Chosen:
    """Choose directions for a plan's units, and the point that meets the limits and diverges least.

    Args:
        plan: Its edit is one that chooses, with nothing chosen.
        bench: Measures points.
        journal: Each round is recorded before the next begins.
        choice: The prompts that decide the weights.
        limits: What a point must meet.
        settings: Of the ascent.
        pick: The number of a point to take whatever its figures are; None for the best within the limits.

    Raises:
        CannotRepair: If there is nothing to choose by, or no point meets the limits.
        CheckpointError: If a model has values, or computes gradients, that are not finite numbers.
    """
    with task("decomposing the difference of the models", plan.num_parameters(plan.units), "parameters"):
        spectra = kept_spectra(plan, plan.units, bench.device, kept_file(journal.parts))
    if not spectra:
        raise CannotRepair(
            f"no matrix of {plan.source.name} differs from the target {plan.target.name}; there is no direction to add"
        )
    _tell(spectra)
    points: list[Point] = []
    baselines, plans = [], []
    for weights in _rounds(plan, bench, journal, choice, spectra, settings):
        edit = Directions.of(factors_of(spectra, weights, settings.min_weight), plan.edit.strength)
        of_point = _with_edit(plan, edit)
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
    if number is None or number > len(points):
        raise CannotRepair(_none(points, limits, plan))
    return Chosen(tuple(points), number, plans[number - 1], baselines[number - 1])


def kept_file(parts: Mapping[str, str]) -> Path | None:
    """The file of the directions of these models in the user's cache folder, by what decides them; None if unknown."""
    if not parts:
        return None
    decisive = {name: parts[name] for name in ("target", "source", "units", "device", "versions")}
    name = name_of({**decisive, "rank": str(MAX_RANK)}).replace(".jsonl", ".safetensors")
    return Path(platformdirs.user_cache_dir("dapa-merge")) / "directions" / name


def _tell(spectra: Sequence[Spectrum]) -> None:
    share = sum(one.share for one in spectra) / len(spectra)
    LOG.info(
        f"{sum(one.rank for one in spectra)} directions of {len(spectra)} matrices hold {100 * share:.1f} % of their "
        f"differences"
    )


def _best(points: Sequence[Point]) -> int | None:
    """The number of the point within the limits that diverges least from the target, the smaller one on a tie."""
    within = [point for point in points if point.complaint is None]

    def order(point: Point) -> tuple[float, int]:
        divergence = point.figures.get(DIVERGENCE, math.nan)
        return (math.inf if math.isnan(divergence) else divergence), point.num_directions

    return min(within, key=order).number if within else None


def _none(points: Sequence[Point], limits: Requirement, plan: Plan) -> str:
    """The sentence for a choice whose points all violate a limit: which one is nearest, and how to take it."""
    nearest = max(points, key=lambda point: point.figures.get("score", 0.0))
    return (
        f"no choice of directions of {plan.source.name} meets the recipe's limits; the nearest is point "
        f"{nearest.number}: {nearest.complaint}; `--pick {nearest.number}` takes it"
    )


def _with_edit(plan: Plan, edit: Directions) -> Plan:
    units = tuple(unit for unit in plan.units if edit.changes(found["target"] for found in plan.regions((unit,))))
    return replace(plan, edit=edit, units=units)


def _rounds(
    plan: Plan,
    bench: Bench,
    journal: Journal,
    choice: PromptSet,
    spectra: Sequence[Spectrum],
    settings: Settings,
) -> Iterator[torch.Tensor]:
    """Yield the weights after each round, from the journal if all are recorded."""
    names = [f"round {number}" for number in range(1, settings.num_rounds + 1)]
    if all(name in journal.notes for name in names):
        for name in names:
            yield _decoded(journal.notes[name])
        return
    sides, groups = _material(plan, bench, choice, settings)
    found = []
    # All rounds first: a candidate's measurement needs the target's own tensors.
    with widened(bench.live.model):
        keep = [
            make_reference(
                bench.live.model,
                bench.live.tokenizer,
                prompts,
                batch_size=bench.meter.batch_size,
                max_new_tokens=tokens,
            ).rows
            for prompts, tokens in groups
        ]
        ascent = Ascent(bench.live, spectra, sides, keep, settings, MAX_BACKWARD)
        total = settings.num_rounds * settings.num_steps
        with task("choosing directions", total, "steps"):
            for _ in names:
                progress = ascent.round(lambda: advance(1, "steps"))
                LOG.info(
                    f"the choice's refusals have a smallest margin of {progress.margin:+.1f} logits, and the "
                    f"divergence {progress.divergence:.4f}"
                )
                found.append(ascent.weights.cpu().clone())
    for name, weights in zip(names, found, strict=True):
        journal.note(name, _encoded(weights))
        yield weights


def _material(
    plan: Plan, bench: Bench, choice: PromptSet, settings: Settings
) -> tuple[list[Any], list[tuple[tuple[str, ...], int]]]:
    """The contrasts of the choice's harmful prompts, and its keep and harmless prompts with their lengths."""
    live, classifier = bench.live, bench.meter.classifiers[0]

    def answers() -> list[str]:
        return generate(
            live.model,
            live.tokenizer,
            choice.harmful,
            max_new_tokens=max(bench.meter.max_new_tokens, settings.num_tokens),
            batch_size=bench.meter.batch_size,
        )

    with task("reading the answers of target and source", 2 * len(choice.harmful), "prompts"):
        answering = answers()
        bench.use(plan.reference)
        with live.transplanted(plan.units):
            refusing = answers()
    outcomes = [classifier.classify(choice.harmful, said) for said in (answering, refusing)]
    contrasts = [
        Contrast(prompt, refusing=after, complying=before)
        for prompt, before, after, was, now in zip(choice.harmful, answering, refusing, *outcomes, strict=True)
        if was is not Outcome.REFUSED and now is Outcome.REFUSED
    ]
    sides = [tuple(found) for one in contrasts if (found := sides_of(live.tokenizer, one, settings.num_tokens))]
    if not sides:
        raise CannotRepair(
            f"the source {plan.source.name} refuses none of the {len(choice.harmful)} harmful prompts of the choice "
            f"that the target answers; there is nothing to learn from"
        )
    LOG.info(f"{len(sides)} of {len(choice.harmful)} prompts are refused by the source and answered by the target")
    groups = [(choice.harmless, settings.num_tokens)]
    if choice.keep != choice.harmless:
        groups.append((choice.keep, settings.num_keep_tokens))
    return sides, groups


def _encoded(weights: torch.Tensor) -> dict[str, Any]:
    return {"weights": base64.b64encode(weights.numpy().astype("<f4").tobytes()).decode()}


def _decoded(note: Mapping[str, Any]) -> torch.Tensor:
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(note["weights"]), dtype="<f4").copy())
