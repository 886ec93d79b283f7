"""Any task of lm-evaluation-harness, on a live model that no file holds.

A task is named `lm-eval:TASK` or `lm-eval:TASK:METRIC`: a name that the harness knows, or the path of a task file,
whose own relative paths start beside it. Prompts are the harness's own, without a chat template, as in published
figures.
"""

from __future__ import annotations

import copy
import difflib
import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge.errors import HubError, UsageError, one_line
from dapa_merge.measure.prompts.datasets import reading
from dapa_merge.progress import quiet

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PREFIX = "lm-eval:"
# lm-evaluation-harness's own, for the examples that stand before a question.
SEED = 1234


@dataclass(frozen=True)
class Task:
    """A task and the metric that is read; an empty metric is the task's first one."""

    name: str
    metric: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}{f':{self.metric}' if self.metric else ''}"


def parse_task(text: str) -> Task:
    """Parse `lm-eval:TASK` or `lm-eval:TASK:METRIC`; the metric may name a filter, as in `exact_match,strict-match`.

    Raises:
        UsageError: If it is neither.
    """
    name, _, metric = text.removeprefix(PREFIX).partition(":")
    if not text.startswith(PREFIX) or not name or ":" in metric or (text.endswith(":")):
        raise UsageError(f"{text!r} is no task; write {PREFIX}TASK or {PREFIX}TASK:METRIC")
    return Task(name, metric)


class Harness:
    """One task with its data, asked of any number of models."""

    def __init__(self, task: Task) -> None:
        """Read the task: what is wrong with it is known before a model is loaded.

        Raises:
            UsageError: If lm-evaluation-harness is not installed, or the task cannot be read or has no such metric.
            HubError: If the Hub does not give its data and no copy is in the cache.
        """
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise UsageError(f"{task} needs lm-evaluation-harness: pip install 'dapa-merge[eval]'") from error
        self.task = task
        self._loaded = _load(task)
        known = _metrics(self._loaded)
        if known and not any(map(self._is_wanted, known)):
            raise UsageError(f"{task} has no metric {task.metric!r}; its metrics are {', '.join(known)}")

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> float:
        """The task's metric on a model, which is left as it was.

        Raises:
            UsageError: If the task cannot be run, or its metric has no such filter, or is not from 0 to 1.
        """
        try:
            with _quietly(_beside(self.task)):
                results = _evaluate(model, tokenizer, self._loaded, batch_size)
        except Exception as error:
            # Tasks bring code of their own, which may raise anything.
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
                f"{self.task} gave {wanted[0]} = {value}; a metric from 0 to 1 is needed, more being better"
            )
        return value

    def _is_wanted(self, key: str) -> bool:
        """Whether a metric with its filter, `acc,none`, is the one that is read."""
        return not self.task.metric or self.task.metric in (key, key.partition(",")[0])


def _manager(*, is_file: bool) -> TaskManager:
    """What finds tasks, in a file of the user's or among those that come with the harness."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False) if is_file else _manager_of_all()


@functools.cache
def _manager_of_all() -> TaskManager:
    """Once, since to index what comes with the harness takes it five seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(task: Task) -> Mapping[str, Any]:
    is_file = os.path.isfile(task.name)
    try:
        with _quietly(_beside(task)):
            manager = _manager(is_file=is_file)
            known = is_file or task.name in manager.all_tasks
            if known:
                with reading(str(task)):
                    loaded = manager.load([os.path.abspath(task.name) if is_file else task.name])
    except HubError:
        raise
    except Exception as error:
        raise UsageError(f"{task} cannot be read: {one_line(error)}") from error
    if not known:
        near = difflib.get_close_matches(task.name, manager.all_tasks, n=3)
        hint = f"; near names are {', '.join(near)}" if near else ""
        raise UsageError(f"lm-evaluation-harness has no task {task.name!r}, nor is that a file{hint}")
    for one in loaded["tasks"].values():
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
    return dict(loaded)


def _metrics(loaded: Mapping[str, Any]) -> list[str]:
    """The metrics of what was asked for, with their filters, as far as it tells them before it is run."""
    tasks = loaded["tasks"].values()
    if loaded["groups"]:
        names = [metric.metric for metric in next(iter(loaded["groups"].values())).aggregate_metric_list or ()]
    else:
        # Those of a tag's first task, which is the one that is read.
        tasks = list(tasks)[:1]
        names = [name for task in tasks for name in task.aggregation()]
    filters = {one.name: None for task in tasks for one in getattr(task, "_filters", ())}
    return [f"{name},{one}" for name in names for one in filters]


def _evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: Mapping[str, Any], batch_size: int
) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in loaded["tasks"].values():
        # Anew each time, or the examples would depend on what was asked before.
        task.set_fewshot_seed(seed=SEED)
    was_training = model.training
    try:
        # The harness sets padding and special tokens of the tokenizer that it is given.
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        results = evaluate(wrapped, dict(loaded), bootstrap_iters=0, log_samples=False)
    finally:
        model.train(was_training)
    assert results is not None
    return dict(results)


def _beside(task: Task) -> Path | None:
    return Path(task.name).absolute().parent if os.path.isfile(task.name) else None


@contextmanager
def _quietly(folder: Path | None) -> Iterator[None]:
    """Without the harness's bars and advice; in `folder`, if there is one."""
    here = os.getcwd()
    try:
        with quiet("lm_eval"):
            if folder is not None:
                os.chdir(folder)
            yield
    finally:
        os.chdir(here)
