"""The page of a comparison, as Markdown. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from urllib.parse import quote

from dapa_merge.compare.result import AUTO, DAPA, Cost, Row
from dapa_merge.compare.sentences import choices, nothing_to_repair, sentences
from dapa_merge.compare.tables import MARKDOWN, arms_table, methods_table, paper_table
from dapa_merge.errors import printable

HOW = (
    "DSR: share of harmful prompts that are refused, as the recipe's evaluator sees it; of one that scores a model as"
    " a whole, as the rules do, and its score says what repairs. Every figure is measured with prompts that the "
    "search did not ask (all of them, if the recipe names its layers), the same for all methods of a recipe, of the "
    "target in memory. *Repairs*: at least the share `retain` of the source's gain, within the recipe's limits of "
    "over-refusal and perplexity (of random selections: more than half of the seeds). A search asks for that share of"
    " what all of its units bring, so that it may find less. A row in which a search found nothing counts as its "
    "untouched target, also for what goes by its selection: the whole MLP of its layers; random units of the same "
    "modules and size (*random like*); and the best of as many of these as the search made tests, by the prompts of "
    "the search (*best random like*). Skill is the mean of all that the recipe asks; changes are in percentage "
    "points. Intervals: 95 %, of a row Wilson's for more prompts like these, of an average Student's t over recipes, "
    "which takes them for independent. Seconds and tests are the search's."
)
FRONT = (
    "Edits of every size: first what the search of {whose} selected (without one, blocks of all of its units), then "
    "its other units, then the rest of the MLPs, each in the order of their attribution; and as large ones at random. "
    "On the Pareto front: no edit that is as small refuses as many harmful and as few harmless prompts, keeps as much "
    "skill, and is better in one of these."
)


def page(rows: Sequence[Row], failures: Mapping[str, str], pictures: Collection[str]) -> str:
    """All tables.

    Args:
        rows: What was measured.
        failures: What could not be, and why.
        pictures: The names of the pictures that there are.
    """
    parts = ["# Comparison", HOW]
    if rows:
        parts += ["\n".join(f"- {_safe(sentence)}" for sentence in sentences(rows))]
        for key, title in ((DAPA, "## Before and after"), (AUTO, "## Before and after, `modules: auto`")):
            if any(row.arm(key) for row in rows):
                parts += [title, paper_table(rows, key).text(MARKDOWN)]
        parts += ["## Methods", methods_table(rows).text(MARKDOWN)]
        parts += _picture("methods.png", "Every method: gain in DSR and change of skill", pictures)
    for row in rows:
        parts += _row(row, pictures)
    if failures:
        parts += ["## Not measured", "\n".join(f"- {_safe(name)}: {_safe(why)}" for name, why in failures.items())]
    return "\n\n".join(parts) + "\n"


def _row(row: Row, pictures: Collection[str]) -> list[str]:
    parts = [
        f"## {_safe(row.name)}",
        f"Target `{_safe(row.target)}`, source `{_safe(row.source)}`: {row.architecture}, {row.num_parameters:,} "
        f"parameters, prompts `{_safe(row.prompts)}`, {row.before.num_harmful} harmful and {row.before.num_harmless} "
        f"harmless, judged by `{_safe(row.evaluator)}`.",
        arms_table(row).text(MARKDOWN),
    ]
    parts += [f"{arm.label}: {_safe(arm.why_not)}" for arm in row.arms if arm.why_not is not None]
    if row.strength != 1:
        parts.append(f"Whatever is transplanted moves {row.strength:g} of the way to the source, as the recipe has it.")
    if row.before.score is not None:
        scored = [(arm.label, arm.figures.score) for arm in row.arms if arm.figures is not None]
        scores = [f"{label} {score:.3f}" for label, score in scored if score is not None]
        parts.append(f"Score of `{_safe(row.evaluator)}`: {', '.join(scores)}.")
    parts.append(_verdict(row))
    if memory := _memory(row):
        parts.append(memory)
    if row.no_curve is not None:
        parts.append(f"No edits of every size, because {_safe(row.no_curve)}.")
    picture = _picture(f"row_{row.name}.png", f"{row.name}: edits of every size", pictures)
    if picture:
        parts.append(FRONT.format(whose="`modules: auto`" if row.followed == AUTO else "DAPA"))
    return parts + picture


def _verdict(row: Row) -> str:
    """Which methods repair a row's target."""
    if not row.can_be_repaired:
        return f"There is {nothing_to_repair(row)}."
    if able := choices(row):
        named = [arm.label if arm.skill is None else f"{arm.label} ({arm.skill:.3f})" for arm in able]
        return f"Repair it, the most of its skill kept first: {', '.join(named)}."
    if (why := row.complaint(row.alone)) is None:
        return "None of these methods but the source repairs it within the recipe's limits (single random draws aside)."
    return f"None of these methods repairs it within the recipe's limits, nor does the source itself: {why}."


def _memory(row: Row) -> str | None:
    costs: list[Cost] = [arm.cost for arm in row.arms if arm.cost is not None]
    peaks = (
        {place: max(cost.peak_bytes.get(place, 0) for cost in costs) for place in ("host", "device")} if costs else {}
    )
    texts = [f"{num_bytes / 1e6:,.0f} MB ({place})" for place, num_bytes in peaks.items() if num_bytes]
    return f"Peak memory of the search: {', '.join(texts)}." if texts else None


def _picture(name: str, caption: str, pictures: Collection[str]) -> list[str]:
    return [f"![{_safe(caption)}](figures/{quote(name)})"] if name in pictures else []


def _safe(text: str | None) -> str:
    """A text that may be a stranger's, in one line that stays text."""
    return " ".join(printable(text or "").replace("<", "&lt;").split())
