"""The text of a model card: what the model is and is not, what was measured, and how to check all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dapa_merge.figures_view import category_rows, figure_rows, skill_label
from dapa_merge.hub.card_facts import CardFacts
from dapa_merge.hub.card_limits import misuse, trust
from dapa_merge.hub.parent import PAGES, Parent
from dapa_merge.report import Report, change_lines, spans, thrift

PAPER = "[arXiv 2406.01514](https://arxiv.org/abs/2406.01514)"
CAPTIONS = {
    "dapa_figures.png": "Before, after, and the source alone, with 95 % intervals",
    "dapa_search.png": "The search: every selection that was tested, and its score",
}
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
    for name, caption in CAPTIONS.items():
        if name in facts.pictures:
            yield ""
            yield f"![{caption}]({name})"


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
        f"the requirement: {requirement(report)}."
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


def requirement(report: Report) -> str:
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
