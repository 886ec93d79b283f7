"""What a model card must not leave out: how little the figures promise, and what the model must not be used for."""

from __future__ import annotations

from collections.abc import Iterator

from dapa_merge.hub.card_facts import CardFacts


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
