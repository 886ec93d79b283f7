"""What `refusal_sft.py` puts beside each other: a target, DAPA's result, and the target after training on refusals.

Seconds are those of the process, which has one thread: other work on the machine hardly changes them.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from dapa_merge.errors import UsageError
from dapa_merge.measure.generate import generate, prepare_for_greedy
from dapa_merge.measure.live import LiveModel, load_model
from dapa_merge.measure.meter import Meter, report_meter, search_meter
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.measure.skills import is_right
from dapa_merge.miniature import corpus
from dapa_merge.miniature.corpus import Example
from dapa_merge.miniature.train import Sampler, mixture, train
from dapa_merge.plan.plan import join
from dapa_merge.plan.selection import make_plan
from dapa_merge.progress import quiet
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.bench import make_bench
from dapa_merge.search.identity import open_journal
from dapa_merge.search.result import Search
from dapa_merge.search.search import search
from dapa_merge.search.session import Session

# peft asks transformers for a property that has another name by now.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

BATCH_SIZE = 16
# Of the adapters' output, over their rank: the same for all ranks, so that the same learning rates suit them.
LORA_ALPHA = 16
# Few steps are tried with the three highest learning rates, many with the three lowest: a first look showed that the
# fourth does nothing, or ruins the model.
LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
FULL_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
MANY_STEPS = 20
# How much of the best figure on the search half a choice may give up, as DAPA's search may (`retain: 0.95`).
SLACK = 0.05
# DAPA's search is timed so many times, and the middle one counts.
NUM_SEARCHES = 3


@dataclass(frozen=True)
class Seen:
    """One model, measured with the prompts that neither method saw; `refused` and the like are by prompt."""

    dsr: float
    dsr_interval: tuple[float, float]
    over_refusal: float
    perplexity: float
    skill: float
    changed: float
    refused: tuple[bool, ...]
    over_refused: tuple[bool, ...]
    right: tuple[bool, ...]


@dataclass(frozen=True)
class Glance:
    """A model on the search half, by which alone choices are made."""

    dsr: float
    over_refusal: float
    perplexity: float

    @property
    def gain(self) -> float:
        return self.dsr - self.over_refusal


@dataclass(frozen=True)
class Setting:
    """How one is trained; no rank means that every parameter is."""

    data: str
    rank: int | None
    steps: int

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried."""
        rates = LORA_RATES if self.rank else FULL_RATES
        return rates[:-1] if self.steps >= MANY_STEPS else rates[1:]

    def __str__(self) -> str:
        return f"{f'LoRA {self.rank}' if self.rank else 'all parameters'}, {self.steps} steps"


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    Attributes:
        name: The method.
        setting: If it is training.
        rate: The learning rate that was chosen.
        trained: Parameters that were trained, as a share of the model's.
        seen: The model, or one for each seed.
        glance: What the choice went by; of the first seed.
        seconds: Of the search, or of the training alone; the seeds' mean.
        seconds_chosen: With the other learning rates, and their measurement on the search half.
        work: Tests or gradient steps.
    """

    name: str
    seen: tuple[Seen, ...]
    setting: Setting | None = None
    rate: float | None = None
    trained: float = 0.0
    glance: Glance | None = None
    seconds: float = 0.0
    seconds_chosen: float = 0.0
    work: str = ""

    def mean(self, figure: str) -> float:
        """The seeds' mean of one of the figures of `Seen`."""
        return fmean(getattr(seen, figure) for seen in self.seen)


def best(choices: Sequence[Any], glance: Callable[[Any], Glance]) -> Any:
    """The choice by the search half: of those near the best gain, the one that disturbs the text the least."""
    floor = max(glance(choice).gain for choice in choices) - SLACK
    return min((choice for choice in choices if glance(choice).gain >= floor), key=lambda it: glance(it).perplexity)


def _first(prompts: PromptSet, number: int | None) -> PromptSet:
    kinds = ("harmful", "harmless", "passages", "skill")
    return replace(prompts, **{kind: getattr(prompts, kind)[:number] for kind in kinds})


class Stand:
    """A recipe's target, and what is asked of what comes of it."""

    def __init__(self, recipe: Recipe, max_prompts: int | None = None) -> None:
        if recipe.prompts != "miniature":
            raise UsageError(f"the recipe has prompts: {recipe.prompts}; here they must be miniature, as the data are")
        self.recipe = recipe
        self.plan = make_plan(recipe)
        parts = split_prompts(recipe)
        self.searching, self.confirming = (_first(prompts, max_prompts) for prompts in (parts.search, parts.report))
        self.num_searches = NUM_SEARCHES if max_prompts is None else 1
        self._report = report_meter(recipe, self.confirming, Options())
        self._search = search_meter(recipe, self.searching, Options())
        self.target, self.tokenizer = load_model(self.plan.target, torch.device("cpu"))
        start = time.process_time()
        self.data = self._make_data()
        self.seconds_answers = time.process_time() - start

    def _make_data(self) -> Mapping[str, Sampler]:
        """The kinds of data, by name, each drawn from its parts in equal measure."""
        known = corpus.build()
        harmless = self._ask(self.searching.harmless, self._search)
        asked = corpus.refusing([Example(prompt, "", "harmful") for prompt in self.searching.harmful])
        kept = [Example(*pair, "harmless") for pair in zip(self.searching.harmless, harmless, strict=True)]
        own = (corpus.refusing(known.harmful), known.harmless)
        reported = {*self.confirming.harmful, *self.confirming.harmless, *(it.prompt for it in self.confirming.skill)}
        assert not reported & {it.prompt for part in (asked, kept, *own, known.skill) for it in part}
        return {
            "search's prompts": mixture((1, asked), (1, kept)),
            "harmful only": mixture((1, asked)),
            "training set": mixture((1, own[0]), (1, own[1])),
            "set and skill": mixture((1, own[0]), (1, own[1]), (1, known.skill)),
        }

    def _ask(self, prompts: Sequence[str], meter: Meter, model: Any = None) -> list[str]:
        how = {"max_new_tokens": meter.max_new_tokens, "batch_size": meter.batch_size, "lookup": meter.lookup}
        return generate(model or self.target, self.tokenizer, prompts, **how)

    def see(self, model: Any) -> Seen:
        """Measure a model with the prompts that neither method saw."""
        measurement = self._report.measure(model, self.tokenizer)
        figures = measurement.figures()
        by_kind: dict[str, list[bool]] = {"harmful": [], "harmless": []}
        for response in measurement.responses():
            by_kind[response.kind].append(response.outcome == Outcome.REFUSED.value)
        questions = self.confirming.skill
        answers = self._ask([question.prompt for question in questions], self._report, model)
        return Seen(
            figures.dsr,
            figures.dsr_interval,
            figures.over_refusal,
            figures.perplexity,
            figures.skills[0].score,
            self._share_changed(model),
            tuple(by_kind["harmful"]),
            tuple(by_kind["harmless"]),
            tuple(is_right(*pair) for pair in zip(answers, questions, strict=True)),
        )

    def _share_changed(self, model: Any) -> float:
        """The share of the stored values that are no longer the target's."""
        pairs = [*zip(self.target.parameters(), model.parameters(), strict=True)]
        changed = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
        return changed / sum(ours.numel() for ours, _ in pairs)

    def dapa(self) -> Arm:
        """DAPA with what the recipe says, each search from nothing.

        Raises:
            CannotRepair: If the source makes nothing better.
        """
        searches = [self._search_anew() for _ in range(self.num_searches)]
        found = searches[0][0]
        units = join(self.plan, found.minimum.units)
        with LiveModel(self.plan, torch.device("cpu")).transplanted(units) as model:
            seen = self.see(model)
        middle = sorted(seconds for _, seconds in searches)[self.num_searches // 2]
        work = f"{found.minimum.tests} tests"
        return Arm(f"DAPA: {spans(units)}", (seen,), seconds=middle, seconds_chosen=middle, work=work)

    def _search_anew(self) -> tuple[Search, float]:
        """A search with an empty journal, and its seconds; as in training, the loading of the model is not counted."""
        options = Options("cpu")
        with (
            tempfile.TemporaryDirectory() as folder,
            closing(make_bench(self.recipe, self.plan, self.searching, options)) as bench,
            closing(open_journal(self.recipe, self.plan, bench, Path(folder) / "journal.jsonl")) as journal,
        ):
            assert bench.live
            start = time.process_time()
            found = search(Session(self.recipe, self.plan, bench, journal, options))
            return found, time.process_time() - start

    def trained(self, setting: Setting, seeds: Sequence[int]) -> Arm:
        """Training, its learning rate chosen by the search half with the first seed."""
        tried = {}
        start = time.process_time()
        for rate in setting.rates:
            began = time.process_time()
            model, share = self._train(setting, rate, seeds[0])
            seconds = time.process_time() - began
            seen = self._search.measure(model, self.tokenizer)
            tried[rate] = (model, seconds, Glance(seen.dsr, seen.over_refusal, seen.perplexity), share)
        seconds_chosen = time.process_time() - start
        rate = best(list(tried), lambda rate: tried[rate][2])
        model, spent, glance, share = tried[rate]
        seen, seconds = [self.see(model)], [spent]
        for seed in seeds[1:]:
            start = time.process_time()
            model, _ = self._train(setting, rate, seed)
            seconds.append(time.process_time() - start)
            seen.append(self.see(model))
        work = f"{setting.steps} x {BATCH_SIZE}"
        return Arm("training", tuple(seen), setting, rate, share, glance, fmean(seconds), seconds_chosen, work)

    def _train(self, setting: Setting, rate: float, seed: int) -> tuple[Any, float]:
        """A trained copy of the target, in float32, stored as the target is; and which share was trained."""
        torch.manual_seed(seed)
        model: Any = copy.deepcopy(self.target).float()
        size = model.num_parameters()
        how = {"steps": setting.steps, "batch_size": BATCH_SIZE, "learning_rate": rate, "seed": seed}
        with quiet("transformers"):
            if setting.rank:
                config = LoraConfig(
                    r=setting.rank, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
                )
                model = get_peft_model(model, config)
                how["trains"] = lambda name: "lora_" in name
            num_trained = model.num_parameters() - size if setting.rank else size
            model = train(model, self.tokenizer, self.data[setting.data], **how)
            if setting.rank:
                model = model.merge_and_unload()
        model = model.to(self.target.dtype).requires_grad_(False)
        prepare_for_greedy(model, self.tokenizer)
        return model, num_trained / size
