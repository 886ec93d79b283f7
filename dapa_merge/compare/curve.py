"""Edits of every size, from one block of neurons to the whole MLP: their order, their sizes, and the best. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.plan import Plan, cut
from dapa_merge.compare.layers import blocks_of, mlp_units


@dataclass(frozen=True)
class EditPath:
    """Pieces in the order in which a growing edit takes them.

    Attributes:
        pieces: Units and blocks of units, none of which overlap.
        marks: Numbers of pieces at which something is complete, and that are measured whatever their size.
    """

    pieces: tuple[Unit, ...]
    marks: tuple[int, ...]


@dataclass(frozen=True)
class Stages:
    """What edits grow through: first inside the candidates of the search, then on to the whole MLP.

    Attributes:
        selection: What the search kept; may be nothing.
        others: Its other candidates; of a unit of which it kept some rows, the other rows.
        candidates: What it chose from, in whole units.
        rest: What else the MLPs have.
    """

    selection: tuple[Unit, ...]
    others: tuple[Unit, ...]
    candidates: tuple[Unit, ...]
    rest: tuple[Unit, ...]

    @classmethod
    def of(cls, selection: Sequence[Unit], searched: Plan, units: Iterable[Unit]) -> Stages:
        """The stages of a search's plan, in a model with these units, of every module."""
        kept = set(selection)
        others = tuple(unit for unit in cut(searched, selection).units if unit not in kept)
        candidates = tuple(dict.fromkeys(unit.whole for unit in searched.units))
        inside = {(unit.layer, unit.module) for unit in candidates}
        rest = [unit for unit in mlp_units(units) if (unit.layer, unit.module) not in inside]
        whole = {unit.layer for unit in candidates if unit.module == "mlp"}
        return cls(tuple(selection), others, candidates, tuple(unit for unit in rest if unit.layer not in whole))


def weighed_pieces(plan: Plan, stages: Stages, rows: int | None) -> tuple[Unit, ...]:
    """What must be weighed for `best_path`: blocks of what was selected, and everything else whole."""
    first, others = _first_and_others(plan, stages, rows)
    return (*first, *others, *stages.rest)


def best_path(plan: Plan, stages: Stages, scores: Mapping[Unit, float], rows: int | None) -> EditPath:
    """What the search kept, block by block, then the other candidates, then the rest; each by descending score.

    Where it kept nothing, blocks of the candidates by their scores.

    Args:
        plan: The models.
        stages: What there is.
        scores: How much each of `weighed_pieces` is expected to do.
        rows: Of a block.
    """
    first, others = _first_and_others(plan, stages, rows)
    ordered = [sorted(pieces, key=lambda piece: -scores[piece]) for pieces in (first, others, stages.rest)]
    return _path(ordered)


def _first_and_others(plan: Plan, stages: Stages, rows: int | None) -> tuple[Sequence[Unit], Sequence[Unit]]:
    if stages.selection:
        return blocks_of(plan, stages.selection, rows), stages.others
    return blocks_of(plan, stages.candidates, rows), ()


def random_path(plan: Plan, stages: Stages, rows: int | None, seed: int) -> EditPath:
    """Random blocks of the candidates, then the rest in random order."""
    generator = random.Random(f"curve {seed}")
    pools = (blocks_of(plan, stages.candidates, rows), stages.rest)
    return _path([generator.sample(pool, len(pool)) for pool in pools])


def _path(stages: Sequence[Sequence[Unit]]) -> EditPath:
    pieces: list[Unit] = []
    marks: list[int] = []
    for stage in stages:
        pieces += stage
        marks.append(len(pieces))
    return EditPath(tuple(pieces), tuple(dict.fromkeys(mark for mark in marks if mark)))


def edit_sizes(plan: Plan, path: EditPath, num_points: int) -> tuple[int, ...]:
    """How many parameters the edits on a path change: from its first piece to all, by equal factors; and its marks.

    Args:
        plan: The models.
        path: The path.
        num_points: How many sizes beside the marks, roughly.
    """
    sums = _sums(plan, path)
    wanted = [sums[0] * (sums[-1] / sums[0]) ** (step / max(1, num_points - 1)) for step in range(num_points)]
    reached = {next((total for total in sums if total >= size - 0.5), sums[-1]) for size in wanted}
    return tuple(sorted(reached | {sums[mark - 1] for mark in path.marks}))


def edit_of(plan: Plan, path: EditPath, num_parameters: int) -> tuple[Unit, ...]:
    """The first pieces of a path whose parameters come nearest to so many; at least one piece."""
    sums = _sums(plan, path)
    number = min(range(len(sums)), key=lambda index: abs(sums[index] - num_parameters)) + 1
    return path.pieces[:number]


def _sums(plan: Plan, path: EditPath) -> list[int]:
    total, sums = 0, []
    for piece in path.pieces:
        total += plan.num_parameters((piece,))
        sums.append(total)
    return sums
