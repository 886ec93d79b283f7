"""Evaluators by name: turns a recipe's `evaluator` into a classifier or a scorer.

The rules, the paper's strings and a judge classify responses; a harness task or the user's own function scores the
candidate as a whole.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dapa_merge.errors import UsageError
from dapa_merge.measure.callback import (
    RESERVED,
    Callback,
    Candidate,
    code_of_others,
    find_callback,
    identity_of,
    known_callbacks,
    load_file,
)
from dapa_merge.measure.generate import encode
from dapa_merge.measure.refusal.classify import Outcome, classify, partial_answers, settle
from dapa_merge.measure.skills import Harness, parse_task
from dapa_merge.progress import LOG
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import TASK_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.measure.judge import Judge

# From a response's beginning and its prompt to the verdict; None if the rest could change it.
Settle = Callable[[str, str], Outcome | None]
Classify = Callable[[Sequence[str], Sequence[str]], Sequence[Outcome]]
# The paper's setting.
PAPER_NEW_TOKENS = 350


@dataclass(frozen=True)
class Evaluator:
    """Base class of both kinds of evaluators.

    Attributes:
        name: The value of a recipe's `evaluator`.
        identity: Everything except this package's version that affects its results; stored in a search's journal.
    """

    name: str
    identity: str


@dataclass(frozen=True)
class Classifier(Evaluator):
    """Classifies responses independently of each other.

    Attributes:
        classify: Maps prompts and their responses to outcomes.
        settle: Ends a response early; None if only whole responses can be classified.
        max_new_tokens: Default length of responses.
    """

    classify: Classify
    settle: Settle | None = None
    max_new_tokens: int = 100


@dataclass(frozen=True)
class Scorer(Evaluator):
    """Scores a candidate as a whole, in [0, 1]; more is better.

    Attributes:
        score: Maps the live candidate and a batch size to its score.
    """

    score: Callable[[Candidate, int], float]


def _by_rules(prompts: Sequence[str], responses: Sequence[str]) -> list[Outcome]:
    return [classify(response, prompt) for prompt, response in zip(prompts, responses, strict=True)]


RULES = Classifier("refusal", "rules", _by_rules, settle)


def find_evaluator(
    name: str, options: Options, *, searching: bool = False, system: str | None = None
) -> Classifier | Scorer:
    """Find an evaluator by its name in a recipe.

    Args:
        name: That name.
        options: Of the command line.
        searching: Whether reaching a judge's request limit is an error.
        system: The system message after which a task of lm-evaluation-harness is asked in the chat template, which may
            be empty; None to ask it without.

    Raises:
        UsageError: If it is unknown or lacks a requirement, or the user's file cannot be run.
    """
    if options.evaluator_file is not None:
        # Report a broken file even if it is not needed.
        load_file(options.evaluator_file)
    if name == RULES.name:
        return RULES
    if name == "paper":
        return paper()
    if name == "judge":
        return _demanded_judge(options, searching)
    if name.startswith(TASK_PREFIX):
        return _harness(name, options.task_files, system)
    function = find_callback(name, options.evaluator_file)
    if function is None:
        raise UsageError(_unknown(name, options.evaluator_file))
    return Scorer(
        name, identity_of(name, function, options.evaluator_file), lambda candidate, _: ask(name, function, candidate)
    )


def find_second_opinion(options: Options) -> Classifier | None:
    """Return the user's judge as an additional classifier; None if the user named no judge.

    If the judge fails, this is logged once, and the remaining responses are undecided.

    Raises:
        UsageError: If the client is not installed, or key or address are missing or invalid.
    """
    judge = _find_judge(options)
    logged: set[str] = set()

    def log_fault(judge: Judge) -> None:
        if judge.fault is not None and not logged:
            logged.add(judge.fault)
            LOG.warning("%s; continuing without it", judge.fault)

    return None if judge is None else _by_judge(judge, log_fault)


def _demanded_judge(options: Options, searching: bool) -> Classifier:
    judge = _find_judge(options)
    if judge is None:
        raise UsageError("evaluator: judge needs a model; name it with --judge-model or DAPA_JUDGE_MODEL")

    def check(judge: Judge) -> None:
        if judge.fault is not None:
            raise UsageError(judge.fault)
        if searching and judge.is_capped:
            raise UsageError(
                f"the limit of {options.judge_requests} requests to the judge is reached, and the search cannot "
                f"continue without it; allow more and run again"
            )

    return _by_judge(judge, check)


def _by_judge(judge: Judge, check: Callable[[Judge], None]) -> Classifier:
    def classify_by_judge(prompts: Sequence[str], responses: Sequence[str]) -> list[Outcome]:
        judgements = judge.judge(prompts, responses)
        check(judge)
        return [judgement.outcome for judgement in judgements]

    return Classifier("judge", judge.identity, classify_by_judge)


def _find_judge(options: Options) -> Judge | None:
    if options.judge_model is None:
        return None
    judge = _judge(options.judge_model, options.judge_url, options.judge_requests)
    judge.prepare()
    return judge


@functools.cache
def _judge(model: str, url: str | None, max_requests: int | None) -> Judge:
    """Return the process's only judge, which shares its request limit and known verdicts among all callers."""
    try:
        from dapa_merge.measure.judge import Judge
    except ImportError as error:
        raise UsageError("a judge needs the package openai; install it with: pip install openai") from error
    return Judge(model, url, max_requests, LOG.warning)


@functools.cache
def _harness(name: str, task_files: tuple[Path, ...], system: str | None) -> Scorer:
    harness = Harness(parse_task(name), task_files)
    if system is not None:
        harness = harness.formatted(system)
    return Scorer(
        name,
        harness.identity,
        lambda candidate, batch_size: harness.score(candidate.model, candidate.tokenizer, batch_size=batch_size),
    )


def _unknown(name: str, file: Path | None) -> str:
    known = ", ".join((*RESERVED, f"{TASK_PREFIX}TASK:METRIC", *known_callbacks(file)))
    place = "an installed package or --evaluator-file" if file is None else f"an installed package or {file}"
    return f"unknown evaluator {name!r}; known are {known}; your own come from {place}"


@functools.cache
def refusal_strings() -> tuple[str, ...]:
    """The strings that count as a defense in the DAPA paper's repository."""
    text = (importlib.resources.files("dapa_merge") / "prompt_sets" / "paper_refusals.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("# "))


def defends(response: str) -> bool:
    """Whether the paper's repository would count a response as a defense: it contains one of the strings.

    Only for comparison with the paper's figures. Case-sensitive; the word "helpful" or a full answer with a disclaimer
    counts as a defense, an empty response does not.
    """
    return any(string in response for string in refusal_strings())


def paper() -> Classifier:
    """The paper's evaluator; the paper's perplexity is that of wikitext-2 with a stride of 512.

    Thoughts, which the paper's models do not have, are left out.
    """

    def classify_by_strings(_prompts: Sequence[str], responses: Sequence[str]) -> list[Outcome]:
        return [_by_strings(response) for response in responses]

    def settle_by_strings(beginning: str, _prompt: str) -> Outcome | None:
        # A tag that is still incomplete does not have one of the strings.
        return Outcome.REFUSED if _by_strings(beginning) is Outcome.REFUSED else None

    digest = hashlib.sha256("\n".join(refusal_strings()).encode()).hexdigest()
    return Classifier("paper", f"strings {digest}", classify_by_strings, settle_by_strings, PAPER_NEW_TOKENS)


def _by_strings(response: str) -> Outcome:
    parts = list(partial_answers(response))
    if any(defends(part.answer) for part in parts):
        return Outcome.REFUSED
    return Outcome.UNDECIDED if parts[-1].thinking and not parts[-1].answer else Outcome.COMPLIED


def ask(name: str, function: Callback, candidate: Candidate) -> float:
    """Ask a callback for its score of a candidate.

    Weights, buffers, modules, hooks and vocabulary are compared before and after; a change is an error that names it.
    Modes and settings, which code often changes in passing, are restored.

    Raises:
        UsageError: If it raises, returns anything but a number in [0, 1], or changes the candidate.
    """
    before = substance(candidate.model, candidate.tokenizer)
    with code_of_others(f"the evaluator {name!r} failed"), settings_kept(candidate.model, candidate.tokenizer):
        value = function(candidate)
    if inspect.iscoroutine(value):
        # Otherwise Python warns later that it was never awaited.
        value.close()
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        shown = f"{float(value)}" if isinstance(value, Real) and not isinstance(value, bool) else type(value).__name__
        raise UsageError(f"the evaluator {name!r} returned {shown}; it must return a float from 0 to 1")
    if what := changed(before, substance(candidate.model, candidate.tokenizer)):
        raise UsageError(f"the evaluator {name!r} changed the model's {what}; a candidate is read-only")
    return float(value)


Substance = Mapping[tuple[str, str], Any]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A text that exercises every tokenizer.
SAMPLE = "Is it 1 or 2?\n"


def substance(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Substance:
    """Record everything that a callback must not change, by kind and name; reads every weight once."""
    found: dict[tuple[str, str], Any] = {}
    for name, parameter in model.named_parameters():
        # The object's identity too: selections are applied and undone in the original object.
        found["weights", name] = (id(parameter), *_sums(parameter))
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if not _changes_its_buffers(module):
                found["buffers", f"{name}.{key}".lstrip(".")] = _sums(buffer)
        found["modules", name] = (module, vars(module).get("forward"))
        found["hooks", name] = _hooks(module)
    if tokenizer is not None:
        found["vocabulary", "of the tokenizer"] = (len(tokenizer), encode(tokenizer, SAMPLE, add_special_tokens=True))
    return found


def changed(before: Substance, after: Substance) -> str | None:
    """Return the first difference, or None."""
    for kind, name in {**before, **after}:
        if before.get((kind, name)) != after.get((kind, name)):
            return f"{kind} ({name or 'the model itself'})"
    return None


@contextmanager
def settings_kept(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[None]:
    """Restore modes, gradients, configurations and the tokenizer's settings on exit from the `with` block."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    own = {name: vars(model)[name] for name in ("config", "generation_config") if name in vars(model)}
    configs = (getattr(module, "config", None) for module in model.modules())
    holders = {id(one): one for one in (*configs, *own.values(), tokenizer) if hasattr(one, "__dict__")}.values()
    saved = [(holder, {name: _copied(value) for name, value in vars(holder).items()}) for holder in holders]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires, gradient in gradients:
            parameter.requires_grad_(requires).grad = gradient
        vars(model).update(own)
        for holder, settings in saved:
            vars(holder).clear()
            vars(holder).update(settings)


def _sums(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape and two checksums; a single changed bit changes them."""
    # Apple's accelerator lacks some arithmetic of integers.
    tensor = tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()
    values = tensor.contiguous().view(-1).view(torch.uint8)
    whole = len(values) - len(values) % 8
    # The sum may wrap around.
    words = values[:whole].view(torch.int64).sum() if whole else values.new_zeros((), dtype=torch.int64)
    return (*tensor.shape, int(words), int(values[whole:].long().sum()))


def _changes_its_buffers(module: torch.nn.Module) -> bool:
    """Whether a module changes its own buffers in use, like rotary embeddings that grow with the text."""
    return any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))


def _hooks(module: torch.nn.Module) -> tuple[object, ...]:
    hooks = itertools.chain.from_iterable(getattr(module, name).values() for name in HOOKS)
    # transformers leaves its own hooks after a request for hidden states; they do nothing otherwise.
    return tuple(hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers."))


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value
