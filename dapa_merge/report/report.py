"""What a run found and did, as data, as JSON and as a table.

Reading `dapa_report.json` back, which may come from anywhere.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.header import read_json
from dapa_merge.errors import CheckpointError
from dapa_merge.measure.figures import Change, Figures

REPORT_NAME = "dapa_report.json"


@dataclass(frozen=True)
class Searched:
    """What the search saw, with prompts of its own that no figure of the report rests on.

    Attributes:
        measure: What it looked at: DSR, or the name of the evaluator.
        num_harmful: Harmful prompts that it asked.
        num_harmless: Harmless ones.
        before: The target's figure on them, in [0, 1].
        after: The result's. The search took the first of many selections that did well on just these prompts, so
            that this flatters; the confirmed one does not.
    """

    measure: str
    num_harmful: int
    num_harmless: int
    before: float
    after: float


@dataclass(frozen=True)
class Report:
    """One run, from recipe to result.

    Attributes:
        version: Of dapa-merge.
        target: As the recipe names it.
        source: As the recipe names it.
        prompts: Name of the prompt set.
        evaluator: What a search goes by.
        units: The transplanted units, as `3.gate`.
        layers: Their layers.
        num_candidates: Units that the search could choose from.
        parameters_changed: Parameters that the transplant replaced.
        share_changed: Their share of the target's parameters, in [0, 1].
        before: Figures of the target, with prompts that the search did not ask, or with all if the layers were given;
            None if nothing was evaluated, as the next four.
        after: Figures of the result, with the same prompts.
        source_alone: Figures of the source, with the same prompts.
        dsr_change: What became of the harmful prompts from `before` to `after`, and whether that is more than chance.
        over_refusal_change: The same of the harmless ones.
        searched: What the search saw; None if the layers were given.
        requirement: What a selection had to meet; None if the layers were given.
        tests: Distinct selections that the search asked; 0 if the layers were given.
        tests_recorded: How many of them were in the journal already.
        tests_unneeded: How many more were made ahead of time by parallel workers, in vain.
        share_of_prompts_saved: Share of the tests' prompts that early verdicts saved, in [0, 1].
        prior: How much each unit was expected to matter, in nats; None if the search did not ask.
        one_minimal: Whether each kept unit was seen to be needed; None if the layers were given.
        certificate: For each kept unit, the selection without it, which did not hold.
        num_tensors: Tensors of the result. It appears only after each was compared with target and source.
        seconds: Wall-clock time from the recipe to the start of the writing.
    """

    version: str
    target: str
    source: str
    prompts: str
    evaluator: str
    units: tuple[str, ...]
    layers: tuple[int, ...]
    num_candidates: int
    parameters_changed: int
    share_changed: float
    before: Figures | None
    after: Figures | None
    source_alone: Figures | None
    dsr_change: Change | None
    over_refusal_change: Change | None
    searched: Searched | None
    requirement: Mapping[str, float | str] | None
    tests: int
    tests_recorded: int
    tests_unneeded: int
    share_of_prompts_saved: float
    prior: Mapping[str, float] | None
    one_minimal: bool | None
    certificate: Mapping[str, Sequence[str]]
    num_tensors: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; a figure that is not finite becomes None, since JSON has no word for it."""
        return dict(jsonable(asdict(self)))


def jsonable(value: Any) -> Any:
    """The same data with tuples as lists and numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


NAMES = {"Change": Change, "Figures": Figures}


def read_report(path: Path) -> Report:
    """The report in a file, or in a result's folder.

    Raises:
        CheckpointError: If there is none, or it is no report of this version.
    """
    path = path / REPORT_NAME if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"there is no report {path}; `dapa-merge run` writes one into its result")
    content = read_json(path)
    try:
        return typing.cast(Report, _made(Report, content, REPORT_NAME))
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is no report that this version reads: {str(error)[:200]}") from None


def read_figures(content: object) -> Figures:
    """Figures of what `json.dumps` made of them.

    Raises:
        TypeError: If they are none, as the next.
        ValueError: If something is missing.
    """
    return typing.cast(Figures, _made(Figures, content, "figures"))


def _made(kind: Any, value: Any, place: str) -> Any:
    """A value of the given type, made of what JSON has for it; keys that the type does not know are left out."""
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise TypeError(f"{place} is no object")
        hints = typing.get_type_hints(kind, localns=NAMES)
        if missing := [field.name for field in fields(kind) if field.name not in value]:
            raise ValueError(f"{place} lacks {missing[0]}")
        return typing.cast(Any, kind)(**{key: _made(hints[key], value[key], key) for key in hints})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, place)
    if origin is tuple:
        return _several(arguments, value, place)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError(f"{place} is no object")
        return {str(key): _made(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if origin is not None and issubclass(origin, Sequence):
        return _several((arguments[0], ...), value, place)
    return _plain(kind, value, place)


def _one_of(kinds: Sequence[Any], value: Any, place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return _made(kind, value, place)
            except (TypeError, ValueError):
                if kind is kinds[-1] or kinds[-1] is type(None):
                    raise
    raise TypeError(f"{place} is of another kind")


def _several(kinds: Sequence[Any], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{place} is no list")
    if len(kinds) == 2 and kinds[1] is ...:
        return tuple(_made(kinds[0], item, place) for item in value)
    if len(value) != len(kinds):
        raise ValueError(f"{place} has {len(value)} entries, not {len(kinds)}")
    return tuple(_made(kind, item, place) for kind, item in zip(kinds, value, strict=True))


def _plain(kind: Any, value: Any, place: str) -> Any:
    if kind is float:
        # JSON has no word for what is not finite.
        value = float("nan") if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{place} is no number")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{place} is no {kind.__name__}")
    return value
