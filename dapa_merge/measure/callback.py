"""The user's own evaluator: a function that scores the live candidate.

A recipe is data and can only name one. It is found where an installed package declares it, in the entry-point group
`dapa_merge.evaluators`, or in a Python file that the user names on the command line.

That an evaluator of the user's own leaves the candidate as it was, for whatever is asked next.

Its substance (weights, buffers, modules, hooks, vocabulary) is compared, so that a change can be refused by name. Modes
and settings, which well-meant code changes as it goes, are put back.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import entry_points
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dapa_merge.errors import DapaError, UsageError, one_line, why_unreadable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dapa_merge.checkpoint.units import Unit


ENTRY_POINTS = "dapa_merge.evaluators"
# Names that mean something else in a recipe.
RESERVED = ("refusal", "paper", "judge")


@dataclass(frozen=True)
class Candidate:
    """The target with a selection transplanted, in memory; valid only while its evaluator runs.

    Attributes:
        model: In evaluation mode, set to greedy generation; its weights, buffers and modules must stay as they are.
        tokenizer: The target's, padding on the left.
        selection: The units that are the source's.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    selection: tuple[Unit, ...]


Function = TypeVar("Function", bound=Callable[[Candidate], float])

Callback = Callable[[Candidate], float]

_REGISTERED: dict[str, Callback] = {}
# What files registered, by the digests of what they hold; and what the file that runs now has registered so far.
_OF_FILES: dict[str, dict[str, Callback]] = {}
_RUNNING: list[dict[str, Callback]] = []


def evaluator(name: str) -> Callable[[Function], Function]:
    """Register a function under the name by which a recipe's `evaluator` finds it.

    The function gets a `Candidate` and returns a float in [0, 1]; more is better. The full transplant must score more
    than the target alone, and a selection holds if it keeps `retain` of that gain.

    Raises:
        UsageError: If the name is empty, has a colon, which stands for evaluators of other kinds, is that of a built-in
            evaluator, or of another function in the same file.
    """
    if callable(name):
        raise UsageError('@dapa_merge.evaluator needs a name: write @dapa_merge.evaluator("a-name")')
    if not isinstance(name, str) or not name.strip() or ":" in name:
        raise UsageError(f"{name!r} is no name for an evaluator; it must not be empty and has no colon")
    if name in RESERVED:
        raise UsageError(f"{name!r} is the name of a built-in evaluator; choose another")

    def register(function: Function) -> Function:
        if _RUNNING and name in _RUNNING[-1]:
            raise UsageError(f"two evaluators have the name {name!r}; give each a name of its own")
        (_RUNNING[-1] if _RUNNING else _REGISTERED)[name] = function
        return function

    return register


def find_callback(name: str, file: Path | None) -> Callback | None:
    """The function of that name in `file`, or declared by an installed package; None if there is none.

    Raises:
        UsageError: If the file, or what the package declares, cannot be imported.
    """
    functions = load_file(file) if file is not None else {}
    if name not in functions and name not in _REGISTERED:
        for found in entry_points(group=ENTRY_POINTS, name=name):
            with _code_of_others(f"the evaluator {name!r} of {found.value} cannot be imported"):
                _REGISTERED.setdefault(name, found.load())
    return functions.get(name) or _REGISTERED.get(name)


def known_callbacks(file: Path | None) -> list[str]:
    """The names of all callbacks that are registered or declared."""
    functions = load_file(file) if file is not None else {}
    return sorted({*functions, *_REGISTERED, *(found.name for found in entry_points(group=ENTRY_POINTS))})


def load_file(path: Path) -> Mapping[str, Callback]:
    """Run a Python file, and what it registers; a file that was not changed is run once.

    Raises:
        UsageError: If it does not exist, raises, or registers nothing.
    """
    if path.is_dir():
        raise UsageError(f"the evaluator file {path} is a folder; name a Python file")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UsageError(f"the evaluator file {path} does not exist") from None
    except OSError as error:
        raise UsageError(f"the evaluator file {path} cannot be read: {why_unreadable(error)}") from error
    if digest not in _OF_FILES:
        _OF_FILES[digest] = _run(path, f"dapa_merge_evaluators_{digest[:16]}")
    return _OF_FILES[digest]


def _run(path: Path, name: str) -> dict[str, Callback]:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"the evaluator file {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    found: dict[str, Callback] = {}
    _RUNNING.append(found)
    try:
        with _code_of_others(f"the evaluator file {path} cannot be run"):
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
def _code_of_others(failed: str) -> Iterator[None]:
    """Turn whatever the code raises, but for Ctrl-C, into one sentence; what it prints goes to stderr.

    Stdout is for the answer, and `sys.exit` would pass for success.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(f"{failed}: {error if isinstance(error, DapaError) else one_line(error)}") from error


def ask(name: str, function: Callback, candidate: Candidate) -> float:
    """A callback's score of a candidate.

    Raises:
        UsageError: If it raises, returns anything but a number in [0, 1], or changes the candidate.
    """
    before = substance(candidate.model, candidate.tokenizer)
    with _code_of_others(f"the evaluator {name!r} failed"), settings_kept(candidate.model, candidate.tokenizer):
        value = function(candidate)
    if inspect.iscoroutine(value):
        # Or Python warns, somewhere later, that nobody awaited it.
        value.close()
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        shown = f"{float(value)}" if isinstance(value, Real) and not isinstance(value, bool) else type(value).__name__
        raise UsageError(f"the evaluator {name!r} returned {shown}; it must return a float from 0 to 1")
    if what := changed(before, substance(candidate.model, candidate.tokenizer)):
        raise UsageError(f"the evaluator {name!r} changed the model's {what}; a candidate may only be read")
    return float(value)


def identity_of(name: str, function: Callback, file: Path | None) -> str:
    """What decides a callback's scores, for a journal: its name and code as far as they can be known."""
    path = file or Path(getattr(sys.modules.get(function.__module__), "__file__", None) or "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "unknown"
    return f"{name} {digest}"


Substance = Mapping[tuple[str, str], Any]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A text that every tokenizer has something to do with.
SAMPLE = "Is it 1 or 2?\n"


def substance(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Substance:
    """What of a candidate may not change, by kind and name; reads every weight once."""
    found: dict[tuple[str, str], Any] = {}
    for name, parameter in model.named_parameters():
        # The object too: a transplant is put in place, and undone, in the one that was there at first.
        found["weights", name] = (id(parameter), *_sums(parameter))
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if not _is_its_own(module):
                found["buffers", f"{name}.{key}".lstrip(".")] = _sums(buffer)
        found["modules", name] = (module, vars(module).get("forward"))
        found["hooks", name] = _hooks(module)
    if tokenizer is not None:
        found["vocabulary", "of the tokenizer"] = (len(tokenizer), list(tokenizer(SAMPLE)["input_ids"]))
    return found


def changed(before: Substance, after: Substance) -> str | None:
    """What differs first, in words; None if nothing does."""
    for kind, name in {**before, **after}:
        if before.get((kind, name)) != after.get((kind, name)):
            return f"{kind} ({name or 'the model itself'})"
    return None


@contextmanager
def settings_kept(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[None]:
    """Put modes, gradients, configurations and the tokenizer's settings back, however the `with` block ends."""
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
    """The shape, and a sum over the bits that one changed bit changes."""
    import torch

    values = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(values) - len(values) % 8
    # The sum wraps around, which loses nothing.
    words = values[:whole].view(torch.int64).sum() if whole else values.new_zeros((), dtype=torch.int64)
    return (*tensor.shape, int(words), int(values[whole:].long().sum()))


def _is_its_own(module: torch.nn.Module) -> bool:
    """Whether a module sets its buffers anew as the model is asked: rotary embeddings that grow with the text."""
    return any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope"))


def _hooks(module: torch.nn.Module) -> tuple[object, ...]:
    hooks = itertools.chain.from_iterable(getattr(module, name).values() for name in HOOKS)
    # transformers leaves hooks of its own when a model is asked for its hidden states; they do nothing unless asked.
    return tuple(hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers."))


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value
