"""The user's own evaluators: functions that score a candidate, registered under a name.

A recipe is data and can only name one. An installed package declares it in the entry-point group
`dapa_merge.evaluators`, or a Python file that the user names on the command line registers it. No torch here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dapa_merge.errors import DapaError, UsageError, one_line, why_unreadable
from dapa_merge.files import nearest_here

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.checkpoint.units import Unit


ENTRY_POINTS = "dapa_merge.evaluators"
# Names of built-in evaluators.
RESERVED = ("refusal", "paper", "judge")


@dataclass(frozen=True)
class Candidate:
    """The target with a selection applied, in memory; valid only while its evaluator runs.

    Attributes:
        model: In evaluation mode, set to greedy generation; its weights, buffers and modules must not be changed.
        tokenizer: The target's, padding on the left.
        selection: The edited units.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    selection: tuple[Unit, ...]


Function = TypeVar("Function", bound=Callable[[Candidate], float])

Callback = Callable[[Candidate], float]

_REGISTERED: dict[str, Callback] = {}
# Evaluators by the digest of the file that registered them, and those of the file that is running now.
_OF_FILES: dict[str, dict[str, Callback]] = {}
_RUNNING: list[dict[str, Callback]] = []


def evaluator(name: str) -> Callable[[Function], Function]:
    """Register a function as the evaluator of this name in recipes.

    The function gets a `Candidate` and returns a float in [0, 1]; more is better. The full transplant must score more
    than the target alone, and a selection holds if it keeps `retain` of that gain:

        @dapa_merge.evaluator("short-answers")
        def short_answers(candidate: dapa_merge.Candidate) -> float:
            return share_of_short_answers(candidate.model, candidate.tokenizer)

    Raises:
        UsageError: If the name is empty, has a colon, which marks other kinds of evaluators, or already belongs to a
            built-in evaluator or another function in the same file.
    """
    if callable(name):
        raise UsageError('@dapa_merge.evaluator needs a name: write @dapa_merge.evaluator("a-name")')
    if not isinstance(name, str) or not name.strip() or ":" in name:
        raise UsageError(f"{name!r} is not a name for an evaluator: it must not be empty or have a colon")
    if name in RESERVED:
        raise UsageError(f"{name!r} is the name of a built-in evaluator; choose another")

    def register(function: Function) -> Function:
        if _RUNNING and name in _RUNNING[-1]:
            raise UsageError(f"two evaluators have the name {name!r}; rename one of them")
        (_RUNNING[-1] if _RUNNING else _REGISTERED)[name] = function
        return function

    return register


def find_callback(name: str, file: Path | None) -> Callback | None:
    """Find a function by name in `file` or declared by an installed package; None if absent.

    Raises:
        UsageError: If the file or the package's function cannot be imported.
    """
    functions = load_file(file) if file is not None else {}
    if name not in functions and name not in _REGISTERED:
        for found in entry_points(group=ENTRY_POINTS, name=name):
            with code_of_others(f"the evaluator {name!r} of {found.value} cannot be imported"):
                _REGISTERED.setdefault(name, found.load())
    return functions.get(name) or _REGISTERED.get(name)


def known_callbacks(file: Path | None) -> list[str]:
    """List the names of all callbacks that are registered or declared."""
    functions = load_file(file) if file is not None else {}
    return sorted({*functions, *_REGISTERED, *(found.name for found in entry_points(group=ENTRY_POINTS))})


def load_file(path: Path) -> Mapping[str, Callback]:
    """Run a Python file and return what it registers, by name; an unchanged file is run only once.

    Raises:
        UsageError: If it does not exist, raises, or registers nothing.
    """
    if path.is_dir():
        raise UsageError(f"the evaluator file {path} is a folder; name a Python file")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UsageError(f"the evaluator file {path} does not exist{nearest_here(str(path))}") from None
    except OSError as error:
        raise UsageError(f"the evaluator file {path} cannot be read: {why_unreadable(error)}") from error
    if digest not in _OF_FILES:
        _OF_FILES[digest] = _run(path, f"dapa_merge_evaluators_{digest[:16]}")
    return _OF_FILES[digest]


def _run(path: Path, name: str) -> dict[str, Callback]:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"the evaluator file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    found: dict[str, Callback] = {}
    _RUNNING.append(found)
    try:
        with code_of_others(f"the evaluator file {path} cannot be run"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        _RUNNING.pop()
    if not found:
        raise UsageError(
            f'the evaluator file {path} registers no evaluator; write @dapa_merge.evaluator("a-name") above a function'
        )
    return found


@contextmanager
def code_of_others(failed: str) -> Iterator[None]:
    """Turn exceptions of the user's code, except Ctrl-C, into a `UsageError`, and redirect its output to stderr.

    Stdout is for results, and `sys.exit` would look like success.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(f"{failed}: {error if isinstance(error, DapaError) else one_line(error)}") from error


def identity_of(name: str, function: Callback, file: Path | None) -> str:
    """Identify a callback for a journal: its name, and the digest of its file or `unknown`."""
    path = file or Path(getattr(sys.modules.get(function.__module__), "__file__", None) or "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "unknown"
    return f"{name} {digest}"
