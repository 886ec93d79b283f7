"""Settings of a run that depend on the machine and are therefore not part of a recipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import click

from dapa_merge.checkpoint.open import ALLOW_VARIABLE
from dapa_merge.errors import UsageError


@dataclass(frozen=True)
class Options:
    """Settings for searching and measuring.

    Attributes:
        device: A torch device; `auto` picks an accelerator if present.
        journal: The journal's file; None for one in the user's cache folder.
        uses_ray: Whether to test in Ray actors, each with its own target, instead of this process.
        num_workers: Number of actors; None for one per GPU or, without GPUs, per node.
        evaluator_file: A Python file that registers evaluators.
        task_files: Task files of lm-evaluation-harness, which may run, for recipes that name their tasks.
        judge_model: The judge's model; None for no judge.
        judge_url: The judge's OpenAI-compatible endpoint; None for the client's default.
        judge_requests: Maximum number of requests to the judge; None for no limit.
        allow_pickle: Whether to read pickled weights, as tensors only, if there are no others.
        pick: The number of the point to take, of those that an edit's choice offers; None for the best within limits.
    """

    device: str = "auto"
    journal: Path | None = None
    uses_ray: bool = False
    num_workers: int | None = None
    evaluator_file: Path | None = None
    task_files: tuple[Path, ...] = ()
    judge_model: str | None = None
    judge_url: str | None = None
    judge_requests: int | None = None
    allow_pickle: bool = False
    pick: int | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` if the judge has an empty name or an invalid address."""
        if self.judge_model is not None and not self.judge_model.strip():
            raise UsageError("the judge has no model name; name the model as its endpoint knows it")
        if self.judge_url is not None:
            check_url(self.judge_url, "the judge's url")

    def for_worker(self, device: str) -> Options:
        """The same settings for a process with another working folder, perhaps elsewhere, on a kind of device."""
        file, tasks = self.evaluator_file, tuple(task.absolute() for task in self.task_files)
        return replace(
            self,
            device=device,
            evaluator_file=file and file.absolute(),
            task_files=tasks,
            uses_ray=False,
            num_workers=None,
        )

    @classmethod
    def from_environment(cls, device: str = "auto", environment: Mapping[str, str] = os.environ) -> Options:
        """Read the variables of the fields: `DAPA_ALLOW_PICKLE`, `DAPA_EVALUATOR_FILE`, `DAPA_TASK_FILE` and so on.

        Raises:
            UsageError: If `DAPA_JUDGE_REQUESTS` or `DAPA_PICK` is not a whole number of at least 1.
            click.BadParameter: If `DAPA_ALLOW_PICKLE` is neither yes nor no.
        """
        file, tasks = environment.get("DAPA_EVALUATOR_FILE"), environment.get("DAPA_TASK_FILE") or ""
        return cls(
            device,
            evaluator_file=Path(file) if file else None,
            task_files=tuple(Path(task) for task in tasks.split(os.pathsep) if task),
            judge_model=environment.get("DAPA_JUDGE_MODEL") or None,
            judge_url=environment.get("DAPA_JUDGE_URL") or None,
            judge_requests=parse_number(environment.get("DAPA_JUDGE_REQUESTS"), "DAPA_JUDGE_REQUESTS"),
            allow_pickle=bool(click.BOOL.convert(environment.get(ALLOW_VARIABLE) or "0", None, None)),
            pick=parse_number(environment.get("DAPA_PICK"), "DAPA_PICK"),
        )


def check_url(url: str, name: str) -> None:
    """Check that a URL such as http://localhost:8000/v1 is a valid HTTP address.

    Args:
        url: The address.
        name: The option or variable that holds it, for the message.

    Raises:
        UsageError: If scheme, host, port or a character is invalid.
    """
    # Reading a port above 65535 raises `ValueError`.
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if is_http and url.isprintable() and " " not in url:
            return
    raise UsageError(
        f"{name} is not a valid address (scheme, host or port is wrong, or it has a space); "
        "expected something like http://localhost:8000/v1"
    )


def parse_number(text: str | None, name: str) -> int | None:
    """Parse a whole number from the option or variable `name`; None if empty.

    Raises:
        UsageError: If it is not a whole number of at least 1.
    """
    if not text:
        return None
    if not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"{name} is {text!r}; write a whole number of at least 1")
    return int(text)
