"""Settings of methods, tried on the prompts of choice and search; only the one that is chosen sees the report's.

Every try is in the journal before the next is made. The rule is the same for all methods, and the recipe's own: what is
within its limits, with the highest score.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.compare.measuring import Measuring, Model
from dapa_merge.compare.methods import DELTA, METHODS, OWN_ANSWERS, REFUSALS, TRAINING, TUNED, Method
from dapa_merge.compare.peers import Deltas, Weights
from dapa_merge.compare.result import CompareOptions, Trial, Tuning
from dapa_merge.compare.training import (
    TRAINING_STEPS,
    Adapters,
    Answer,
    adapted,
    inverted_moments,
    linear_layers,
    refusal_direction,
    rows_of,
    train_adapters,
)
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.generate import generate, prompt_ids
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.prompts.conversation import request_of
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.constraints import SCORE
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.journal import Journal, Missing, gathered
from dapa_merge.search.requirement import Requirement, constraints_of, requirement, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# Harmful prompts whose refusals are learned from, and harmless and keep prompts, at most.
MAX_ANSWERS = 256
# What is needed of the source and kept in memory only.
MOMENTS = "moments"


@dataclass(frozen=True)
class Candidate:
    """A method with one setting.

    Attributes:
        note: Identifies it in the journal.
        setting: For people.
        make: Applies it to the target in memory inside a `with` block.
    """

    note: str
    setting: str
    make: Callable[[], AbstractContextManager[Model]]


def best(trials: Sequence[Trial], limits: Requirement) -> int:
    """The number of the trial to take: within the limits the highest score, of equals the first.

    If none is within the limits, the highest score less the violations of the limits.
    """

    def rank(trial: Trial) -> tuple[bool, float]:
        if not trial.figures:
            return False, -math.inf
        violation = limits.violation(trial.figures)
        return violation == 0, trial.figures[SCORE.figure] - violation

    ranks = [rank(trial) for trial in trials]
    return ranks.index(max(ranks))


class Trials:
    """Measures candidates on the prompts of choice and search, by the recipe's own constraints."""

    def __init__(self, recipe: Recipe, prompts: PromptSet, measuring: Measuring, journal: Journal) -> None:
        meter = replace(measuring.meter, prompts=prompts, text=None, skills=())
        self._meter = meter if recipe.min_skill is None else meter.asking_keep()
        self._settings = settings_of(recipe)
        self._constraints = constraints_of(self._settings, is_whole=meter.scorer is not None)
        self._measuring = measuring
        self._journal = journal

    @cached_property
    def _referring(self) -> Meter:
        if not any(one.refers for one in self._constraints):
            return self._meter
        return self._meter.referring(self._measuring.live.model, self._measuring.live.tokenizer, keeps_logits=True)

    def try_out(self, note: str, make: Callable[[], AbstractContextManager[Model]]) -> tuple[dict[str, float], float]:
        """The figures of a candidate's constraints, and the seconds that it took."""

        def measure() -> dict[str, object]:
            meter = self._referring
            began = time.perf_counter()
            with make() as (model, tokenizer):
                measured = meter.measure(model, tokenizer)
                found = {one.figure: one.of(measured) for one in self._constraints}
            # JSON knows only finite numbers.
            finite = {key: value if math.isfinite(value) else None for key, value in found.items()}
            return {"figures": finite, "seconds": round(time.perf_counter() - began, 3)}

        noted = self._journal.once(f"trial {note}", measure)
        figures = {key: math.nan if value is None else float(value) for key, value in noted["figures"].items()}
        return figures, float(noted["seconds"])

    @cached_property
    def limits(self) -> Requirement:
        """The limits of a repair on these prompts; the source must have been tried before."""
        if not self._measuring.has("trial source"):
            raise Missing("trial source")
        target, source = (self.try_out(name, self._measuring.untouched)[0] for name in ("target", "source"))
        return requirement(self._constraints, target, source, self._settings)

    def tune(self, label: str, candidates: Sequence[Candidate]) -> Tuning:
        """Try all candidates, and choose one by `RULE`.

        Raises:
            CheckpointError: If none can be measured.
        """

        def tried(one: Candidate) -> Trial:
            try:
                figures, seconds = self.try_out(one.note, one.make)
            except CheckpointError as error:
                # Such as a training at too high a rate.
                return Trial(one.setting, {}, str(error), 0.0)
            return Trial(one.setting, figures, self.limits.complaint(figures), seconds)

        with task(f"trying settings of {label}", len(candidates) * self._num_prompts, "prompts"):
            trials = gathered(functools.partial(tried, one) for one in candidates)
        chosen = best(trials, self.limits)
        if not trials[chosen].figures:
            raise CheckpointError(str(trials[chosen].complaint))
        LOG.info(f"{label}: {trials[chosen].setting} of {len(trials)} settings")
        return Tuning(tuple(trials), chosen)

    @property
    def _num_prompts(self) -> int:
        return len(self._meter.prompts.harmful) + len(self._meter.prompts.harmless)


def thinned(grid: Sequence[tuple[float, ...]], tries: int | None) -> tuple[tuple[float, ...], ...]:
    """At most so many settings of a grid, spread evenly over it; the last of it if only one."""
    if tries is None or len(grid) <= tries:
        return tuple(grid)
    if tries == 1:
        return (grid[-1],)
    return tuple(grid[round(number * (len(grid) - 1) / (tries - 1))] for number in range(tries))


class Workbench:
    """Makes the candidates of methods that rewrite deltas or train, and holds what they need of the models."""

    def __init__(
        self,
        plan: Plan,
        pretrained: Checkpoint | None,
        prompts: PromptSet,
        measuring: Measuring,
        journal: Journal,
        wanted: CompareOptions,
        base: Callable[[], str],
    ) -> None:
        """Load nothing yet; `base` tells what identifies the pretrained model, and is asked only if that is needed."""
        self._plan, self._pretrained = plan, pretrained
        self._prompts, self._measuring, self._journal, self._wanted = prompts, measuring, journal, wanted
        self._base = base
        self._why_not: str | None = None
        self.inverted: dict[str, Tensor] | None = None
        self._trained: dict[tuple[str, float], dict[int, Adapters]] = {}

    def lacks(self) -> set[str]:
        """The notes (`refusals`, `direction`) and `MOMENTS` that are still needed of the source."""
        tuned = (METHODS[key] for key in self._wanted.methods if METHODS[key].kind in TUNED)
        methods = [one for one in tuned if REFUSALS in one.needs]
        lacking = {"refusals"} if methods and "refusals" not in self._journal.notes else set()
        if any(one.kind == DELTA and not self._is_done(one) for one in methods) and self.inverted is None:
            lacking.add(MOMENTS)
        if "resta" in self._wanted.methods and self._pretrained is None and "direction" not in self._journal.notes:
            lacking.add("direction")
        return lacking

    def _is_done(self, method: Method) -> bool:
        """Whether a method is measured already."""
        notes = [self.note(method, setting) for setting in self.settings(method)]
        tried = all(f"trial {note}" in self._journal.notes for note in notes)
        return tried and any(note in self._journal.notes for note in notes)

    def hear(self, source: Model) -> None:
        """Ask the loaded source for what is lacking."""
        lacking, (model, tokenizer) = self.lacks(), source
        if "refusals" in lacking:
            self._journal.note("refusals", self._refusals(source))
        if "direction" in lacking:
            few = {kind: getattr(self._prompts, kind)[:MAX_ANSWERS] for kind in ("harmful", "harmless")}
            ids = {kind: [prompt_ids(tokenizer, prompt) for prompt in prompts] for kind, prompts in few.items()}
            with task("reading prompts in the source", sum(map(len, ids.values())), "prompts"):
                self._journal.note("direction", refusal_direction(model, **ids).tolist())
        if MOMENTS in lacking:
            rows = rows_of(model, tokenizer, self._heard("refusals"), self._measuring.meter.max_new_tokens)
            try:
                with task("reading the source's refusals", len(rows), "refusals"):
                    self.inverted = inverted_moments(model, tokenizer.pad_token_id, self._plan.modules, rows)
            except (UsageError, CheckpointError) as error:
                # Not recorded: another machine may have enough memory.
                self._why_not = str(error)
            # Those without the moments.
            self.__dict__.pop("_deltas", None)

    def _refusals(self, source: Model) -> list[list[str]]:
        prompts = self._prompts.harmful[:MAX_ANSWERS]
        responses = self._answers(source, prompts, "source")
        outcomes = self._measuring.meter.classifiers[0].classify([request_of(prompt) for prompt in prompts], responses)
        found = zip(prompts, responses, outcomes, strict=True)
        return [[prompt, response] for prompt, response, outcome in found if outcome is Outcome.REFUSED]

    def _answers(self, model: Model, prompts: Sequence[str], name: str) -> list[str]:
        """A model's whole responses."""
        meter = self._measuring.meter
        with task(f"asking the {name}", len(prompts), "prompts"):
            return generate(
                *model,
                prompts,
                max_new_tokens=meter.max_new_tokens,
                batch_size=meter.batch_size,
                lookup=meter.lookup,
                deterministic=meter.deterministic,
            )

    def _heard(self, note: str) -> list[Answer]:
        return [Answer(prompt, response) for prompt, response in self._journal.notes[note]]

    def settings(self, method: Method) -> tuple[tuple[float, ...], ...]:
        """The settings of a method that are tried."""
        return thinned(method.grid, self._wanted.num_tries)

    def note(self, method: Method, setting: tuple[float, ...]) -> str:
        """The name of a method's measurement with a setting."""
        base = self._base() if method.kind == DELTA and self._pretrained is not None else ""
        return f"{method.key} {' '.join(map(repr, setting))} seed {self._wanted.seed} {base}".rstrip()

    def candidates(self, method: Method) -> list[Candidate]:
        """A method with each of its settings."""
        return [
            Candidate(
                self.note(method, setting),
                method.text(setting),
                functools.partial(self._made, method, setting),
            )
            for setting in self.settings(method)
        ]

    @property
    def num_changed(self) -> int:
        """Parameters that differ from the target's, while a candidate is applied."""
        return self._weights.num_changed

    @contextmanager
    def _made(self, method: Method, setting: tuple[float, ...]) -> Iterator[Model]:
        if method.kind == TRAINING:
            rate, steps = setting
            applied = adapted(self._weights, self._adapters(method, rate)[int(steps)])
        else:
            if REFUSALS in method.needs and self.inverted is None and self._why_not is None:
                # The source was asked all else by another process.
                with self._measuring.source() as source:
                    self.hear(source)
            if REFUSALS in method.needs and self.inverted is None:
                raise UsageError(str(self._why_not))
            applied = getattr(self._deltas, method.key.replace("-", "_"))(*setting)
        with applied as model:
            yield model, self._measuring.live.tokenizer

    @cached_property
    def _weights(self) -> Weights:
        return Weights(self._measuring.live, self._plan, self._pretrained)

    @cached_property
    def _deltas(self) -> Deltas:
        direction = None if self._pretrained is not None else self._journal.notes.get("direction")
        return Deltas(
            self._weights, self.inverted, None if direction is None else torch.tensor(direction), self._wanted.seed
        )

    def _adapters(self, method: Method, rate: float) -> Mapping[int, Adapters]:
        """The adapters that a method trains at one rate, by the number of steps."""
        if (method.key, rate) not in self._trained:
            live, limit = self._measuring.live, self._measuring.meter.max_new_tokens
            marks = sorted({int(steps) for one, steps in self.settings(method) if one == rate})
            groups = [rows_of(live.model, live.tokenizer, self._heard("refusals"), limit)]
            if OWN_ANSWERS in method.needs:
                groups.append(rows_of(live.model, live.tokenizer, self._own_answers(), limit))
            with task(f"training at a rate of {rate:g}", marks[-1], TRAINING_STEPS):
                self._trained[method.key, rate] = train_adapters(
                    live.model,
                    live.tokenizer.pad_token_id,
                    linear_layers(live.model, self._weights),
                    groups,
                    rate=rate,
                    marks=marks,
                    seed=self._wanted.seed,
                )
        return self._trained[method.key, rate]

    def _own_answers(self) -> list[Answer]:
        """The target's own answers to the harmless and the keep prompts."""
        if "own answers" not in self._journal.notes:
            live = self._measuring.live
            prompts = list(dict.fromkeys([*self._prompts.harmless, *self._prompts.keep]))[:MAX_ANSWERS]
            said = self._answers((live.model, live.tokenizer), prompts, "target")
            self._journal.note("own answers", [list(pair) for pair in zip(prompts, said, strict=True)])
        return self._heard("own answers")
