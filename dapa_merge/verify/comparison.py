"""Compares a result's files, each read once in order, with the target's bytes and with the edit's output.

Every tensor of a result is divided into boxes, each matched to its place in the target and, where it may have been
transplanted, in the source. Result and target may divide and name their tensors differently: mergekit writes the
experts of a mixture as one tensor, which the target's files hold one by one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import zip_longest

import numpy

from dapa_merge.checkpoint.digest import HASHES, Hash
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import Checkpoint, iterate_bytes, read_tiles
from dapa_merge.checkpoint.region import Box, Region, TensorBox, intersection, moved, remainder, whole_box
from dapa_merge.checkpoint.units import Unit, find_units
from dapa_merge.errors import CheckpointError
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import advance

# Bytes compared at once in whole tensors: two pieces stay in the processor's cache.
PIECE_BYTES = 1 << 18
# Bytes compared at once row by row: the result's, the target's, the source's and the edit's.
TILE_BYTES = 1 << 22


@dataclass(frozen=True)
class ExpectedBox:
    """The expected origin of a box of a result's tensor.

    Attributes:
        box: The box of the result's tensor.
        target: Its place in the target.
        edited: Its place in every model, if it may have been transplanted.
        unit: The unit that it belongs to, if `edited`.
        part: The unit's part in the target.
    """

    box: Box
    target: Region
    edited: Mapping[str, Region] | None = None
    unit: Unit | None = None
    part: TensorBox | None = None


@dataclass
class RowOrigins:
    """For each row of a unit's part, whether the result equals the target, and whether it equals the edit's output."""

    is_target: numpy.ndarray
    is_edited: numpy.ndarray

    @classmethod
    def unseen(cls, num_rows: int) -> RowOrigins:
        """All true, until a difference is found."""
        return cls(numpy.ones(num_rows, dtype=bool), numpy.ones(num_rows, dtype=bool))

    def note(self, part: TensorBox, box: Box, is_target: numpy.ndarray, is_edited: numpy.ndarray) -> None:
        """Add the comparison of a box of the part's tensor, given element by element."""
        first, stop = box[part.axis]
        start = part.box[part.axis][0]
        rows = slice(first - start, stop - start)
        shape = tuple(stop - first for first, stop in box)
        others = tuple(axis for axis in range(len(box)) if axis != part.axis)
        self.is_target[rows] &= is_target.reshape(shape).all(axis=others)
        self.is_edited[rows] &= is_edited.reshape(shape).all(axis=others)


@dataclass
class Findings:
    """The comparison of one weight file of a result.

    Attributes:
        digest: Of the whole file.
        tensors: Digests of the bytes of each tensor that may have been transplanted.
        different: Tensors that differ from the target where they must not.
        rows: The origin of each row, by unit and part.
    """

    digest: str = ""
    tensors: dict[str, str] = field(default_factory=dict)
    different: set[str] = field(default_factory=set)
    rows: dict[tuple[Unit, TensorBox], RowOrigins] = field(default_factory=dict)


def examine_file(
    result: Checkpoint, shard: str, places: Mapping[str, Sequence[ExpectedBox]], plan: Plan, algorithm: str
) -> Findings:
    """Read one weight file of a result completely, compare it, and hash it by an algorithm of `HASHES`.

    Raises:
        CheckpointError: If a file becomes shorter meanwhile.
    """
    findings = Findings()
    state = HASHES[algorithm]()
    tensors = sorted(
        (tensor for tensor in result.tensors.values() if tensor.file == shard), key=lambda item: item.start
    )
    with result.open(shard) as file:
        state.update(file.read(tensors[0].start if tensors else -1))
        for tensor in tensors:
            found = places.get(tensor.name, ())
            own = HASHES[algorithm]() if any(place.edited for place in found) else None
            reader = _HashingReader((state, own) if own else (state,))
            if not found:
                is_same = False
                _hash_only(file, tensor, reader)
            elif len(found) == 1 and found[0].edited is None and found[0].target.is_whole:
                is_same = _compare_whole(file, tensor, plan.target, found[0].target.tensor, reader)
            else:
                is_same = _compare_tiles(file, tensor, found, plan, reader, findings)
            if not is_same:
                findings.different.add(tensor.name)
            if own is not None:
                findings.tensors[tensor.name] = own.hexdigest()
    findings.digest = state.hexdigest()
    return findings


class _HashingReader:
    """Reads the next bytes of a result's file, and hashes them."""

    def __init__(self, hashes: Sequence[Hash]) -> None:
        self._hashes = hashes

    def read_into(self, file: BufferedReader, buffer: bytearray) -> None:
        if file.readinto(buffer) != len(buffer):
            raise CheckpointError(f"{file.name} became shorter while it was read")
        for state in self._hashes:
            state.update(buffer)
        advance(len(buffer), "bytes")


def _hash_only(file: BufferedReader, tensor: Tensor, reader: _HashingReader) -> None:
    """Read and hash a tensor of the result without comparing it."""
    for start in range(0, tensor.num_bytes, PIECE_BYTES):
        reader.read_into(file, bytearray(min(PIECE_BYTES, tensor.num_bytes - start)))


def _compare_whole(
    file: BufferedReader, tensor: Tensor, target: Checkpoint, expected: Tensor, reader: _HashingReader
) -> bool:
    """Read a tensor of the result, and return whether its bytes equal those of a target's tensor."""
    mine, theirs = bytearray(PIECE_BYTES), bytearray(PIECE_BYTES)
    is_same = True
    with target.open(expected.file) as other:
        other.seek(expected.start)
        for start in range(0, tensor.num_bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, tensor.num_bytes - start)
            if size < PIECE_BYTES:
                mine, theirs = bytearray(size), bytearray(size)
            reader.read_into(file, mine)
            if other.readinto(theirs) != size:
                raise CheckpointError(f"{target.folder / expected.file} became shorter while it was read")
            is_same = is_same and mine == theirs
    return is_same


def _compare_tiles(
    file: BufferedReader,
    tensor: Tensor,
    places: Sequence[ExpectedBox],
    plan: Plan,
    reader: _HashingReader,
    findings: Findings,
) -> bool:
    """Read a tensor of the result tile by tile, and note the origins of its units' rows.

    Returns:
        Whether everything outside of units is the target's.
    """
    num_element_bytes = Region.of(tensor).num_element_bytes
    is_same = True
    for tile in _tiles(tensor.shape, TILE_BYTES // max(num_element_bytes, 1)):
        shape = tuple(stop - first for first, stop in tile)
        buffer = bytearray(math.prod(shape) * num_element_bytes)
        reader.read_into(file, buffer)
        # As integers, which are compared bit by bit.
        values = numpy.frombuffer(buffer, dtype=f"u{num_element_bytes}").reshape(shape)
        for place in places:
            box = intersection(tile, place.box)
            if box is None:
                continue
            mine = values[
                tuple(slice(first - low, stop - low) for (first, stop), (low, _) in zip(box, tile, strict=True))
            ]
            ours = Region(place.target.tensor, moved(box, place.box, place.target.box))
            is_target = _equal(mine, b"".join(read_tiles(plan.target, ours)))
            if place.unit is None or place.part is None or place.edited is None:
                is_same = is_same and bool(is_target.all())
                continue
            edited = {name: Region(one.tensor, moved(box, place.box, one.box)) for name, one in place.edited.items()}
            expected = b"".join(tile for tile, _ in plan.edit.tiles(plan.models, edited))
            origins = findings.rows.setdefault((place.unit, place.part), RowOrigins.unseen(place.part.num_rows))
            origins.note(place.part, ours.box, is_target, _equal(mine, expected))
    return is_same


def _equal(values: numpy.ndarray, expected: bytes) -> numpy.ndarray:
    """Compare an array with bytes, element by element."""
    same: numpy.ndarray = values == numpy.frombuffer(expected, dtype=values.dtype).reshape(values.shape)
    return same


def _tiles(shape: tuple[int, ...], num_elements: int) -> Iterator[Box]:
    """Divide a tensor into boxes of at most `num_elements` (but at least a row), in file order."""
    if not shape:
        yield ()
        return
    num_row_elements = max(math.prod(shape[1:]), 1)
    if len(shape) == 1 or num_row_elements <= num_elements:
        step = max(num_elements // num_row_elements, 1)
        for row in range(0, shape[0], step):
            yield ((row, min(row + step, shape[0])), *whole_box(shape[1:]))
    else:
        for row in range(shape[0]):
            for inner in _tiles(shape[1:], num_elements):
                yield ((row, row + 1), *inner)


@dataclass(frozen=True)
class Correspondence:
    """The match between a result's tensors and the target's.

    Attributes:
        places: For each tensor of the result, boxes that make up all of it, with their expected origins.
        faults: Names of tensors, and what is wrong with them regardless of their values.
    """

    places: Mapping[str, list[ExpectedBox]]
    faults: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Segment:
    """A box of a target's tensor, and its place in the result."""

    box: Box
    tensor: str
    result_box: Box


def correspond(result: Checkpoint, plan: Plan) -> Correspondence:
    """Find each of the target's values in a result.

    Any program may have written the result: its files may be divided differently, and mergekit writes a mixture's
    experts as one tensor, and tied weights twice.
    """
    target = plan.target
    faults: list[tuple[str, str]] = []
    segments: dict[str, list[_Segment]] = {}
    for name, tensor in target.tensors.items():
        found = result.tensors.get(name)
        if found is not None and _form(found) == _form(tensor):
            segments[name] = [_all_of(tensor, found)]
        elif found is not None:
            faults.append((name, f"is {_form_text(found)}, not {_form_text(tensor)}"))
    lost = set(target.tensors) - set(segments) - {name for name, _ in faults}
    new = set(result.tensors) - set(target.tensors)
    if lost and new:
        segments |= _divided_differently(result, target, lost)
        segments |= _renamed(result, target, lost - set(segments), new)
    faults += [(name, "is missing") for name in sorted(lost - set(segments))]
    places = _places(segments, plan)
    for name in sorted(new - set(places)):
        if twin := _twin(result, result.tensors[name], target, target.tensors.values()):
            whole = whole_box(twin.shape)
            places[name] = [ExpectedBox(whole, Region(twin, whole))]
        else:
            faults.append((name, "is in the result but not in the target"))
    return Correspondence(places, tuple(faults))


def _places(segments: Mapping[str, Iterable[_Segment]], plan: Plan) -> dict[str, list[ExpectedBox]]:
    """For each tensor of the result, its boxes: parts of units, and the rest between them."""
    parts: dict[str, list[tuple[Unit, TensorBox, dict[str, Region]]]] = {}
    for unit in plan.units:
        for part, regions in zip(unit.parts, plan.regions((unit,)), strict=True):
            parts.setdefault(part.tensor, []).append((unit, part, regions))
    places: dict[str, list[ExpectedBox]] = {}
    for name, found in segments.items():
        tensor = plan.target.tensors[name]
        of_units = parts.get(name, [])
        between = remainder(whole_box(tensor.shape), [part.box for _, part, _ in of_units])
        for segment in found:
            here = places.setdefault(segment.tensor, [])
            if not tensor.num_bytes:
                # Boxes without elements do not overlap.
                here.append(ExpectedBox(segment.result_box, Region(tensor, segment.box)))
                continue
            for box in between:
                if (common := intersection(box, segment.box)) is not None:
                    here.append(ExpectedBox(moved(common, segment.box, segment.result_box), Region(tensor, common)))
            for unit, part, regions in of_units:
                if (common := intersection(part.box, segment.box)) is not None:
                    edited = {
                        name: Region(one.tensor, moved(common, part.box, one.box)) for name, one in regions.items()
                    }
                    box = moved(common, segment.box, segment.result_box)
                    here.append(ExpectedBox(box, Region(tensor, common), edited, unit, part))
    return places


def _divided_differently(result: Checkpoint, target: Checkpoint, lost: set[str]) -> dict[str, list[_Segment]]:
    """The lost tensors whose values are in differently divided tensors of the result's MLPs."""
    modules = ("gate", "up", "down")
    try:
        units = find_units(target.config, target.shapes, modules)
        twins = find_units(result.config, result.shapes, modules)
    except CheckpointError:
        return {}
    segments: dict[str, list[_Segment]] = {}
    for unit, twin in zip_longest(units, twins):
        if unit != twin or len(unit.parts) != len(twin.parts):
            return {}
        for part, other in zip(unit.parts, twin.parts, strict=True):
            ours, found = target.tensors[part.tensor], result.tensors[other.tensor]
            if part.tensor in lost and ours.dtype == found.dtype:
                ours_region, region = Region.of(ours, part), Region.of(found, other)
                if ours_region.extents == region.extents:
                    segments.setdefault(part.tensor, []).append(_Segment(part.box, other.tensor, other.box))
    return {name: found for name, found in segments.items() if _is_complete(target.tensors[name], found)}


def _is_complete(tensor: Tensor, segments: Iterable[_Segment]) -> bool:
    return not remainder(whole_box(tensor.shape), (segment.box for segment in segments))


def _renamed(result: Checkpoint, target: Checkpoint, lost: set[str], new: set[str]) -> dict[str, list[_Segment]]:
    """The lost tensors that the result has under another name with the same numbers in it."""
    found = {}
    for name in sorted(lost):
        tensor = target.tensors[name]
        numbers = re.findall(r"\d+", name)
        candidates = (result.tensors[other] for other in sorted(new) if re.findall(r"\d+", other) == numbers)
        if twin := _twin(target, tensor, result, candidates):
            found[name] = [_all_of(tensor, twin)]
            new = new - {twin.name}
    return found


def _twin(checkpoint: Checkpoint, tensor: Tensor, other: Checkpoint, candidates: Iterable[Tensor]) -> Tensor | None:
    """The first candidate in another checkpoint with the dtype, shape and bytes of a tensor; None if absent."""
    for candidate in candidates:
        if _form(candidate) == _form(tensor):
            pairs = zip(iterate_bytes(checkpoint, tensor), iterate_bytes(other, candidate), strict=True)
            if all(mine == theirs for mine, theirs in pairs):
                return candidate
    return None


def _all_of(tensor: Tensor, found: Tensor) -> _Segment:
    return _Segment(whole_box(tensor.shape), found.name, whole_box(found.shape))


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _form_text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
