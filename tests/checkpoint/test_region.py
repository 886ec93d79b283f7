from __future__ import annotations

import math

import numpy
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.region import Region, intersection, moved, remainder, whole_box
from dapa_merge.checkpoint.region import TensorBox as Part

SIZES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes(draw, shape):
    return tuple(
        (first, draw(st.integers(first + 1, size))) for size in shape for first in (draw(st.integers(0, size - 1)),)
    )


def tensor_of(shape, start=16):
    return Tensor("t", "f.safetensors", "F16", shape, start, start + 2 * math.prod(shape))


def cells(shape, box):
    """Which elements of a tensor of that shape are in a box, as positions in the file."""
    return numpy.arange(math.prod(shape)).reshape(shape)[tuple(slice(*rows) for rows in box)].reshape(-1).tolist()


@given(st.data())
def test_the_runs_of_a_region_are_its_elements_in_order(data):
    shape = data.draw(SIZES)
    box = data.draw(boxes(shape))
    region = Region(tensor_of(shape), box)
    positions = []
    for start, num_bytes in region.runs():
        assert num_bytes > 0
        positions += range(start, start + num_bytes, 2)
    assert positions == [16 + 2 * cell for cell in cells(shape, box)]
    assert region.num_bytes == 2 * len(positions) == 2 * region.num_parameters


@given(st.data())
def test_rows_that_lie_together_are_one_run(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    (rows,) = data.draw(boxes(shape[:1]))
    assert len(list(Region(tensor_of(shape), (rows, *whole_box(shape[1:]))).runs())) == 1


@given(st.data())
def test_what_is_left_of_a_box_is_each_element_that_is_in_no_hole_once(data):
    shape = data.draw(SIZES)
    holes = data.draw(st.lists(boxes(shape), max_size=3))
    left = [cell for box in remainder(whole_box(shape), holes) for cell in cells(shape, box)]
    in_holes = {cell for hole in holes for cell in cells(shape, hole)}
    assert sorted(left) == sorted(set(range(math.prod(shape))) - in_holes)


@given(st.data())
def test_the_intersection_is_what_two_boxes_share(data):
    shape = data.draw(SIZES)
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = intersection(one, other)
    expected = sorted(set(cells(shape, one)) & set(cells(shape, other)))
    assert (cells(shape, common) if common is not None else []) == expected


@given(st.data())
def test_a_part_of_a_box_is_found_again_where_the_box_was_moved_to(data):
    shape = data.draw(SIZES)
    origin = data.draw(boxes(shape))
    box = intersection(origin, data.draw(boxes(shape)))
    if box is None:
        return
    sizes = tuple(stop - first for first, stop in origin)
    # The same values elsewhere: in a tensor of their own, or as those of the third expert of five.
    for destination in (whole_box(sizes), ((2, 3), *whole_box(sizes))):
        there = moved(box, origin, destination)
        assert moved(there, destination, origin) == box
        values = numpy.arange(math.prod(sizes)).reshape(sizes)
        relative = tuple(slice(first - low, stop - low) for (first, stop), (low, _) in zip(box, origin, strict=True))
        picked = values[tuple(slice(*rows) for rows in there[len(there) - len(sizes) :])]
        assert picked.tolist() == values[relative].tolist()


@given(st.integers(0, 30), st.integers(1, 30))
def test_a_part_holds_the_rows_of_a_range_that_are_its_own(first, size):
    part = Part("t", ((4, 14), (0, 3)), axis=0, first_row=10)
    narrowed = part.narrow((first, first + size))
    expected = [row for row in range(first, first + size) if 10 <= row < 20]
    if not expected:
        assert narrowed is None
    else:
        assert narrowed.first_row == expected[0]
        assert narrowed.num_rows == len(expected)
        assert narrowed.box == ((expected[0] - 6, expected[-1] - 5), (0, 3))


def test_a_region_is_named_by_what_it_is_of_its_tensor():
    tensor = tensor_of((4, 3, 2))
    assert Region.of(tensor).name == "t"
    assert Region(tensor, ((1, 2), (0, 3), (0, 2))).name == "t[1:2]"
    assert Region(tensor, ((0, 4), (1, 2), (0, 2))).name == "t[0:4,1:2]"
