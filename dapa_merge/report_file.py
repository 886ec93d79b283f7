"""Reading `dapa_report.json` back, which may come from anywhere."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from dapa_merge.checkpoint.header import read_json
from dapa_merge.errors import CheckpointError
from dapa_merge.evaluate.chance import Change
from dapa_merge.evaluate.figures import Figures
from dapa_merge.report import FILE_NAME, Report

NAMES = {"Change": Change, "Figures": Figures}


def read_report(path: Path) -> Report:
    """The report in a file, or in a result's folder.

    Raises:
        CheckpointError: If there is none, or it is no report of this version.
    """
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"there is no report {path}; `dapa-merge run` writes one into its result")
    content = read_json(path)
    try:
        return typing.cast(Report, _made(Report, content, FILE_NAME))
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
