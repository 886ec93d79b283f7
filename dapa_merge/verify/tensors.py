"""Proves that a result is its target with an edit of some units, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path

import numpy

from dapa_merge.checkpoint.digest import ALGORITHM
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.checkpoint.region import Rows, TensorBox
from dapa_merge.checkpoint.units import DIVISIBLE_MODULES, Unit
from dapa_merge.plan.edit import Edit
from dapa_merge.plan.plan import Plan, cut, region_of
from dapa_merge.verify.comparison import Findings, RowOrigins, correspond, examine_file

# Hashing and comparing let other threads run.
THREADS = 4


@dataclass(frozen=True)
class Verification:
    """The outcome of a verification, tensor by tensor.

    Attributes:
        transplanted: The units whose tensors all equal the edit's output, and not all also the target's. If only some
            rows of a unit do, the blocks of these rows.
        alike: The units that the edit does not change, so whether they were transplanted is unknown.
        differences: For each tensor that is neither, missing or surplus, its name and what is wrong. The name may be
            followed by the range of rows that holds all faults, as `[64:128]`.
        num_tensors: Number of tensors compared.
        edit: The edit that changed units were compared with.
        origins: For each tensor of the result that is not all the target's, its origin: `source`, the name of another
            edit, or `unexplained`. The name is followed by the rows concerned, if not all.
        files: The digest of each weight file.
        tensors: The digest of the bytes of each tensor that may have been transplanted.
    """

    transplanted: tuple[Unit, ...]
    alike: tuple[Unit, ...]
    differences: tuple[tuple[str, str], ...]
    num_tensors: int
    edit: Edit
    origins: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return not self.differences

    def is_exactly(self, selection: Iterable[Unit]) -> bool:
        """Whether the result holds and its transplanted units are those of `selection`."""
        return self.holds and set(self.transplanted) == set(selection) - set(self.alike)


def verify(out: Path, plan: Plan, algorithm: str = ALGORITHM) -> Verification:
    """Compare every byte of every tensor in `out` with the target and, for the plan's units, with the edit's output.

    Any program may have written `out`: shards, order, headers and the division into tensors may differ, values may not.
    Every row of the plan's units is judged, including those outside of its blocks.
    Each model is read once, by several threads, in constant memory, and hashed by an algorithm of `HASHES`.

    Raises:
        CheckpointError: If one of the checkpoints cannot be read.
    """
    result = open_checkpoint(str(out))
    plan = cut(plan, plan.units)
    found = correspond(result, plan)
    with ThreadPoolExecutor(THREADS) as pool:
        look = partial(examine_file, result, places=found.places, plan=plan, algorithm=algorithm)
        by_file = dict(zip(result.shards, pool.map(look, result.shards), strict=True))
    seen = reduce(_combine, by_file.values(), Findings())
    known = {name for name, _ in found.faults}
    differences = [*found.faults, *((name, "differs from the target") for name in seen.different - known)]
    verdicts = [
        _judge(unit, seen.rows, plan) for unit in plan.units if all((unit, part) in seen.rows for part in unit.parts)
    ]
    differences += [fault for verdict in verdicts for fault in verdict.faults]
    return Verification(
        transplanted=tuple(unit for verdict in verdicts for unit in verdict.transplanted),
        alike=tuple(unit for verdict in verdicts for unit in verdict.alike),
        differences=tuple(sorted(differences)),
        num_tensors=len(plan.target.tensors),
        edit=plan.edit,
        origins=_origins(verdicts, differences, plan),
        files={name: findings.digest for name, findings in by_file.items()},
        tensors=seen.tensors,
    )


@dataclass(frozen=True)
class _UnitOrigin:
    """A unit's origin in a result: its transplanted blocks, the unit if it is alike in both models, and faults."""

    transplanted: tuple[Unit, ...] = ()
    alike: tuple[Unit, ...] = ()
    faults: tuple[tuple[str, str], ...] = ()


_NEITHER = "is neither the target's nor {result}"
_LONE = "is {result}, but others of its unit are the target's"


def _judge(unit: Unit, rows: Mapping[tuple[Unit, TensorBox], RowOrigins], plan: Plan) -> _UnitOrigin:
    origins = {part: rows[unit, part] for part in unit.parts}
    if all(origin.is_edited.all() for origin in origins.values()):
        is_alike = all(origin.is_target.all() for origin in origins.values())
        return _UnitOrigin(alike=(unit,)) if is_alike else _UnitOrigin(transplanted=(unit,))
    return _judge_rows(unit, origins, plan) if unit.module in DIVISIBLE_MODULES else _judge_whole(origins, plan)


def _judge_whole(origins: Mapping[TensorBox, RowOrigins], plan: Plan) -> _UnitOrigin:
    """Judge a unit that is not completely edited, and cannot be edited in part."""
    neither = {
        part: ~(origin.is_target | origin.is_edited)
        for part, origin in origins.items()
        if not origin.is_target.all() and not origin.is_edited.all()
    }
    if neither:
        what = _NEITHER.format(result=plan.edit.result)
        return _UnitOrigin(faults=tuple((_name(plan, part, wrong), what) for part, wrong in neither.items()))
    lone = [part for part, origin in origins.items() if not origin.is_target.all()]
    what = _LONE.format(result=plan.edit.result)
    return _UnitOrigin(faults=tuple((region_of(plan.target, part).name, what) for part in lone))


def _judge_rows(unit: Unit, origins: Mapping[TensorBox, RowOrigins], plan: Plan) -> _UnitOrigin:
    """Judge a unit that is not completely edited: find its edited rows and its faults."""
    start, stop = plan.rows(unit)
    is_target, is_edited, is_neither = (numpy.full(stop - start, value) for value in (True, True, False))
    places = {part: slice(part.first_row - start, part.first_row - start + part.num_rows) for part in origins}
    for part, origin in origins.items():
        is_target[places[part]] &= origin.is_target
        is_edited[places[part]] &= origin.is_edited
        is_neither[places[part]] |= ~(origin.is_target | origin.is_edited)
    faults = []
    for part, origin in origins.items():
        neither = ~(origin.is_target | origin.is_edited)
        lone = ~(is_target | is_edited | is_neither)[places[part]] & ~origin.is_target
        faults += [
            (_name(plan, part, wrong), what.format(result=plan.edit.result))
            for wrong, what in ((neither, _NEITHER), (lone, _LONE))
            if wrong.any()
        ]
    blocks = (plan.part(unit.whole, (start + first, start + last)) for first, last in _ranges(is_edited & ~is_target))
    return _UnitOrigin(transplanted=tuple(blocks), faults=tuple(faults))


def _name(plan: Plan, part: TensorBox, wrong: numpy.ndarray) -> str:
    """The name of a part's tensor, followed by the range of rows that holds all faults, if it is not the whole."""
    ranges = _ranges(wrong)
    if ranges:
        part = part.narrow((part.first_row + ranges[0][0], part.first_row + ranges[-1][1])) or part
    return region_of(plan.target, part).name


def _ranges(mask: numpy.ndarray) -> list[Rows]:
    """The ranges in which a mask is true."""
    edges = numpy.flatnonzero(numpy.diff(mask, prepend=False, append=False))
    return [(int(first), int(stop)) for first, stop in zip(edges[::2], edges[1::2], strict=True)]


def _origins(verdicts: Iterable[_UnitOrigin], differences: Iterable[tuple[str, str]], plan: Plan) -> dict[str, str]:
    """Origins of everything that is not the target's, by tensor name, with rows if it is a part."""
    units = (unit for verdict in verdicts for unit in verdict.transplanted)
    origins = {region_of(plan.target, part).name: plan.edit.origin for unit in units for part in unit.parts}
    return origins | {name: "unexplained" for name, _ in differences}


def _combine(one: Findings, other: Findings) -> Findings:
    """Combine the findings of two files; rows that occur in both must match in both."""
    rows = dict(one.rows)
    for key, origin in other.rows.items():
        if (before := rows.get(key)) is not None:
            origin = RowOrigins(before.is_target & origin.is_target, before.is_edited & origin.is_edited)
        rows[key] = origin
    return Findings(tensors={**one.tensors, **other.tensors}, different=one.different | other.different, rows=rows)
