"""The report of a run as data, and as `dapa_report.json`, which may be untrusted when it is read back."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dapa_merge.checkpoint.header import read_json
from dapa_merge.errors import CheckpointError, fault_of
from dapa_merge.files import nearest_here
from dapa_merge.imports import Shown
from dapa_merge.measure.figures import BesideSource, Change, Figures, Number
from dapa_merge.plan.ladder import Tried
from dapa_merge.recipe.parameters import spans
from dapa_merge.search.result import Limit, Point, needed

REPORT_NAME = "dapa_report.json"


@dataclass(frozen=True)
class Searched:
    """The search's own measurements, on prompts that no other figure of the report uses.

    Attributes:
        measure: DSR, or the name of the evaluator.
        before: The target's, in [0, 1].
        after: The result's; biased upward, because the search chose the selection by these prompts.
    """

    measure: str
    num_harmful: int
    num_harmless: int
    before: float
    after: float

    @property
    def num_of_kind(self) -> dict[str, int]:
        """The number of prompts of each kind."""
        return {"harmful": self.num_harmful, "harmless": self.num_harmless}


@dataclass(frozen=True)
class Report(Shown):
    """One run, from recipe to result.

    Attributes:
        units: The edited units, as `3.gate`.
        parameters_changed: Number of the target's parameters in them whose values became others: not all, where the
            models differ in only some.
        share_changed: Share of the target's parameters that these are, in [0, 1].
        size_of_change: How far the values of the edited units moved, as a share of their size (Frobenius norms, of all
            units together); None for an edit that copies, and in older reports.
        before: Figures of the target on prompts that the search did not ask, or on all if the layers were given; None,
            like the next four, if nothing was evaluated.
        dsr_change: The change on harmful prompts from `before` to `after`.
        over_refusal_change: The same on harmless ones.
        searched: None if the layers were given, like `requirement`, `prior` and `one_minimal`.
        points: What there was to pick from, measured on the search's prompts; empty for most searches (see `Point`).
        picked: The number of the point that was taken; None without points.
        tests: Distinct selections that the search asked about; 0 if the layers were given.
        tests_recorded: The number of them that were already in the journal.
        resumed: Whether the journal of an earlier run had a part of the search. Then the result was measured again, and
            target and all units together if others may have written the journal, but other points and tests are as
            recorded.
        tests_unneeded: Further tests that parallel workers made ahead of time, but that were not needed.
        share_of_prompts_saved: Share of the tests' prompts that early verdicts saved, in [0, 1].
        prior: The expected effect of each unit, in nats; None if the search did not use a prior.
        one_minimal: Whether each kept unit, or bundle of units, was shown to be needed; None if the layers were given,
            or a point picked.
        certificate: For each kept unit, the selection without it or without its bundle, which did not hold.
        num_tensors: Tensors of the result, each of them compared with target and source.
        seconds: Wall-clock time from the recipe to the start of the writing.
        keep: The keep prompts as the recipe names them; None for the harmless prompts.
        system: The system message before all prompts; None for none.
        chat_template: The file in the result that the models were asked with in place of their own template; `none` if
            they were asked without one, None if with their own.
        directions: Number of directions that were added; None, like the next, for an edit that adds none, and in older
            reports.
        degrees_of_freedom: Of these directions: r (m + n) for r directions of a matrix of m x n, summed over matrices.
        arithmetic: In what the search and the figures were computed; None if as the target's config says.
        edit: Its name in a recipe; None in older reports.
        rungs: The edits that were tried, in order, the last of which repairs; empty unless the recipe's edit is `auto`.
        beside_source: The result's refusals beside the source's; None if nothing was evaluated, and in older reports.
        held_out: Whether the figures are of prompts that neither choice nor search asked.
        limits: Each limit of the recipe on the search's prompts and on those of the figures, and whether it is met;
            empty without a search, and in older reports.
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
    requirement: Mapping[str, str | Number] | None
    tests: int
    tests_recorded: int
    tests_unneeded: int
    share_of_prompts_saved: float
    prior: Mapping[str, Number] | None
    one_minimal: bool | None
    certificate: Mapping[str, Sequence[str]]
    num_tensors: int
    seconds: float
    keep: str | None = None
    system: str | None = None
    chat_template: str | None = None
    directions: int | None = None
    degrees_of_freedom: int | None = None
    rungs: tuple[Tried, ...] = ()
    points: tuple[Point, ...] = ()
    picked: int | None = None
    resumed: bool = False
    arithmetic: str | None = None
    beside_source: BesideSource | None = None
    held_out: bool = False
    limits: tuple[Limit, ...] = ()
    edit: str | None = None
    size_of_change: float | None = None

    @property
    def share_of_freedom(self) -> float | None:
        """The degrees of freedom as a share of the target's parameters."""
        if self.degrees_of_freedom is None or not self.parameters_changed:
            return None
        return self.degrees_of_freedom * self.share_changed / self.parameters_changed

    @property
    def picked_by_hand(self) -> Point | None:
        """The point that the user picked, if any, rather than a search."""
        return self.points[self.picked - 1] if self.picked is not None and self.one_minimal is None else None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; figures that are not finite become None, which JSON can represent."""
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


# Made when they are needed: each takes longer than the rest of this module.
_report_adapter = functools.cache(lambda: TypeAdapter(Report))
_figures_adapter = functools.cache(lambda: TypeAdapter(Figures))


def read_report(path: Path) -> Report:
    """Read the report in a file, or in a result's folder.

    Raises:
        CheckpointError: If it is missing, or not a report of this version.
    """
    path = path / REPORT_NAME if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"the report {path} does not exist{nearest_here(str(path))}; `dapa-merge run` writes one into its result"
        )
    # `read_json` limits size and depth, which pydantic does not.
    content = json.dumps(read_json(path))
    try:
        report = _report_adapter().validate_json(content, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a report that this version reads: {fault_of(error)}") from None
    if fault := _fault(report):
        raise CheckpointError(f"{path} is not a report that this version reads: {fault}")
    return report


def _fault(report: Report) -> str | None:
    """The first contradiction in a report whose fields have the right types; None if there is none."""
    if report.picked not in ([*range(1, len(report.points) + 1)] or [None]):
        return f"picked is {report.picked}, of {len(report.points)} points"
    try:
        for units in (report.units, *(part for reason in needed(report.certificate) for part in reason)):
            spans(units)
    except ValueError:
        return "its units are not units"
    columns = [column for column in (report.before, report.after, report.source_alone) if column is not None]
    for one in columns:
        shares = (one.dsr, *one.dsr_interval, one.complied, one.degenerate, one.undecided, one.over_refusal)
        kept = one.kept.same_interval if one.kept else ()
        if not all(0 <= share <= 1 for share in (*shares, *one.over_refusal_interval, *kept)):
            return "a share is not between 0 and 1"
    asked = {_asked(one) for one in columns}
    if len(asked) > 1 or any(min(one.num_harmful, one.num_harmless, _kept(one)) < 1 for one in columns):
        return "not all of its figures are of the same prompts"
    return None


def _kept(one: Figures) -> int:
    """The number of keep prompts, or 1 if none was asked."""
    return one.kept.num_prompts if one.kept else 1


def _asked(one: Figures) -> tuple[object, ...]:
    """Numbers of prompts and questions of a column of figures, which all columns of a report share."""
    kinds = tuple((category.kind, category.category, category.num_prompts) for category in one.categories)
    skills = tuple(skill.name for skill in one.skills)
    return one.num_harmful, one.num_harmless, one.score is None, kinds, skills, one.kept and one.kept.num_prompts


def read_figures(content: object) -> Figures:
    """Read figures that a journal holds as plain data.

    Raises:
        ValueError: If something is missing or of another type.
    """
    return _figures_adapter().validate_python(content)
