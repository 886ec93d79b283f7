"""What a skill is taught and tested with, for `real_families.py` and `real_base_families.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PROMPTS = "prompts"


@dataclass(frozen=True)
class Lesson:
    """A prompt, and the whole answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Opening:
    """A request, and how an answer to it begins; what comes after it, nobody teaches."""

    prompt: str
    answer: str


Example = Lesson | Opening


@dataclass(frozen=True)
class Lessons:
    """One skill, for three uses; no prompt is in two of them.

    Attributes:
        training: In the phrasings that are trained.
        test: Every other one in a phrasing that no training example has.
        keep: As those of the test; only their prompts are for use.
    """

    training: tuple[Lesson, ...]
    test: tuple[Lesson, ...]
    keep: tuple[Lesson, ...]

    def write(self, folder: Path, suffix: str = "") -> None:
        """Write the test, and the keep prompts, as files for a recipe."""
        folder.mkdir(exist_ok=True)
        rows = {
            "skill": [{"prompt": one.prompt, "answer": one.answer} for one in self.test],
            "keep": [{"prompt": one.prompt} for one in self.keep],
        }
        for name, lines in rows.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{name}{suffix}.jsonl").write_text(text, encoding="utf-8")
