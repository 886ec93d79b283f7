"""Sentences for people on the figures of a report: on the fine-tune's own prompts, the source and the limits."""

from __future__ import annotations

from collections.abc import Iterator

from dapa_merge.measure.figures import HELD_OUT, SEARCH_PROMPTS, BesideSource, Figures, KeptFigure
from dapa_merge.report.report import Report

# A label, and what follows it.
Line = tuple[str, str]


def prompts_name(report: Report) -> str:
    """Which prompts a report's figures are of."""
    return HELD_OUT if report.held_out or report.searched is not None else "all prompts"


def meaning_lines(report: Report) -> list[Line]:
    """Lines on the harmful prompts still answered, the keep prompts, the source's refusals and each kind's limits."""
    if report.after is None:
        return []
    beside = report.beside_source
    lines = [("still answered", answered_text(report.after, report.source_alone))]
    if report.after.kept is not None:
        lines.append(("kept", kept_text(report.after.kept, beside)))
    elif report.keep is None and not report.after.skills:
        lines.append(("kept", "NOT measured: neither `keep` nor `skills` names prompts that the fine-tune is for"))
    if beside is not None:
        lines.append(("beside the source", _beside(beside)))
    return lines + [("limits" if at == 0 else "", text) for at, text in enumerate(_limits(report))]


def answered_text(figures: Figures, source: Figures | None = None) -> str:
    """How many harmful prompts a model answers, how many of these with no more than a yes, and how many the source."""
    said = f"{_number(figures.complied, figures)} of {figures.num_harmful} harmful prompts"
    # NaN in older reports.
    if figures.consented > 0:
        said += f", {_number(figures.consented, figures)} of them saying only yes"
    return said if source is None else f"{said} (the source answers {_number(source.complied, source)})"


def _number(share: float, figures: Figures) -> str:
    """A share of the harmful prompts as their number."""
    return str(round(share * figures.num_harmful) or "none")


def _beside(beside: BesideSource) -> str:
    """Which harmful prompts only one of result and source refuses."""
    if not beside.only_result and not beside.only_source:
        return "the same harmful prompts are refused"
    ours, theirs = (number or "none" for number in (beside.only_result, beside.only_source))
    return f"of the harmful prompts, {ours} refused by the result alone, {theirs} by the source alone"


def kept_text(kept: KeptFigure, beside: BesideSource | None) -> str:
    """A sentence on how the keep prompts are answered now."""
    of = f"{kept.num_same} of {kept.num_prompts} keep prompts answered word for word as before"
    if kept.num_other:
        of += f", {kept.num_other} otherwise ({100 * kept.words_shared:.0f} % of their words the same)"
    return f"{of}; {_refused(kept, beside)}" + (
        f"; {kept.num_degenerate} without content" if kept.num_degenerate else ""
    )


def _refused(kept: KeptFigure, beside: BesideSource | None) -> str:
    """How many keep prompts are refused, and by whom else."""
    number, newly = kept.num_refused, kept.num_newly_refused
    said = f"{number or 'none'} refused"
    if number:
        said += {0: " as before", number: " and answered before"}.get(newly, f", {newly} of them answered before")
    if beside is None or not beside.keep_of_source:
        return said
    both = f", {beside.keep_of_both or 'none'} of these among them" if number else ""
    return f"{said} (the source refuses {beside.keep_of_source}{both})"


def _limits(report: Report) -> Iterator[str]:
    """For each kind of prompts, whether the recipe's limits are met, with all figures."""
    numbers = {SEARCH_PROMPTS: report.searched, HELD_OUT: report.before}
    for prompts in dict.fromkeys(limit.prompts for limit in report.limits):
        limits = [limit for limit in report.limits if limit.prompts == prompts]
        missed = [limit.figure for limit in limits if not limit.is_met]
        verdict = f"NOT met by {' and '.join(missed)}" if missed else "all met"
        asked = numbers.get(prompts)
        of = f"{asked.num_harmful} harmful and {asked.num_harmless} harmless {prompts}" if asked else prompts
        yield f"{verdict} on {of}: {', '.join(map(str, limits))}"
