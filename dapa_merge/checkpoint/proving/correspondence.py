"""Which box of a result's tensors should hold which of the target's values, and may hold which of the source's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from dapa_merge.checkpoint.architecture import Unit, find_units
from dapa_merge.checkpoint.files import Checkpoint, iterate_bytes
from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.checkpoint.proving.comparison import Place
from dapa_merge.checkpoint.region import Box, Part, Region, intersection, moved, remainder, whole_box
from dapa_merge.errors import CheckpointError


@dataclass(frozen=True)
class Correspondence:
    """How a result's tensors stand to the target's.

    Attributes:
        places: For each tensor of the result, its boxes and what they should be; they make up all of it.
        faults: Names of tensors, and what is wrong with them whatever they hold.
    """

    places: Mapping[str, list[Place]]
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

    Args:
        result: The result.
        plan: The target, the source and the units that may have been transplanted.
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
            places[name] = [Place(whole, Region(twin, whole))]
        else:
            faults.append((name, "is in the result but not in the target"))
    return Correspondence(places, tuple(faults))


def _places(segments: Mapping[str, Iterable[_Segment]], plan: Plan) -> dict[str, list[Place]]:
    """For each tensor of the result, its boxes: parts of units, and what lies between them."""
    parts: dict[str, list[tuple[Unit, Part, Region]]] = {}
    for unit in plan.units:
        for part, (_, theirs) in zip(unit.parts, plan.regions((unit,)), strict=True):
            parts.setdefault(part.tensor, []).append((unit, part, theirs))
    places: dict[str, list[Place]] = {}
    for name, found in segments.items():
        tensor = plan.target.tensors[name]
        of_units = parts.get(name, [])
        between = remainder(whole_box(tensor.shape), [part.box for _, part, _ in of_units])
        for segment in found:
            here = places.setdefault(segment.tensor, [])
            if not tensor.num_bytes:
                # Boxes without elements have nothing in common.
                here.append(Place(segment.result_box, Region(tensor, segment.box)))
                continue
            for box in between:
                if (common := intersection(box, segment.box)) is not None:
                    here.append(Place(moved(common, segment.box, segment.result_box), Region(tensor, common)))
            for unit, part, theirs in of_units:
                if (common := intersection(part.box, segment.box)) is not None:
                    source = Region(theirs.tensor, moved(common, part.box, theirs.box))
                    box = moved(common, segment.box, segment.result_box)
                    here.append(Place(box, Region(tensor, common), source, unit, part))
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
