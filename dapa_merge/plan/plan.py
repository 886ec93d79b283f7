"""Which tensors a recipe is about: the units of a target and their twins in the source, checked against each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dapa_merge.checkpoint.header import TORCH_NAMES
from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.checkpoint.region import Region, Rows, TensorBox
from dapa_merge.checkpoint.units import (
    DIVISIBLE_MODULES,
    Unit,
    architecture_name,
    check_not_quantized,
    find_units,
    join_ranges,
)
from dapa_merge.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Plan:
    """A target, a source that fits it, and the units that may move from one to the other.

    Attributes:
        target: The checkpoint to repair.
        source: The aligned checkpoint of the same family.
        units: Every candidate unit, in the order of the layers.
        twins: For each whole unit, the source's, whose tensors may be cut and named otherwise.
        strength: How far a selected value moves from the target's (0) to the source's (1).
        max_overflow: How many values that the target's dtype cannot hold are cut to the largest that it can.
    """

    target: Checkpoint
    source: Checkpoint
    units: tuple[Unit, ...]
    twins: Mapping[Unit, Unit]
    strength: float = 1.0
    max_overflow: int = 0

    def regions(self, selection: Iterable[Unit]) -> Iterator[tuple[Region, Region]]:
        """Pairs of what is replaced in the target, and what of the source comes in its place: as many elements."""
        for unit in selection:
            twin = replace(self.twins[unit.whole], rows=unit.rows)
            for ours, theirs in zip(unit.parts, twin.parts, strict=True):
                yield region_of(self.target, ours), region_of(self.source, theirs)

    def rows(self, unit: Unit) -> Rows:
        """Which rows of its layer's module a unit is."""
        return unit.rows or (0, unit.num_rows)

    def part(self, whole: Unit, rows: Rows) -> Unit:
        """A block of a whole unit; all of its rows are the unit itself."""
        return whole if rows == self.rows(whole) else replace(whole, rows=rows)

    def num_parameters(self, selection: Iterable[Unit]) -> int:
        """How many parameters of the target a selection replaces."""
        return sum(region.num_parameters for region, _ in self.regions(selection))

    def num_bytes(self, selection: Iterable[Unit]) -> int:
        """How many bytes of the target a selection replaces."""
        return sum(region.num_bytes for region, _ in self.regions(selection))

    def share(self, selection: Iterable[Unit]) -> float:
        """The share of the target's parameters that a selection replaces, in [0, 1]."""
        return self.num_parameters(selection) / self.target.num_parameters


def plan_transplant(
    target: Checkpoint, source: Checkpoint, modules: Sequence[str], *, strength: float = 1.0, max_overflow: int = 0
) -> Plan:
    """Find the units of both models and check that each fits in the other's place.

    Raises:
        CheckpointError: If the models are of different architectures or sizes, or are quantized.
        UnsupportedArchitecture: If their units cannot be found.
    """
    for checkpoint in (target, source):
        check_not_quantized(checkpoint)
    ours, theirs = architecture_name(target.config), architecture_name(source.config)
    if ours != theirs:
        raise CheckpointError(
            f"the source {source.name} is a {theirs} but the target {target.name} is a {ours}; "
            f"a source must be of the target's own family"
        )
    units = find_units(target.config, target.shapes, modules)
    twins = find_units(source.config, source.shapes, modules)
    if (found := _num_layers(twins)) != (wanted := _num_layers(units)):
        raise CheckpointError(
            f"the source {source.name} has {found} layers but the target {target.name} has {wanted}; "
            f"a source must have the target's own size"
        )
    plan = Plan(target, source, units, dict(zip(units, twins, strict=True)), strength, max_overflow)
    for unit in units:
        _check_twin(unit, plan)
    return plan


def divide(plan: Plan, units: Iterable[Unit], rows_per_block: int | None) -> Plan:
    """The plan of a search among blocks of some of its units; the last block of each may be shorter.

    Args:
        plan: Target and source.
        units: What to divide, whole or already blocks.
        rows_per_block: Rows (neurons) of a block, at least 1; None for a block of each expert.

    Raises:
        UsageError: If a unit's rows are not neurons.
    """
    blocks: list[Unit] = []
    for unit in units:
        if unit.module not in DIVISIBLE_MODULES:
            raise UsageError(
                f"{unit} cannot be divided into blocks of rows; only {' and '.join(DIVISIBLE_MODULES)} can, "
                f"whose every row is one neuron"
            )
        first, stop = plan.rows(unit)
        ends = {part.first_row for part in unit.parts} if rows_per_block is None else range(first, stop, rows_per_block)
        blocks += [plan.part(unit.whole, rows) for rows in pairwise([*sorted(ends), stop])]
    return replace(plan, units=tuple(blocks))


def join(plan: Plan, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """The same rows in as few units as can be, in the plan's order: blocks that touch as one, all rows as the unit."""
    ranges: dict[Unit, list[Rows]] = {unit.whole: [] for unit in (*plan.units, *units)}
    for unit in units:
        ranges[unit.whole].append(plan.rows(unit))
    return tuple(plan.part(whole, rows) for whole in ranges for rows in join_ranges(ranges[whole]))


def cut(plan: Plan, blocks: Iterable[Unit]) -> Plan:
    """The plan's units made whole and cut at the ends of `blocks`: these blocks, and the gaps between them."""
    ends: dict[Unit, set[int]] = {unit.whole: set() for unit in plan.units}
    for block in blocks:
        if block.rows is not None and block.whole in ends:
            ends[block.whole] |= {*block.rows, *plan.rows(block.whole)}
    units: list[Unit] = []
    for whole, cuts in ends.items():
        units += [plan.part(whole, rows) for rows in pairwise(sorted(cuts))] if cuts else [whole]
    return replace(plan, units=tuple(units))


def sparing(plan: Plan, selection: Iterable[Unit]) -> Plan:
    """The plan by which a result is judged that should have this selection, cut at the ends of its blocks.

    Of a source that is fetched as it is read, the plan has no other units: they must be the target's, as everything
    else, and nothing is fetched to tell what they are instead.
    """
    chosen = tuple(selection)
    if plan.source.partial is not None:
        plan = replace(plan, units=tuple(dict.fromkeys(unit.whole for unit in chosen)))
    return cut(plan, chosen)


def region_of(checkpoint: Checkpoint, part: TensorBox) -> Region:
    """Where a part of a unit lies in a checkpoint's files."""
    return Region.of(checkpoint.tensors[part.tensor], part)


def _check_twin(unit: Unit, plan: Plan) -> None:
    """Raise `CheckpointError` unless a unit and its twin in the source are of the same size, and of floats."""
    twin = plan.twins[unit]
    if unit != twin or len(unit.parts) != len(twin.parts):
        odd = sorted(set(unit.tensors) ^ set(twin.tensors))
        what = f"tensor {odd[0]}" if odd else f"{len(unit.parts)} parts in {unit}"
        raise CheckpointError(f"only one of {plan.target.name} and {plan.source.name} has {what}")
    for ours, theirs in plan.regions((unit,)):
        if ours.extents != theirs.extents:
            raise CheckpointError(
                f"{theirs.name} is {list(theirs.shape)} in the source {plan.source.name} but {list(ours.shape)} in the "
                f"target {plan.target.name}; a source must have the target's own size"
            )
        for region, checkpoint in ((ours, plan.target), (theirs, plan.source)):
            if region.tensor.dtype not in TORCH_NAMES:
                raise CheckpointError(
                    f"{region.tensor.name} of {checkpoint.name} is stored as {region.tensor.dtype}; "
                    f"only {', '.join(TORCH_NAMES.values())} can be transplanted"
                )


def _num_layers(units: Sequence[Unit]) -> int:
    return len({unit.layer for unit in units})
