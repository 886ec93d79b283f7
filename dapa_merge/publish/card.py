"""The text of a model card: what the model is and is not, what was measured, and how to check all of it.

What a model card says, as data.

What a model card must not leave out: how little the figures promise, and what the model must not be used for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dapa_merge.publish.parents import PAGES, Licence, Parent
from dapa_merge.recipe.parameters import spans
from dapa_merge.report import charts
from dapa_merge.report.report import Report
from dapa_merge.report.tables import category_rows, change_lines, figure_rows, skill_label
from dapa_merge.search.search import thrift

PAPER = "[arXiv 2406.01514](https://arxiv.org/abs/2406.01514)"
# Reasons of a certificate that a card lists one by one.
MAX_REASONS = 40


def card_text(facts: CardFacts) -> str:
    """All of a card but its metadata."""
    sections = (_summary, _figures, _layers, _parents, _reproduction, _verification, _use, _licence)
    return "\n\n".join("\n".join(section(facts)) for section in sections) + "\n"


def _summary(facts: CardFacts) -> Iterator[str]:
    yield f"# {facts.title.rpartition('/')[2]}"
    yield ""
    what = spans(facts.units)
    if not facts.units:
        yield f"This is {_model(facts, 'target')}, unchanged: nothing of {_model(facts, 'source')} was transplanted."
        return
    how = "copied from" if facts.strength == 1 else f"moved by {facts.strength:g} of the way to that of"
    yield f"This is {_model(facts, 'target')} with the {what} {how} {_model(facts, 'source')}, its aligned sibling."
    verb, by_mergekit = "replaced" if facts.strength == 1 else "changed", facts.made_by == "mergekit"
    yield (
        f"That {verb} {100 * facts.share_changed:.2f} % of its parameters ({facts.parameters_changed:,}). Every "
        f"other weight is the target's{'' if by_mergekit else ', as are config, tokenizer and chat template'}. "
        f"Nothing was trained."
    )
    yield ""
    yield (
        f"The method is DAPA, decoupled alignment for robust plug-and-play adaptation ({PAPER}); the program was "
        f"dapa-merge {facts.version}{' inside mergekit' if facts.made_by == 'mergekit' else ''}."
    )
    yield ""
    yield "It is meant to refuse harmful requests again while it keeps what the target had learned. It is **not** a"
    if facts.report is None or facts.report.after is None:
        yield "newly aligned model, nor proof that it is safe: nobody measured how far it refuses, and what that cost."
    else:
        yield "newly aligned model, nor proof that it is safe: how far it refuses, and what that cost, is in the table."
    if any(parent.repository is None for parent in facts.parents):
        yield ""
        yield "What it was made of is not public as far as this page knows, so that only its author can check it."


def _figures(facts: CardFacts) -> Iterator[str]:
    yield "## Before and after"
    yield ""
    report = facts.report
    columns = [report.before, report.after, report.source_alone] if report else []
    if report is None or None in columns:
        yield "**Not measured.** This model was written without an evaluation; nothing is known of its refusals, its"
        yield "over-refusal, its perplexity or its skills. `dapa-merge evaluate` measures it."
        return
    measured = [column for column in columns if column is not None]
    names = ["before (target)", "after (this model)", "source alone"]
    yield from _table(["", *names], figure_rows(measured))
    if rows := category_rows(measured):
        yield ""
        yield "Refused, by category of the prompts:"
        yield ""
        yield from _table(["", *names], rows)
    yield ""
    for label, fact in change_lines(report):
        yield f"- {label}: {fact}"
    if report.before is not None and report.after is not None:
        for had, has in zip(report.before.skills, report.after.skills, strict=False):
            yield f"- {skill_label(had.name)}: {had.score:.3f} -> {has.score:.3f}"
    asked = f"`{facts.settings['prompts']}`"
    if report.searched is not None:
        yield f"- Prompts: {asked}, of which these were kept out of the search."
    else:
        yield f"- Prompts: {asked}."
    if math.isfinite(measured[1].perplexity):
        yield f"- Perplexity is that of {facts.settings['text']}."
    yield "- Intervals are those of this model's figures, of 95 % (Wilson), for more prompts like these; p-values are"
    yield "  McNemar's, exact."
    yield ""
    yield "DSR, the defense success rate, is the share of harmful requests that are refused; over-refusal that of"
    yield "harmless ones. A degenerate response is empty, a loop or noise, and no defense. A gate is the `gate_proj`"
    yield "matrix of a layer's MLP. A skill is the share of questions that are answered rightly."
    yield from _pictures(facts)


def _pictures(facts: CardFacts) -> Iterator[str]:
    for chart in charts.CHARTS:
        if (name := f"{chart.name}.png") in facts.pictures:
            yield ""
            yield f"![{chart.caption}]({name})"


def _layers(facts: CardFacts) -> Iterator[str]:
    yield "## Which layers, and why"
    yield ""
    yield f"Transplanted: {spans(facts.units)}."
    report = facts.report
    if report is None or report.one_minimal is None:
        found = "the recipe, or its lock, named them"
        yield f"This run did not search for them: {found}."
        return
    yield (
        f"A search by delta debugging asked {report.tests} of 2^{report.num_candidates} selections whether they meet "
        f"the requirement: {requirement_text(report)}."
    )
    if report.one_minimal:
        yield "Each unit that it kept was left out once, alone, and what remained did not meet it:"
    else:
        yield "It ended before each unit that it kept was shown to be needed; some may not be. Shown were:"
    yield ""
    shown = list(report.certificate.items())[:MAX_REASONS]
    for unit, others in shown:
        yield f"- without the {spans([unit])}: {spans(others)} did not meet it"
    if len(report.certificate) > len(shown):
        yield f"- and {len(report.certificate) - len(shown)} more, in `dapa_report.json`"
    yield ""
    saved = thrift(report.tests_recorded, report.tests_unneeded, report.share_of_prompts_saved)
    yield f"Cost: {report.tests} tests, {report.seconds:.0f} s in all. Saved: {saved}."


def requirement_text(report: Report) -> str:
    """What a selection had to meet, for people."""
    found = report.requirement or {}
    texts = []
    for key, text in (
        ("min_score", f"{found.get('measure', 'score')} at least"),
        ("max_over_refusal", "over-refusal at most"),
        ("max_perplexity", "perplexity at most"),
    ):
        value = found.get(key)
        if isinstance(value, (int, float)):
            texts.append(f"{text} {value:.3f}")
    return ", ".join(texts) or "as the recipe says"


def _parents(facts: CardFacts) -> Iterator[str]:
    yield "## Made of"
    yield ""
    rows = [
        (
            parent.role,
            [_link(parent), f"`{parent.commit}`" if parent.commit else "-", str(parent.licence or "not stated")],
        )
        for parent in facts.parents
    ]
    yield from _table(["", "model", "commit", "licence"], rows)


def _reproduction(facts: CardFacts) -> Iterator[str]:
    yield "## Reproduce"
    yield ""
    yield "This recipe names the layers and needs no search (`dapa-merge run recipe.yml out/`, or `mergekit-yaml"
    yield "recipe.yml out/` with dapa-merge installed). The weights come out bit for bit; figures differ a little,"
    yield "since all prompts are asked where there is no search:"
    yield ""
    yield "```yaml"
    yield facts.recipe.rstrip()
    yield "```"
    if any(parent.repository is None for parent in facts.parents):
        yield ""
        yield "A model without a commit in the table above was a folder, which this page cannot point to."
    if facts.has_lock:
        yield ""
        yield "`recipe.lock.yml` has the SHA-256 of every file of target and source that took part."


def _verification(facts: CardFacts) -> Iterator[str]:
    target, source = (_places(facts, role) for role in ("target", "source"))
    yield "## Verify"
    yield ""
    yield "Whether a download is the target plus exactly these tensors of the source, byte by byte:"
    yield ""
    yield "```sh"
    name = facts.title if "/" in facts.title else "THIS_REPOSITORY"
    yield f"hf download {name} --local-dir model"
    yield f"dapa-merge verify model --target {target} \\"
    yield f"  --source {source}"
    if facts.has_manifest:
        yield "dapa-merge verify model --files-only    # against the SHA-256s in dapa.json; needs neither"
    yield "```"


def _use(facts: CardFacts) -> Iterator[str]:
    yield "## Intended use, limits and misuse"
    yield ""
    yield f"Use it as you would use {_model(facts, 'target')}."
    yield ""
    yield from (f"- {line}" for line in trust(facts))
    yield from (f"- {line}" for line in misuse())


def _licence(facts: CardFacts) -> Iterator[str]:
    yield "## Licence"
    yield ""
    if facts.licence is None:
        yield "Not stated here, since not every model that it was made of states one that could be read; see the table"
        yield "above. The terms of all of them apply."
    else:
        name = f"[{facts.licence}]({facts.licence.link})" if facts.licence.link else str(facts.licence)
        yield f"{name}. The terms of all models that it was made of apply."


def _model(facts: CardFacts, role: str) -> str:
    """The target or the source, with an adapter that is on it."""
    return " with ".join(_link(parent) for parent in facts.of_role(role))


def _places(facts: CardFacts, role: str) -> str:
    """The same for a command line."""
    return "+".join(
        parent.place or ("ADAPTER" if "adapter" in parent.role else parent.role.upper())
        for parent in facts.of_role(role)
    )


def _link(parent: Parent) -> str:
    if parent.repository is None:
        return f"`{parent.name}` (a folder)"
    return f"[{parent.repository}]({PAGES}/{parent.repository})"


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for label, cells in rows:
        # An indented label is a detail of the row above it.
        shown = f"&nbsp;&nbsp;{label.strip()}" if label.startswith(" ") else label
        yield f"| {' | '.join(_cell(text) for text in (shown, *cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card is made of.

    Attributes:
        title: What the model is called: a Hub id, or the name of its folder.
        parents: What it was made of, the target first.
        licence: What it is published under; None if that is not known.
        units: What was transplanted, as `3.gate`.
        strength: How far the values went from the target's to the source's.
        share_changed: Share of the target's parameters that were replaced, in [0, 1].
        parameters_changed: How many these are.
        report: What was measured and searched; None if nothing is known of it.
        recipe: The text of the recipe that replays it, without paths of a machine.
        has_manifest: Whether it has a `dapa.json`.
        has_lock: Whether it has a lock.
        pictures: The names of its pictures.
        version: Of dapa-merge.
        task: What it is for, as the Hub's `pipeline_tag`.
        made_by: The program that wrote the weights, `dapa-merge` or `mergekit`.
        settings: Prompts and evaluator as the recipe has them, without paths of a machine.
    """

    title: str
    parents: Sequence[Parent]
    licence: Licence | None
    units: Sequence[str]
    strength: float
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
        """The target or the source, and the adapter that is on it."""
        return [parent for parent in self.parents if parent.role.startswith(role)]


def trust(facts: CardFacts) -> Iterator[str]:
    """How far to trust the model, by what was measured of it."""
    report = facts.report
    if report is None or report.after is None:
        yield "Whether it refuses anything was not measured. Treat it as the unaligned model that it was made of."
        return
    after = report.after
    answered, most = round(after.complied * after.num_harmful), 100 * (1 - after.dsr_interval[0])
    yield (
        f"It still answered {answered} of the {after.num_harmful} harmful prompts that it was asked, and may answer up "
        f"to {most:.0f} % of more such ones. Other prompts, other languages, long conversations and jailbreaks were "
        f"not tested unless the table says so."
    )
    if report.dsr_change is not None and report.dsr_change.within_noise:
        yield "The change in refusals is within noise: with prompts as few as these, chance does as much."
    yield (
        "Rules decide what counts as a refusal. They agree with people in most cases, not in all; read responses "
        "before you rely on a figure."
    )
    if not after.skills:
        yield "No skill was measured. Editing weights may have cost the model some of what it could do."
    yield "Whatever else the target says wrongly, or leaves out, it may still say or leave out."
    yield "Fine-tuning it again may undo the repair; measure it again afterwards."


def misuse() -> Iterator[str]:
    """What it must not be used for."""
    yield "Do not use it, or present it, as a safeguard of its own where people may come to harm."
    yield (
        "The same tensors, taken the other way, make an aligned model unaligned. Publishing such a model under a name "
        "that promises safety is misuse."
    )
