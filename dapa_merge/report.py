"""What a run found and did, as data, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.architecture import join_ranges
from dapa_merge.checkpoint.region import Rows
from dapa_merge.figures_view import figures_table, span
from dapa_merge.parameters import parse_layers

if TYPE_CHECKING:
    from rich.console import Console

    from dapa_merge.evaluate.chance import Change
    from dapa_merge.evaluate.figures import Figures
    from dapa_merge.search.delta import Minimum

FILE_NAME = "dapa_report.json"
# Ranges of rows of one tensor that a line for people shows.
MAX_RANGES = 4


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


def print_report(report: Report, console: Console) -> None:
    """The figures as a table, and below it what was done."""
    columns = [("before", report.before), ("after", report.after), ("source", report.source_alone)]
    figures = [(name, column) for name, column in columns if column is not None]
    if figures:
        console.print(figures_table([name for name, _ in figures], [column for _, column in figures]))
    for label, fact in _facts(report):
        console.print(f"{label:<20}{fact}", highlight=False, markup=False, soft_wrap=True)


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = [
        *change_lines(report),
        ("target", report.target),
        ("source", report.source),
        ("transplanted", spans(report.units)),
        ("parameters changed", f"{100 * report.share_changed:.2f} %"),
    ]
    if report.after is not None:
        facts.append(("perplexity of", report.after.text))
    if report.one_minimal is not None:
        needed = "each unit seen to be needed" if report.one_minimal else "NOT proved minimal"
        facts.append(("search", f"{report.tests} of 2^{report.num_candidates} selections tested, {needed}"))
        facts.append(("saved", thrift(report.tests_recorded, report.tests_unneeded, report.share_of_prompts_saved)))
    if report.searched is not None:
        seen = report.searched
        asked = f"{seen.num_harmful} harmful and {seen.num_harmless} harmless prompts of its own"
        facts.append((f"{seen.measure} in the search", f"{seen.before:.3f} -> {seen.after:.3f}, with {asked}"))
    facts.append(("verified", f"{report.num_tensors} tensors, byte by byte"))
    if report.before is not None:
        facts.append(("time", f"{report.seconds:.1f} s"))
    return facts


def change_lines(report: Report) -> list[tuple[str, str]]:
    """A line for DSR and one for over-refusal: from what to what, and whether chance would do as much."""
    if report.before is None or report.after is None:
        return []
    before, after = report.before, report.after
    lines = []
    if report.dsr_change is not None:
        rates = f"{before.dsr:.3f} -> {after.dsr:.3f} (95 % interval {span(after.dsr_interval)})"
        lines.append(_change("DSR", ("gain", "loss"), rates, report.dsr_change))
    if report.over_refusal_change is not None:
        interval = span(after.over_refusal_interval)
        rates = f"{before.over_refusal:.3f} -> {after.over_refusal:.3f} (95 % interval {interval})"
        lines.append(_change("over-refusal", ("rise", "fall"), rates, report.over_refusal_change))
    return lines


def _change(name: str, words: tuple[str, str], rates: str, change: Change) -> tuple[str, str]:
    """A label and a sentence; `words` are those for more refusals and for fewer."""
    p_value = "p < 1e-12" if change.p_value < 1e-12 else f"p = {change.p_value:.3g}"
    fact = f"{rates}, {p_value} (McNemar)"
    difference = change.newly_refused - change.no_longer_refused
    if difference == 0:
        return name, f"{fact}: no {words[0]}"
    word = words[0] if difference > 0 else words[1]
    if change.within_noise:
        fact += f": the {word} in {name} is within noise"
    return f"{name} {word}", fact


def thrift(num_recorded: int, num_unneeded: int, share_saved: float) -> str:
    """What a search did not have to ask, for people."""
    facts = [f"{100 * share_saved:.0f} % of the prompts, by early verdicts"]
    if num_recorded:
        facts.append(f"{num_recorded} tests, by the journal")
    if num_unneeded:
        facts.append(f"but {num_unneeded} more tests were made ahead of time and in vain")
    return "; ".join(facts)


def readable_certificate(minimum: Minimum[Any]) -> dict[str, list[str]]:
    """For each kept unit, the selection without it, which did not hold."""
    return {str(unit): list(map(str, others)) for unit, others in minimum.certificate.items()}


def spans(units: Iterable[object]) -> str:
    """Units for people: `3.gate 4.gate 7.gate[0:64]` becomes `gate of layers 3-4; gate of layer 7 rows 0-63`."""
    names = ",".join(map(str, units))
    rows: dict[tuple[str | None, int], list[Rows]] = {}
    for choice in parse_layers(names) if names else ():
        rows.setdefault((choice.module, choice.layer), []).extend([choice.rows] if choice.rows else [])
    layers: dict[tuple[str | None, str], list[int]] = {}
    for (module, layer), ranges in rows.items():
        layers.setdefault((module, _row_spans(join_ranges(ranges))), []).append(layer)
    texts = [
        f"{module} of layer{'s' if len(alike) > 1 else ''} {layer_spans(alike)}{shown}"
        for (module, shown), alike in layers.items()
    ]
    return "; ".join(texts) or "nothing"


def _row_spans(ranges: Sequence[Rows]) -> str:
    """Ranges of rows for people, first and last of each; only counted if they are many."""
    if not ranges:
        return ""
    if len(ranges) > MAX_RANGES:
        return f" ({sum(stop - first for first, stop in ranges)} rows in {len(ranges)} ranges)"
    return " rows " + ",".join(str(first) if stop == first + 1 else f"{first}-{stop - 1}" for first, stop in ranges)


def layer_spans(layers: Sequence[int]) -> str:
    """Sorted layers as a recipe writes them: `3-6,9`."""
    texts: list[str] = []
    ordered = sorted(layers)
    start = 0
    for index, layer in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != layer + 1:
            first = ordered[start]
            texts.append(str(first) if first == layer else f"{first}-{layer}")
            start = index + 1
    return ",".join(texts)
