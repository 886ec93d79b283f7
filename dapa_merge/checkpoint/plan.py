"""Which tensors a recipe is about: the units of a target and their twins in the source, checked against each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dapa_merge.checkpoint.architecture import Unit, architecture_name, find_units
from dapa_merge.checkpoint.files import TORCH_NAMES, Checkpoint, Tensor
from dapa_merge.errors import CheckpointError


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
        """Pairs of target tensor and source tensor of a selection."""
        for unit in selection:
            for name in unit.tensors:
                yield self.target.tensors[name], self.source.tensors[name]

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
