"""The proof that a result is its target with some units of its source, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.files import Checkpoint, Tensor, iterate_bytes, open_checkpoint
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.checkpoint.transplant import source_bytes
from dapa_merge.errors import CheckpointError


@dataclass(frozen=True)
class Verification:
    """What a result turned out to be, tensor by tensor.

    Attributes:
        transplanted: The units whose every tensor is the source's, and not also the target's.
        alike: The units that are the same in source and target, so that nothing can be told of them.
        differences: For each tensor that is neither, or missing, or too many: its name and what is wrong.
        num_tensors: How many tensors were compared.
    """

    transplanted: tuple[Unit, ...]
    alike: tuple[Unit, ...]
    differences: tuple[tuple[str, str], ...]
    num_tensors: int

    @property
    def holds(self) -> bool:
        return not self.differences

    def is_exactly(self, selection: Iterable[Unit]) -> bool:
        """Whether the result holds and its transplanted units are those of `selection`."""
        return self.holds and set(self.transplanted) == set(selection) - set(self.alike)


def verify(out: Path, plan: Plan, progress: Callable[[int], None] = lambda _: None) -> Verification:
    """Compare every byte of every tensor in `out` with the target and, for the plan's units, with the source.

    It does not matter who wrote `out`: shards, order and headers may differ, tensors may not.

    Args:
        out: The result's folder.
        plan: The target, the source and the units that may have been transplanted.
        progress: Called with numbers of bytes as they are compared.

    Raises:
        CheckpointError: If one of the three checkpoints cannot be read.
    """
    result = open_checkpoint(str(out))
    target = plan.target
    of_units = {name for unit in plan.units for name in unit.tensors}
    differences = [(name, "is in the result but not in the target") for name in result.tensors.keys() - target.tensors]
    for name, tensor in target.tensors.items():
        found = result.tensors.get(name)
        if found is None:
            differences.append((name, "is missing"))
        elif (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            what = f"is {found.dtype} {list(found.shape)}, not {tensor.dtype} {list(tensor.shape)}"
            differences.append((name, what))
        elif name not in of_units and not _same(result, found, iterate_bytes(target, tensor)):
            differences.append((name, "differs from the target"))
        progress(tensor.num_bytes)
    faulty = {name for name, _ in differences}
    transplanted, alike = [], []
    for unit in plan.units:
        if faulty.isdisjoint(unit.tensors):
            is_target, is_source = _origins(result, plan, unit)
            if is_target and is_source:
                alike.append(unit)
            elif is_source:
                transplanted.append(unit)
            elif not is_target:
                differences += [(name, "is neither the target's nor the source's") for name in unit.tensors]
    return Verification(tuple(transplanted), tuple(alike), tuple(sorted(differences)), len(target.tensors))


def prove(out: Path, plan: Plan, selection: Iterable[Unit], progress: Callable[[int], None] = lambda _: None) -> None:
    """Raise `CheckpointError` unless `out` is the target with exactly the selected units."""
    verification = verify(out, plan, progress)
    if not verification.holds:
        name, what = verification.differences[0]
        raise CheckpointError(f"the result is wrong and was not kept: {name} {what}")
    if not verification.is_exactly(selection):
        raise CheckpointError("the result was not kept: its transplanted units are not those that were selected")


def _origins(result: Checkpoint, plan: Plan, unit: Unit) -> tuple[bool, bool]:
    """Whether a unit of the result is the target's, and whether it is the source's."""
    is_target = is_source = True
    for ours, theirs in plan.tensors((unit,)):
        found = result.tensors[ours.name]
        is_target = is_target and _same(result, found, iterate_bytes(plan.target, ours))
        is_source = is_source and _same(result, found, source_bytes(plan.source, theirs, ours.dtype))
    return is_target, is_source


def _same(result: Checkpoint, tensor: Tensor, expected: Iterable[bytes]) -> bool:
    pieces = zip_longest(_regrouped(iterate_bytes(result, tensor)), _regrouped(expected))
    return all(found == wanted for found, wanted in pieces)


def _regrouped(pieces: Iterable[bytes], size: int = 1 << 20) -> Iterable[bytes]:
    """The same bytes in pieces of one size, so that two streams can be compared however each was cut."""
    pending = bytearray()
    for piece in pieces:
        pending += piece
        while len(pending) >= size:
            yield bytes(pending[:size])
            del pending[:size]
    yield bytes(pending)
