"""The text of a model card: a description of the model, its measurements, and how to check them.

The sentences are in `card.md.jinja`; this module provides their values. Only measured facts are stated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from dapa_merge.errors import printable
from dapa_merge.plan.edit import MODELS, Edit
from dapa_merge.publish.options import License
from dapa_merge.publish.parents import PAGES, Parent
from dapa_merge.recipe.parameters import spans
from dapa_merge.report import charts
from dapa_merge.report.report import Report
from dapa_merge.report.tables import (
    category_rows,
    change_lines,
    figure_rows,
    point_lines,
    point_rows,
    skill_label,
    taken_line,
)
from dapa_merge.search.requirement import limits_text
from dapa_merge.search.result import is_of_bundles, needed, thrift

TEMPLATE_PATH = Path(__file__).with_name("card.md.jinja")
# Entries of a certificate that a card lists at most.
MAX_REASONS = 40


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card is made of.

    Attributes:
        title: The model's name: a Hub id, or the name of its folder.
        parents: The models that it was made of, the target first.
        license: None if unknown.
        units: The transplanted units, as `3.gate`.
        edit: How the values of the units were computed.
        share_changed: Share of the target's parameters that were replaced, in [0, 1].
        report: None if measurements and search are unknown.
        recipe: The text of the recipe that replays it, without local paths.
        version: The version of dapa-merge.
        task: The Hub's `pipeline_tag`.
        made_by: The program that wrote the weights, `dapa-merge` or `mergekit`.
        settings: Prompts and text as the recipe has them, without local paths.
    """

    title: str
    parents: Sequence[Parent]
    license: License | None
    units: Sequence[str]
    edit: Edit
    share_changed: float
    parameters_changed: int
    report: Report | None
    recipe: str
    has_manifest: bool
    has_lock: bool
    pictures: Sequence[str]
    version: str
    task: str
    made_by: str
    settings: Mapping[str, str]

    def of_role(self, role: str) -> list[Parent]:
        """The target or the source, followed by its adapter if it has one."""
        return [parent for parent in self.parents if parent.role.startswith(role)]


@functools.cache
def _template() -> Template:
    environment = Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


def card_text(facts: CardFacts) -> str:
    """The body of a card, without its metadata."""

    def model(role: str) -> str:
        return " with ".join(_link(parent) for parent in facts.of_role(role))

    def places(role: str) -> str:
        # For a command line.
        return "+".join(
            parent.public_name or ("ADAPTER" if "adapter" in parent.role else parent.role.upper())
            for parent in facts.of_role(role)
        )

    report = facts.report
    columns = [report.before, report.after, report.source_alone] if report else []
    # Untrusted text is only ever passed as a value, never as part of the template.
    return _template().render(
        facts=facts,
        report=report,
        after=report.after if report else None,
        measured=columns if None not in columns else [],
        by_mergekit=facts.made_by == "mergekit",
        has_folders=any(parent.repository is None for parent in facts.parents),
        how=facts.edit.how({name: model(name) for name in MODELS}),
        verb=facts.edit.verb,
        freedom=_freedom(facts),
        charts=charts.CHARTS,
        reasons=needed(report.certificate) if report else [],
        max_reasons=MAX_REASONS,
        is_of_bundles=is_of_bundles,
        saved=thrift(report.tests_recorded, report.tests_unneeded, report.share_of_prompts_saved) if report else "",
        parent_rows=[
            (one.role, [_link(one), f"`{one.commit}`" if one.commit else "-", str(one.license or "not stated")])
            for one in facts.parents
        ],
        license=f"[{facts.license}]({facts.license.link})" if facts.license and facts.license.link else facts.license,
        model=model,
        places=places,
        point_rows=point_rows,
        point_lines=point_lines,
        taken_line=taken_line,
        spans=spans,
        table=_table,
        figure_rows=figure_rows,
        category_rows=category_rows,
        change_lines=change_lines,
        skill_label=skill_label,
        limits_text=limits_text,
        sizes=report.searched.num_of_kind if report and report.searched else None,
        isfinite=math.isfinite,
        printable=printable,
        zip=zip,
    )


def _freedom(facts: CardFacts) -> str:
    """The rest of a sentence on how many numbers decide the changed parameters; empty if as many as these."""
    counts = facts.edit.counts()
    if not counts or not facts.parameters_changed:
        return ""
    degrees = counts["degrees_of_freedom"]
    share = degrees * facts.share_changed / facts.parameters_changed
    return f", in which the directions have {degrees:,} degrees of freedom, {100 * share:.2f} % of the parameters"


def _link(parent: Parent) -> str:
    if parent.repository is None:
        return f"`{parent.name}` (a folder)"
    return f"[{parent.repository}]({PAGES}/{parent.repository})"


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    # An indented label is a detail of the row above it.
    labels = [f"&nbsp;&nbsp;{label.strip()}" if label.startswith(" ") else label for label, _ in rows]
    cells = [[label, *others] for label, (_, others) in zip(labels, rows, strict=True)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in cells)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
