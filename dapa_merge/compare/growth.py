"""The curve of one recipe: edits that grow from one block of neurons to the whole MLP, by DAPA and at random."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.compare.curve import Stages, best_path, edit_of, edit_sizes, random_path, weighed_pieces
from dapa_merge.compare.measuring import Measuring, Model
from dapa_merge.compare.options import CompareOptions
from dapa_merge.compare.result import DAPA, Point, mean_skill
from dapa_merge.errors import CheckpointError
from dapa_merge.evaluate.batching import DoesNotFit
from dapa_merge.evaluate.figures import Response
from dapa_merge.progress import Reporter
from dapa_merge.search.journal import Journal
from dapa_merge.search_testers import note_of


class Growth:
    """Edits of more and more pieces of the source.

    Their order in DAPA's path is by attribution, as a search's prior, but between the source's and the target's
    responses: where gates bring nothing, the full transplant has none that refuse. The prompts are the search's, or all
    if the recipe names its layers.

    Attributes:
        why_not: Why the pieces could not be weighed, once `points` was asked for.
    """

    def __init__(
        self,
        stages: Stages,
        prompts: Sequence[str],
        measuring: Measuring,
        journal: Journal,
        wanted: CompareOptions,
        reporter: Reporter,
    ) -> None:
        """Weighs and measures nothing yet.

        Args:
            stages: What edits grow through.
            prompts: Harmful ones, by which the pieces are weighed.
            measuring: Measures the edits.
            journal: Keeps the weights of the pieces.
            wanted: How many edits.
            reporter: Hears of the steps.
        """
        self._stages = stages
        self._prompts = prompts
        self._measuring = measuring
        self._journal = journal
        self._wanted = wanted
        self._reporter = reporter
        self._source: list[Response] | None = None
        self.why_not: str | None = None

    @cached_property
    def _pieces(self) -> tuple[Unit, ...]:
        return weighed_pieces(self._measuring.plan, self._stages, self._wanted.rows_per_block)

    @cached_property
    def _note(self) -> str:
        return note_of("attribution", self._pieces)

    @property
    def is_weighed(self) -> bool:
        """Whether the journal says how the pieces weigh, so that the source need not be heard."""
        return self._note in self._journal.notes

    def hear(self, source: Model) -> None:
        """Ask the source, which is loaded, what the pieces are weighed by."""
        self._source = self._measuring.answers(source, self._prompts, "source")

    def points(self) -> Iterator[Point]:
        """Edits of the same sizes on each path; none if the pieces cannot be weighed."""
        if (scores := self._scores()) is None:
            return
        measuring, wanted = self._measuring, self._wanted
        plan, rows = measuring.plan, wanted.rows_per_block
        paths = {DAPA: best_path(plan, self._stages, scores, rows)}
        sizes = edit_sizes(plan, paths[DAPA], wanted.num_points)
        for seed in range(wanted.seed, wanted.seed + wanted.num_seeds):
            paths[f"random seed {seed}"] = random_path(plan, self._stages, rows, seed)
        total = len(paths) * len(sizes)
        self._reporter.say(f"measuring edits of {len(sizes)} sizes on {len(paths)} paths")
        with self._reporter.task("edits of every size", total) as done:
            for name, path in paths.items():
                for size in sizes:
                    units = edit_of(plan, path, size)
                    figures = measuring.edit(units, name, Reporter()).figures
                    yield Point(
                        name, plan.share(units), len(units), figures.dsr, figures.dsr_interval, figures.over_refusal,
                        mean_skill(figures), figures.perplexity,
                    )  # fmt: skip
                    done(1)

    def _scores(self) -> Mapping[Unit, float] | None:
        try:
            if self._note not in self._journal.notes:
                self._journal.note(self._note, self._weigh())
            found = self._journal.notes[self._note]
        except DoesNotFit as error:
            # Not noted: another device or another hour may have the memory.
            found = str(error)
        if isinstance(found, str):
            self.why_not = found
            self._reporter.say(f"no edits of every size, because {found}")
            return None
        return dict(zip(self._pieces, found, strict=True))

    def _weigh(self) -> list[float] | str:
        """The weights of the pieces; or why these models give none."""
        from dapa_merge.bench import MAX_CONTRASTS, effects_between

        assert self._source is not None
        live, limit = self._measuring.live, self._measuring.meter.batch_size.limit
        said = self._measuring.answers((live.model, live.tokenizer), self._prompts, "target")
        try:
            with self._reporter.task("weighing pieces by one backward pass", 2 * MAX_CONTRASTS) as done:
                found = effects_between(live, self._pieces, said, self._source, limit, done)
        except (ValueError, CheckpointError) as error:
            return str(error)
        return [found[piece] for piece in self._pieces]
