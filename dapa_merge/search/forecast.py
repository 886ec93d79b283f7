"""What a run will take: tests, seconds on this device, memory, and bytes to fetch; no model is loaded.

Seconds come from a short calibration: matrices of the shapes and dtype of the target's first layer, with random values,
are multiplied as in an answer and as in a step of a choice. Attention, and what Python does between, are estimated. So
it is a rough figure, for the question whether to wait or to come back tomorrow (tests/benchmarks/forecasts.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.units import layer_number
from dapa_merge.measure.decode import PIECE
from dapa_merge.measure.live import choose_device
from dapa_merge.measure.meter import MAX_KEEP
from dapa_merge.measure.placement import weight_bytes
from dapa_merge.measure.prompts.parts import Parts, split_prompts
from dapa_merge.measure.prompts.sets import PromptSet, load_prompts
from dapa_merge.plan.edit import may_choose
from dapa_merge.plan.ladder import Ladder
from dapa_merge.plan.plan import Plan, search_memory
from dapa_merge.plan.selection import given_selection
from dapa_merge.progress import LOG, duration, expect
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.ascent import Settings
from dapa_merge.search.bundles import MAX_ALONE, by_layer, num_scanning

# Tokens of an answer, on the average: refusals are short.
TOKENS_OF_ANSWER = 60
# Tokens of a prompt in its template, with the tokens of its answer that are compared.
TOKENS_OF_ROW = 60
# A backward pass to activations and directions, in forward passes.
BACKWARD = 2.0
# What Python and the launches of kernels take for a layer, in seconds.
OVERHEAD = 4e-4
# Share of a test's prompts that early verdicts leave (tests/benchmarks/RESULTS.md).
ASKED = 0.6
# Rounds of a choice that usually follow those of the settings.
MORE_ROUNDS = 1
# What takes longer is told beforehand.
TOLD_SECONDS = 60
# The part of a run that measures target, result and source for the report.
REPORT = "report"
# Of the trial of one product.
TRIAL_SECONDS = 0.05
MAX_ROWS = 4096


@dataclass(frozen=True)
class Work:
    """What the rung of a recipe takes.

    Attributes:
        edit: Its name.
        tests: Of delta debugging, about.
        prompts: Answers of candidates, about.
        steps: Of a choice of directions.
        parameters: Of the matrices that are decomposed.
    """

    edit: str
    tests: int
    prompts: float
    steps: int
    parameters: int


@dataclass(frozen=True)
class Forecast:
    """What a run will take, about.

    Attributes:
        works: Of each rung.
        prompts: Answers of the report: those of target, result and source.
        rates: Seconds for a prompt, a step, and a parameter that is decomposed.
        memory_bytes: On the device, beside activations.
        fetch_bytes: That are not on this machine yet.
        device: Where the seconds were calibrated.
    """

    works: tuple[Work, ...]
    prompts: int
    rates: dict[str, float]
    memory_bytes: int
    fetch_bytes: int
    device: str

    @property
    def tests(self) -> int:
        """Of delta debugging, about, in the last rung."""
        return self.works[-1].tests if self.works else 0

    def seconds(self, work: Work) -> float:
        """About how long a rung takes."""
        amounts = {"prompts": work.prompts, "steps": work.steps, "parameters": work.parameters}
        return sum(amount * self.rates[unit] for unit, amount in amounts.items())

    def begin(self) -> None:
        """Tell the job that shows progress what is to come, and the user if it takes long."""
        for work in self.works:
            expect(work.edit, prompts=work.prompts, steps=work.steps, parameters=work.parameters)
        expect(REPORT, prompts=self.prompts)
        if self.total_seconds >= TOLD_SECONDS:
            LOG.info(f"this takes {self}")

    @property
    def total_seconds(self) -> float:
        """About how long all takes, if every rung is tried."""
        return sum(map(self.seconds, self.works)) + self.prompts * self.rates["prompts"]

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        works = [{**asdict(work), "seconds": round(self.seconds(work), 1)} for work in self.works]
        return {
            "device": self.device,
            "seconds": round(self.total_seconds, 1),
            "tests": self.tests,
            "memory_bytes": self.memory_bytes,
            "fetch_bytes": self.fetch_bytes,
            "report_prompts": self.prompts,
            "works": works,
        }

    def __str__(self) -> str:
        found = [f"about {duration(self.total_seconds)} on {self.device}"]
        if self.tests:
            found.append(f"about {self.tests} tests")
        found.append(f"{self.memory_bytes / 1e9:.1f} GB of its memory and the batches")
        if self.fetch_bytes:
            found.append(f"{self.fetch_bytes / 1e9:.1f} GB to fetch")
        return ", ".join(found)


def forecast(ladder: Ladder, options: Options, *, reports: bool = True) -> Forecast:
    """Estimate what a recipe's run takes, or with `reports` false its search alone.

    Raises:
        UsageError: If there are too few prompts, or the device is absent.
    """
    device = choose_device(options.device)
    works: list[Work] = []
    num_report = 0
    for recipe, plan in ladder.rungs:
        parts = _parts(recipe, is_rung=ladder.is_auto)
        selection = given_selection(recipe, plan)
        num_report = 3 * _asked(parts.report) if reports else 0
        if selection is None:
            works.append(_work(recipe, plan, parts))
    plan = ladder.plan
    return Forecast(
        tuple(works),
        num_report,
        _rates(plan.target, device, ladder.recipe.max_new_tokens),
        search_memory(plan) - plan.target.num_bytes + weight_bytes(plan.target, options.where),
        sum(_missing(model) for model in ladder.models.values()),
        device.type,
    )


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


def _parts(recipe: Recipe, *, is_rung: bool) -> Parts:
    if recipe.layers is None or may_choose(recipe.edit):
        return split_prompts(recipe, is_rung=is_rung)
    whole = load_prompts(recipe.prompts)
    return Parts(whole, whole)


def _asked(prompts: PromptSet) -> int:
    return len(prompts.harmful) + len(prompts.harmless) + len(prompts.skill) + len(prompts.keep_answers)


def _work(recipe: Recipe, plan: Plan, parts: Parts) -> Work:
    each = len(parts.search.harmful) + len(parts.search.harmless)
    baselines = 2 * each + min(len(parts.search.keep), MAX_KEEP)
    in_bundles = plan.edit.chooses and len(plan.units) > MAX_ALONE
    number = len(by_layer(plan.units)) if in_bundles else len(plan.units)
    # Among bundles it hardly ever goes on: of real models, most were needed (tests/benchmarks/RESULTS.md).
    is_scan = in_bundles and recipe.search == "guided"
    most = recipe.max_tests or (num_scanning(number) if is_scan else None)
    tests = expected_tests(number, recipe.search, max_tests=most)
    if not plan.edit.chooses:
        return Work(recipe.edit, tests, baselines + tests * each * ASKED, 0, 0)
    settings, choice = Settings(), parts.choice or parts.search
    rounds = settings.num_rounds + MORE_ROUNDS
    read = 2 * len(choice.harmful) + len(choice.harmless) + 2 * len(choice.keep)
    # Two more rounds settle what is left.
    steps = (rounds + 2) * settings.num_steps
    prompts = baselines + read + (rounds + 1) * each + tests * each * ASKED
    return Work(recipe.edit, tests, prompts, steps, plan.num_parameters(plan.units))


def _missing(model: Checkpoint) -> int:
    if model.partial is None:
        return 0
    ends: dict[str, int] = {}
    for tensor in model.tensors.values():
        ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.stop)
    return model.num_missing([(file, 0, stop) for file, stop in ends.items()])


def _rates(target: Checkpoint, device: torch.device, max_new_tokens: int | None) -> dict[str, float]:
    """Seconds for a prompt, a step and a parameter."""
    layers = [layer_number(name) for name in target.tensors]
    num_layers = max((number for number in layers if number is not None), default=0) + 1
    matrices = list(_matrices(target))
    head = max(matrices, key=lambda tensor: tensor.num_parameters)
    inner = [tensor for tensor in matrices if layer_number(tensor.name) == 0]
    settings = Settings()
    num_rows = 2 * settings.num_contrasts + 2 * settings.num_keep

    def layer(num_tokens: int) -> float:
        return sum(_seconds(tensor, num_tokens, device) for tensor in inner) + OVERHEAD

    token = num_layers * layer(PIECE) + _seconds(head, PIECE, device)
    rows = num_rows * TOKENS_OF_ROW
    step = (1 + BACKWARD) * (num_layers * layer(rows) + _seconds(head, num_rows * settings.num_tokens, device))
    tokens = min(TOKENS_OF_ANSWER, max_new_tokens or TOKENS_OF_ANSWER)
    return {"prompts": token * tokens / PIECE, "steps": step, "parameters": _decomposing(inner, device)}


def _matrices(target: Checkpoint) -> Iterator[Tensor]:
    return (tensor for tensor in target.tensors.values() if len(tensor.shape) == 2)


def _seconds(tensor: Tensor, num_tokens: int, device: torch.device) -> float:
    """Of a product of so many rows with a matrix; of a large one, some of its rows are tried."""
    dtype = torch.bfloat16 if tensor.num_bytes == 2 * tensor.num_parameters else torch.float32
    rows, columns = tensor.shape
    tried = min(rows, MAX_ROWS)
    matrix = torch.randn(tried, columns, device=device).to(dtype)
    inputs = torch.randn(num_tokens, columns, device=device).to(dtype)
    return _timed(lambda: torch.nn.functional.linear(inputs, matrix), device) * rows / tried


def _decomposing(matrices: list[Tensor], device: torch.device) -> float:
    """Seconds for a parameter of a matrix whose leading directions are found: products with few columns."""
    rows, columns = max((tensor.shape for tensor in matrices), key=math.prod)
    matrix = torch.randn(min(rows, MAX_ROWS), columns, device=device)
    tried = torch.randn(columns, Settings().max_rank, device=device)
    # Each of some ten iterations multiplies by it twice, and makes the columns orthogonal.
    return 30 * _timed(lambda: matrix @ tried, device) / matrix.numel()


def _timed(work: Callable[[], object], device: torch.device) -> float:
    def synchronize() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    # The fastest of some: the first warms up, and other processes may disturb.
    spent: list[float] = []
    while len(spent) < 4 or (sum(spent) < TRIAL_SECONDS and len(spent) < 30):
        start = time.perf_counter()
        work()
        synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent)
