"""Reads a result's files once, in order, next to what they should be: the target's bytes, or what the edit makes.

Every tensor of a result is cut into pieces, each with the place in the target where the same values are, and, for what
may have been transplanted, the place in the source. Result and target may cut and name their tensors differently:
mergekit writes the experts of a mixture as one tensor, which the target's files hold one by one.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import zip_longest

import numpy

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.open import Checkpoint, iterate_bytes
from dapa_merge.checkpoint.region import Box, Region, TensorBox, intersection, moved, remainder, whole_box
from dapa_merge.checkpoint.units import Unit, find_units
from dapa_merge.errors import CheckpointError
from dapa_merge.plan.edit import read_tiles
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import advance

# Compared at once where nothing else is to be known: two of these stay in the processor's cache.
PIECE_BYTES = 1 << 18
# And where rows are told apart: the result's, the target's and the source's, and what is computed of them.
TILE_BYTES = 1 << 22


@dataclass(frozen=True)
class Origin:
    """Where a box of a result's tensor should come from.

    Attributes:
        box: Which of the result's tensor.
        target: The same values in the target.
        edited: Where the same values are in every model, if they may have been transplanted.
        unit: The unit of which it is a part, with `edited`.
        part: The unit's part in the target.
    """

    box: Box
    target: Region
    edited: Mapping[str, Region] | None = None
    unit: Unit | None = None
    part: TensorBox | None = None


@dataclass
class RowOrigins:
    """Of each row of a part of a unit: whether the result's is the target's, and whether it is what the edit makes."""

    is_target: numpy.ndarray
    is_edited: numpy.ndarray

    @classmethod
    def unseen(cls, num_rows: int) -> RowOrigins:
        """Both, until it is seen otherwise."""
        return cls(numpy.ones(num_rows, dtype=bool), numpy.ones(num_rows, dtype=bool))

    def note(self, part: TensorBox, box: Box, is_target: numpy.ndarray, is_edited: numpy.ndarray) -> None:
        """What was seen of a box of the part's tensor, element by element."""
        first, stop = box[part.axis]
        start = part.box[part.axis][0]
        rows = slice(first - start, stop - start)
        shape = tuple(stop - first for first, stop in box)
        others = tuple(axis for axis in range(len(box)) if axis != part.axis)
        self.is_target[rows] &= is_target.reshape(shape).all(axis=others)
        self.is_edited[rows] &= is_edited.reshape(shape).all(axis=others)


@dataclass
class Findings:
    """What was seen in one weight file of a result.

    Attributes:
        sha256: Of all of the file.
        tensor_sha256: Of the bytes of each tensor that may have been transplanted.
        different: Tensors that are not the target's where they must be.
        rows: By unit and part of it, where each row comes from.
    """

    sha256: str = ""
    tensor_sha256: dict[str, str] = field(default_factory=dict)
    different: set[str] = field(default_factory=set)
    rows: dict[tuple[Unit, TensorBox], RowOrigins] = field(default_factory=dict)


def examine_file(result: Checkpoint, shard: str, places: Mapping[str, Sequence[Origin]], plan: Plan) -> Findings:
    """Read one weight file of a result from end to end, and compare and hash what is read.

    Raises:
        CheckpointError: If a file becomes shorter meanwhile.
    """
    findings = Findings()
    state = hashlib.sha256()
    tensors = sorted(
        (tensor for tensor in result.tensors.values() if tensor.file == shard), key=lambda item: item.start
    )
    with result.open(shard) as file:
        state.update(file.read(tensors[0].start if tensors else -1))
        for tensor in tensors:
            found = places.get(tensor.name, ())
            own = hashlib.sha256() if any(place.edited for place in found) else None
            take = _Taker((state, own) if own else (state,))
            if not found:
                is_same = False
                _pass_over(file, tensor, take)
            elif len(found) == 1 and found[0].edited is None and found[0].target.is_whole:
                is_same = _stream(file, tensor, plan.target, found[0].target.tensor, take)
            else:
                is_same = _by_tiles(file, tensor, found, plan, take, findings)
            if not is_same:
                findings.different.add(tensor.name)
            if own is not None:
                findings.tensor_sha256[tensor.name] = own.hexdigest()
    findings.sha256 = state.hexdigest()
    return findings


class _Taker:
    """Reads on in a result's file, and hashes what it reads."""

    def __init__(self, hashes: Sequence[hashlib._Hash]) -> None:
        self._hashes = hashes

    def read_into(self, file: BufferedReader, buffer: bytearray) -> None:
        if file.readinto(buffer) != len(buffer):
            raise CheckpointError(f"{file.name} became shorter while it was read")
        for state in self._hashes:
            state.update(buffer)
        advance(len(buffer), "bytes")


def _pass_over(file: BufferedReader, tensor: Tensor, take: _Taker) -> None:
    """Read a tensor of the result that is compared with nothing."""
    for start in range(0, tensor.num_bytes, PIECE_BYTES):
        take.read_into(file, bytearray(min(PIECE_BYTES, tensor.num_bytes - start)))


def _stream(file: BufferedReader, tensor: Tensor, target: Checkpoint, expected: Tensor, take: _Taker) -> bool:
    """Read a tensor of the result; whether its bytes are those of a tensor of the target."""
    mine, theirs = bytearray(PIECE_BYTES), bytearray(PIECE_BYTES)
    is_same = True
    with target.open(expected.file) as other:
        other.seek(expected.start)
        for start in range(0, tensor.num_bytes, PIECE_BYTES):
            size = min(PIECE_BYTES, tensor.num_bytes - start)
            if size < PIECE_BYTES:
                mine, theirs = bytearray(size), bytearray(size)
            take.read_into(file, mine)
            if other.readinto(theirs) != size:
                raise CheckpointError(f"{target.folder / expected.file} became shorter while it was read")
            is_same = is_same and mine == theirs
    return is_same


def _by_tiles(
    file: BufferedReader, tensor: Tensor, places: Sequence[Origin], plan: Plan, take: _Taker, findings: Findings
) -> bool:
    """Read a tensor of the result tile by tile, and note where the rows of its units come from.

    Returns:
        Whether all that belongs to no unit is the target's.
    """
    num_element_bytes = Region.of(tensor).num_element_bytes
    is_same = True
    for tile in _tiles(tensor.shape, TILE_BYTES // max(num_element_bytes, 1)):
        shape = tuple(stop - first for first, stop in tile)
        buffer = bytearray(math.prod(shape) * num_element_bytes)
        take.read_into(file, buffer)
        # As whole numbers, which are compared bit by bit.
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
    """Element by element, whether an array holds these bytes."""
    same: numpy.ndarray = values == numpy.frombuffer(expected, dtype=values.dtype).reshape(values.shape)
    return same


def _tiles(shape: tuple[int, ...], num_elements: int) -> Iterator[Box]:
    """Boxes of at most so many elements (but a row, at least) that make up a tensor, in the order of the file."""
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
    """How a result's tensors stand to the target's.

    Attributes:
        places: For each tensor of the result, its boxes and what they should be; they make up all of it.
        faults: Names of tensors, and what is wrong with them whatever they hold.
    """

    places: Mapping[str, list[Origin]]
    faults: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Segment:
    """A box of a target's tensor, and where the result has it."""

    box: Box
    tensor: str
    result_box: Box


def correspond(result: Checkpoint, plan: Plan) -> Correspondence:
    """Find each of the target's values in a result.

    It does not matter who wrote the result: its files may be divided otherwise, mergekit writes a mixture's experts as
    one tensor, and tied weights twice.
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
        segments |= _cut_otherwise(result, target, lost)
        segments |= _renamed(result, target, lost - set(segments), new)
    faults += [(name, "is missing") for name in sorted(lost - set(segments))]
    places = _places(segments, plan)
    for name in sorted(new - set(places)):
        if twin := _twin(result, result.tensors[name], target, target.tensors.values()):
            whole = whole_box(twin.shape)
            places[name] = [Origin(whole, Region(twin, whole))]
        else:
            faults.append((name, "is in the result but not in the target"))
    return Correspondence(places, tuple(faults))


def _places(segments: Mapping[str, Iterable[_Segment]], plan: Plan) -> dict[str, list[Origin]]:
    """For each tensor of the result, its boxes: parts of units, and what lies between them."""
    parts: dict[str, list[tuple[Unit, TensorBox, dict[str, Region]]]] = {}
    for unit in plan.units:
        for part, regions in zip(unit.parts, plan.regions((unit,)), strict=True):
            parts.setdefault(part.tensor, []).append((unit, part, regions))
    places: dict[str, list[Origin]] = {}
    for name, found in segments.items():
        tensor = plan.target.tensors[name]
        of_units = parts.get(name, [])
        between = remainder(whole_box(tensor.shape), [part.box for _, part, _ in of_units])
        for segment in found:
            here = places.setdefault(segment.tensor, [])
            if not tensor.num_bytes:
                # Boxes without elements have nothing in common.
                here.append(Origin(segment.result_box, Region(tensor, segment.box)))
                continue
            for box in between:
                if (common := intersection(box, segment.box)) is not None:
                    here.append(Origin(moved(common, segment.box, segment.result_box), Region(tensor, common)))
            for unit, part, regions in of_units:
                if (common := intersection(part.box, segment.box)) is not None:
                    edited = {
                        name: Region(one.tensor, moved(common, part.box, one.box)) for name, one in regions.items()
                    }
                    box = moved(common, segment.box, segment.result_box)
                    here.append(Origin(box, Region(tensor, common), edited, unit, part))
    return places


def _cut_otherwise(result: Checkpoint, target: Checkpoint, lost: set[str]) -> dict[str, list[_Segment]]:
    """Of tensors that are gone, those whose values are in other tensors of the result's MLPs."""
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
    """Of tensors that are gone, those that the result has under another name with the same numbers in it."""
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
    """The first of another checkpoint's tensors that has the form and the bytes of one of this."""
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
