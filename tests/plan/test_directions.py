"""Factors of directions: stored small, and the same sum everywhere, whoever adds it up in whatever order."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from dapa_merge.checkpoint.header import Tensor
from dapa_merge.checkpoint.region import Region
from dapa_merge.errors import CheckpointError
from dapa_merge.plan import directions
from dapa_merge.plan.directions import (
    TOLERANCE,
    Factors,
    FactorTable,
    Place,
    misfit,
    quantize,
    read_factors,
    unfit,
)


def drawn(rank: int, rows: int, columns: int, seed: int, smallest: float = 1e-4) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Random factors with weights from `smallest` to 1, some zero."""
    random = numpy.random.default_rng(seed)
    weights = smallest ** random.random(rank) * (random.random(rank) > 0.1)
    return random.standard_normal((rows, rank)) * weights, random.standard_normal((rank, columns))


def exact(factors: Factors) -> list[list[Fraction]]:
    """The sum of the directions as rational numbers."""
    powers = [Fraction(2) ** int(exponent) for exponent in factors.exponents]
    left, right = factors.left.tolist(), factors.right.tolist()
    return [
        [sum(row[i] * power * right[i][column] for i, power in enumerate(powers)) for column in range(len(right[0]))]
        for row in left
    ]


SHAPES = st.tuples(st.integers(0, 64), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))


@given(shape=SHAPES, smallest=st.sampled_from([1e-4, 1e-9, 1.0]), data=st.data())
def test_every_tile_in_every_order_is_the_exact_sum(shape, smallest, data):
    factors = quantize(*drawn(*shape, smallest))
    if not factors.rank:
        assert not factors.product().any()
        return
    wanted = exact(factors)
    order = numpy.array(data.draw(st.permutations(range(factors.rank))))
    shuffled = Factors(factors.left[:, order], factors.right[order], factors.exponents[order])
    rows, columns = (
        slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape[1:3]
    )
    for found in (factors, shuffled):
        tile = found.product(rows, columns)
        assert tile.dtype == numpy.float32
        # A float64 that is the rational number, rounded once.
        assert tile.tolist() == [[float(numpy.float32(float(x))) for x in row[columns]] for row in wanted[rows]]
    for row in wanted:
        for value in row:
            assert Fraction(float(value)) == value


@given(shape=SHAPES)
def test_what_is_stored_is_close_to_what_was_given(shape):
    left, right = drawn(*shape)
    change = left @ right
    error = numpy.abs(quantize(left, right).product() - change).max(initial=0)
    assert error <= 2e-4 * numpy.linalg.norm(left) * numpy.linalg.norm(right) / max(numpy.sqrt(change.size), 1)


def test_the_number_of_threads_changes_no_bit():
    code = (
        "import hashlib, numpy; from dapa_merge.plan.directions import quantize; r = numpy.random.default_rng(0); "
        "f = quantize(r.standard_normal((301, 64)) * 1e-4 ** r.random(64), r.standard_normal((64, 257))); "
        "print(hashlib.sha256(f.product().tobytes()).hexdigest())"
    )
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    found = {
        subprocess.run(
            (sys.executable, "-c", code), env={**os.environ, **dict.fromkeys(names, n)}, capture_output=True, check=True
        ).stdout
        for n in "14"
    }
    assert len(found) == 1


def test_directions_that_are_zero_or_vanish_are_dropped_and_what_is_kept_is_still_a_direction():
    # Singular values of a spread that no 53 bits hold.
    random = numpy.random.default_rng(1)
    u, v = (numpy.linalg.qr(random.standard_normal((40, 40)))[0] for _ in range(2))
    values = numpy.geomspace(1, 1e-12, 40)
    difference = ((u * values) @ v.T).astype(numpy.float32)
    weights = numpy.where(numpy.arange(40) % 9 == 8, 0, 1.0)
    factors = quantize(u * values * weights, v.T)
    assert 8 < factors.rank < 35
    one = numpy.linalg.norm(factors.left.astype(float), axis=0) * numpy.exp2(factors.exponents.astype(float))
    sizes = one * numpy.linalg.norm(factors.right.astype(float), axis=1)
    kept = values[weights > 0][: factors.rank]
    assert numpy.allclose(sizes, kept, rtol=TOLERANCE / 2)
    leading = Factors(factors.left[:, :8], factors.right[:8], factors.exponents[:8])
    assert misfit(leading, [difference]) is None
    assert quantize(numpy.zeros((3, 2)), numpy.ones((2, 5))).rank == 0


def decomposed(shape: tuple[int, int], rank: int, seed: int = 0, weight: float = 1.0) -> tuple[Factors, numpy.ndarray]:
    """The leading directions of a random matrix, and the matrix."""
    difference = numpy.random.default_rng(seed).standard_normal(shape).astype(numpy.float32)
    u, s, vt = numpy.linalg.svd(difference.astype(float), full_matrices=False)
    return quantize(u[:, :rank] * s[:rank] * weight, vt[:rank]), difference


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (1, 5), (5, 1)])
@pytest.mark.parametrize("num_rows", [1, 3, 100])
def test_directions_of_a_matrix_fit_it_however_it_is_read(shape, num_rows):
    factors, difference = decomposed(shape, min(shape), weight=0.5)
    blocks = [difference[row : row + num_rows] for row in range(0, len(difference), num_rows)]
    assert misfit(factors, blocks) is None
    assert "which holds values that are not finite" in misfit(factors, [numpy.full_like(difference, numpy.nan)])


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_directions_of_another_matrix_do_not_fit(shape):
    factors, _ = decomposed(shape, 3)
    assert "the rows are not right singular vectors" in misfit(factors, [decomposed(shape, 3, seed=1)[1]])


def test_a_change_along_the_leading_directions_fits_in_any_mixture():
    # What a core makes: what direction j reads is written along any direction i.
    factors, difference = decomposed((12, 7), 3)
    left = factors.left * numpy.exp2(factors.exponents.astype(float))
    mixing = numpy.random.default_rng(2).standard_normal((3, 3)) / 3
    assert misfit(quantize(left @ mixing, factors.right), [difference]) is None


def test_a_column_that_is_written_along_no_direction_that_is_read_does_not_fit():
    factors, difference = decomposed((12, 7), 4)
    left = factors.left * numpy.exp2(factors.exponents.astype(float))
    mixed = quantize(left[:, :3] + left[:, 3:] / 10, factors.right[:3])
    assert "the columns are not sums of left ones" in misfit(mixed, [difference])


def test_a_row_that_is_half_of_two_directions_does_not_fit():
    factors, difference = decomposed((12, 7), 2)
    mixed = quantize(factors.left[:, :1] * 1.0, factors.right[:1] + factors.right[1:] * 1.0)
    assert "the rows are not right singular vectors" in misfit(mixed, [difference])


@pytest.mark.parametrize(("weight", "fits"), [(1.0, True), (4.0, True), (4.2, False), (-4.0, True), (1e-3, True)])
def test_nothing_moves_more_than_four_times_as_far_as_the_source(weight, fits):
    factors, difference = decomposed((9, 6), 3, weight=weight)
    what = misfit(factors, [difference])
    assert (what is None) is fits
    assert fits or "it moves 4.2 times as far as the source along a direction; at most 4 are allowed" in what


def tensor(name: str, *shape: int) -> Tensor:
    return Tensor(name, "model.safetensors", "BF16", shape, 0, 2 * int(numpy.prod(shape)))


def small(rows: int, columns: int, seed: int = 0) -> Factors:
    return quantize(*drawn(3, rows, columns, seed, 0.5))


TABLE = FactorTable(
    {
        Place("whole", None): small(8, 6),
        Place("fused", ((0, 8), (0, 6))): small(8, 6, 1),
        Place("fused", ((8, 20), (0, 6))): small(12, 6, 2),
        Place("columns", ((0, 6), (4, 9))): small(6, 5, 3),
        Place("experts", ((2, 3), (0, 16), (0, 4))): small(16, 4, 4),
        Place("experts", ((0, 1), (16, 32), (0, 4))): small(16, 4, 5),
        Place("row", None): small(1, 6, 6),
        Place("column", None): small(6, 1, 7),
    }
)
SIZES = {
    "whole": (8, 6), "fused": (20, 6), "columns": (6, 12), "experts": (4, 32, 4), "row": (1, 6), "column": (6, 1),
    "other": (8, 6),
}  # fmt: skip


def dense(name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The changes of a whole tensor, by brute force, and which matrix each of its elements lies in."""
    change, owner = numpy.zeros(SIZES[name], numpy.float32), numpy.full(SIZES[name], -1)
    for number, (place, factors) in enumerate(TABLE.of.items()):
        if place.tensor == name:
            slices = tuple(slice(*rows) for rows in place.box or [(0, size) for size in SIZES[name]])
            change[slices] = factors.product().reshape(change[slices].shape)
            owner[slices] = number
    return change, owner


@given(name=st.sampled_from(sorted(SIZES)), data=st.data())
def test_the_values_of_any_box_are_those_of_its_matrix(name, data):
    shape = SIZES[name]
    box = tuple(
        data.draw(st.tuples(st.integers(0, size - 1), st.integers(1, size)).filter(lambda rows: rows[0] < rows[1]))
        for size in shape
    )
    region = Region(tensor(name, *shape), box)
    change, owner = (array[region.slices()].reshape(-1) for array in dense(name))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(change)), st.integers(0, len(change)))))
    if len(set(owner)) == 1 and owner[0] >= 0:
        assert TABLE.values(region, start, stop).tolist() == change[start:stop].tolist()
    else:
        # Not in one matrix: the units of a plan never are.
        assert TABLE.find(region) is None
        assert not TABLE.values(region, start, stop).any()


def test_a_file_says_the_same_as_the_table_and_is_always_the_same(tmp_path):
    path = tmp_path / "dapa_directions.dat"
    path.write_bytes(TABLE.content())
    read = read_factors(path)
    backwards = FactorTable(dict(reversed(TABLE.of.items())))
    assert read.content() == TABLE.content() == backwards.content()
    assert read.digest == backwards.digest == TABLE.digest != FactorTable().digest == ""
    assert set(read.of) == set(TABLE.of)
    assert read.num_directions == sum(found.rank for found in TABLE.of.values())
    assert read.num_values == sum(
        found.rank * (found.left.shape[0] + found.right.shape[1]) for found in TABLE.of.values()
    )


def test_a_lora_of_scale_1_is_the_change():
    for place, left, right in TABLE.loras():
        assert left.dtype == right.dtype == numpy.float32
        assert numpy.array_equal(
            (left.astype(float) @ right.astype(float)).astype(numpy.float32), TABLE.of[place].product()
        )


def test_selected_regions_keep_their_factors():
    regions = [Region.of(tensor("whole", 8, 6)), Region(tensor("fused", 20, 6), ((8, 20), (0, 6)))]
    assert set(TABLE.selected(regions).of) == {Place("whole", None), Place("fused", ((8, 20), (0, 6)))}


def arrays(**changes: numpy.ndarray) -> dict[str, numpy.ndarray]:
    found = {"w.left": numpy.ones((3, 2)), "w.right": numpy.ones((2, 4)), "w.exponents": numpy.array([-30, -31])}
    return {name: array.astype(numpy.int16) for name, array in found.items()} | changes


def short(*values: int) -> numpy.ndarray:
    return numpy.array(values, numpy.int16)


BAD = {
    "another dtype": (arrays(**{"w.left": numpy.ones((3, 2), numpy.float32)}), "holds 'w.left' of float32"),
    "another name": (arrays(**{"w": short(1)}), "holds 'w' of int16"),
    "a box of nothing": (arrays(**{"v[:].left": short(1)}), r"'v\[:\]' are not complete"),
    "a box with three ends": (arrays(**{"v[1:2:3].left": short(1)}), r"'v\[1:2:3\]' are not complete"),
    "a box that is written twice": (arrays(**{"v[00:3,0:4].left": short(1)}), r"holds 'v\[00:3,0:4\].left'"),
    "no exponents": ({"w.left": arrays()["w.left"], "w.right": arrays()["w.right"]}, "'w' are not complete"),
    "three exponents": (arrays(**{"w.exponents": short(1, 2, 3)}), "'w' do not fit together"),
    "no directions": (
        {"w.left": numpy.ones((3, 0), numpy.int16), "w.right": numpy.ones((0, 4), numpy.int16), "w.exponents": short()},
        "'w' do not fit together",
    ),
    "no rows": (arrays(**{"w.left": numpy.ones((0, 2), numpy.int16)}), "'w' hold a direction that is zero"),
    "a zero": (arrays(**{"w.right": numpy.zeros((2, 4), numpy.int16)}), "'w' hold a direction that is zero"),
    "too large a power": (arrays(**{"w.exponents": short(110, 109)}), "'w' are out of range"),
    "the smallest number": (arrays(**{"w.exponents": short(-(2**15), -30)}), "'w' are out of range"),
    "a sum that is not exact": (arrays(**{"w.exponents": short(-30, -52)}), "'w' are out of range"),
    "nothing": ({}, "holds no directions"),
    "rows twice": (
        {f"{name}{key[1:]}": value for name in ("w[0:3,0:4]", "w[2:5,0:4]") for key, value in arrays().items()},
        r"'w\[0:3,0:4\]' and 'w\[2:5,0:4\]', which overlap",
    ),
    "a whole and a part": (
        {f"{name}{key[1:]}": value for name in ("w", "w[2:5,0:4]") for key, value in arrays().items()},
        "which overlap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_holds_anything_else_is_refused(case, tmp_path):
    content, what = BAD[case]
    path = tmp_path / "dapa_directions.dat"
    path.write_bytes(save(content))
    with pytest.raises(CheckpointError, match=what) as raised:
        read_factors(path)
    assert str(path) in str(raised.value)
    assert raised.value.exit_code == 4


def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "dapa_directions.dat"
    for name in (path, tmp_path, "/dev/zero"):
        with pytest.raises(CheckpointError, match="does not exist"):
            read_factors(type(path)(name))
    whole = TABLE.content()
    for damaged in (b"", whole[:7], whole[:100], whole[:-1], b"\xff" * 64, whole.replace(b'"I16"', b'"I17"', 1)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is not a file of directions"):
            read_factors(path)
    path.write_bytes(whole)
    monkeypatch.setattr(directions, "MAX_FILE_BYTES", 100)
    with pytest.raises(CheckpointError, match="too large for a file of directions"):
        read_factors(path)


@given(data=st.data())
def test_any_damage_to_a_file_is_read_or_refused_without_a_traceback(data, tmp_path_factory):
    content = bytearray(TABLE.content())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.dat"
    path.write_bytes(content)
    try:
        table = read_factors(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        unfit(table, SIZES)
        assert read_factors(path).digest == table.digest


def test_matrices_that_the_target_does_not_have_are_named():
    assert unfit(TABLE, SIZES) is None
    assert unfit(TABLE, {**SIZES, "row": (1, 7)}) == (
        "holds directions of 'row' for a matrix of 1 x 6, but the target's tensor is [1, 7]"
    )
    lacking = {name: shape for name, shape in SIZES.items() if name != "fused"}
    assert unfit(TABLE, lacking) == "holds directions of 'fused[0:8,0:6]', which the target does not have"
    for shape in ((4, 32), (4, 31, 4), (2, 32, 4)):
        assert "but the target's tensor is" in unfit(TABLE, {**SIZES, "experts": shape})
