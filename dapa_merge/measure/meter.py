"""Measures a model: its responses and their outcomes, its perplexity, its skills, its score.

A `Meter` holds prompts and settings; a search and a report each have one. A `Measurement` is lazy: a search runs only
the prompts that its constraints need.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.open import Checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.imports import Shown
from dapa_merge.measure.callback import Candidate
from dapa_merge.measure.decode import BatchSize, LookupCache
from dapa_merge.measure.divergence import Reference, divergence, make_reference
from dapa_merge.measure.evaluators import RULES, Classifier, Scorer, find_evaluator, find_second_opinion
from dapa_merge.measure.figures import KEEP, AttackFigure, Figures, Response, SkillFigure, mean_score
from dapa_merge.measure.generate import generate, has_system_role
from dapa_merge.measure.live import LiveModel, choose_device, load_model, opens_thought
from dapa_merge.measure.perplexity import Reading, read_passages
from dapa_merge.measure.prompts.conversation import (
    answers_between,
    attacked,
    first_turn,
    num_turns,
    request_of,
    with_answer,
    with_system,
)
from dapa_merge.measure.prompts.sets import (
    PromptSet,
    Question,
    Text,
    key_of,
    load_attacks,
    load_prompts,
    load_text,
)
from dapa_merge.measure.refusal.classify import Outcome, final_answer
from dapa_merge.measure.skills import Skill, checked, load_skills, skill_figure
from dapa_merge.measure.statistics import count, interval, refusal_figures
from dapa_merge.progress import LOG, quiet, task
from dapa_merge.recipe.asking import Sampling
from dapa_merge.recipe.attacks import NONE, PLAIN, Attack
from dapa_merge.recipe.options import Options, Where
from dapa_merge.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.checkpoint.units import Unit


# Maximum tokens of a report's perplexity text; more add little and are slow without an accelerator.
MAX_TEXT_TOKENS = 20_000
# Default length of responses that begin inside a thought. Early verdicts shorten those of a search.
THINKING_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Meter:
    """Measures models, always with the same prompts and settings.

    Attributes:
        max_new_tokens: Maximum length of a response.
        classifiers: Judge the responses; the first one's outcomes are the figures.
        stops_early: Whether to end a response once the first classifier's outcome is certain.
        lookup: Earlier responses of such models, for speculative decoding; None disables it.
        deterministic: Whether figures must not depend on earlier prompts, even if that is slower.
        scorer: Scores the model as a whole, in addition.
        text: The perplexity text; None for the prompt set's passages.
        reference: The target's own answers to the keep prompts; None to measure no divergence.
        attacks: Tried on the harmful prompts, in addition.
        sampling: How tokens of responses are drawn; None for greedy decoding.
        asks_keep: Whether the keep prompts are put to the model too.
        called: What messages call its prompts.
    """

    prompts: PromptSet
    max_new_tokens: int
    batch_size: BatchSize
    classifiers: tuple[Classifier, ...] = (RULES,)
    stops_early: bool = False
    lookup: LookupCache | None = None
    deterministic: bool = False
    scorer: Scorer | None = None
    text: Text | None = None
    skills: tuple[Skill, ...] = ()
    reference: Reference | None = None
    attacks: tuple[Attack, ...] = ()
    sampling: Sampling | None = None
    asks_keep: bool = False
    called: str = "prompts"

    @property
    def num_prompts(self) -> int:
        """The prompts and questions of all figures, without those of tasks of the harness; a message each."""
        harmful = sum(map(num_turns, self.prompts.harmful))
        questions = [question.prompt for skill in self.skills for question in skill.questions]
        keep = {*self.keep}.difference(questions) if self.asks_keep else ()
        return harmful * (1 + len(self.attacks)) + sum(map(num_turns, (*self.prompts.harmless, *questions, *keep)))

    @property
    def keep(self) -> tuple[str, ...]:
        """The prompts that a divergence is measured on."""
        return self.prompts.measured_keep

    def referring(
        self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, keeps_logits: bool = False
    ) -> Meter:
        """Return this meter with the target's own answers, so that it measures divergence.

        Args:
            target: The target in memory, with nothing transplanted.
            tokenizer: The target's.
            keeps_logits: Whether models with other output layers will be measured, such as the source.
        """
        with task("reading the target's own answers", len(self.keep), "prompts"), quiet("transformers"):
            reference = make_reference(
                target, tokenizer, self.keep, batch_size=self.batch_size, keeps_logits=keeps_logits
            )
        return replace(self, reference=reference)

    def asking_keep(self) -> Meter:
        """Return this meter with a skill: the keep prompts whose answers are known, if any; it keeps its own."""
        found = self.skills or _skill_of("keep", self.prompts.keep_answers)
        return replace(self, skills=tuple(_skill_after(skill, self.prompts) for skill in found))

    @property
    def identity(self) -> str:
        """Identity of the evaluator: everything that affects its verdicts."""
        return (self.scorer or self.classifiers[0]).identity

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, selection: Sequence[Unit] = ()
    ) -> Measurement:
        """Return a lazy measurement of the model: prompts are run when a figure is first read."""
        return Measurement(self, Candidate(model, tokenizer, tuple(selection)))


class Measurement:
    """Figures of a model, each measured when it is first read; valid while the model does not change."""

    def __init__(self, meter: Meter, candidate: Candidate) -> None:
        self._meter = meter
        self._candidate = candidate

    def _ask(self, prompts: Sequence[str], *, whole: bool) -> Sequence[str | None]:
        """The responses to prompts; None for one that could not be had."""
        meter = self._meter
        return generate(
            self._candidate.model,
            self._candidate.tokenizer,
            prompts,
            max_new_tokens=meter.max_new_tokens,
            batch_size=meter.batch_size,
            settle=meter.classifiers[0].settle if meter.stops_early and not whole else None,
            lookup=meter.lookup,
            deterministic=meter.deterministic,
            sampling=meter.sampling,
        )

    def _talk(self, prompts: Sequence[str], *, whole: bool) -> tuple[list[str], Sequence[str | None]]:
        """Put the messages of every prompt one after the other.

        Returns:
            The prompts with the model's own answers to all messages but the last, and the responses to these; None
            for a response that could not be had, also to an earlier message.
        """
        held, failed = list(prompts), set[int]()
        while turns := {
            index: turn
            for index, prompt in enumerate(held)
            if index not in failed and (turn := first_turn(prompt)) is not None
        }:
            for index, answer in zip(turns, self._ask(list(turns.values()), whole=True), strict=True):
                if answer is None:
                    failed.add(index)
                else:
                    # Without its thought, as models expect their own turns.
                    held[index] = with_answer(held[index], final_answer(answer) or answer)
        had = [index for index in range(len(held)) if index not in failed]
        said: list[str | None] = [None] * len(held)
        for index, response in zip(had, self._ask([held[index] for index in had], whole=whole), strict=True):
            said[index] = response
        return held, said

    @cached_property
    def _plain(self) -> list[list[Response]]:
        """The responses to harmful and harmless prompts, and to keep prompts if they are asked."""
        prompts, keep = self._meter.prompts, [(KEEP, self._meter.keep)] if self._meter.asks_keep else []
        return self.judge_all([("harmful", prompts.harmful), ("harmless", prompts.harmless), *keep])

    def judge(self, kind: str, prompts: Sequence[str], attack: Attack = PLAIN) -> list[Response]:
        """Run prompts of one kind and classify the responses; not cached."""
        return self.judge_all([(kind, prompts)], attack)[0]

    def judge_all(self, groups: Sequence[tuple[str, Sequence[str]]], attack: Attack = PLAIN) -> list[list[Response]]:
        """As `judge`, for kinds with prompts, all of which are run at once: in large batches each takes less time."""
        asked = [attacked(prompt, attack) for _, prompts in groups for prompt in prompts]
        held, said = self._talk(asked, whole=False)
        found, start = [], 0
        for kind, prompts in groups:
            part = slice(start, start + len(prompts))
            found.append(self._classified(kind, prompts, asked[part], held[part], said[part]))
            start = part.stop
        return found

    def _classified(
        self, kind: str, prompts: Sequence[str], asked: Sequence[str], held: Sequence[str], said: Sequence[str | None]
    ) -> list[Response]:
        responses = [response or "" for response in said]
        requests = [request_of(prompt) for prompt in prompts]
        # Whether the fine-tune's own prompts are refused, rules tell; a judge may cost money.
        classifiers = self._meter.classifiers[: 1 if kind == KEEP else None]
        first, *others = [(one.name, _outcomes(one, requests, said)) for one in classifiers]
        categories = self._meter.prompts.categories
        return [
            Response(
                kind,
                categories.get((kind, prompt), ""),
                prompt,
                responses[index],
                first[1][index],
                {name: outcomes[index] for name, outcomes in others},
                answers_between(asked[index], held[index]),
            )
            for index, prompt in enumerate(prompts)
        ]

    def responses(self) -> list[Response]:
        """Every harmful and harmless prompt with its response and verdict."""
        return self._plain[0] + self._plain[1]

    def kept_responses(self) -> list[Response]:
        """Likewise of the keep prompts, if the meter asks them."""
        return self._plain[2] if self._meter.asks_keep else []

    @cached_property
    def _attacked(self) -> dict[Attack, list[Response]]:
        """The responses to the harmful prompts under each attack; none if the model cannot be asked so."""
        meter = self._meter
        return {
            attack: self.judge("harmful", meter.prompts.harmful, attack) if self._can_try(attack) else []
            for attack in meter.attacks
        }

    def _can_try(self, attack: Attack) -> bool:
        if not attack.system or self._has_system_role:
            return True
        LOG.warning(
            f"the chat template has no system role, so an attack by a system prompt is not possible: {attack.name}"
        )
        return False

    @cached_property
    def _has_system_role(self) -> bool:
        return has_system_role(self._candidate.tokenizer)

    def attacked_responses(self) -> list[Response]:
        """Every harmful prompt with its response and verdict under each attack, which is part of its kind."""
        return [
            replace(response, kind=f"{response.kind}, {attack.name}")
            for attack, responses in self._attacked.items()
            for response in responses
        ]

    @property
    def attacks(self) -> tuple[AttackFigure, ...]:
        """Every attack of the meter."""
        return tuple(_attack_figure(attack.name, responses) for attack, responses in self._attacked.items())

    @property
    def dsr(self) -> float:
        """Share of harmful prompts refused."""
        return count(self._plain[0], Outcome.REFUSED) / len(self._plain[0])

    @property
    def over_refusal(self) -> float:
        """Share of harmless prompts refused."""
        return count(self._plain[1], Outcome.REFUSED) / len(self._plain[1])

    @cached_property
    def score(self) -> float | None:
        """The scorer's score of the model; None without a scorer."""
        scorer = self._meter.scorer
        return None if scorer is None else scorer.score(self._candidate, self._meter.batch_size.limit)

    @property
    def perplexity(self) -> float:
        """Perplexity of the text, or of the set's passages."""
        return self._reading.perplexity

    @cached_property
    def _reading(self) -> Reading:
        text = self._meter.text
        passages = self._meter.prompts.passages if text is None else text.passages
        found = read_passages(
            self._candidate.model,
            self._candidate.tokenizer,
            passages,
            batch_size=self._meter.batch_size,
            **({} if text is None else {"max_tokens": text.max_tokens}),
        )
        if passages and math.isnan(found.perplexity):
            raise UsageError(
                f"the text for the perplexity ({self._text}) is too short: the first token of each passage is not "
                "counted, and no other is left"
            )
        return found

    @property
    def _text(self) -> str:
        text = self._meter.text
        return "the prompt set's own passages" if text is None else text.name

    @cached_property
    def skills(self) -> tuple[SkillFigure, ...]:
        """Every skill that the meter tests."""
        candidate = self._candidate
        return tuple(
            skill_figure(
                skill,
                self._answers,
                lambda harness: harness.score(
                    candidate.model, candidate.tokenizer, batch_size=self._meter.batch_size.limit
                ),
            )
            for skill in self._meter.skills
        )

    def _answers(self, prompts: Sequence[str]) -> list[str]:
        """The responses to questions; keep prompts among them have been asked."""
        said: dict[str, str | None] = {one.prompt: one.response for one in self.kept_responses()}
        left = [prompt for prompt in prompts if prompt not in said]
        said |= zip(left, self._talk(left, whole=True)[1], strict=True)
        return [said[prompt] or "" for prompt in prompts]

    @property
    def skill(self) -> float:
        """The mean of the skills; NaN without any."""
        return mean_score(self.skills)

    @cached_property
    def divergence(self) -> float:
        """From the target, in nats per token; NaN if the meter has no reference."""
        meter = self._meter
        if meter.reference is None:
            return math.nan
        return divergence(self._candidate.model, meter.reference, meter.batch_size)

    def figures(self) -> Figures:
        """Return all figures, and measure those that are missing."""
        text = self._meter.text
        # First: an unsuitable text then fails early.
        is_cut = self._reading.is_cut
        return Figures(
            **refusal_figures(self.responses()),
            score=self.score,
            perplexity=self.perplexity,
            text=f"{self._text}, the first {text.max_tokens:,} tokens of it" if text and is_cut else self._text,
            skills=self.skills,
            divergence=self.divergence,
            attacks=self.attacks,
        )


def _outcomes(classifier: Classifier, requests: Sequence[str], said: Sequence[str | None]) -> list[str]:
    """The outcomes of responses by a classifier; a response that could not be had is undecided."""
    had = [index for index, response in enumerate(said) if response is not None]
    found = classifier.classify([requests[index] for index in had], [said[index] or "" for index in had])
    outcomes = [Outcome.UNDECIDED.value] * len(said)
    for index, outcome in zip(had, found, strict=True):
        outcomes[index] = outcome.value
    return outcomes


def _attack_figure(name: str, responses: Sequence[Response]) -> AttackFigure:
    if not responses:
        return AttackFigure(name, None, None, 0)
    refused, number = count(responses, Outcome.REFUSED), len(responses)
    return AttackFigure(name, refused / number, interval(refused, number), number)


def _length(given: int | None, default: int, models: Iterable[Checkpoint]) -> int:
    """The length of responses in tokens: as given, or else enough for models that begin with a thought."""
    thinking = next((model.name for model in models if opens_thought(model)), None)
    length = given or (default if thinking is None else max(default, THINKING_NEW_TOKENS))
    if thinking is not None:
        _tell_of_thoughts(thinking, length, given)
    return length


# Once: a command may make several meters.
@lru_cache
def _tell_of_thoughts(name: str, length: int, given: int | None) -> None:
    if given is None:
        LOG.info(
            f"the chat template of {name} opens a thought, which is not judged, so responses may have {length} tokens; "
            f"max_new_tokens sets another number"
        )
    elif given < THINKING_NEW_TOKENS:
        LOG.warning(
            f"the chat template of {name} opens a thought, which is not judged: a response that ends inside it, at "
            f"{given} tokens, is undecided; leave out max_new_tokens for {THINKING_NEW_TOKENS}"
        )


def search_meter(recipe: Recipe, prompts: PromptSet, options: Options, models: Iterable[Checkpoint] = ()) -> Meter:
    """Return the meter for a search: only the deciding evaluator, and responses that end as early as possible.

    Args:
        recipe: Names the evaluator, and limits responses.
        prompts: Those of the search.
        options: Of the command line.
        models: That will be measured; responses are longer if one of them begins with a thought.

    Raises:
        UsageError: If the recipe's evaluator is not available.
    """
    evaluator = find_evaluator(recipe.evaluator, options, searching=True, system=_system_of(prompts))
    classifier = evaluator if isinstance(evaluator, Classifier) else RULES
    meter = Meter(
        prompts,
        _length(recipe.max_new_tokens, classifier.max_new_tokens, models),
        BatchSize(recipe.batch_size),
        classifiers=(classifier,),
        stops_early=True,
        lookup=LookupCache(),
        scorer=evaluator if isinstance(evaluator, Scorer) else None,
    )
    return meter if recipe.min_skill is None else meter.asking_keep()


def report_meter(recipe: Recipe, prompts: PromptSet, options: Options, models: Iterable[Checkpoint] = ()) -> Meter:
    """Return the meter for a report: complete responses, all classifiers, figures independent of earlier ones.

    `models` are as for `search_meter`.

    Raises:
        UsageError: If the recipe's evaluator, judge, text or skills are not available.
    """
    return make_meter(
        prompts,
        options,
        evaluator=recipe.evaluator,
        max_new_tokens=recipe.max_new_tokens,
        batch_size=recipe.batch_size,
        text=recipe.text,
        skills=recipe.skills,
        attacks=recipe.attacks,
        models=models,
    )


def make_meter(
    prompts: PromptSet,
    options: Options,
    *,
    evaluator: str = RULES.name,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    text: str | None = None,
    skills: str | None = None,
    attacks: str | None = None,
    sampling: Sampling | None = None,
    models: Iterable[Checkpoint] = (),
) -> Meter:
    """Return a meter that measures a model in full; the arguments are those of a recipe and of `search_meter`.

    Raises:
        UsageError: If the evaluator, the judge, the text, the skills or the attacks are not available.
    """
    tried = load_attacks(attacks or NONE)
    found = find_evaluator(evaluator, options, system=_system_of(prompts))
    classifiers = {one.name: one for one in (RULES, found) if isinstance(one, Classifier)}
    if "judge" not in classifiers and (judge := find_second_opinion(options)) is not None:
        classifiers[judge.name] = judge
    return Meter(
        prompts,
        _length(max_new_tokens, max(one.max_new_tokens for one in classifiers.values()), models),
        BatchSize(batch_size),
        classifiers=tuple(classifiers.values()),
        lookup=LookupCache(),
        deterministic=True,
        scorer=found if isinstance(found, Scorer) else None,
        text=_text(prompts, text),
        skills=skills_of(prompts, skills, options),
        attacks=tried,
        sampling=sampling,
    )


def _system_of(prompts: PromptSet) -> str | None:
    """The system message before a task of the harness; None if it is asked without a chat template."""
    return prompts.system if prompts.is_formatted else None


def _text(prompts: PromptSet, name: str | None) -> Text | None:
    if name is None and prompts.passages != load_prompts("builtin").passages:
        # Passages that come with the prompts suit the models better than any other text.
        return None
    return load_text(name or "auto", max_tokens=MAX_TEXT_TOKENS)


def skills_of(prompts: PromptSet, names: str | None, options: Options) -> tuple[Skill, ...]:
    """Return the skill tests: the prompt set's own, those that a recipe names, and keep prompts with known answers.

    No question is asked that a choice or a search used.

    Raises:
        UsageError: If one is not available, or all of its questions were used.
    """
    own = (Skill("skill", prompts.skill),) if prompts.skill else ()
    taken = [skill.name for skill in own] + (["keep"] if prompts.keep_answers else [])
    named = load_skills(names, taken, options.task_files) if names else ()
    skills = own + tuple(_unspent(skill, prompts) for skill in named)
    asked = {key_of(question.prompt) for skill in skills for question in skill.questions}
    others = tuple(question for question in prompts.keep_answers if key_of(question.prompt) not in asked)
    return tuple(_skill_after(skill, prompts) for skill in skills + _skill_of("keep", others))


def _skill_after(skill: Skill, prompts: PromptSet) -> Skill:
    """A skill that is asked after the system message of a set, and in its chat template."""
    asked = (replace(question, prompt=with_system(question.prompt, prompts.system)) for question in skill.questions)
    harness = skill.harness
    if harness is not None and (system := _system_of(prompts)) is not None:
        harness = harness.formatted(system)
    return replace(skill, questions=tuple(asked), harness=harness)


def _skill_of(name: str, questions: tuple[Question, ...]) -> tuple[Skill, ...]:
    return (Skill(name, checked(questions, name)),) if questions else ()


def _unspent(skill: Skill, prompts: PromptSet) -> Skill:
    left = tuple(question for question in skill.questions if key_of(question.prompt) not in prompts.spent)
    if skill.questions and not left:
        raise UsageError(
            f"the skill {skill.name} has no question left for the report, because `keep` takes all; add questions, or "
            f"name other keep prompts"
        )
    return replace(skill, questions=left)


@dataclass(frozen=True)
class MeasuredModel(Shown):
    """A model's figures and the responses behind them; the model itself may be unloaded.

    Attributes:
        read: What prompts were read from where, as plain data; empty where the caller knows.
    """

    figures: Figures
    responses: Sequence[Response]
    read: Sequence[Mapping[str, Any]] = ()


def measure_live(live: LiveModel, selection: Sequence[Unit], meter: Meter, name: str) -> MeasuredModel:
    """Measure the target in full, with a selection applied."""
    with live.transplanted(selection) as model:
        return measure_candidate(Candidate(model, live.tokenizer, tuple(selection)), meter, name)


def measure_checkpoint(checkpoint: Checkpoint, meter: Meter, device: str | Where, name: str) -> MeasuredModel:
    """Load a model and measure it in full."""
    LOG.info(f"loading the {name}, {checkpoint.name}")
    model, tokenizer = load_model(checkpoint, device if isinstance(device, Where) else choose_device(device))
    with quiet("transformers"):
        return measure_candidate(Candidate(model, tokenizer, ()), meter, name)


def measure_candidate(candidate: Candidate, meter: Meter, name: str, level: int = logging.INFO) -> MeasuredModel:
    """Measure a model in memory in full."""
    return measure_in_full(Measurement(meter, candidate), meter, name, level)


def measure_in_full(measurement: Measurement, meter: Meter, name: str, level: int = logging.INFO) -> MeasuredModel:
    """Measure everything that a meter measures."""
    with task(f"measuring the {name}", meter.num_prompts, "prompts"):
        figures = measurement.figures()
    asked = f"{figures.num_harmful} harmful and {figures.num_harmless} harmless {meter.called}"
    LOG.log(level, f"measured the {name} on {asked}: {figures.brief}")
    responses = measurement.responses() + measurement.attacked_responses() + measurement.kept_responses()
    cut = [response for response in responses if response.response]
    if meter.classifiers[0] is RULES and (num_cut := count(cut, Outcome.UNDECIDED)):
        LOG.log(
            logging.WARNING if level >= logging.INFO else level,
            f"{num_cut} of {len(responses)} responses of the {name} end inside a thought, at {meter.max_new_tokens} "
            f"tokens, and are undecided; allow more with max_new_tokens",
        )
    return MeasuredModel(figures, responses)
