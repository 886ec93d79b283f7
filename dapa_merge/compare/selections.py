"""Selections to compare: from searches, with their costs, and from controls (fixed, whole MLPs, random)."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch

from dapa_merge.checkpoint.units import AUTO, DIVISIBLE_MODULES, Unit, auto_modules
from dapa_merge.compare.methods import DIRECTIONS
from dapa_merge.compare.result import Cost
from dapa_merge.errors import CannotRepair
from dapa_merge.measure.live import choose_device
from dapa_merge.plan.edit import Directions
from dapa_merge.plan.plan import Plan, divide, join, with_modules
from dapa_merge.plan.selection import changing_selection, given_selection, make_plan
from dapa_merge.progress import LOG, begin, end
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import parse_layers
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.identity import take_over
from dapa_merge.search.journal import Journal
from dapa_merge.search.result import Search
from dapa_merge.search.search import search_plan


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        units: Its selection; None if nothing repairs.
        cost: The cost of the search; None if the recipe names its layers.
        complaint: The limit that the selection violates, where nothing kept to all and the nearest was taken.
    """

    plan: Plan
    units: tuple[Unit, ...] | None = None
    why_not: str | None = None
    cost: Cost | None = None
    complaint: str | None = None


def auto_of(recipe: Recipe, chosen: Plan) -> tuple[Recipe, Plan] | None:
    """The recipe with `modules: auto`, of whole projections; None if the plan has these or whole MLPs."""
    modules = auto_modules(chosen.target.config, chosen.target.shapes)
    if set(modules) <= set(chosen.modules) or "mlp" in (*modules, *chosen.modules):
        return None
    plan = with_modules(chosen, modules)
    # Rows of down are not neurons, so nothing finer is possible.
    return replace(recipe, layers=None, modules=(AUTO,), granularity="layer", prefer=None), plan


def directions_of(recipe: Recipe) -> Recipe:
    """The recipe with the edit `directions`, of all projections unless it is that already."""
    if recipe.edit == Directions.name:
        return recipe
    return replace(recipe, edit=Directions.name, strength=1.0, modules=(AUTO,), granularity="layer", prefer=None)


def part_of(row: str, search: str) -> str:
    """The name of a search of a row as a part of the job, apart from the row's own."""
    return f"{row}: {search}"


@dataclass
class _Taken:
    """Counts the work of `run` that a search takes over, which is part of its own cost."""

    number: int = 0
    seconds: float = 0.0

    def take(self, journal: Journal) -> None:
        number, seconds = take_over(journal)
        self.number += number
        self.seconds += seconds

    def cost(self, tests: int, seconds: float, peak: dict[str, int]) -> Cost:
        """The cost of a search that took so long here; how much memory the other process used is not known."""
        return Cost(tests, round(seconds + self.seconds, 3), {} if self.number else peak)


@contextmanager
def _searching(folder: Path, search: str) -> Iterator[None]:
    """Count progress inside the `with` block for a search of the row that has this folder."""
    begin(part_of(folder.name, search))
    try:
        yield
    finally:
        end()
        begin(folder.name)


def find_directions(recipe: Recipe, plan: Plan, folder: Path, options: Options) -> Found:
    """Search with `edit: directions`, or replay its journal; the directions are in the result's plan.

    If no point is within the limits, the nearest is taken, as of the settings of other methods.
    """
    if recipe.layers is not None:
        return Found(plan, None, "the recipe names its layers, so that no prompts are left to choose directions by")
    recipe = directions_of(recipe)
    path = folder / "directions.jsonl"
    before = _recorded_seconds(path)
    began = time.perf_counter()
    options = replace(options, journal=path)
    found, why_not, taken = None, None, _Taken()
    with peak_memory(choose_device(options.device)) as peak, _searching(folder, DIRECTIONS):
        try:
            plan = make_plan(recipe, partial=False, allow_pickle=options.allow_pickle)
            LOG.info(f"searching for directions in {', '.join(plan.modules)}")
            found = _found_or_nearest(recipe, plan, options, taken)
        except CannotRepair as error:
            why_not = str(error)
            LOG.info(why_not)
    cost = taken.cost(found.minimum.tests if found else 0, before + time.perf_counter() - began, peak)
    if found is None:
        return Found(plan, None, why_not, cost)
    complaint = None if found.picked is None else found.points[found.picked - 1].complaint
    return Found(found.plan, join(found.plan, found.minimum.units), None, cost, complaint)


def _found_or_nearest(recipe: Recipe, plan: Plan, options: Options, taken: _Taken) -> Search:
    try:
        return search_plan(recipe, plan, options, opened=taken.take)
    except CannotRepair as error:
        if error.pick is None:
            raise
        LOG.info(str(error))
        return search_plan(recipe, plan, replace(options, pick=error.pick))


def find_selections(
    name: str, recipe: Recipe, plan: Plan, folder: Path, journal: Journal, options: Options, *, is_rung: bool = False
) -> Found:
    """Search once, or read the outcome in the journal; `is_rung` as for `split_prompts`.

    Raises:
        DapaError: For any error; finished tests are in the search's journal.
    """
    given = given_selection(recipe, plan)
    if given is not None:
        try:
            return Found(plan, changing_selection(recipe, plan, given))
        except CannotRepair as error:
            LOG.info(str(error))
            return Found(plan, None, str(error))
    path = folder / f"{name}.jsonl"
    found = journal.once(f"search {name}", lambda: _search(recipe, plan, path, options, is_rung), alone=True)
    cost = Cost(**found["cost"])
    if found["units"] is None:
        return Found(plan, None, found["why_not"], cost)
    choices = parse_layers(",".join(found["units"]))
    return Found(plan, given_selection(replace(recipe, layers=choices), plan), None, cost)


def _search(recipe: Recipe, plan: Plan, path: Path, options: Options, is_rung: bool) -> dict[str, object]:
    LOG.info(f"searching among {', '.join(recipe.modules)}")
    before = _recorded_seconds(path)
    began = time.perf_counter()
    units: Sequence[Unit] | None = None
    why_not, tests, taken = None, 0, _Taken()
    with peak_memory(choose_device(options.device)) as peak, _searching(path.parent, path.stem):
        try:
            found = search_plan(recipe, plan, replace(options, journal=path), is_rung=is_rung, opened=taken.take)
        except CannotRepair as error:
            why_not = str(error)
            LOG.info(why_not)
        else:
            units, tests = join(plan, found.minimum.units), found.minimum.tests
    cost = taken.cost(tests, before + time.perf_counter() - began, peak)
    return {"units": None if units is None else list(map(str, units)), "why_not": why_not, "cost": asdict(cost)}


def _recorded_seconds(path: Path) -> float:
    """The time of what is in the journal of a stopped search, as far as it is known."""
    total = 0.0
    with suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError, AttributeError, TypeError):
                total += float(json.loads(line).get("seconds", 0))
    return total


# The first and last layer that the DAPA repository transplants, by family and number of layers.
REPOSITORY_LAYERS = {("llama", 32): (12, 17), ("mistral", 32): (9, 18), ("gemma", 28): (7, 13), ("gemma", 18): (3, 6)}
OTHERS = "llama"
# The smallest edit is one block of rows.
BLOCKS_PER_PROJECTION = 16


def fixed_layers(model_type: str, num_layers: int) -> tuple[int, ...]:
    """The middle layers that the DAPA repository takes for a family, scaled to a model's depth.

    For an unknown depth they are those of the nearest known one, for an unknown family Llama's.
    """
    depths = [depth for family, depth in REPOSITORY_LAYERS if family == model_type]
    family = model_type if depths else OTHERS
    depth = min(depths or [32], key=lambda known: abs(known - num_layers))
    first, last = REPOSITORY_LAYERS[family, depth]
    start = min(round(first * num_layers / depth), num_layers - 1)
    stop = max(start + 1, round((last + 1) * num_layers / depth))
    return tuple(range(start, min(stop, num_layers)))


def mlp_units(units: Iterable[Unit], layers: Collection[int] | None = None) -> tuple[Unit, ...]:
    """The whole MLP of some layers, or of all if None, among units of every module."""
    inside = [unit for unit in units if layers is None or unit.layer in layers]
    apart = tuple(unit for unit in inside if unit.module in ("gate", "up", "down"))
    return apart or tuple(unit for unit in inside if unit.module == "mlp")


def blocks_of(plan: Plan, units: Sequence[Unit], rows: int | None) -> tuple[Unit, ...]:
    """The units, divided into blocks of `rows` (None for a sixteenth) if their rows are neurons."""
    pieces: list[Unit] = []
    for unit in units:
        if unit.module not in DIVISIBLE_MODULES:
            pieces.append(unit)
            continue
        first, stop = plan.rows(unit)
        size = rows or max(1, -(-unit.num_rows // BLOCKS_PER_PROJECTION))
        pieces += divide(plan, (unit,), min(size, stop - first)).units
    return tuple(pieces)


def random_units(plan: Plan, among: Sequence[Unit], like: Sequence[Unit], seed: int) -> tuple[Unit, ...]:
    """Draw random units with as many parameters of each module as the units `like`.

    If some of those are blocks, blocks no larger than the smallest are drawn, and the last is cut to size.
    """
    blocks = [unit for unit in like if unit.rows is not None]
    rows = min((plan.rows(unit)[1] - plan.rows(unit)[0] for unit in blocks), default=None)
    drawn: list[Unit] = []
    for module in dict.fromkeys(unit.module for unit in like):
        pool = tuple(unit for unit in among if unit.module == module)
        if rows is not None and module in DIVISIBLE_MODULES:
            pool = blocks_of(plan, pool, rows)
        wanted = plan.num_parameters([unit for unit in like if unit.module == module])
        shuffled = random.Random(f"{seed} {module} {wanted}").sample(pool, len(pool))
        if rows is not None and module in DIVISIBLE_MODULES:
            drawn += _cut_to(plan, shuffled, wanted)
        else:
            drawn += shuffled[: nearest_number(plan, shuffled, wanted)]
    order = {unit: index for index, unit in enumerate(among)}
    return tuple(sorted(drawn, key=lambda unit: (order[unit.whole], unit.rows or (0, 0))))


def _cut_to(plan: Plan, blocks: Sequence[Unit], wanted: int) -> list[Unit]:
    """The first blocks with `wanted` parameters in all; the last block is cut to its first rows."""
    found, left = [], wanted
    for block in blocks:
        size = plan.num_parameters((block,))
        first, stop = plan.rows(block)
        if size > left:
            block = plan.part(block.whole, (first, first + left * (stop - first) // size))
        if left > 0:
            found.append(block)
        left -= size
    return found


def nearest_number(plan: Plan, pieces: Sequence[Unit], wanted: int) -> int:
    """The number of first pieces, at least one, with a total of parameters nearest to `wanted`."""
    distances = [abs(total - wanted) for total in sums_of(plan, pieces)]
    return distances.index(min(distances)) + 1 if distances else 1


def sums_of(plan: Plan, pieces: Sequence[Unit]) -> list[int]:
    """The parameters of the first piece, of the first two, and so on."""
    return list(accumulate(plan.num_parameters((piece,)) for piece in pieces))


STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Sets the process's peak back to its present use; proc(5).
RESET_PEAK = "5"


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Yield bytes by place, filled in at the end: `host` is resident (Linux), `device` allocated (CUDA)."""
    peak: dict[str, int] = {}
    was_reset = False
    with suppress(OSError):
        RESET.write_text(RESET_PEAK)
        was_reset = True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield peak
    finally:
        if was_reset and (num_bytes := _peak_resident()) is not None:
            peak["host"] = num_bytes
        if device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(device)


def _peak_resident() -> int | None:
    with suppress(OSError, ValueError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
