"""Skills that a target must not lose: questions with known answers, or a task of lm-evaluation-harness.

A task is written `lm-eval:TASK` or `lm-eval:TASK:METRIC`; TASK is a name known to the harness, the name of a task in a
file that the user trusts, or the path of such a file, whose own paths are relative to it. Functions and templates of a
task file run, so no other file is read. A live model gets the harness's own prompts without a chat template, as in
published figures, unless the user gives a system message or another template: then they are asked as all prompts are.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dapa_merge.errors import HubError, UsageError, one_line, why_unreadable
from dapa_merge.files import nearest_here
from dapa_merge.measure.confined import Unfinished, is_found
from dapa_merge.measure.figures import SkillFigure
from dapa_merge.measure.generate import chat_prompt
from dapa_merge.measure.prompts.conversation import Conversation, Message
from dapa_merge.measure.prompts.datasets import reading
from dapa_merge.measure.prompts.rows import listed_names
from dapa_merge.measure.prompts.sets import Question, load_questions
from dapa_merge.measure.refusal.classify import final_answer
from dapa_merge.measure.statistics import interval
from dapa_merge.progress import quiet
from dapa_merge.recipe.parameters import TASK_PREFIX, is_task_file

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lm-evaluation-harness's own seed, for few-shot examples.
SEED = 1234


@dataclass(frozen=True)
class Skill:
    """A skill test: questions, or a task of the harness."""

    name: str
    questions: tuple[Question, ...] = ()
    harness: Harness | None = None

    @property
    def num_questions(self) -> int:
        """Number of questions, without a harness task's."""
        return len(self.questions)


def load_skills(names: str, besides: Sequence[str] = (), task_files: Sequence[Path] = ()) -> tuple[Skill, ...]:
    """Load the skills of a comma list: files of questions (JSON lines or CSV), and `lm-eval:TASK:METRIC`.

    A file's skill is named after the file, without folder and suffix if that is unique; `besides` are taken names, and
    `task_files` those of the user, as in `Harness`.

    Raises:
        UsageError: If a file cannot be read, a match is unknown, or the harness cannot be used.
        HubError: If a task's data cannot be fetched.
    """
    entries = _entries(names)
    stems = [Path(entry).stem for entry in entries]
    taken = [*stems, *besides]
    return tuple(
        _load_skill(entry, stem if taken.count(stem) == 1 else entry, task_files)
        for entry, stem in zip(entries, stems, strict=True)
    )


def absolute(names: str) -> str:
    """Return the same comma list with absolute paths."""
    return ", ".join(map(_absolute, _entries(names)))


def skill_figure(
    skill: Skill, ask: Callable[[Sequence[str]], Sequence[str]], score: Callable[[Harness], float]
) -> SkillFigure:
    """Measure a skill: `ask` returns a model's whole responses to prompts, `score` its score in a harness task."""
    if skill.harness is not None:
        return SkillFigure(skill.name, score(skill.harness), 0, None)
    responses = ask([question.prompt for question in skill.questions])
    right = sum(is_right(*pair) for pair in zip(responses, skill.questions, strict=True))
    return SkillFigure(skill.name, right / len(responses), len(responses), interval(right, len(responses)))


def is_right(response: str, question: Question) -> bool:
    """Whether a response answers a question, by the question's `match`; a thought before the answer does not count."""
    return MATCHES[question.match](final_answer(response), question.answer)


def _exact(response: str, answer: str) -> bool:
    return _folded(response) == _folded(answer)


def _contains(response: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(_folded(answer))}(?!\w)", _folded(response)) is not None


def _number(response: str, answer: str) -> bool:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", response)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(answer.replace(",", ""))


def _regex(response: str, answer: str) -> bool:
    try:
        # Even to read a pattern may take for ever.
        return is_found(answer, response)
    except Unfinished as error:
        raise UsageError(f"the pattern {answer[:80]!r} of a question cannot be looked for: {error}") from error


# `exact`: except for case and space. `contains`: the answer, as whole words. `number`: the last number of the response.
# `regex`: the answer is a pattern found in the response.
MATCHES: Mapping[str, Callable[[str, str], bool]] = {
    "exact": _exact, "contains": _contains, "number": _number, "regex": _regex,
}  # fmt: skip


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _entries(names: str) -> list[str]:
    """Split a comma list into distinct entries."""
    entries: list[str] = []
    for part in listed_names(names):
        follows_task = bool(entries) and entries[-1].startswith(TASK_PREFIX)
        if follows_task and not os.path.exists(part) and not re.search(r"[.:/\\]", part):
            # A metric may name its filter after a comma, which never looks like a path or a task.
            entries[-1] += f",{part}"
        else:
            entries.append(part)
    distinct: dict[str, str] = {}
    for entry in entries:
        distinct.setdefault(_absolute(entry), entry)
    return list(distinct.values())


def _absolute(entry: str) -> str:
    if not entry.startswith(TASK_PREFIX):
        return os.path.abspath(entry)
    task = parse_task(entry)
    return str(replace(task, name=os.path.abspath(task.name))) if is_task_file(task.name) else entry


def named_task_files(names: str | None) -> tuple[Path, ...]:
    """The task files among the names of an option; a user who names a file trusts it."""
    tasks = [parse_task(entry).name for entry in _entries(names or "none") if entry.startswith(TASK_PREFIX)]
    return tuple(Path(os.path.abspath(name)) for name in tasks if is_task_file(name))


def _load_skill(entry: str, name: str, task_files: Sequence[Path]) -> Skill:
    if entry.startswith(TASK_PREFIX):
        return Skill(entry, harness=Harness(parse_task(entry), task_files))
    if not os.path.exists(entry):
        raise UsageError(
            f"skills {entry!r}: no such file{nearest_here(entry)}; name files of questions and answers, or tasks as "
            f"{TASK_PREFIX}TASK"
        )
    return Skill(name, checked(load_questions(Path(entry)), entry))


def checked(questions: tuple[Question, ...], where: str) -> tuple[Question, ...]:
    """Return the questions if each has a known match and an answer that suits it; raises `UsageError` otherwise."""
    for number, question in enumerate(questions, 1):
        if question.match not in MATCHES:
            raise UsageError(f"{where}, question {number}: match is {question.match!r}; known are {', '.join(MATCHES)}")
        try:
            is_right("0", question)
        except (ValueError, UsageError) as error:
            raise UsageError(f"{where}, question {number}: the answer is not a {question.match}: {error}") from error
    return questions


@dataclass(frozen=True)
class Task:
    """A task and its metric; an empty metric means the task's first."""

    name: str
    metric: str = ""

    def __str__(self) -> str:
        return f"{TASK_PREFIX}{self.name}{f':{self.metric}' if self.metric else ''}"


def parse_task(text: str) -> Task:
    """Parse `lm-eval:TASK` or `lm-eval:TASK:METRIC`; the metric may name a filter, as in `exact_match,strict-match`.

    Raises:
        UsageError: If it has another form.
    """
    name, _, metric = text.removeprefix(TASK_PREFIX).partition(":")
    if not text.startswith(TASK_PREFIX) or not name or ":" in metric or (text.endswith(":")):
        raise UsageError(f"{text!r} is not a task; write {TASK_PREFIX}TASK or {TASK_PREFIX}TASK:METRIC")
    return Task(name, metric)


class Harness:
    """One task with its data, for any number of models.

    Attributes:
        identity: Its name and, if it is in a file, the SHA-256 of that.
    """

    def __init__(self, task: Task, task_files: Sequence[Path] = ()) -> None:
        """Read the task, to find its faults before a model is loaded.

        Args:
            task: Names the task.
            task_files: The files that the user trusts: they may run.

        Raises:
            UsageError: If lm-evaluation-harness is not installed, or the task cannot be read or has no such metric.
            HubError: If its data can neither be fetched nor found in the cache.
        """
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise UsageError(f"{task} needs lm-evaluation-harness; install it with: pip install lm-eval") from error
        self.task = task
        self._system: str | None = None
        self._file = _file_of(task, task_files)
        digest = "" if self._file is None else " " + hashlib.sha256(_read(self._file)).hexdigest()
        self.identity = f"{task}{digest}"
        self._loaded = _load(task, self._file)
        known = _metrics(self._loaded)
        if known and not any(map(self._is_wanted, known)):
            raise UsageError(f"{task} has no metric {task.metric!r}; its metrics are {', '.join(known)}")

    def __repr__(self) -> str:
        return self.identity

    def formatted(self, system: str) -> Harness:
        """The same task, asked in the model's chat template and after a system message, which may be empty."""
        found = copy.copy(self)
        found._system = system
        found.identity = f"{self.identity} in the chat template after {system!r}"
        return found

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> float:
        """Return the task's metric for a model, which is not changed.

        Raises:
            UsageError: If the task cannot be run, or its metric lacks the filter or is not from 0 to 1.
        """
        try:
            with _quietly(self._file and self._file.parent):
                results = _evaluate(model, tokenizer, self._loaded, batch_size, self._system)
        except Exception as error:
            # Tasks contain their own code, which may raise anything.
            raise UsageError(f"{self.task} cannot be run: {one_line(error)}") from error
        return self._read(results)

    def _read(self, results: Mapping[str, Any]) -> float:
        names = [*self._loaded["groups"], *self._loaded["tasks"]]
        found = {
            key: value
            for key, value in results["results"].get(names[0], {}).items()
            if isinstance(value, (int, float)) and "," in key and "_stderr," not in key
        }
        wanted = list(filter(self._is_wanted, found))
        if not wanted:
            known = ", ".join(found) or "none that could be read"
            raise UsageError(f"{self.task} has no metric {self.task.metric!r}; its metrics are {known}")
        value = float(found[wanted[0]])
        if not 0 <= value <= 1:
            raise UsageError(
                f"{self.task} gave {wanted[0]} = {value}; the metric must be from 0 to 1, and higher must be better"
            )
        return value

    def _is_wanted(self, key: str) -> bool:
        """Whether a metric with its filter, such as `acc,none`, is the one to read."""
        return not self.task.metric or self.task.metric in (key, key.partition(",")[0])


def _manager(*, include_defaults: bool) -> TaskManager:
    """Return a task manager for the harness's own tasks, or only for the user's file."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


# The harness takes five seconds to index its tasks.
_manager_of_all = functools.cache(functools.partial(_manager, include_defaults=True))


def _file_of(task: Task, task_files: Sequence[Path]) -> Path | None:
    """The absolute path of the user's file that has a task; None for a task of the harness.

    Raises:
        UsageError: If the task is a file that the user did not name, or the name of several tasks.
    """
    trusted = [Path(os.path.abspath(file)) for file in task_files]
    if is_task_file(task.name):
        file = Path(os.path.abspath(task.name))
        if file not in trusted:
            raise UsageError(f"{task} names a task file, which would run; name it with --task-file (DAPA_TASK_FILE)")
        if not file.is_file():
            raise UsageError(f"{task}: there is no such file{nearest_here(task.name)}")
        return file
    having = [file for file in trusted if _name_in(file) == task.name]
    if having and task.name in _manager_of_all().all_tasks:
        raise UsageError(f"{having[0]} calls its task {task.name}, as the harness does its own; rename it")
    if len(having) > 1:
        raise UsageError(f"{having[0]} and {having[1]} both have a task {task.name}; rename one")
    return having[0] if having else None


def _name_in(file: Path) -> object:
    """The name that a task file gives its task or group, without running anything."""
    try:
        head = yaml.compose(_read(file), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the task file {file} is not YAML: {one_line(error)}") from error
    pairs = head.value if isinstance(head, yaml.MappingNode) else ()
    return next((value.value for key, value in pairs if key.value in ("task", "group")), None)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the task file {file}: {why_unreadable(error)}") from error


def _load(task: Task, file: Path | None = None) -> Mapping[str, Any]:
    try:
        with _quietly(file and file.parent):
            manager = _manager(include_defaults=False) if file else _manager_of_all()
            known = file is not None or task.name in manager.all_tasks
            if known:
                with reading(str(task)):
                    loaded = manager.load([str(file or task.name)])
    except HubError:
        raise
    except Exception as error:
        raise UsageError(f"{task} cannot be read: {one_line(error)}") from error
    if not known:
        near = difflib.get_close_matches(task.name, manager.all_tasks, n=3)
        hint = f"; near names are {', '.join(near)}" if near else ""
        raise UsageError(
            f"lm-evaluation-harness has no task {task.name!r}{hint}; one of your own comes from --task-file"
        )
    for one in loaded["tasks"].values():
        if getattr(one, "UNSAFE_CODE", False):
            raise UsageError(f"{task} runs code that the model writes, which dapa-merge never does; name another task")
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
    return dict(loaded)


def _metrics(loaded: Mapping[str, Any]) -> list[str]:
    """List the metrics with their filters, as far as they are known before a task is run."""
    tasks = loaded["tasks"].values()
    if loaded["groups"]:
        names = [metric.metric for metric in next(iter(loaded["groups"].values())).aggregate_metric_list or ()]
    else:
        # A tag's first task is the one that is read.
        tasks = list(tasks)[:1]
        names = [name for task in tasks for name in task.aggregation()]
    filters = {one.name: None for task in tasks for one in getattr(task, "_filters", ())}
    return [f"{name},{one}" for name in names for one in filters]


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Mapping[str, Any],
    batch_size: int,
    system: str | None,
) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    class Asked(HFLM):  # type: ignore[misc]
        """Formats as all prompts are: confined, and checked."""

        def apply_chat_template(
            self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
        ) -> str:
            messages = [Message(one["role"], one["content"]) for one in chat_history]
            opening = "" if add_generation_prompt else messages.pop().content
            return chat_prompt(self.tokenizer, Conversation(messages)) + opening

    for task in loaded["tasks"].values():
        # Each time, or the examples would depend on earlier runs.
        task.set_fewshot_seed(seed=SEED)
    was_training = model.training
    try:
        # A copy, because the harness changes the tokenizer's padding and special tokens.
        wrapped = Asked(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        # Examples are turns of the conversation, as they are for a user.
        asked = {"system_instruction": system or None, "apply_chat_template": True, "fewshot_as_multiturn": True}
        results = evaluate(
            wrapped, dict(loaded), bootstrap_iters=0, log_samples=False, **({} if system is None else asked)
        )
    finally:
        model.train(was_training)
    assert results is not None
    return dict(results)


@contextmanager
def _quietly(folder: Path | None) -> Iterator[None]:
    """Silence the harness, and change to `folder` if given."""
    here = os.getcwd()
    try:
        with quiet("lm_eval"):
            if folder is not None:
                os.chdir(folder)
            yield
    finally:
        os.chdir(here)
