"""Which units the controls transplant: fixed middle layers, whole MLPs, random units. Pure."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

from dapa_merge.checkpoint.architecture import DIVISIBLE_MODULES, Unit
from dapa_merge.checkpoint.plan import Plan, divide

# The layers that the DAPA repository transplants, first and last: of models of this family with so many layers.
REPOSITORY_LAYERS = {
    ("llama", 32): (12, 17),
    ("mistral", 32): (9, 18),
    ("gemma", 28): (7, 13),
    ("gemma", 18): (3, 6),
}
OTHERS = "llama"
# Of the smallest edit, as a share of the rows of its projection.
BLOCKS_PER_PROJECTION = 16


def fixed_layers(model_type: str, num_layers: int) -> tuple[int, ...]:
    """The middle layers that the DAPA repository takes for a family, scaled to a model's depth.

    A depth that it does not name takes the layers of the nearest one of the family, another family Llama's.

    Args:
        model_type: Of the config.
        num_layers: Of the model, at least 1.
    """
    depths = [depth for family, depth in REPOSITORY_LAYERS if family == model_type]
    family = model_type if depths else OTHERS
    depth = min(depths or [32], key=lambda known: abs(known - num_layers))
    first, last = REPOSITORY_LAYERS[family, depth]
    start = min(round(first * num_layers / depth), num_layers - 1)
    stop = max(start + 1, round((last + 1) * num_layers / depth))
    return tuple(range(start, min(stop, num_layers)))


def mlp_units(units: Iterable[Unit], layers: Collection[int] | None = None) -> tuple[Unit, ...]:
    """The whole MLP of some layers, or of all.

    Args:
        units: Of every module, as `plan_of_all` has them.
        layers: Which; None for all.
    """
    inside = [unit for unit in units if layers is None or unit.layer in layers]
    apart = tuple(unit for unit in inside if unit.module in ("gate", "up", "down"))
    return apart or tuple(unit for unit in inside if unit.module == "mlp")


def blocks_of(plan: Plan, units: Sequence[Unit], rows: int | None) -> tuple[Unit, ...]:
    """The same units, those whose rows are neurons in blocks of so many rows; None for a sixteenth of each."""
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
    """Random units of as many parameters as others have; of each module as many as those have.

    Args:
        plan: The models.
        among: What is drawn from.
        like: Some of `among`, or blocks of some: then random blocks no larger than their smallest are drawn, the last
            of them cut so that the sizes agree.
        seed: The same seed draws the same.
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
    """The first blocks with so many parameters, of the last one only its first rows."""
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
    """How many of the first pieces together come nearest to a number of parameters; at least one."""
    total, best, distance = 0, 1, float("inf")
    for number, piece in enumerate(pieces, 1):
        total += plan.num_parameters((piece,))
        if abs(total - wanted) < distance:
            best, distance = number, abs(total - wanted)
        if total >= wanted:
            break
    return best
