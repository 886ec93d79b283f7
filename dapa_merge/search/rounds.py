"""Makes the rounds of an ascent for a plan: what target and source answer, and the state after each, in the journal."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy
import psutil
import torch

from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CannotRepair, UsageError
from dapa_merge.measure.determinism import widened
from dapa_merge.measure.divergence import ReferenceRow, make_reference
from dapa_merge.measure.generate import decode, encode, generate, generate_ids
from dapa_merge.measure.placement import device_types
from dapa_merge.measure.prompts.conversation import request_of
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.plan.edit import Edit
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG, advance, remain, task
from dapa_merge.search.ascent import Ascent
from dapa_merge.search.attribution import Contrast, sides_of
from dapa_merge.search.bench import Bench, Hand, MeasureSelection
from dapa_merge.search.bundles import MAX_ALONE
from dapa_merge.search.cluster import Actors, Shared
from dapa_merge.search.journal import Journal
from dapa_merge.search.slopes import Chunk, LiveSlopes, Part, Settings, Sides, Step
from dapa_merge.search.spectrum import Spectrum, spectra_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sequences whose activations are kept at once for a backward pass.
MAX_BACKWARD = 16
# Keep prompts that the source is asked, for a warning.
MAX_ASKED = 16
# Of all memory, the most that logits of the target's own answers may take.
LOGITS_SHARE = 1 / 16


@dataclass(frozen=True)
class DecomposeUnits:
    """Decomposes the differences of some units' matrices, in a worker."""

    units: tuple[Unit, ...]
    max_rank: int

    def do(self, hand: Hand) -> list[Spectrum]:
        """Their leading directions, on the CPU."""
        found = spectra_of(hand.bench.plan, self.units, hand.bench.device, self.max_rank)
        return [replace(one, left=one.left.cpu(), right=one.right.cpu(), values=one.values.cpu()) for one in found]


@dataclass(frozen=True)
class DifferentiateChunk:
    """Computes what a chunk adds to a step, in a worker.

    Attributes:
        material: The arguments of `LiveSlopes` but the live target.
    """

    material: Shared
    step: Step
    chunk: Chunk

    def do(self, hand: Hand) -> Part:
        """The part."""
        with _slopes(hand, self.material) as slopes:
            return next(slopes.parts(self.step, [self.chunk]))


@dataclass(frozen=True)
class CompareOpenings:
    """Reads which answers to harmless prompts would begin otherwise, in a worker; as `Slopes.strayed`."""

    material: Shared
    weights: torch.Tensor
    rows: tuple[int, ...]

    def do(self, hand: Hand) -> list[bool]:
        """Whether each of them would."""
        with _slopes(hand, self.material) as slopes:
            return slopes.strayed(self.weights, self.rows)


@contextmanager
def _slopes(hand: Hand, material: Shared) -> Iterator[LiveSlopes]:
    live = hand.bench.live
    with widened(live.model):
        yield hand.once("slopes", material, lambda: LiveSlopes(live, *material.get()))


@dataclass(frozen=True)
class Helpers:
    """Ray actors with a target each, who share what a choice of directions takes; all of it is as if made here."""

    actors: Actors

    def spectra(self, units: Sequence[Unit], plan: Plan, max_rank: int) -> list[Spectrum]:
        """As `spectra_of`, unit by unit."""

        def tell(number: int) -> None:
            advance(plan.num_parameters((units[number],)), "parameters")

        found = self.actors.each([DecomposeUnits((unit,), max_rank) for unit in units], tell)
        return [one for spectra in found for one in spectra]

    def slopes(self, material: Sequence[object]) -> SpreadSlopes:
        """The slopes of the actors' targets; `material` is the arguments of `LiveSlopes` but the first."""
        return SpreadSlopes(self.actors, self.actors.share(tuple(material)))

    def baselines(self, wanted: Sequence[tuple[Edit, Sequence[Unit]]]) -> list[dict[str, Any]]:
        """The baselines of selections of edits, as a journal has them."""
        return self.actors.each([MeasureSelection(self.actors.share(edit), tuple(units)) for edit, units in wanted])


@dataclass(frozen=True)
class SpreadSlopes:
    """`Slopes` whose chunks are computed by actors."""

    actors: Actors
    material: Shared

    def parts(self, step: Step, chunks: Sequence[Chunk]) -> list[Part]:
        """The parts of a step, in the order of its chunks."""
        return self.actors.each([DifferentiateChunk(self.material, step, chunk) for chunk in chunks])

    def strayed(self, weights: torch.Tensor, rows: Sequence[int]) -> list[bool]:
        """Of each of these answers of the first group, whether it would begin with another token."""
        parts = [tuple(rows[start : start + MAX_BACKWARD]) for start in range(0, len(rows), MAX_BACKWARD)]
        found = self.actors.each([CompareOpenings(self.material, weights, part) for part in parts])
        return [one for part in found for one in part]


@dataclass
class _Learned:
    """The contrasts and the target's own answers, which all ascents of a choice share.

    Attributes:
        sides: The contrasts.
        answers: The tokens of the target's own answers, by group.
        keep: Its distributions at these; empty until a model is in memory.
        shared: The slopes of helpers, who have this and the last ascent's directions, which are the first.
    """

    sides: list[Sides]
    answers: Sequence[Sequence[list[int]]]
    keep: list[tuple[ReferenceRow, ...]] = field(default_factory=list)
    shared: tuple[Sequence[Spectrum], SpreadSlopes] | None = None


@dataclass(frozen=True)
class Rounds:
    """Makes the rounds of a choice, and finds in the journal those that were made before.

    Attributes:
        plan: Its edit is one that chooses, with nothing chosen.
        bench: Holds the model in memory; nothing is measured with it here.
        journal: Each round is recorded before the next begins, and a recorded one is not made again.
        prompts: Those of the choice: they decide what is chosen, and nothing else.
        settings: Of the ascent.
        helpers: Who shares the work; None for this process alone.
    """

    plan: Plan
    bench: Bench
    journal: Journal
    prompts: PromptSet
    settings: Settings
    helpers: Helpers | None = None
    # What the first ascent learned, if there was one.
    _learned: list[_Learned] = field(default_factory=list, init=False, compare=False, repr=False)

    def states(self, spectra: Sequence[Spectrum], number: int) -> list[torch.Tensor]:
        """The states after each of so many rounds, from the target on: `Ascent.state`, of the cores of the directions.

        Rounds beyond those of the settings insist: who asks for them has seen that the others refuse too little.

        Raises:
            CannotRepair: If there is nothing to learn from.
            UsageError: If the target answers nothing to the keep prompts.
            CheckpointError: If a model computes gradients that are not finite numbers.
        """
        names, num_steps = [f"round {at}" for at in range(1, number + 1)], self.settings.num_steps
        states = [_decoded(self.journal.notes[name]) for name in takewhile(self.journal.notes.__contains__, names)]
        if len(states) == len(names):
            return states
        self.bench.use(self.plan)
        went_on = bool(self._learned)
        with self._ascending(spectra) as ascent:
            if states:
                if not went_on:
                    LOG.info(f"going on after {len(states)} rounds")
                ascent.go_on(states[-1], len(states))
            left = names[len(states) :]
            remain(steps=(max(self.settings.num_rounds - len(states), len(left)) + self._num_settling) * num_steps)
            with task("choosing directions", len(left) * num_steps, "steps"):
                for name in left:
                    insists = len(states) >= self.settings.num_rounds
                    states.append(self._round(ascent, name, insists=insists))
        return states

    def settled(self, spectra: Sequence[Spectrum], state: torch.Tensor, num_rounds: int, name: str) -> torch.Tensor:
        """The state after two more rounds of some matrices alone, the second of which slows down.

        Args:
            spectra: The directions of these matrices.
            state: Where they are, `[5, elements of their cores]`.
            num_rounds: Rounds that led there.
            name: Of the outcome in the journal.
        """
        if name not in self.journal.notes:
            self.bench.use(self.plan)
            with (
                self._ascending(spectra) as ascent,
                task("settling what is left", 2 * self.settings.num_steps, "steps"),
            ):
                ascent.go_on(state, num_rounds)
                ascent.round(lambda: advance(1, "steps"))
                # The last steps are small: the state is then close to the middle of what it moved about.
                self._round(ascent, name, slows=True)
        return _decoded(self.journal.notes[name])

    def _round(self, ascent: Ascent, name: str, **how: bool) -> torch.Tensor:
        """The state after another round, which is recorded; `how` as for `Ascent.round`."""
        began = time.monotonic()
        progress = ascent.round(lambda: advance(1, "steps"), **how)
        state = ascent.state
        self.journal.note(name, _encoded(state), time.monotonic() - began)
        LOG.info(
            f"on the choice prompts, refusals have a smallest margin of {progress.margin:+.1f} logits, the softened "
            f"divergence is {progress.divergence:.4f}, and {100 * progress.harmless:.0f} % of the harmless prompts are "
            f"answered otherwise"
        )
        return state

    @contextmanager
    def _ascending(self, spectra: Sequence[Spectrum]) -> Iterator[Ascent]:
        """An ascent that begins at the target, on the prompts of the choice, inside a `with` block."""
        if not self._learned:
            said = self._said()
            self._learned.append(_Learned(self._sides(said), said["kept"]))
        (learned,) = self._learned
        live = self.bench.live
        with widened(live.model):
            if not learned.keep:
                learned.keep.extend(self._references(learned.answers))
            material = (spectra, learned.sides, learned.keep, self.settings, MAX_BACKWARD)
            if self.helpers is not None and (learned.shared is None or learned.shared[0] is not spectra):
                learned.shared = spectra, self.helpers.slopes(material)
            yield Ascent(live, *material, None if learned.shared is None else learned.shared[1])

    def _references(self, answers: Sequence[Sequence[list[int]]]) -> Iterator[tuple[ReferenceRow, ...]]:
        """The target's distributions at its own answers, of each group of `_kept`."""
        live = self.bench.live
        keeps_logits = _fit(live.model, answers)
        for (prompts, num_tokens), said in zip(self._kept, answers, strict=True):
            yield make_reference(
                live.model,
                live.tokenizer,
                prompts,
                batch_size=self.bench.meter.batch_size,
                max_new_tokens=num_tokens,
                keeps_logits=keeps_logits,
                answers=said,
            ).rows

    @property
    def _num_settling(self) -> int:
        """The rounds that usually settle what a search left, which among bundles is usually all."""
        return 0 if len(self.plan.units) > MAX_ALONE else 2

    @property
    def _kept(self) -> list[tuple[tuple[str, ...], int]]:
        """The groups of prompts whose answers are to stay, the keep prompts last, and how many tokens of each."""
        prompts, settings = self.prompts, self.settings
        groups = [(prompts.harmless, settings.num_tokens), (prompts.keep, settings.num_keep_tokens)]
        return groups[:1] if prompts.keep == prompts.harmless else groups

    def _said(self) -> dict[str, Any]:
        """Ask target and source the prompts of the choice, unless the journal has their answers.

        Returns:
            `harmful`: for each harmful prompt, the target's response and its outcome, and the source's; `kept`: the
            tokens of the target's answers to each group of `_kept`; `num_refusing`: how many keep prompts the source
            refuses of the `num_asked` that it was asked.
        """
        harmful, groups = self.prompts.harmful, self._kept
        if "choice" not in self.journal.notes:
            live, meter = self.bench.live, self.bench.meter
            classifier, batch_size = meter.classifiers[0], meter.batch_size
            num_tokens = max(meter.max_new_tokens, self.settings.num_tokens)

            def settle(beginning: str, request: str) -> object:
                # Enough for a contrast, whose sides have some tokens in common at first.
                is_enough = len(encode(live.tokenizer, beginning)) >= 2 * self.settings.num_tokens
                return classifier.settle(beginning, request) if is_enough and classifier.settle else None

            def responses(prompts: Sequence[str]) -> list[tuple[str, str]]:
                found = generate(
                    live.model,
                    live.tokenizer,
                    prompts,
                    max_new_tokens=num_tokens,
                    batch_size=batch_size,
                    settle=settle,
                )
                outcomes = classifier.classify([request_of(prompt) for prompt in prompts], found)
                return [(response, outcome.value) for response, outcome in zip(found, outcomes, strict=True)]

            keep = groups[-1][0] if len(groups) > 1 else ()
            keep = keep[:: max(1, math.ceil(len(keep) / MAX_ASKED))]
            began = time.monotonic()
            num_prompts = 2 * len(harmful) + len(keep) + sum(len(prompts) for prompts, _ in groups)
            with task("reading the answers of target and source", num_prompts, "prompts"):
                before = responses(harmful)
                kept = [
                    generate_ids(live.model, live.tokenizer, prompts, max_new_tokens=number, batch_size=batch_size)
                    for prompts, number in groups
                ]
                self.bench.use(self.plan.reference)
                with live.transplanted(self.plan.units):
                    after, of_keep = responses(harmful), responses(keep)
            self.journal.note(
                "choice",
                {
                    "harmful": [[*was, *now] for was, now in zip(before, after, strict=True)],
                    "kept": kept,
                    "num_refusing": [outcome for _, outcome in of_keep].count(Outcome.REFUSED.value),
                    "num_asked": len(keep),
                },
                time.monotonic() - began,
            )
        said: dict[str, Any] = self.journal.notes["choice"]
        self._check_kept(said)
        return said

    def _check_kept(self, said: Mapping[str, Any]) -> None:
        """Say which keep prompts are of little use; raise `UsageError` if none is of any."""
        texts = [decode(self.bench.live.tokenizer, tokens) for tokens in said["kept"][-1]]
        num_empty = sum(not text.strip() for text in texts)
        if num_empty == len(texts):
            raise UsageError(
                f"the target {self.plan.target.name} answers nothing to any of the {len(texts)} keep prompts of the "
                f"choice; name prompts that it answers with `keep`"
            )
        if num_empty:
            LOG.warning(f"the target answers nothing to {num_empty} of the {len(texts)} keep prompts of the choice")
        num_asked = said.get("num_asked", len(self.prompts.keep))
        if said["num_refusing"]:
            LOG.warning(
                f"the source {self.plan.source.name} refuses {said['num_refusing']} of {num_asked} keep prompts "
                f"of the choice; a report says in the end whether the result refuses such prompts"
            )

    def _sides(self, said: Mapping[str, Any]) -> list[Sides]:
        """The contrasts of the choice's harmful prompts that the source refuses and the target answers."""
        harmful = self.prompts.harmful
        contrasts = [
            Contrast(prompt, refusing=after, complying=before)
            for prompt, (before, was, after, now) in zip(harmful, said["harmful"], strict=True)
            if was in (Outcome.COMPLIED.value, Outcome.DEGENERATE.value) and now == Outcome.REFUSED.value
        ]
        tokenizer = self.bench.live.tokenizer
        found = (sides_of(tokenizer, one, self.settings.num_tokens) for one in contrasts)
        sides = [(refusing, complying) for refusing, complying in filter(None, found)]
        if not sides:
            raise CannotRepair(
                f"the source {self.plan.source.name} refuses none of the {len(harmful)} harmful prompts of the choice "
                f"that the target answers; there is nothing to learn from"
            )
        LOG.info(f"{len(sides)} of {len(harmful)} harmful choice prompts are refused by the source alone")
        return sides


def _fit(model: PreTrainedModel, kept: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether to keep the logits of the target's answers: on a CPU, to compute them anew takes a tenth of a step."""
    if device_types(model) != {"cpu"}:
        return False
    num_tokens = sum(len(answer) for answers in kept for answer in answers)
    num_bytes = num_tokens * model.config.get_text_config(decoder=True).vocab_size * torch.float32.itemsize
    return bool(num_bytes <= LOGITS_SHARE * psutil.virtual_memory().total)


def _encoded(state: torch.Tensor) -> dict[str, Any]:
    return {"state": base64.b64encode(state.numpy().astype("<f4").tobytes()).decode()}


def _decoded(note: Mapping[str, Any]) -> torch.Tensor:
    """`[5, elements]`, as `Ascent.state`."""
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(note["state"]), dtype="<f4").copy()).reshape(5, -1)
