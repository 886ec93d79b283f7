"""Boxes of tensors: the parts that units consist of, and the places of their bytes in a file."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.errors import CheckpointError

# A row range; the end is exclusive.
Rows = tuple[int, int]
# The index range of each dimension of a tensor; the ends are exclusive.
Box = tuple[Rows, ...]
# The shape of every tensor, by name.
Shapes = Mapping[str, tuple[int, ...]]


def whole_box(shape: Iterable[int]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


@dataclass(frozen=True)
class TensorBox:
    """A box of one tensor: all of it, or a range along some of its dimensions.

    Attributes:
        tensor: The tensor's name.
        box: The index range of each dimension.
        axis: The dimension along which the unit's rows run.
        first_row: Number of its first row within the unit.
    """

    tensor: str
    box: Box
    axis: int = 0
    first_row: int = 0

    @property
    def num_rows(self) -> int:
        if not self.box:
            return 1
        first, stop = self.box[self.axis]
        return stop - first

    def narrow(self, rows: Rows) -> TensorBox | None:
        """The part within a range of the unit's rows; None if empty."""
        first = max(rows[0], self.first_row)
        stop = min(rows[1], self.first_row + self.num_rows)
        if first >= stop:
            return None
        start = self.box[self.axis][0] - self.first_row
        box = list(self.box)
        box[self.axis] = (start + first, start + stop)
        return replace(self, box=tuple(box), first_row=first)


@dataclass(frozen=True)
class Region:
    """A box of a tensor on disk. Its elements are in row-major order, as in the file."""

    tensor: Tensor
    box: Box

    @classmethod
    def of(cls, tensor: Tensor, part: TensorBox | None = None) -> Region:
        """The region of a whole tensor, or of a unit's part of it.

        Raises:
            CheckpointError: If it has no such part.
        """
        box = whole_box(tensor.shape) if part is None else part.box
        if len(box) != len(tensor.shape) or any(
            not 0 <= first <= stop <= size for (first, stop), size in zip(box, tensor.shape, strict=True)
        ):
            raise CheckpointError(f"{tensor.name} has shape {list(tensor.shape)}, and so no part {box_text(box)}")
        return cls(tensor, box)

    @property
    def name(self) -> str:
        """The tensor's name, followed by the box if it is only a part."""
        partial = [axis for axis, size in enumerate(self.shape) if size != self.tensor.shape[axis]]
        return self.tensor.name + (box_text(self.box[: partial[-1] + 1]) if partial else "")

    @property
    def is_whole(self) -> bool:
        return self.box == whole_box(self.tensor.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - first for first, stop in self.box)

    @property
    def extents(self) -> tuple[int, ...]:
        """The shape without dimensions of size one; elements correspond between regions of equal extents."""
        return tuple(size for size in self.shape if size != 1)

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def num_element_bytes(self) -> int:
        """Bytes per element, for dtypes of whole bytes."""
        return self.tensor.num_bytes // max(self.tensor.num_parameters, 1)

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * self.num_element_bytes

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yields its contiguous parts of the file in order, as (offset, number of bytes)."""
        if not self.num_parameters:
            return
        if not self.box:
            yield self.tensor.start, self.num_bytes
            return
        # The last dimension that is not whole: from it on, the bytes are contiguous.
        inner = len(self.box) - 1
        while inner > 0 and self.shape[inner] == self.tensor.shape[inner]:
            inner -= 1
        strides = [math.prod(self.tensor.shape[axis + 1 :]) * self.num_element_bytes for axis in range(inner + 1)]
        first = self.tensor.start + self.box[inner][0] * strides[inner]
        num_run_bytes = self.shape[inner] * strides[inner]
        for indices in itertools.product(*(range(*rows) for rows in self.box[:inner])):
            yield first + sum(map(operator.mul, indices, strides)), num_run_bytes

    def slices(self) -> tuple[slice, ...]:
        """The slices that select it from an array of the tensor's shape."""
        return tuple(slice(first, stop) for first, stop in self.box)


def intersection(one: Box, other: Box) -> Box | None:
    """The overlap of two boxes of one tensor; None if empty."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(first < stop for first, stop in common) else None


def moved(box: Box, origin: Box, destination: Box) -> Box:
    """The part of `destination` that corresponds to the part `box` of `origin`.

    Both have the same size, but either may have one more leading dimension with a single index, the expert's.
    """
    offsets = [(first - low, stop - low) for (first, stop), (low, _) in zip(box, origin, strict=True)]
    surplus = len(offsets) - len(destination)
    offsets = offsets[surplus:] if surplus > 0 else [(0, 1)] * -surplus + offsets
    return tuple((low + first, low + stop) for (first, stop), (low, _) in zip(offsets, destination, strict=True))


def remainder(box: Box, holes: Iterable[Box]) -> list[Box]:
    """The rest of a box outside the holes, as disjoint boxes."""
    pieces = [box]
    for hole in holes:
        pieces = [rest for piece in pieces for rest in _without(piece, hole)]
    return pieces


def _without(box: Box, hole: Box) -> Iterator[Box]:
    common = intersection(box, hole)
    if common is None:
        yield box
        return
    left = list(box)
    for axis, ((first, stop), (low, high)) in enumerate(zip(box, common, strict=True)):
        for rows in ((first, low), (high, stop)):
            if rows[0] < rows[1]:
                yield (*left[:axis], rows, *left[axis + 1 :])
        left[axis] = (low, high)


def box_text(box: Box) -> str:
    """A box for messages, as `[0:48]` or `[2:3,0:16]`."""
    return "[" + ",".join(f"{first}:{stop}" for first, stop in box) + "]"
