"""The proof that a result is its target with some units of its source, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapa_merge.checkpoint.architecture import DIVISIBLE_MODULES, Rows, Unit, rows_text
from dapa_merge.checkpoint.files import Checkpoint, open_checkpoint
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.plan import Plan, cut, divide, join, sparing
from dapa_merge.checkpoint.values import source_bytes
from dapa_merge.errors import CheckpointError, ValueDoesNotFit

PIECE_BYTES = 1 << 18


@dataclass(frozen=True)
class Verification:
    """What a result turned out to be, tensor by tensor.

    Attributes:
        transplanted: The units whose every tensor is the source's, and not also the target's. If that is so of some
            rows of a unit only, the blocks of these.
        alike: The units that are the same in source and target, so that nothing can be told of them.
        differences: For each tensor that is neither, or missing, or too many: its name and what is wrong. The name of
            a tensor may have the rows behind it that hold all that is wrong, as `[64:128]`.
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

    It does not matter who wrote `out`: shards, order and headers may differ, tensors may not. Whatever blocks the plan
    has, every row of its units' tensors is judged, also those between the blocks.

    Args:
        out: The result's folder.
        plan: The target, the source and the units that may have been transplanted.
        progress: Called with numbers of bytes as they are compared.

    Raises:
        CheckpointError: If one of the three checkpoints cannot be read.
    """
    result = open_checkpoint(str(out))
    target = plan.target
    plan = cut(plan, plan.units)
    of_units = {name for unit in plan.units for name in unit.tensors}
    differences = [
        (name, "is in the result but not in the target")
        for name, tensor in result.tensors.items()
        if name not in target.tensors and not _is_copy(result, tensor, target)
    ]
    # One thread: it compares as fast as the memory delivers, and more did not help when measured.
    for tensor in target.tensors.values():
        if fault := _fault(result, target, tensor, of_units):
            differences.append((tensor.name, fault))
        progress(tensor.num_bytes)
    faulty = {name for name, _ in differences}
    transplanted: list[Unit] = []
    alike: list[Unit] = []
    for unit in plan.units:
        if faulty.isdisjoint(unit.tensors):
            origins = _origins(result, plan, unit)
            if all(is_source for _, is_source in origins.values()):
                is_target = all(is_target for is_target, _ in origins.values())
                (alike if is_target else transplanted).append(unit)
            elif (False, False) in origins.values() and unit.module in DIVISIBLE_MODULES:
                blocks, strangers = _row_by_row(result, plan, unit)
                transplanted += blocks
                differences += strangers
            else:
                differences += [(name + rows_text(unit.rows), what) for name, what in _strangers(origins)]
    return Verification(tuple(transplanted), tuple(alike), tuple(sorted(differences)), len(target.tensors))


def prove(out: Path, plan: Plan, selection: Sequence[Unit], progress: Callable[[int], None] = lambda _: None) -> None:
    """Raise `CheckpointError` unless `out` is the target with exactly the selected units."""
    selection = join(plan, selection)
    verification = verify(out, sparing(plan, selection), progress)
    if not verification.holds:
        name, what = verification.differences[0]
        raise CheckpointError(f"the result is wrong and was not kept: {name} {what}")
    if not verification.is_exactly(selection):
        raise CheckpointError("the result was not kept: its transplanted units are not those that were selected")


def _is_copy(result: Checkpoint, tensor: Tensor, target: Checkpoint) -> bool:
    """Whether a tensor is one of the target's under another name: mergekit writes out tied weights."""
    return any(
        (twin.dtype, twin.shape) == (tensor.dtype, tensor.shape) and _same(result, tensor, target, twin)
        for twin in target.tensors.values()
    )


def _fault(result: Checkpoint, target: Checkpoint, tensor: Tensor, of_units: Container[str]) -> str | None:
    """What is wrong with the result's tensor, if anything; of a unit's tensor only dtype and shape are judged here."""
    found = result.tensors.get(tensor.name)
    if found is None:
        return "is missing"
    if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
        return f"is {found.dtype} {list(found.shape)}, not {tensor.dtype} {list(tensor.shape)}"
    if tensor.name not in of_units and not _same(result, found, target, tensor):
        return "differs from the target"
    return None


def _origins(result: Checkpoint, plan: Plan, unit: Unit) -> dict[str, tuple[bool, bool]]:
    """By tensor of a unit: whether the result's rows of it are the target's, and whether they are the source's."""
    origins = {}
    for ours, theirs in plan.tensors((unit,)):
        found = result.tensors[ours.name]
        if unit.rows is not None:
            found = found.narrow(*unit.rows)
        same = _same if theirs.dtype == found.dtype else _same_as_converted
        origins[ours.name] = _same(result, found, plan.target, ours), same(result, found, plan.source, theirs)
    return origins


def _row_by_row(result: Checkpoint, plan: Plan, unit: Unit) -> tuple[tuple[Unit, ...], list[tuple[str, str]]]:
    """What a unit is that is neither the target's nor the source's: blocks of the source's rows, and what is wrong."""
    from_source: list[Unit] = []
    wrong: dict[tuple[str, str], list[Rows]] = {}
    for row in divide(plan, (unit,), 1).units:
        origins = _origins(result, plan, row)
        if not all(is_source for _, is_source in origins.values()):
            for fault in _strangers(origins):
                wrong.setdefault(fault, []).append(plan.rows(row))
        elif not all(is_target for is_target, _ in origins.values()):
            from_source.append(row)
    hulls = {fault: plan.part(unit.whole, (rows[0][0], rows[-1][1])).rows for fault, rows in wrong.items()}
    return join(plan, from_source), [(name + rows_text(rows), what) for (name, what), rows in hulls.items()]


def _strangers(origins: Mapping[str, tuple[bool, bool]]) -> list[tuple[str, str]]:
    """The faulty tensors of a unit that is not all the source's: none, if it is all the target's."""
    neither = [name for name, origin in origins.items() if origin == (False, False)]
    if neither:
        return [(name, "is neither the target's nor the source's") for name in neither]
    lone = [name for name, (is_target, _) in origins.items() if not is_target]
    return [(name, "is the source's, but others of its unit are the target's") for name in lone]


def _same(result: Checkpoint, tensor: Tensor, other: Checkpoint, expected: Tensor) -> bool:
    """Whether two tensors of one size have the same bytes. Reads both in pieces that stay in the processor's cache."""
    mine, theirs = bytearray(PIECE_BYTES), bytearray(PIECE_BYTES)
    with (
        result.open(tensor.file, tensor.start, tensor.stop) as one,
        other.open(expected.file, expected.start, expected.stop) as two,
    ):
        for start in range(0, tensor.num_bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, tensor.num_bytes - start)
            if size < PIECE_BYTES:
                mine, theirs = bytearray(size), bytearray(size)
            if one.readinto(mine) != size or two.readinto(theirs) != size:
                raise CheckpointError(f"{tensor.file} of {result.folder} or {other.name} became shorter meanwhile")
            if mine != theirs:
                return False
    return True


def _same_as_converted(result: Checkpoint, tensor: Tensor, source: Checkpoint, theirs: Tensor) -> bool:
    """Whether a tensor of the result is the source's, rounded to the result's dtype."""
    with result.open(tensor.file, tensor.start, tensor.stop) as file:
        try:
            return all(file.read(len(piece)) == piece for piece in source_bytes(source, theirs, tensor.dtype))
        except ValueDoesNotFit:
            return False
