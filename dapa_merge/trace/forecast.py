"""What a trace will take, before it begins: each stage as a part of the job, counted without a model in memory.

Which prompts only the source refuses, and how long they are, is not known yet: all of them are taken to be so, and of
one length. Before the stages that compare responses, the trace counts again (`TraceSession`).
"""

from __future__ import annotations

import math
from pathlib import Path

from dapa_merge.measure.expected import Calibration, Expected, bytes_to_fetch
from dapa_merge.measure.live import choose_device
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import plan_of_all
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.forecast import TOKENS_OF_ROW, memory_of, rates_of, work_of
from dapa_merge.search.journal import noted
from dapa_merge.trace.edits import curve_sizes, make_groups, selections_of
from dapa_merge.trace.influence import share
from dapa_merge.trace.options import MAX_INFLUENCE_PROMPTS, PROMPTS_AT_ONCE, SITE_KINDS, STAGES, TraceOptions
from dapa_merge.trace.store import JOURNAL_NAME, TRACES_NAME

# The part of a trace in which both models answer.
ANSWERS = "answers"
# Tokens of a prompt from its subject on, with those of the template.
TOKENS_OF_SUBJECT = 15
# Rows that are timed at once.
NUM_ROWS = 8


def forecast(
    recipe: Recipe,
    plan: Plan,
    meter: Meter,
    wanted: TraceOptions,
    stages: tuple[str, ...],
    out: Path,
    options: Options,
) -> Expected:
    """Estimate what a trace takes.

    Args:
        recipe: Names the models and the prompts.
        plan: Its plan.
        meter: Of edits: its prompts and skills.
        wanted: What is traced.
        stages: Names of those to make.
        out: The folder; what it has is not made again.
        options: The device.
    """
    passes = Calibration(plan.target, choose_device(options.device), options.dtype)
    rates = rates_of(passes, recipe.max_new_tokens)
    row = passes.pass_seconds(NUM_ROWS * TOKENS_OF_ROW, NUM_ROWS * wanted.num_tokens) / NUM_ROWS
    known = noted(out / JOURNAL_NAME)
    units, number = plan_of_all(plan.reference).units, len(meter.prompts.harmful)
    parts: dict[str, dict[str, float]] = {}
    tests = 0
    if "search" in stages:
        work = work_of(recipe, plan, split_prompts(recipe))
        parts["search"], tests = work.amounts, work.tests
    if any(stage.compares and stage.name in stages for stage in STAGES) and not wanted.responses:
        asked = sum(f"responses of the {name}" not in known for name in ("source", "target"))
        parts[ANSWERS] = {"prompts": asked * number}
    if "influence" in stages:
        parts["influence"] = {"units": len(units) * math.ceil(min(number, MAX_INFLUENCE_PROMPTS) / PROMPTS_AT_ONCE)}
        rates["units"] = 2 * PROMPTS_AT_ONCE * row * sum(share(unit, passes.num_layers) for unit in units) / len(units)
    if "directions" in stages:
        parts["directions"] = {"prompts": number}
    if "groups" in stages:
        selections = len(selections_of(make_groups(units), wanted.num_controls, wanted.seed)) + 1
        scored = sum(note.startswith("score ") for note in known)
        parts["groups"], rates["edits"] = {"edits": max(selections - scored, 0)}, number * rates["prompts"]
    if "edits" in stages:
        sizes = len(curve_sizes(len(plan.units), max(1, len(plan.units) // 10)))
        measured = sum(note.startswith("edit ") for note in known)
        parts["edits"] = {"prompts": max(sizes - measured, 0) * meter.num_prompts}
    if "traces" in stages:
        cells = TOKENS_OF_SUBJECT * passes.num_layers * len(wanted.kinds or SITE_KINDS)
        left = max(min(number, wanted.num_prompts) - len(list((out / TRACES_NAME).glob("*.npz"))), 0)
        parts["traces"] = {"runs": left * 2 * (1 + wanted.num_samples * (1 + cells))}
        # A run begins at the layer that is restored, half of them deep on the average.
        rates["runs"] = row / 2
    models = plan.models.values()
    return Expected(parts, rates, memory_of(plan, options), bytes_to_fetch(models), passes.device.type, tests)
