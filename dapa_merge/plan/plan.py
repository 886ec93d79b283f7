"""The units of a target that may change, and their twins in the other models, checked against each other."""

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
    is_sibling,
    join_ranges,
)
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.plan.edit import MODELS, Copy, Edit

COPY = Copy()


@dataclass(frozen=True)
class Plan:
    """A target, the models that its new values come from, and the units that may change.

    Attributes:
        models: By their names in a recipe: `target`, `source`, and `pretrained` if the edit reads it.
        units: All candidate units, in the order of the layers.
        twins: For each whole unit, the same unit in every model; tensors may be fused and named differently there.
        edit: Computes the new values.
        max_overflow: Number of overflowing values that may be clamped to the largest of the target's dtype.
    """

    models: Mapping[str, Checkpoint]
    units: tuple[Unit, ...]
    twins: Mapping[Unit, Mapping[str, Unit]]
    edit: Edit = COPY
    max_overflow: int = 0

    @property
    def target(self) -> Checkpoint:
        """The checkpoint to repair."""
        return self.models["target"]

    @property
    def source(self) -> Checkpoint:
        """The aligned checkpoint of the same family."""
        return self.models["source"]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of its units, in the order of the recipe, whose `auto` is resolved."""
        return tuple(dict.fromkeys(unit.module for unit in self.units))

    @property
    def reference(self) -> Plan:
        """The plan of a full transplant: an edit that has nothing to add before it chooses stands for a copy."""
        return replace(self, edit=COPY) if self.edit.chooses else self

    @property
    def others(self) -> dict[str, Checkpoint]:
        """All models except the target."""
        return {name: checkpoint for name, checkpoint in self.models.items() if name != "target"}

    def regions(self, selection: Iterable[Unit]) -> Iterator[dict[str, Region]]:
        """Yield the regions of a selection, part by part: one of equal size in each model."""
        for unit in selection:
            twins = self.twins[unit.whole]
            for parts in zip(*(replace(twin, rows=unit.rows).parts for twin in twins.values()), strict=True):
                yield {name: region_of(self.models[name], part) for name, part in zip(twins, parts, strict=True)}

    def changes(self, selection: Iterable[Unit]) -> bool:
        """Whether the edit may change any of these units."""
        return self.edit.changes(regions["target"] for regions in self.regions(selection))

    def with_changing_units(self) -> Plan:
        """The same plan with only the units that the edit may change."""
        return replace(self, units=tuple(unit for unit in self.units if self.changes((unit,))))

    def rows(self, unit: Unit) -> Rows:
        """The rows of a module that a unit covers."""
        return unit.rows or (0, unit.num_rows)

    def part(self, whole: Unit, rows: Rows) -> Unit:
        """The block of a whole unit with these rows, or the unit itself for all of its rows."""
        return whole if rows == self.rows(whole) else replace(whole, rows=rows)

    def num_parameters(self, selection: Iterable[Unit]) -> int:
        """The number of the target's parameters in a selection, whether or not their values change."""
        return sum(regions["target"].num_parameters for regions in self.regions(selection))

    def num_bytes(self, selection: Iterable[Unit]) -> int:
        """The number of the target's bytes in a selection."""
        return sum(regions["target"].num_bytes for regions in self.regions(selection))

    def share(self, selection: Iterable[Unit]) -> float:
        """The share of the target's parameters that are in a selection, in [0, 1]."""
        return self.num_parameters(selection) / self.target.num_parameters


def plan_transplant(
    target: Checkpoint,
    source: Checkpoint,
    modules: Sequence[str],
    *,
    pretrained: Checkpoint | None = None,
    edit: Edit = COPY,
    max_overflow: int = 0,
) -> Plan:
    """Find the units of all models and check that they fit the target's.

    Raises:
        CheckpointError: If the models are of different architectures or sizes, or are quantized.
        UnsupportedArchitecture: If their units cannot be found.
    """
    models = {"target": target, "source": source} | ({} if pretrained is None else {"pretrained": pretrained})
    assert set(edit.inputs) <= set(models), f"{edit.name} reads {edit.inputs}"
    found = {name: _find_units(name, models, modules) for name in models}
    units = found["target"]
    for name, theirs in found.items():
        if (has := _num_layers(theirs)) != (wanted := _num_layers(units)):
            raise CheckpointError(
                f"the {MODELS[name]} {models[name].name} has {has} layers but the target {target.name} has {wanted}; "
                f"a {MODELS[name]} must have the target's own size"
            )
    twins = {same[0]: dict(zip(found, same, strict=True)) for same in zip(*found.values(), strict=True)}
    plan = Plan(models, units, twins, edit, max_overflow)
    for unit in units:
        _check_twins(unit, plan)
    return plan


def with_modules(plan: Plan, modules: Sequence[str]) -> Plan:
    """The same plan of other modules; raises as `plan_transplant` does."""
    return plan_transplant(**plan.models, modules=modules, edit=plan.edit, max_overflow=plan.max_overflow)


def divide(plan: Plan, units: Iterable[Unit], rows_per_block: int | None) -> Plan:
    """Return the plan with some units, whole or already blocks, divided into blocks; a unit's last may be shorter.

    Args:
        plan: Provides the models and the edit.
        units: The units to divide.
        rows_per_block: Rows (neurons) of a block, at least 1; None for one block per expert.

    Raises:
        UsageError: If a unit's rows are not neurons, or the edit's units cannot be divided.
    """
    blocks: list[Unit] = []
    if not plan.edit.divides:
        raise UsageError(f"a unit of the edit {plan.edit.name} is {plan.edit.unit}, and cannot be divided")
    for unit in units:
        if unit.module not in DIVISIBLE_MODULES:
            raise UsageError(
                f"{unit} cannot be divided into blocks of rows; only {' and '.join(DIVISIBLE_MODULES)} can, because "
                f"each of their rows is one neuron"
            )
        first, stop = plan.rows(unit)
        ends = {part.first_row for part in unit.parts} if rows_per_block is None else range(first, stop, rows_per_block)
        blocks += [plan.part(unit.whole, rows) for rows in pairwise([*sorted(ends), stop])]
    return replace(plan, units=tuple(blocks))


def join(plan: Plan, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Join adjacent blocks, and all rows into the whole unit; return the units in the plan's order."""
    ranges: dict[Unit, list[Rows]] = {unit.whole: [] for unit in (*plan.units, *units)}
    for unit in units:
        ranges[unit.whole].append(plan.rows(unit))
    return tuple(plan.part(whole, rows) for whole in ranges for rows in join_ranges(ranges[whole]))


def reduced(plan: Plan, selection: Iterable[Unit]) -> Plan:
    """Return the plan whose edit brings only what the selected units need."""
    regions = [found["target"] for found in plan.regions(selection)]
    return replace(plan, edit=plan.edit.reduced(regions))


def cut(plan: Plan, blocks: Iterable[Unit]) -> Plan:
    """Return the plan with whole units cut into `blocks` and the gaps between them."""
    ends: dict[Unit, set[int]] = {unit.whole: set() for unit in plan.units}
    for block in blocks:
        if block.rows is not None and block.whole in ends:
            ends[block.whole] |= {*block.rows, *plan.rows(block.whole)}
    units: list[Unit] = []
    for whole, cuts in ends.items():
        units += [plan.part(whole, rows) for rows in pairwise(sorted(cuts))] if cuts else [whole]
    return replace(plan, units=tuple(units))


def sparing(plan: Plan, selection: Iterable[Unit]) -> Plan:
    """Return the plan to verify a result with this selection, cut at the ends of its blocks.

    If a model is fetched on demand, the plan holds only these units: all others must equal the target's, and nothing is
    fetched to identify what else they are.
    """
    chosen = tuple(selection)
    if any(checkpoint.partial is not None for checkpoint in plan.others.values()):
        plan = replace(plan, units=tuple(dict.fromkeys(unit.whole for unit in chosen)))
    return cut(plan, chosen)


def region_of(checkpoint: Checkpoint, part: TensorBox) -> Region:
    """The region of a unit's part in a checkpoint's files."""
    return Region.of(checkpoint.tensors[part.tensor], part)


def _find_units(name: str, models: Mapping[str, Checkpoint], modules: Sequence[str]) -> tuple[Unit, ...]:
    """Find the units of a model; raise `CheckpointError` if it is of another family than the target."""
    checkpoint, target = models[name], models["target"]
    check_not_quantized(checkpoint)
    ours, theirs = (architecture_name(one.config, one.name) for one in (target, checkpoint))
    if not is_sibling(target.config, checkpoint.config):
        raise CheckpointError(
            f"the {MODELS[name]} {checkpoint.name} is a {theirs} but the target {target.name} is a {ours}; "
            f"a {MODELS[name]} must be of the target's own family"
        )
    return find_units(checkpoint.config, checkpoint.shapes, modules)


def _check_twins(unit: Unit, plan: Plan) -> None:
    """Raise `CheckpointError` unless a unit and its twins have equal sizes and hold floats."""
    for name, twin in plan.twins[unit].items():
        if unit != twin or len(unit.parts) != len(twin.parts):
            odd = sorted(set(unit.tensors) ^ set(twin.tensors))
            what = f"tensor {odd[0]}" if odd else f"{len(unit.parts)} parts in {unit}"
            raise CheckpointError(f"only one of {plan.target.name} and {plan.models[name].name} has {what}")
    for regions in plan.regions((unit,)):
        ours = regions["target"]
        for name, theirs in regions.items():
            if ours.extents != theirs.extents:
                raise CheckpointError(
                    f"{theirs.name} is {list(theirs.shape)} in the {MODELS[name]} {plan.models[name].name} but "
                    f"{list(ours.shape)} in the target {plan.target.name}; a {MODELS[name]} must have the target's own "
                    f"size"
                )
        for name, region in regions.items():
            if region.tensor.dtype not in TORCH_NAMES:
                raise CheckpointError(
                    f"{region.tensor.name} of {plan.models[name].name} is stored as {region.tensor.dtype}; "
                    f"only {', '.join(TORCH_NAMES.values())} can be edited"
                )


def _num_layers(units: Sequence[Unit]) -> int:
    return len({unit.layer for unit in units})


def search_memory(plan: Plan) -> int:
    """Bytes that a search needs on its device besides activations: the target, and the largest region being copied."""
    return plan.target.num_bytes + max((regions["target"].num_bytes for regions in plan.regions(plan.units)), default=0)
