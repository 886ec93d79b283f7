"""Declares every key under a recipe's `parameters`: its parser and its allowed values."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.location import Location, parse_location
from dapa_merge.checkpoint.region import Rows
from dapa_merge.checkpoint.units import AUTO, DIVISIBLE_MODULES, MODULES, WHOLES, join_ranges, rows_text
from dapa_merge.delta.minimize import ALGORITHMS
from dapa_merge.recipe.asking import NO_TEMPLATE
from dapa_merge.recipe.attacks import ALLOWED, parse_attacks
from dapa_merge.recipe.constraints import CONSTRAINTS

SEARCHES = tuple(ALGORITHMS)
# One entry of `layers`: `3`, `3-6`, `3.gate` or `3.gate[0:64]`; numbers short enough for a message.
_LAYERS = re.compile(r"([0-9]{1,9})(?: *- *([0-9]{1,9}))?(?:\.([a-z]+)(?:\[([0-9]{1,9}):([0-9]{1,9})\])?)?")


# A task of lm-evaluation-harness: `lm-eval:TASK` or `lm-eval:TASK:METRIC`.
TASK_PREFIX = "lm-eval:"
_TASK_NAME = re.compile(r"[\w.+-]+")


def is_task_file(name: str) -> bool:
    """Whether a task is named by the path of its file; by its look only, whatever files are here."""
    return not _TASK_NAME.fullmatch(name) or name.lower().endswith((".yaml", ".yml"))


def task_file_in(names: object) -> str | None:
    """The first task file in the value of `skills` or `evaluator`; None if it has only names of tasks."""
    _, *tasks = str(names).split(TASK_PREFIX)
    found = (re.split("[:,]", task, maxsplit=1)[0].strip() for task in tasks)
    return next((name for name in found if name and is_task_file(name)), None)


@dataclass(frozen=True)
class LayerChoice:
    """One entry of `layers`: a layer, optionally one of its modules (`4.down`) and rows of it (`3.gate[0:64]`)."""

    layer: int
    module: str | None = None
    rows: Rows | None = None

    def __str__(self) -> str:
        return f"{self.layer}{f'.{self.module}' if self.module else ''}{rows_text(self.rows)}"


def parse_layers(text: str) -> tuple[LayerChoice, ...]:
    """Parse `"3-6,9"`, `"4.down,5.gate"` or `"3.gate[0:64]"`; sorted, without repeated whole layers and modules.

    Raises:
        ValueError: If the text has another form; `rows_fault` checks the rows.
    """
    choices: list[LayerChoice] = []
    for item in text.split(","):
        match = _LAYERS.fullmatch(item.strip())
        if match is None or match[3] not in (None, *MODULES):
            raise ValueError(item.strip())
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 10_000:
            raise ValueError(item.strip())
        rows = None if match[4] is None else (int(match[4]), int(match[5]))
        choices += [LayerChoice(layer, match[3], rows) for layer in range(first, last + 1)]
    whole = {choice for choice in choices if choice.rows is None}
    blocks = [choice for choice in choices if choice.rows is not None]
    order = (None, *MODULES)
    return tuple(
        sorted([*whole, *blocks], key=lambda choice: (choice.layer, order.index(choice.module), choice.rows or ()))
    )


def rows_fault(choices: Sequence[LayerChoice]) -> str | None:
    """Describe what is wrong with the rows of parsed layers; None if they are sound."""
    for choice in choices:
        if choice.rows is not None and choice.rows[0] >= choice.rows[1]:
            return f"{choice}, an empty range of rows; the end is exclusive"
        if choice.rows is not None and choice.module not in DIVISIBLE_MODULES:
            return f"{choice}, but only rows of {' and '.join(DIVISIBLE_MODULES)} are neurons and can be chosen"
    for one, other in pairwise(choices):
        same = (one.layer, one.module) == (other.layer, other.module)
        if same and not (one.rows and other.rows and one.rows[1] <= other.rows[0]):
            return f"{one} and {other}, which overlap"
    return None


@dataclass(frozen=True)
class Parameter:
    """One key of `parameters`: its parser, and a hint at allowed values for messages."""

    read: Callable[[Any], Any]
    allowed: str


def _number(low: float, high: float, *, above: bool = False, below: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not (low < number if above else low <= number) or not (number < high if below else number <= high):
            raise ValueError
        return number

    return read


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value) or int(value) < 0:
        raise ValueError
    return int(value)


def _count(value: Any) -> int:
    if (number := _whole(value)) < 1:
        raise ValueError
    return number


def _name(known: Sequence[str] = ()) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or (known and value not in known):
            raise ValueError
        return value

    return read


def _location(value: Any) -> Location:
    return parse_location(_name()(value))


def _layers(value: Any) -> tuple[LayerChoice, ...] | None:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError
    return None if value == "auto" else parse_layers(str(value))


def overlap(modules: Collection[str]) -> bool:
    """Whether two modules share tensors: mlp consists of gate, up and down, and attention of q, k, v and o."""
    return any(whole in modules and not set(parts).isdisjoint(modules) for whole, parts in WHOLES.items())


WHOLES_TEXT = "mlp is gate, up and down together, attention q, k, v and o"


def _modules(value: Any) -> tuple[str, ...]:
    if value == "auto":
        # Which these are is known from the models.
        return (AUTO,)
    names = tuple(name.strip() for name in str(value).split(","))
    if len(set(names)) != len(names) or not set(names) <= set(MODULES) or overlap(names):
        raise ValueError
    return names


def _attacks(value: Any) -> str:
    text = _name()(value)
    parse_attacks(text)
    return text


# What a recipe may name as a chat template; such a file is copied into the result.
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")


def _template(value: Any) -> str:
    name = _name()(value)
    if name != NO_TEMPLATE and Path(name).suffix.lower() not in TEMPLATE_SUFFIXES:
        raise ValueError
    return name


def _granularity(value: Any) -> str:
    if value == "expert":
        return "expert"
    kind, _, number = str(value).partition(":")
    if value != "layer" and (kind != "block" or int(number) < 1):
        raise ValueError
    return f"block:{int(number)}" if kind == "block" else "layer"


PARAMETERS: dict[str, Parameter] = {
    "layers": Parameter(
        _layers,
        'write a string: auto to search, or layers as in "3-6,9" or "4.down,5.gate", or rows as in "3.gate[0:64]"',
    ),
    "modules": Parameter(_modules, f"write auto, or a comma list of {', '.join(MODULES)} ({WHOLES_TEXT})"),
    "granularity": Parameter(
        _granularity,
        f"write layer or, for {' and '.join(DIVISIBLE_MODULES)} only, expert (one expert of a mixture) or block:N "
        f"(blocks of N rows)",
    ),
    "edit": Parameter(
        _name(), "write copy, the source's values; directions; auto, to try several; or the name of another edit"
    ),
    "directions": Parameter(
        _name(), "write the file of directions that a search wrote next to its result (dapa_directions.dat)"
    ),
    "strength": Parameter(
        _number(0, 2, above=True),
        "write a number above 0 and up to 2: 1 makes all of the edit's change, 0.5 half of it",
    ),
    "max_overflow": Parameter(_whole, "write the number of values that may be cut, from 0"),
    "evaluator": Parameter(
        _name(), "write refusal, paper, judge, lm-eval:TASK:METRIC, or the name of an evaluator of your own"
    ),
    "prompts": Parameter(
        _name(),
        "write the name of a set (builtin, miniature, advbench, xstest, ...), a file or folder, a Hub dataset, or "
        "several with commas",
    ),
    "keep": Parameter(
        _name(),
        "write skills, or where to read prompts that the fine-tune is for: a file, a folder or a Hub dataset",
    ),
    "text": Parameter(_name(), "write builtin, auto, a file, or a Hub dataset"),
    "skills": Parameter(_name(), "write files of questions, or lm-eval:TASK:METRIC, with commas"),
    "attacks": Parameter(_attacks, ALLOWED),
    "system": Parameter(_name(), "write the system message that the model is used with"),
    "chat_template": Parameter(
        _template,
        f"write {NO_TEMPLATE}, or a file with a chat template that ends in {', '.join(TEMPLATE_SUFFIXES)}",
    ),
    "pretrained": Parameter(
        _location,
        "write the model that target and source were both fine-tuned from: a folder, a Hub id or id@revision",
    ),
    "confirm": Parameter(_number(0, 1, above=True, below=True), "write a share above 0 and below 1"),
    **{
        one.key: Parameter(_number(one.values.low, one.values.high, above=one.values.above), one.values.allowed)
        for one in CONSTRAINTS
    },
    "search": Parameter(_name(SEARCHES), f"known algorithms: {', '.join(SEARCHES)}"),
    "prefer": Parameter(_name(MODULES), f"write one of the recipe's modules ({', '.join(MODULES)})"),
    "max_tests": Parameter(_count, "write a whole number of at least 1"),
    "max_new_tokens": Parameter(_count, "write a whole number of at least 1"),
    "batch_size": Parameter(_count, "write a whole number of at least 1"),
}

# The modules of a recipe that names none, for edits with another default than the gate. Each rung of `edit: auto` has
# its own.
MODULES_OF_EDITS: dict[str, tuple[str, ...]] = {"directions": (AUTO,), AUTO: ()}
# Maximum number of row ranges of a tensor that are listed; more are only counted.
MAX_RANGES = 4


def spans(units: Iterable[object]) -> str:
    """Describe units: `3.gate 4.gate 7.gate[0:64]` becomes `gate of layers 3-4; gate of layer 7 rows 0-63`."""
    given = ",".join(map(str, units))
    rows: dict[tuple[str | None, int], list[Rows]] = {}
    for choice in parse_layers(given) if given else ():
        rows.setdefault((choice.module, choice.layer), []).extend([choice.rows] if choice.rows else [])
    layers: dict[tuple[str | None, str], list[int]] = {}
    for (module, layer), ranges in rows.items():
        layers.setdefault((module, _row_spans(join_ranges(ranges))), []).append(layer)
    # Modules with the same layers are named together.
    modules: dict[str, list[str]] = {}
    for (module, shown), alike in layers.items():
        where = f"layer{'s' if len(alike) > 1 else ''} {layer_spans(alike)}{shown}"
        modules.setdefault(where, []).append(str(module))
    texts = [f"{', '.join(names)} of {where}" for where, names in modules.items()]
    return "; ".join(texts) or "nothing"


def _row_spans(ranges: Sequence[Rows]) -> str:
    """Describe row ranges by first and last row; many ranges are only counted."""
    if not ranges:
        return ""
    if len(ranges) > MAX_RANGES:
        return f" ({sum(stop - first for first, stop in ranges)} rows in {len(ranges)} ranges)"
    return " rows " + ",".join(str(first) if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in ranges)


def layer_spans(layers: Sequence[int]) -> str:
    """Format layers as in a recipe: `3-6,9`."""
    texts: list[str] = []
    ordered = sorted(layers)
    start = 0
    for index, layer in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != layer + 1:
            first = ordered[start]
            texts.append(str(first) if first == layer else f"{first}-{layer}")
            start = index + 1
    return ",".join(texts)
