"""Factors of how a matrix moves along directions of (source - target): what `edit: directions` adds to the target.

For a matrix W in R^(m x n), D = W_source - W_target = sum_i s_i u_i v_i^T. The new values are W_target + L R, where the
rows of R are right singular vectors v_i of D, and the columns of L sums of the left singular vectors u_i of the same
directions. An SVD is not bit for bit the same on two machines, so its factors are stored: as 16-bit whole numbers with
a power of two for each row. Every product of two of them, and every sum of such products, is then exact in float64,
whatever the order of the additions: a model in memory, the transplant, mergekit and `verify` compute the same values,
tile by tile or whole. No torch here.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dapa_merge.checkpoint.region import Box, Region, Shapes, box_text, intersection, whole_box
from dapa_merge.errors import CheckpointError
from dapa_merge.files import refuse_special

# A safetensors file, but not named so: programs such as vLLM load every `*.safetensors` of a folder without an index.
FILE_NAME = "dapa_directions.dat"
FORMAT = "1"
# Bits of a float64's significand, and of the product of two factors.
SIGNIFICAND, PRODUCT = 53, 30
LARGEST = 32767
# How much of a stored factor may lie outside the singular vectors that it is made of, as a share of its norm.
TOLERANCE = 0.02
# Of a product in float64, the number of values that are computed at once.
PIECE = 1 << 17
# How many times as far as the source itself a matrix may move along directions: the largest singular value of a core.
MAX_WEIGHT = 4.0
MAX_FILE_BYTES = 1 << 32
# A tensor holds at most a layer's experts, with gate and up apart.
MAX_PLACES = 4096
_NAME = re.compile(r"(.+?)(?:\[((?:\d{1,15}:\d{1,15},?)+)\])?\.(left|right|exponents)")

Matrix = NDArray[numpy.floating[Any]]


class Place(NamedTuple):
    """A matrix of the target: a tensor, and a box of it; None for all of a tensor with two dimensions."""

    tensor: str
    box: Box | None

    def __str__(self) -> str:
        return self.tensor + (box_text(self.box) if self.box else "")


@dataclass(frozen=True)
class Factors:
    """The change of one matrix along its directions, a sum of products of a column and a row.

    Attributes:
        left: `[m, r]`, int16.
        right: `[r, n]`, int16.
        exponents: `[r]`, int16: the change is the sum of left[:, i] right[i] 2^exponents[i].
    """

    left: NDArray[numpy.int16]
    right: NDArray[numpy.int16]
    exponents: NDArray[numpy.int16]

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.exponents)

    def product(self, rows: slice = slice(None), columns: slice = slice(None)) -> NDArray[numpy.float32]:
        """Their sum for some rows and columns: computed exactly, and rounded once to float32."""
        left = self.left[rows] * numpy.exp2(self.exponents.astype(numpy.float64))
        right = self.right[:, columns].astype(numpy.float64)
        found = numpy.empty((len(left), right.shape[1]), dtype=numpy.float32)
        # Pieces whose float64 values stay in a processor's cache.
        step = max(PIECE // max(right.shape[1], 1), 1)
        for start in range(0, len(left), step):
            found[start : start + step] = left[start : start + step] @ right
        return found


def quantize(left: Matrix, right: Matrix) -> Factors:
    """Round factors to 16 bits; products that are zero, or vanish beside the others, are dropped.

    The relative error of a product is about 2^-15 times its largest element over its root mean square. Those that are
    less than about 2^-20 of the largest, and would not be exact any more, vanish.

    Args:
        left: `[m, r]`: sums of left singular vectors.
        right: `[r, n]`: right singular vectors.
    """
    columns, rows = left.T.astype(numpy.float64), right.astype(numpy.float64)
    tops = numpy.abs(columns).max(axis=1, initial=0), numpy.abs(rows).max(axis=1, initial=0)
    kept = (tops[0] > 0) & (tops[1] > 0)
    shifts = [numpy.floor(numpy.log2(LARGEST / top[kept])) for top in tops]
    exponents = -(shifts[0] + shifts[1])
    if len(exponents):
        # All products lie on one grid that float64 can hold; smaller directions are stored more coarsely.
        lowest = exponents.max() - _max_spread(len(exponents))
        shifts[0] = numpy.where(exponents < lowest, shifts[0] - (lowest - exponents), shifts[0])
        exponents = numpy.maximum(exponents, lowest)
    whole = [
        numpy.rint(values[kept] * numpy.exp2(shift)[:, None]).astype(numpy.int16)
        for values, shift in zip((columns, rows), shifts, strict=True)
    ]
    exact = columns[kept] * numpy.exp2(shifts[0])[:, None]
    errors = numpy.linalg.norm(whole[0] - exact, axis=1) / numpy.linalg.norm(exact, axis=1)
    left_over = errors <= TOLERANCE / 4
    return Factors(
        numpy.ascontiguousarray(whole[0][left_over].T), whole[1][left_over], exponents[left_over].astype(numpy.int16)
    )


def _max_spread(rank: int) -> int:
    """How far the exponents of so many directions may be apart, so that float64 holds each sum exactly."""
    return SIGNIFICAND - PRODUCT - math.ceil(math.log2(rank + 1))


@dataclass(frozen=True)
class FactorTable:
    """The factors of many matrices, by the target's tensors as its files have them."""

    of: Mapping[Place, Factors] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the stored factors; empty without any."""
        return hashlib.sha256(self.content()).hexdigest() if self.of else ""

    @property
    def num_directions(self) -> int:
        """Number of directions in all matrices."""
        return sum(found.rank for found in self.of.values())

    @property
    def num_values(self) -> int:
        """The degrees of freedom: r (m + n), summed over the matrices."""
        return sum(found.left.size + found.right.size for found in self.of.values())

    def find(self, region: Region) -> tuple[Factors, slice, slice] | None:
        """The factors of the matrix that a region lies in, and the region's rows and columns within it."""
        for place, factors in self.by_tensor.get(region.tensor.name, ()):
            box = place.box or whole_box(region.tensor.shape)
            ranges, axes = list(zip(box, region.box, strict=True)), _matrix_axes(box)
            if len(axes) == 2 and all(low <= first and stop <= high for (low, high), (first, stop) in ranges):
                # Only the dimensions of the matrix: an expert's number is given by the box.
                rows, columns = (
                    slice(first - low, stop - low)
                    for axis, ((low, _), (first, stop)) in enumerate(ranges)
                    if axis in axes
                )
                return factors, rows, columns
        return None

    def values(self, region: Region, start: int, stop: int) -> NDArray[numpy.float32]:
        """The sum of the directions at elements of a region, numbered in row-major order; zero without directions."""
        found = self.find(region)
        if found is None:
            return numpy.zeros(stop - start, dtype=numpy.float32)
        factors, rows, columns = found
        width = columns.stop - columns.start
        first, last = start // width, -(-stop // width)
        product = factors.product(slice(rows.start + first, rows.start + last), columns)
        return product.reshape(-1)[start - first * width : stop - first * width]

    def selected(self, regions: Iterable[Region]) -> FactorTable:
        """Only the factors of these regions."""
        wanted = {(region.tensor.name, region.box) for region in regions}
        whole = {region_name for region_name, _ in wanted}
        return FactorTable(
            {
                place: factors
                for place, factors in self.of.items()
                if (place.tensor in whole if place.box is None else (place.tensor, place.box) in wanted)
            }
        )

    def content(self) -> bytes:
        """The factors as a safetensors file, always the same bytes for the same factors."""
        arrays = {
            f"{place}.{name}": getattr(factors, name)
            for place, factors in sorted(self.of.items(), key=lambda item: str(item[0]))
            for name in ("left", "right", "exponents")
        }
        return bytes(save(arrays, {"format": FORMAT}))

    def loras(self, strength: float = 1.0) -> Iterator[tuple[Place, Matrix, Matrix]]:
        """Yield each matrix with B `[m, r]` and A `[r, n]` of a LoRA of scale 1, in float32: B A is the change."""
        for place, found in self.of.items():
            # Half of the power of two to each side, so that neither is very small.
            first = found.exponents // 2
            scales = [numpy.exp2(half.astype(numpy.float64)) for half in (first, found.exponents - first)]
            yield (
                place,
                (found.left * scales[0] * strength).astype(numpy.float32),
                (found.right * scales[1][:, None]).astype(numpy.float32),
            )

    @cached_property
    def by_tensor(self) -> dict[str, list[tuple[Place, Factors]]]:
        """The matrices of each tensor."""
        found: dict[str, list[tuple[Place, Factors]]] = {}
        for place, factors in self.of.items():
            found.setdefault(place.tensor, []).append((place, factors))
        return found


def _matrix_axes(box: Box) -> tuple[int, ...]:
    """The two dimensions of a box along which its matrix lies; fewer or more if it does not hold a matrix."""
    return (0, 1) if len(box) == 2 else tuple(axis for axis, (low, high) in enumerate(box) if high - low != 1)


def read_factors(path: Path) -> FactorTable:
    """Read a file of factors.

    Raises:
        CheckpointError: If it cannot be read, is not such a file, or holds what `quantize` does not make.
    """
    try:
        if not path.is_file():
            raise CheckpointError(
                f"the file of directions {path} does not exist; put it next to the recipe, or write there where it is"
            )
        refuse_special(path)
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is too large for a file of directions: it has {size / 1e9:.1f} GB")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the directions {path}: {error.strerror}") from error
    return factors_in(content, str(path))


def factors_in(content: bytes, name: str) -> FactorTable:
    """Read the content of a file of factors; raises as `read_factors` does, with the file's name."""
    try:
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{name} is not a file of directions: {str(error)[:200]}") from error
    found: dict[Place, dict[str, numpy.ndarray]] = {}
    # The library gives them in an order that differs from call to call.
    for key, array in sorted(arrays.items()):
        match = _NAME.fullmatch(key)
        if match is None or array.dtype != numpy.int16:
            raise CheckpointError(f"{name} is not a file of directions: it holds {key[:80]!r} of {array.dtype}")
        box = match[2] and tuple((int(first), int(stop)) for first, stop in re.findall(r"(\d+):(\d+)", match[2]))
        place = Place(match[1], box or None)
        if f"{place}.{match[3]}" != key:
            raise CheckpointError(f"{name} is not a file of directions: it holds {key[:80]!r}")
        found.setdefault(place, {})[match[3]] = array
    if not found:
        raise CheckpointError(f"{name} holds no directions")
    for place, parts in found.items():
        if what := _damage(parts):
            raise CheckpointError(f"{name} is damaged: the factors of {str(place)[:120]!r} {what}")
    table = FactorTable({place: Factors(**parts) for place, parts in found.items()})
    for places in table.by_tensor.values():
        if len(places) > MAX_PLACES:
            raise CheckpointError(f"{name} is damaged: it holds {len(places)} matrices of one tensor")
        for (one, _), (other, _) in combinations(places, 2):
            if (
                one.box is None
                or other.box is None
                or len(one.box) != len(other.box)
                or intersection(one.box, other.box)
            ):
                raise CheckpointError(
                    f"{name} is damaged: it holds {str(one)[:120]!r} and {str(other)[:120]!r}, which overlap"
                )
    return table


def _damage(parts: Mapping[str, numpy.ndarray]) -> str | None:
    """What is wrong with the arrays of one matrix; None if `quantize` can have made them."""
    if len(parts) != 3:
        return "are not complete"
    left, right, exponents = (parts[name] for name in ("left", "right", "exponents"))
    if (left.ndim, right.ndim, exponents.ndim) != (2, 2, 1) or not (
        left.shape[1] == right.shape[0] == len(exponents) > 0
    ):
        return "do not fit together"
    if not (left.any(axis=0).all() and right.any(axis=1).all()):
        return "hold a direction that is zero"
    lowest, highest = int(exponents.min()), int(exponents.max())
    # Sums are then float32 numbers, and exact.
    bits = PRODUCT + math.ceil(math.log2(len(exponents) + 1))
    if lowest < -1000 or highest + bits > 127 or highest - lowest > _max_spread(len(exponents)):
        return "are out of range"
    return None


def unfit(table: FactorTable, shapes: Shapes) -> str | None:
    """What is wrong with a table's matrices, given the shapes of the target's tensors; None if each exists there."""
    for place, factors in table.of.items():
        name, shape = str(place)[:120], shapes.get(place.tensor)
        if shape is None:
            return f"holds directions of {name!r}, which the target does not have"
        box = place.box or whole_box(shape)
        is_inside = len(box) == len(shape) and all(
            low < high <= size for (low, high), size in zip(box, shape, strict=True)
        )
        sizes = [box[axis][1] - box[axis][0] for axis in _matrix_axes(box)]
        if not is_inside or sizes != [factors.left.shape[0], factors.right.shape[1]]:
            return (
                f"holds directions of {name!r} for a matrix of {factors.left.shape[0]} x {factors.right.shape[1]}, but "
                f"the target's tensor is {list(shape)}"
            )
    return None


def misfit(factors: Factors, difference: Iterable[Matrix]) -> str | None:
    """Say why the factors of a matrix are not made of directions of D = source - target; None if they are.

    They are if the rows span a space of right singular vectors of D, so that D^T D maps it onto itself, and the columns
    lie in D's image of it, both within `TOLERANCE`; and if the change is at most `MAX_WEIGHT` times D along its
    directions: L R = U S^1/2 A S^1/2 V^T, where no singular value of A exceeds it.

    Args:
        factors: Of the matrix, `[m, n]`; none of its products is zero.
        difference: D, float32, in blocks of whole rows, in order; needed one at a time.
    """
    left, right = factors.left.astype(numpy.float64), factors.right.astype(numpy.float64)
    # An orthonormal basis of the rows' span; as columns.
    rows, _ = numpy.linalg.qr(right.T)
    image, back, start = numpy.zeros((len(left), rows.shape[1])), numpy.zeros_like(rows), 0
    # A damaged source may hold infinite values.
    with numpy.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for block in difference:
            exact = block.astype(numpy.float64)
            part = image[start : start + len(exact)] = exact @ rows
            back += exact.T @ part
            start += len(exact)
        if not (numpy.isfinite(image).all() and numpy.isfinite(back).all()):
            return "its factors are not of source - target, which holds values that are not finite"
        u, sizes, turn = numpy.linalg.svd(image, full_matrices=False)
        # The singular vectors within the span, the largest first; D^T D v = s^2 v.
        v = rows @ turn.T
        strayed = back @ turn.T
        strayed -= rows @ (rows.T @ strayed)
        errors = numpy.linalg.norm(strayed, axis=0) / sizes**2
        apart = left - u @ (u.T @ left)
        shares = numpy.linalg.norm(apart, axis=0) / numpy.linalg.norm(left, axis=0)
        scaled = (u.T @ left) * numpy.exp2(factors.exponents.astype(numpy.float64)) @ (right @ v)
        core = scaled / numpy.sqrt(sizes)[:, None] / numpy.sqrt(sizes)
    for found, what in (
        (errors, "the rows are not right singular vectors"),
        (shares, "the columns are not sums of left ones"),
    ):
        if not float(found.max()) <= TOLERANCE:
            return f"its factors are not of source - target: {what}, {float(found.max()):.2g} off"
    weight = float(numpy.linalg.norm(core, 2)) if numpy.isfinite(core).all() else math.inf
    if not weight <= MAX_WEIGHT * (1 + TOLERANCE):
        return f"it moves {weight:.3g} times as far as the source along a direction; at most {MAX_WEIGHT:g} are allowed"
    return None
