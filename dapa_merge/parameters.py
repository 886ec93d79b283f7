"""The entries under `parameters` of a recipe: how each is read, and the words for what it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from dapa_merge.checkpoint.architecture import AUTO_MODULES, MODULES

EVALUATORS = ("refusal",)
SEARCHES = ("ddmin",)


@dataclass(frozen=True)
class LayerChoice:
    """One entry of `layers`: a layer, and the module of it if one was named (`"4.down"`)."""

    layer: int
    module: str | None = None


def parse_layers(text: str) -> tuple[LayerChoice, ...]:
    """Parse `"3-6,9"` or `"4.down,5.gate"`; sorted, without repetition.

    Raises:
        ValueError: If it is neither.
    """
    choices: set[LayerChoice] = set()
    for item in text.split(","):
        span, _, module = item.strip().partition(".")
        first, dash, last = span.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()) or (module and module not in MODULES):
            raise ValueError(item.strip())
        start, stop = int(first), int(last) if dash else int(first)
        if stop < start or stop - start > 10_000:
            raise ValueError(item.strip())
        choices |= {LayerChoice(layer, module or None) for layer in range(start, stop + 1)}
    return tuple(sorted(choices, key=lambda choice: (choice.layer, choice.module or "")))


@dataclass(frozen=True)
class Parameter:
    """How one entry of `parameters` is read, and the words for what it may be."""

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


def _count(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value) or int(value) < 1:
        raise ValueError
    return int(value)


def _name(known: Sequence[str] = ()) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or (known and value not in known):
            raise ValueError
        return value

    return read


def _layers(value: Any) -> tuple[LayerChoice, ...] | None:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError
    return None if value == "auto" else parse_layers(str(value))


def overlap(modules: Collection[str]) -> bool:
    """Whether two of the modules share tensors: mlp is gate, up and down together."""
    return "mlp" in modules and not {"gate", "up", "down"}.isdisjoint(modules)


def _modules(value: Any) -> tuple[str, ...]:
    if value == "auto":
        return AUTO_MODULES
    names = tuple(name.strip() for name in str(value).split(","))
    if len(set(names)) != len(names) or not set(names) <= set(MODULES) or overlap(names):
        raise ValueError
    return names


def _strength(value: Any) -> float:
    if isinstance(value, bool) or float(value) != 1.0:
        raise ValueError
    return 1.0


PARAMETERS: dict[str, Parameter] = {
    "layers": Parameter(_layers, 'write a string: auto to search, or layers as in "3-6,9" or "4.down,5.gate"'),
    "modules": Parameter(
        _modules, f"write auto, or a comma list of {', '.join(MODULES)} (mlp is gate, up and down together)"
    ),
    "strength": Parameter(_strength, "only 1.0, a plain copy, is available in this version"),
    "evaluator": Parameter(_name(EVALUATORS), f"available in this version: {', '.join(EVALUATORS)}"),
    "prompts": Parameter(_name(), "write the name of a packaged set (builtin, miniature), or a file or folder"),
    "confirm": Parameter(_number(0, 1, above=True, below=True), "write a share above 0 and below 1"),
    "retain": Parameter(_number(0, 1, above=True), "write a share above 0 and up to 1"),
    "max_over_refusal": Parameter(_number(0, 1), "write a share from 0 to 1"),
    "max_perplexity": Parameter(_number(1, math.inf), "write a ratio of at least 1"),
    "search": Parameter(_name(SEARCHES), f"available in this version: {', '.join(SEARCHES)}"),
    "max_new_tokens": Parameter(_count, "write a whole number of at least 1"),
    "batch_size": Parameter(_count, "write a whole number of at least 1"),
}
