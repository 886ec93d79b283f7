"""The text of a model card: a description of the model, its measurements, and how to check them.

The sentences are in `card.md.jinja`; this module provides their values. Only measured facts are stated.
"""

from __future__ import annotations

import functools
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from dapa_merge.errors import code_fence, markdown, markdown_code, printable
from dapa_merge.plan.edit import MODELS, Edit
from dapa_merge.publish.options import License
from dapa_merge.publish.parents import PAGES, Parent
from dapa_merge.recipe.parameters import spans
from dapa_merge.report import charts
from dapa_merge.report.report import Report
from dapa_merge.report.sentences import answered_text, meaning_lines, prompts_name
from dapa_merge.report.tables import (
    POINT_HEAD,
    category_rows,
    change_lines,
    figure_rows,
    moved_text,
    point_lines,
    point_rows,
    resumed_line,
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
        title: The model's name: a Hub id, or what its target is called.
        parents: The models that it was made of, the target first.
        license: None if unknown.
        units: The edited units, as `3.gate`.
        edit: How the values of the units were computed.
        share_changed: Share of the target's parameters that were replaced, in [0, 1].
        report: None if measurements and search are unknown.
        recipe: The text of the recipe that replays it, without local paths.
        is_by_mergekits_search: Whether mergekit-yaml made it of a recipe that names no layers, so that the units were
            found by comparing.
        version: The version of dapa-merge.
        task: The Hub's `pipeline_tag`.
        made_by: The program that wrote the weights, `dapa-merge` or `mergekit`.
        settings: Prompts and text as the recipe has them, without local paths.
        has_template: Whether it has a chat template.
        has_config: Whether it is in the format of transformers, rather than only in Mistral AI's own.
        sees: Whether it takes images, too.
        license_files: The texts of licences that travel with it.
        code: The files of Python code that travel with the model.
        code_elsewhere: The Hub repositories whose code its settings name.
        elsewhere: The names of files that the recipe measures with, and which are not part of the model.
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
    is_by_mergekits_search: bool
    has_manifest: bool
    has_lock: bool
    pictures: Sequence[str]
    version: str
    task: str
    made_by: str
    settings: Mapping[str, str]
    has_template: bool = True
    has_config: bool = True
    sees: bool = False
    license_files: Sequence[str] = ()
    code: Sequence[str] = ()
    code_elsewhere: Sequence[str] = ()
    elsewhere: Sequence[str] = ()

    def of_role(self, role: str) -> list[Parent]:
        """The target or the source, followed by its adapter if it has one."""
        return [parent for parent in self.parents if parent.role.startswith(role)]


class _Markup(str):
    """Markdown that this module made, with every untrusted part of it escaped."""


def _finalized(value: object) -> object:
    """Escape whatever the template shows, except for Markdown of our own."""
    return value if isinstance(value, _Markup) else markdown(str(value))


@functools.cache
def _template() -> Template:
    environment = Environment(
        autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined,
        finalize=_finalized,
    )  # fmt: skip
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


def card_text(facts: CardFacts) -> str:
    """The body of a card, without its metadata."""

    def model(role: str) -> str:
        return _Markup(" with ".join(_link(parent) for parent in facts.of_role(role)))

    def places(role: str) -> str:
        return _word(
            "+".join(
                parent.public_name or ("ADAPTER" if "adapter" in parent.role else parent.role.upper())
                for parent in facts.of_role(role)
            )
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
        # Of the names of models, which are markup, and of words of our own.
        how=_Markup(facts.edit.how({name: model(name) for name in MODELS})),
        verb=facts.edit.verb,
        moved=moved_text(facts.report),
        freedom=_freedom(facts),
        charts=charts.CHARTS,
        reasons=needed(report.certificate) if report else [],
        max_reasons=MAX_REASONS,
        is_of_bundles=is_of_bundles,
        saved=thrift(report.tests_recorded, report.tests_unneeded, report.share_of_prompts_saved) if report else "",
        parent_rows=[
            (one.role, [_link(one), _code(one.commit) if one.commit else "-", str(one.license or "none stated")])
            for one in facts.parents
        ],
        license=_licensed(facts.license),
        without_license=[one.role for one in facts.parents if one.license is None],
        doubts=list(_doubts(report)) if report else [],
        use=_use(facts),
        recipe=_block("yaml", facts.recipe),
        code=_code,
        codes=lambda names: _Markup(", ".join(map(markdown_code, names))),
        word=_word,
        model=model,
        places=places,
        point_rows=point_rows,
        point_lines=point_lines,
        resumed_line=resumed_line,
        taken_line=taken_line,
        spans=spans,
        table=_table,
        figure_rows=figure_rows,
        category_rows=category_rows,
        change_lines=change_lines,
        meaning_lines=meaning_lines,
        answered_text=answered_text,
        prompts_name=prompts_name,
        point_head=POINT_HEAD,
        skill_label=skill_label,
        limits_text=limits_text,
        place=_word(_place(facts)),
        sizes=report.searched.num_of_kind if report and report.searched else None,
        isfinite=math.isfinite,
        zip=zip,
    )


def _freedom(facts: CardFacts) -> str:
    """The rest of a sentence on how many numbers decide the changed parameters; empty if as many as these."""
    counts = facts.edit.counts()
    if not counts or not facts.parameters_changed:
        return ""
    degrees = counts["degrees_of_freedom"]
    share = degrees * facts.share_changed / facts.parameters_changed
    return f"; the directions in them have {degrees:,} degrees of freedom, {100 * share:.2f} % of the parameters"


# The name of a model that is not published yet.
UNPUBLISHED = "THIS_REPOSITORY"
_ASKED = {
    # With images, with a chat template, and with neither.
    "image-text-to-text": (
        'messages = [{"role": "user", "content": [{"type": "image", "url": "photo.jpg"}, '
        '{"type": "text", "text": "What is this?"}]}]',
        'print(model(text=messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])',
    ),
    "chat": (
        'messages = [{"role": "user", "content": "Hello! Who are you?"}]',
        'print(model(messages, max_new_tokens=64)[0]["generated_text"][-1]["content"])',
    ),
    "text": ('print(model("Once upon a time", max_new_tokens=64)[0]["generated_text"])',),
}


@dataclass(frozen=True)
class _Use:
    """Programs for a model, as blocks of code; None for those that cannot run it."""

    python: str | None
    serve: str
    convert: str | None
    has_template: bool


def _use(facts: CardFacts) -> _Use:
    """The programs that are right for a model's kind."""
    place, has_code = _place(facts), bool(facts.code or facts.code_elsewhere)
    task = "image-text-to-text" if facts.sees else "text-generation"
    trusted = ", trust_remote_code=True" if has_code else ""
    asked = _ASKED[task if facts.sees else "chat" if facts.has_template else "text"]
    python = [
        "from transformers import pipeline\n",
        f'model = pipeline("{task}", model={json.dumps(printable(place))}{trusted})',
        *asked,
    ]
    serve = f"vllm serve {_word(place)}{' --trust-remote-code' if has_code else ''}"
    if not facts.has_config:
        serve += " --tokenizer-mode mistral --config-format mistral --load-format mistral"
    convert = [
        f"hf download {_word(place)} --local-dir model",
        "python convert_hf_to_gguf.py model --outfile model.gguf",
        "build/bin/llama-server -m model.gguf",
    ]
    is_plain = facts.has_config and not has_code and not facts.sees
    return _Use(
        _block("python", "\n".join(python)) if facts.has_config else None,
        _block("sh", serve),
        _block("sh", "\n".join(convert)) if is_plain else None,
        facts.has_template,
    )


def _doubts(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yields changes that may be chance, except for the better: label, figures, and what that means."""
    changes = [one for one in (report.dsr_change, report.over_refusal_change) if one is not None]
    for (label, fact), change in zip(change_lines(report), changes, strict=bool(change_lines(report))):
        difference = change.newly_refused - change.no_longer_refused
        if change is report.dsr_change and change.within_noise and not difference:
            yield label, fact, "On these prompts, the repair shows no effect."
        elif change.within_noise and (difference > 0 or (change is report.dsr_change and difference)):
            yield label, fact, "With prompts as few as these, chance does as much."


def _place(facts: CardFacts) -> str:
    return facts.title if "/" in facts.title else UNPUBLISHED


def _block(language: str, text: str) -> _Markup:
    return _Markup(f"{code_fence(text)}{language}\n{text.rstrip()}\n{code_fence(text)}")


def _link(parent: Parent) -> _Markup:
    if parent.repository is None:
        return _Markup(f"{markdown_code(parent.name)} (a folder)")
    return _Markup(f"[{markdown(parent.repository)}]({PAGES}/{parent.repository})")


def _licensed(license: License | None) -> str | None:
    if license is None or not license.link:
        return None if license is None else str(license)
    return _Markup(f"[{markdown(str(license))}]({license.link})")


def _code(text: str) -> _Markup:
    return _Markup(markdown_code(text))


def _word(text: str) -> _Markup:
    """One word of a command line."""
    return _Markup(shlex.quote(printable(text)))


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> _Markup:
    # An indented label is a detail of the row above it.
    labels = [("&nbsp;&nbsp;" if label.startswith(" ") else "") + markdown(label.strip()) for label, _ in rows]
    cells = [[label, *map(_cell, others)] for label, (_, others) in zip(labels, rows, strict=True)]
    lines = [f"| {' | '.join(map(markdown, head))} |", f"|{'---|' * len(head)}"]
    return _Markup("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]))


def _cell(text: str) -> str:
    return text.replace("|", "\\|") if isinstance(text, _Markup) else markdown(text)
