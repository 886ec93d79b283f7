"""Which tensors a recipe is about: the units of a target and their twins in the source, checked against each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dapa_merge.checkpoint.architecture import (
    DIVISIBLE_MODULES,
    Rows,
    Unit,
    architecture_name,
    find_units,
    join_ranges,
)
from dapa_merge.checkpoint.files import Checkpoint
from dapa_merge.checkpoint.header import TORCH_NAMES, Tensor
from dapa_merge.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Plan:
    """A target, a source that fits it, and the units that may move from one to the other.

    Attributes:
        target: The checkpoint to repair.
        source: The aligned checkpoint of the same family.
        units: Every candidate unit, in the order of the layers.
    """

    target: Checkpoint
    source: Checkpoint
    units: tuple[Unit, ...]

    def tensors(self, selection: Iterable[Unit]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of target tensor and source tensor of a selection; of a block, its rows of them.

        Raises:
            CheckpointError: If a tensor lacks rows of a block.
        """
        for unit in selection:
            for name in unit.tensors:
                ours, theirs = self.target.tensors[name], self.source.tensors[name]
                if unit.rows is not None:
                    ours, theirs = ours.narrow(*unit.rows), theirs.narrow(*unit.rows)
                yield ours, theirs

    def rows(self, unit: Unit) -> Rows:
        """Which rows of its tensors a unit is; those of a whole unit are counted in the first of its tensors."""
        return unit.rows or (0, self.target.tensors[unit.tensors[0]].num_rows)

    def part(self, whole: Unit, rows: Rows) -> Unit:
        """A block of a whole unit; all of its rows are the unit itself."""
        return whole if rows == self.rows(whole) else replace(whole, rows=rows)

    def num_parameters(self, selection: Iterable[Unit]) -> int:
        """How many parameters of the target a selection replaces."""
        return sum(tensor.num_parameters for tensor, _ in self.tensors(selection))

    def num_bytes(self, selection: Iterable[Unit]) -> int:
        """How many bytes of the target a selection replaces."""
        return sum(tensor.num_bytes for tensor, _ in self.tensors(selection))

    def share(self, selection: Iterable[Unit]) -> float:
        """The share of the target's parameters that a selection replaces, in [0, 1]."""
        return self.num_parameters(selection) / self.target.num_parameters


def plan_transplant(target: Checkpoint, source: Checkpoint, modules: Sequence[str]) -> Plan:
    """Find the units of both models and check that each fits in the other's place.

    Raises:
        CheckpointError: If the models are of different architectures or sizes, or are quantized.
        UnsupportedArchitecture: If their units cannot be found.
    """
    for checkpoint in (target, source):
        if method := checkpoint.config.get("quantization_config"):
            name = method.get("quant_method", "quantized") if isinstance(method, dict) else "quantized"
            raise CheckpointError(
                f"{checkpoint.name} is quantized ({name}); repair the unquantized model and quantize the result"
            )
    ours, theirs = architecture_name(target.config), architecture_name(source.config)
    if ours != theirs:
        raise CheckpointError(
            f"the source {source.name} is a {theirs} but the target {target.name} is a {ours}; "
            f"a source must be of the target's own family"
        )
    units = find_units(target.config, target.tensors.keys(), modules)
    twins = find_units(source.config, source.tensors.keys(), modules)
    if len(units) != len(twins):
        raise CheckpointError(
            f"the source {source.name} has {_num_layers(twins)} layers but the target {target.name} has "
            f"{_num_layers(units)}; a source must have the target's own size"
        )
    for unit, twin in zip(units, twins, strict=True):
        if unit != twin:
            odd = sorted(set(unit.tensors) ^ set(twin.tensors))[0]
            raise CheckpointError(f"only one of {target.name} and {source.name} has tensor {odd}")
    plan = Plan(target, source, units)
    for ours_tensor, theirs_tensor in plan.tensors(units):
        _check_pair(ours_tensor, theirs_tensor, plan)
    return plan


def divide(plan: Plan, units: Iterable[Unit], rows_per_block: int) -> Plan:
    """The plan of a search among blocks of some of its units; the last block of each may be shorter.

    Args:
        plan: Target and source.
        units: What to divide, whole or already blocks.
        rows_per_block: Rows (neurons) of a block, at least 1.

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
        blocks += [
            plan.part(unit.whole, (row, min(row + rows_per_block, stop))) for row in range(first, stop, rows_per_block)
        ]
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


def _check_pair(ours: Tensor, theirs: Tensor, plan: Plan) -> None:
    if ours.shape != theirs.shape:
        raise CheckpointError(
            f"{ours.name} is {list(theirs.shape)} in the source {plan.source.name} but {list(ours.shape)} in the "
            f"target {plan.target.name}; a source must have the target's own size"
        )
    for tensor, checkpoint in ((ours, plan.target), (theirs, plan.source)):
        if tensor.dtype not in TORCH_NAMES:
            raise CheckpointError(
                f"{tensor.name} of {checkpoint.name} is stored as {tensor.dtype}; "
                f"only {', '.join(TORCH_NAMES.values())} can be transplanted"
            )


def _num_layers(units: Sequence[Unit]) -> int:
    return len({unit.layer for unit in units})
