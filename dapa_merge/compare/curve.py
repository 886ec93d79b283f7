"""The curve of one recipe: edits that grow from one block of neurons to the whole MLP, by DAPA and at random."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

from dapa_merge.checkpoint.units import Unit
from dapa_merge.compare.measuring import Measuring, Model
from dapa_merge.compare.methods import DAPA
from dapa_merge.compare.result import CompareOptions, Point, mean_skill
from dapa_merge.compare.selections import blocks_of, mlp_units, nearest_number, sums_of
from dapa_merge.errors import CheckpointError
from dapa_merge.measure.decode import DoesNotFit
from dapa_merge.measure.figures import Response
from dapa_merge.plan.plan import Plan, cut
from dapa_merge.progress import LOG, advance, task
from dapa_merge.search.attribution import MAX_CONTRASTS, effects_between
from dapa_merge.search.journal import Journal, Missing
from dapa_merge.search.workers import note_of


@dataclass(frozen=True)
class EditPath:
    """Pieces in the order in which a growing edit takes them.

    Attributes:
        pieces: Units and blocks of units, which do not overlap.
        marks: Numbers of pieces at which a stage is complete; these edits are measured whatever their size.
    """

    pieces: tuple[Unit, ...]
    marks: tuple[int, ...]


@dataclass(frozen=True)
class GrowthOrder:
    """The stages of growing edits: the candidates of the search first, then the rest of the MLPs.

    Attributes:
        selection: The search's selection; may be empty.
        others: Its other candidates, or other rows of the selected units.
    """

    selection: tuple[Unit, ...]
    others: tuple[Unit, ...]
    candidates: tuple[Unit, ...]
    rest: tuple[Unit, ...]

    @classmethod
    def of(cls, selection: Sequence[Unit], searched: Plan, units: Iterable[Unit]) -> GrowthOrder:
        """The stages for a search's selection and plan, in a model with these units of every module."""
        kept = set(selection)
        others = tuple(unit for unit in cut(searched, selection).units if unit not in kept)
        candidates = tuple(dict.fromkeys(unit.whole for unit in searched.units))
        inside = {(unit.layer, unit.module) for unit in candidates}
        rest = [unit for unit in mlp_units(units) if (unit.layer, unit.module) not in inside]
        whole = {unit.layer for unit in candidates if unit.module == "mlp"}
        return cls(tuple(selection), others, candidates, tuple(unit for unit in rest if unit.layer not in whole))


def weighed_pieces(plan: Plan, stages: GrowthOrder, rows: int | None) -> tuple[Unit, ...]:
    """The pieces whose scores `best_path` needs."""
    return tuple(chain.from_iterable(_stages(plan, stages, rows)))


def best_path(plan: Plan, stages: GrowthOrder, scores: Mapping[Unit, float], rows: int | None) -> EditPath:
    """The selection in blocks of `rows`, then the other candidates, then the rest; each by descending score.

    Without a selection, the candidates come in blocks.
    """
    return _path([sorted(pieces, key=lambda piece: -scores[piece]) for pieces in _stages(plan, stages, rows)])


def _stages(plan: Plan, stages: GrowthOrder, rows: int | None) -> list[Sequence[Unit]]:
    if stages.selection:
        return [blocks_of(plan, stages.selection, rows), stages.others, stages.rest]
    return [blocks_of(plan, stages.candidates, rows), stages.rest]


def random_path(plan: Plan, stages: GrowthOrder, rows: int | None, seed: int) -> EditPath:
    """Random blocks of the candidates, then the rest in random order."""
    generator = random.Random(f"curve {seed}")
    pools = (blocks_of(plan, stages.candidates, rows), stages.rest)
    return _path([generator.sample(pool, len(pool)) for pool in pools])


def _path(stages: Sequence[Sequence[Unit]]) -> EditPath:
    marks = dict.fromkeys(mark for mark in accumulate(map(len, stages)) if mark)
    return EditPath(tuple(chain.from_iterable(stages)), tuple(marks))


def edit_sizes(plan: Plan, path: EditPath, num_points: int) -> tuple[int, ...]:
    """The sizes of the edits on a path, in parameters: about `num_points` at equal factors, and those at its marks."""
    sums = sums_of(plan, path.pieces)
    wanted = [sums[0] * (sums[-1] / sums[0]) ** (step / max(1, num_points - 1)) for step in range(num_points)]
    reached = {next((total for total in sums if total >= size - 0.5), sums[-1]) for size in wanted}
    return tuple(sorted(reached | {sums[mark - 1] for mark in path.marks}))


def edit_of(plan: Plan, path: EditPath, num_parameters: int) -> tuple[Unit, ...]:
    """The first pieces of a path, at least one, with a total of parameters nearest to a number."""
    return path.pieces[: nearest_number(plan, path.pieces, num_parameters)]


@dataclass
class Growth:
    """Edits of more and more pieces of the source.

    DAPA's path orders them by attribution, like a search's prior, but between the responses of source and target: where
    gates have no effect, the full transplant does not refuse. The prompts are the search's, or all if the recipe names
    its layers.

    Attributes:
        prompts: The harmful prompts for weighing the pieces.
        journal: Keeps the weights of the pieces.
        heard: The source's responses, once it was asked.
        why_not: The reason if the pieces could not be weighed, known after `points`.
    """

    stages: GrowthOrder
    prompts: Sequence[str]
    measuring: Measuring
    journal: Journal
    wanted: CompareOptions
    heard: list[Response] | None = None
    why_not: str | None = None

    @cached_property
    def _pieces(self) -> tuple[Unit, ...]:
        return weighed_pieces(self.measuring.plan, self.stages, self.wanted.rows_per_block)

    @cached_property
    def _note(self) -> str:
        return note_of("attribution", self._pieces)

    @property
    def is_weighed(self) -> bool:
        """Whether the journal has the weights of the pieces, so the source need not be asked."""
        return self._note in self.journal.notes

    def hear(self, source: Model) -> None:
        """Ask the loaded source the prompts for weighing the pieces."""
        self.heard = self.measuring.answers(source, self.prompts, "source")

    def points(self) -> Iterator[Point]:
        """Yield edits of the same sizes on each path; none if the pieces cannot be weighed."""
        if (scores := self._scores()) is None:
            return
        measuring, wanted = self.measuring, self.wanted
        plan, rows = measuring.plan, wanted.rows_per_block
        paths = {DAPA: best_path(plan, self.stages, scores, rows)}
        sizes = edit_sizes(plan, paths[DAPA], wanted.num_points)
        for seed in range(wanted.seed, wanted.seed + wanted.num_seeds):
            paths[f"random seed {seed}"] = random_path(plan, self.stages, rows, seed)
        total = len(paths) * len(sizes)
        LOG.info(f"measuring edits of {len(sizes)} sizes on {len(paths)} paths")
        with task("edits of every size", total, "edits"):
            for name, path in paths.items():
                for size in sizes:
                    units = edit_of(plan, path, size)
                    with suppress(Missing):
                        figures = measuring.edit(units, name, logging.DEBUG).figures
                        yield Point(
                            name, plan.share(units), len(units), figures.dsr, figures.dsr_interval,
                            figures.over_refusal, mean_skill(figures), figures.perplexity,
                        )  # fmt: skip
                    advance(1, "edits")

    def _scores(self) -> Mapping[Unit, float] | None:
        try:
            found = self.journal.once(self._note, self._weigh, alone=True)
        except Missing:
            return None
        except DoesNotFit as error:
            # Not recorded, because another device, or the same one later, may have enough memory.
            found = str(error)
        if isinstance(found, str):
            self.why_not = found
            LOG.info(f"no edits of every size, because {found}")
            return None
        return dict(zip(self._pieces, found, strict=True))

    def _weigh(self) -> list[float] | str:
        """The weights of the pieces, or the reason if these models give none."""
        if self.heard is None:
            # One model at a time, as if it had been asked before.
            self.measuring.close()
            with self.measuring.source() as model:
                self.hear(model)
        assert self.heard is not None
        live, limit = self.measuring.live, self.measuring.meter.batch_size.limit
        said = self.measuring.answers((live.model, live.tokenizer), self.prompts, "target")
        try:
            with task("weighing pieces by one backward pass", 2 * MAX_CONTRASTS, "responses"):
                found = effects_between(live, self._pieces, said, self.heard, limit)
        except (ValueError, CheckpointError) as error:
            return str(error)
        return [found[piece] for piece in self._pieces]
