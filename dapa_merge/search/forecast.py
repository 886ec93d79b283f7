"""What a run will take: tests, and what `measure/expected.py` estimates of its time, memory and bytes to fetch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from dapa_merge.checkpoint.header import TORCH_NAMES
from dapa_merge.measure.determinism import can_pack, is_slow
from dapa_merge.measure.expected import MAX_ROWS, TOLD_SECONDS, Calibration, Expected, bytes_to_fetch, timed
from dapa_merge.measure.live import choose_device
from dapa_merge.measure.meter import Meter, report_meter
from dapa_merge.measure.placement import fits, weight_bytes
from dapa_merge.measure.prompts.parts import Parts, all_prompts
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.plan.ladder import Ladder
from dapa_merge.plan.plan import Plan, search_memory
from dapa_merge.plan.selection import given_selection
from dapa_merge.progress import duration
from dapa_merge.recipe.options import DTYPES, Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.bundles import MAX_ALONE, by_layer, scans
from dapa_merge.search.slopes import Settings

# Tokens of a prompt, with the tokens of its answer that are compared, without what all prompts begin with.
TOKENS_OF_ROW = 36
# A backward pass to activations and directions, in forward passes.
BACKWARD = 2.0
# Share of a test's prompts that early verdicts leave (tests/benchmarks/RESULTS.md).
ASKED = 0.6
# What takes at most this share of the time in float32 is worth a word.
FASTER = 0.9
# The part of a run that measures target, result and source for the report.
REPORT = "report"


@dataclass(frozen=True)
class Work:
    """What the rung of a recipe takes.

    Attributes:
        edit: Its name.
        tests: Of delta debugging, about.
        prompts: Answers of candidates, about.
        steps: Of a choice of directions.
        parameters: Of the matrices that are decomposed.
        in_vain: Answers after which an edit that does not repair is usually known not to: what all units score by.
    """

    edit: str
    tests: int
    prompts: float
    steps: int
    parameters: int
    in_vain: int

    @property
    def amounts(self) -> dict[str, float]:
        """How much is to be done of each unit of progress."""
        return {"prompts": self.prompts, "steps": self.steps, "parameters": self.parameters}


@dataclass(frozen=True)
class Forecast(Expected):
    """The estimate for a run, if its last rung is the one that repairs.

    Attributes:
        works: Of each rung.
        prompts: Answers of the report: those of target, result and source.
        meter: Measures for the report; None without one.
        is_upcast: Whether the device is a CPU that lacks the 16-bit arithmetic of the target.
        float32_seconds: About how long all of it takes in float32, where that is faster and fits; else None.
    """

    works: tuple[Work, ...] = ()
    prompts: int = 0
    meter: Meter | None = None
    is_upcast: bool = False
    float32_seconds: float | None = None

    @property
    def place(self) -> str:
        """Where the seconds were calibrated, for people."""
        return f"{self.device} without 16-bit arithmetic" if self.is_upcast else self.device

    def __str__(self) -> str:
        """The estimate as text, with that of float32 where it is less."""
        if self.float32_seconds is None:
            return super().__str__()
        return f"{super().__str__()}; about {duration(self.float32_seconds)} with --dtype float32"

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        works = [{**asdict(work), "seconds": round(self.seconds(work.amounts), 1)} for work in self.works]
        return {
            "device": self.device,
            "seconds": round(self.total_seconds, 1),
            "float32_seconds": None if self.float32_seconds is None else round(self.float32_seconds, 1),
            "tests": self.tests,
            "memory_bytes": self.memory_bytes,
            "fetch_bytes": self.fetch_bytes,
            "report_prompts": self.prompts,
            "works": works,
        }


def forecast(ladder: Ladder, options: Options, *, reports: bool = True) -> Forecast:
    """Estimate what a recipe's run takes, or with `reports` false its search alone.

    Raises:
        UsageError: If there are too few prompts, the device is absent, or anything that the report measures with is not
            available.
    """
    device = choose_device(options.device)
    works: list[Work] = []
    meter: Meter | None = None
    for recipe, plan in ladder.rungs:
        parts = all_prompts(recipe, is_rung=ladder.is_auto, tells=False)
        if reports and meter is None:
            # The same for all edits.
            meter = meter_of_run(recipe, plan, parts.report, options)
        if given_selection(recipe, plan) is None:
            works.append(work_of(recipe, plan, parts))
    num_report = 0 if meter is None else 3 * meter.num_prompts
    plan = ladder.plan
    parts_of_run: dict[str, Mapping[str, float]] = {work.edit: {"prompts": work.in_vain} for work in works[:-1]}
    parts_of_run |= {work.edit: work.amounts for work in works[-1:]}
    parts_of_run[REPORT] = {"prompts": num_report}
    rates = rates_of(Calibration(plan.target, device, options.dtype), ladder.recipe.max_new_tokens)
    found = Forecast(
        parts_of_run,
        rates,
        memory_of(plan, options),
        bytes_to_fetch(ladder.models.values()),
        device.type,
        works[-1].tests if works else 0,
        tuple(works),
        num_report,
        meter,
        _is_upcast(plan, options, device),
    )
    wide = _wider(plan, options, device)
    if wide is None or found.total_seconds < TOLD_SECONDS:
        return found
    seconds = replace(found, rates=rates_of(wide, ladder.recipe.max_new_tokens)).total_seconds
    return replace(found, float32_seconds=seconds) if seconds < FASTER * found.total_seconds else found


def meter_of_run(recipe: Recipe, plan: Plan, prompts: PromptSet, options: Options) -> Meter:
    """The meter of a run's report, which puts the recipe's keep prompts to the models too; raises as `report_meter`."""
    return replace(report_meter(recipe, prompts, options, plan.models.values()), asks_keep=recipe.keep is not None)


def _wider(plan: Plan, options: Options, device: torch.device) -> Calibration | None:
    """The calibration in float32 where that may be faster: on a CPU without the model's arithmetic, if it fits."""
    wide = replace(options.where, dtype=DTYPES[0])
    is_wider = _is_upcast(plan, options, device) and fits(plan.target, wide, device)
    return Calibration(plan.target, device, wide.dtype) if is_wider else None


def _is_upcast(plan: Plan, options: Options, device: torch.device) -> bool:
    """Whether a CPU computes the target in float32, as it lacks the arithmetic of the config's dtype."""
    if device.type != "cpu" or options.dtype is not None or options.quantize is not None:
        return False
    stored = {TORCH_NAMES.get(tensor.dtype) for tensor in plan.target.tensors.values()}
    return any(is_slow(getattr(torch, name)) for name in DTYPES[1:] if name in stored)


def memory_of(plan: Plan, options: Options) -> int:
    """Bytes that a search needs on its device besides activations, in the arithmetic of the options."""
    kept = search_memory(plan) - plan.target.num_bytes + weight_bytes(plan.target, options.where)
    number = plan.target.num_parameters
    is_packed = _is_upcast(plan, options, choose_device(options.device)) and can_pack(number)
    return kept + is_packed * 4 * number


def expected_tests(
    num_units: int, algorithm: str, *, has_prior: bool | None = None, max_tests: int | None = None
) -> int:
    """About how many tests delta debugging needs, where a tenth of the units are needed.

    By means over random oracles, whose shape `tests/search/test_forecast.py` repeats; `has_prior` defaults to what the
    algorithm usually has.
    """
    is_guided = algorithm == "guided"
    if is_guided if has_prior is None else has_prior:
        about = 8 + num_units / 10
    else:
        about = {"ddmin": 40 + 2 * num_units}.get(algorithm, 24 + num_units / 3)
    most = math.inf if max_tests is None else max_tests
    return max(1, round(min(about, 2 * num_units + 1 + num_units**2 / 4, most)))


def work_of(recipe: Recipe, plan: Plan, parts: Parts) -> Work:
    """What the search of a recipe of one edit takes."""
    each = len(parts.search.harmful) + len(parts.search.harmless)
    baselines, in_vain = 2 * each + len(parts.search.measured_keep), len(parts.search.harmful)
    in_bundles = plan.edit.chooses and len(plan.units) > MAX_ALONE
    number = len(by_layer(plan.units)) if in_bundles else len(plan.units)
    # Among bundles it hardly ever goes on: of real models, most were needed (tests/benchmarks/RESULTS.md).
    is_scan = in_bundles and recipe.search == "guided"
    most = recipe.max_tests or (scans(number)[0][0] if is_scan else None)
    tests = expected_tests(number, recipe.search, max_tests=most)
    if not plan.edit.chooses:
        return Work(recipe.edit, tests, baselines + tests * each * ASKED, 0, 0, in_vain)
    settings, choice = Settings(), parts.choice or parts.search
    rounds = settings.num_rounds
    read = 2 * len(choice.harmful) + len(choice.harmless) + 2 * len(choice.keep)
    # Two more rounds settle what a search left, which among bundles is usually all.
    steps = (rounds + (0 if is_scan else 2)) * settings.num_steps
    prompts = baselines + read + (rounds + 1) * each + tests * each * ASKED
    return Work(recipe.edit, tests, prompts, steps, plan.num_parameters(plan.units), in_vain)


def rates_of(passes: Calibration, max_new_tokens: int | None) -> dict[str, float]:
    """Seconds for a prompt, a step and a parameter."""
    settings = Settings()
    num_rows = settings.num_contrasts + 2 * settings.num_keep
    step = (1 + BACKWARD) * passes.pass_seconds(num_rows * TOKENS_OF_ROW, num_rows * settings.num_tokens)
    return {"prompts": passes.answer_seconds(max_new_tokens), "steps": step, "parameters": _decomposing(passes)}


def _decomposing(passes: Calibration) -> float:
    """Seconds for a parameter of a matrix whose leading directions are found: products with few columns."""
    rows, columns = max((tensor.shape for tensor in passes.inner), key=math.prod)
    matrix = torch.randn(min(rows, MAX_ROWS), columns, device=passes.device)
    tried = torch.randn(columns, Settings().max_rank, device=passes.device)
    # Each of some ten iterations multiplies by it twice, and makes the columns orthogonal.
    return 30 * timed(lambda: matrix @ tried, passes.device) / matrix.numel()
