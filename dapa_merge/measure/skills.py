"""What a target was fine-tuned for, and must not lose: questions with known answers, or a task of the harness."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dapa_merge.errors import UsageError
from dapa_merge.measure.figures import SkillFigure
from dapa_merge.measure.harness import PREFIX, Harness, parse_task
from dapa_merge.measure.prompts.rows import listed_names
from dapa_merge.measure.prompts.sets import Question, load_questions
from dapa_merge.measure.statistics import interval


@dataclass(frozen=True)
class Skill:
    """What is asked: questions, or else a task of the harness."""

    name: str
    questions: tuple[Question, ...] = ()
    harness: Harness | None = None

    @property
    def num_questions(self) -> int:
        """Questions of its own."""
        return len(self.questions)


def load_skills(names: str, besides: Sequence[str] = ()) -> tuple[Skill, ...]:
    """The skills of a comma list: files of questions (JSON lines or CSV), and `lm-eval:TASK:METRIC`.

    A file's skill is called by the file's name without folder and suffix, if no other is called so.

    Args:
        names: The list.
        besides: Names of other skills.

    Raises:
        UsageError: If a file cannot be read, a match is unknown, or the harness cannot be asked.
        HubError: If the Hub does not give a task's data.
    """
    entries = _entries(names)
    stems = [Path(entry).stem for entry in entries]
    taken = [*stems, *besides]
    return tuple(
        _load_skill(entry, stem if taken.count(stem) == 1 else entry)
        for entry, stem in zip(entries, stems, strict=True)
    )


def absolute(names: str) -> str:
    """The same skills for another folder: with absolute paths."""
    return ", ".join(map(_absolute, _entries(names)))


def skill_figure(
    skill: Skill, ask: Callable[[Sequence[str]], Sequence[str]], score: Callable[[Harness], float]
) -> SkillFigure:
    """How well a model does.

    Args:
        skill: What is asked.
        ask: Gives the model's whole responses to prompts.
        score: Gives its score in a task of the harness.
    """
    if skill.harness is not None:
        return SkillFigure(skill.name, score(skill.harness), 0, None)
    responses = ask([question.prompt for question in skill.questions])
    right = sum(is_right(*pair) for pair in zip(responses, skill.questions, strict=True))
    return SkillFigure(skill.name, right / len(responses), len(responses), interval(right, len(responses)))


def is_right(response: str, question: Question) -> bool:
    """Whether a response answers a question, by the question's way to match."""
    return MATCHES[question.match](response, question.answer)


def _exact(response: str, answer: str) -> bool:
    return _folded(response) == _folded(answer)


def _contains(response: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(_folded(answer))}(?!\w)", _folded(response)) is not None


def _number(response: str, answer: str) -> bool:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", response)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == float(answer.replace(",", ""))


def _regex(response: str, answer: str) -> bool:
    return re.search(answer, response) is not None


# `exact`: but for case and space. `contains`: the answer, as whole words. `number`: the last number of the response.
# `regex`: the answer is a pattern that is found in the response.
MATCHES: Mapping[str, Callable[[str, str], bool]] = {
    "exact": _exact, "contains": _contains, "number": _number, "regex": _regex,
}  # fmt: skip


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _entries(names: str) -> list[str]:
    """The entries of a comma list, each once: a skill that was measured twice would be no more certain."""
    entries: list[str] = []
    for part in listed_names(names):
        if entries and entries[-1].startswith(PREFIX) and not os.path.exists(part) and not re.search(r"[.:/\\]", part):
            # A metric may name its filter after a comma; no filter looks like a path, or like a task.
            entries[-1] += f",{part}"
        else:
            entries.append(part)
    distinct: dict[str, str] = {}
    for entry in entries:
        distinct.setdefault(_absolute(entry), entry)
    return list(distinct.values())


def _absolute(entry: str) -> str:
    if not entry.startswith(PREFIX):
        return os.path.abspath(entry)
    task = parse_task(entry)
    return str(replace(task, name=os.path.abspath(task.name))) if os.path.exists(task.name) else entry


def _load_skill(entry: str, name: str) -> Skill:
    if entry.startswith(PREFIX):
        return Skill(entry, harness=Harness(parse_task(entry)))
    questions = load_questions(Path(entry))
    for number, question in enumerate(questions, 1):
        if question.match not in MATCHES:
            raise UsageError(f"{entry}, question {number}: match is {question.match!r}; known are {', '.join(MATCHES)}")
        try:
            is_right("0", question)
        except (re.error, ValueError) as error:
            raise UsageError(f"{entry}, question {number}: the answer is no {question.match}: {error}") from error
    return Skill(name, questions)
