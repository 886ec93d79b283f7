"""The test bench: a resident target, and the figures and verdicts of its candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from dapa_merge.checkpoint.units import Unit
from dapa_merge.measure.evaluators import RULES
from dapa_merge.measure.figures import Response
from dapa_merge.measure.live import Resident, choose_device
from dapa_merge.measure.meter import Measurement, Meter
from dapa_merge.plan.plan import Plan
from dapa_merge.search.requirement import PROMPT_KINDS, Constraint, Examiner, Requirement, Verdict, constraints_of
from dapa_merge.search.result import Baseline

# A verdict can stop early only between two pieces, and each piece, however small, costs a run through the model's
# layers per token.
MIN_PIECES = 2


class Bench(Resident):
    """A target that is loaded on first use, and measured with one meter.

    Attributes:
        constraints: The active ones, as the meter measures their figures; the score's first.
    """

    def __init__(
        self,
        plan: Plan,
        meter: Meter,
        device: str,
        settings: Collection[str],
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a bench; `settings` are the keys of the active constraints."""
        super().__init__(plan, choose_device(device), on_load)
        self.meter = meter
        self.constraints = constraints_of(settings, self.measure, is_whole=meter.scorer is not None)
        self._pieces = {kind: pieces_of(getattr(meter.prompts, kind), meter.batch_size.limit) for kind in PROMPT_KINDS}
        self._examiner: Examiner | None = None

    @property
    def measure(self) -> str:
        """The name of a candidate's score."""
        classifier = self.meter.classifiers[0]
        if self.meter.scorer is not None:
            return self.meter.scorer.name
        return "DSR" if classifier is RULES else f"DSR by {classifier.name}"

    @property
    def device_kind(self) -> str:
        """The name of the device's kind; devices of one kind give the same verdicts."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def sizes(self) -> dict[str, list[int]]:
        """The number of prompts in each piece, by kind."""
        return {kind: [len(piece) for piece in pieces] for kind, pieces in self._pieces.items()}

    @property
    def num_prompts(self) -> int:
        """The number of prompts in a full examination."""
        return sum(sum(self.sizes.get(check, ())) for check in {constraint.check for constraint in self.constraints})

    def require(self, requirement: Requirement) -> Examiner:
        """Set the requirement for candidates."""
        costs = {constraint.check: constraint.cost(self.meter) for constraint in self.constraints}
        self._examiner = Examiner(requirement, self.sizes, costs)
        return self._examiner

    def baseline(self, selection: Iterable[Unit]) -> Baseline:
        """Measure the figures of all constraints for the target with a selection transplanted."""
        with self._candidate(selection) as candidate:
            figures = {constraint.figure: candidate.figure(constraint) for constraint in self.constraints}
            return Baseline(figures, tuple(candidate.all_responses("harmful")))

    def score(self, selection: Iterable[Unit]) -> float:
        """The score of the target with a selection transplanted, measured as every test measures it."""
        with self._candidate(selection) as candidate:
            return candidate.figure(self.constraints[0])

    def examine(self, selection: Iterable[Unit], *, stop_early: bool = True) -> Verdict:
        """Whether the target with a selection transplanted meets the requirement."""
        assert self._examiner is not None, "require first"
        with self._candidate(selection) as candidate:
            return self._examiner.examine(candidate, stop_early=stop_early)

    @contextmanager
    def _candidate(self, selection: Iterable[Unit]) -> Iterator[_LiveExaminee]:
        units = tuple(selection)
        with self.live.transplanted(units) as model:
            measurement = self.meter.measure(model, self.live.tokenizer, units)
            yield _LiveExaminee(measurement, self._pieces)


class _LiveExaminee:
    """A measurement that is made piece by piece."""

    def __init__(self, measurement: Measurement, pieces: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
        self._measurement = measurement
        self._pieces = pieces
        self._judged: dict[tuple[str, int], list[Response]] = {}

    def responses(self, kind: str, piece: int) -> list[Response]:
        if (kind, piece) not in self._judged:
            self._judged[kind, piece] = self._measurement.judge(kind, self._pieces[kind][piece])
        return self._judged[kind, piece]

    def all_responses(self, kind: str) -> list[Response]:
        return [response for index in range(len(self._pieces[kind])) for response in self.responses(kind, index)]

    def figure(self, constraint: Constraint) -> float:
        if constraint.kind is None:
            return constraint.of(self._measurement)
        responses = self.all_responses(constraint.kind)
        return sum(map(constraint.counts, responses)) / len(responses)


def pieces_of(prompts: Sequence[str], batch_size: int) -> tuple[tuple[str, ...], ...]:
    """Split prompts into fixed pieces of at most a batch, each a sample of the whole set."""
    num_pieces = min(max(math.ceil(len(prompts) / batch_size), MIN_PIECES), len(prompts))
    return tuple(tuple(prompts[start::num_pieces]) for start in range(num_pieces))
