"""The YAML at the head of a model card, by which the Hub lists and links a model.

Its keys are those of huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dapa_merge.evaluate.figures import Figures
from dapa_merge.figures_view import skill_label
from dapa_merge.hub.card_facts import CardFacts

TAGS = ("mergekit", "merge", "dapa")
LIBRARY = "transformers"
# What the Hub takes for a language: ISO 639 codes, and a few words.
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")


def card_metadata(facts: CardFacts, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a card.

    Args:
        facts: What the card says.
        kept: The metadata that the card had, whose other keys, tags and languages stay.
    """
    from huggingface_hub import ModelCardData

    # In a target's own repository, its own name would say that it was made of itself.
    named = [parent.repository for parent in facts.parents if parent.repository and parent.repository != facts.title]
    repositories = list(dict.fromkeys(named))
    languages = [one for parent in facts.of_role("target") for one in parent.languages if _LANGUAGE.fullmatch(one)]
    measured = facts.report.after if facts.report else None
    data = ModelCardData(
        base_model=repositories or None,
        library_name=LIBRARY,
        pipeline_tag=facts.task,
        tags=list(TAGS),
        language=list(dict.fromkeys(languages)) or None,
        model_name=facts.title.rpartition("/")[2] if measured else None,
        eval_results=_results(facts, measured) if measured else None,
    ).to_dict()
    made = dict(data) | (facts.licence.to_metadata() if facts.licence else {})
    if repositories:
        made["base_model_relation"] = "merge"
    return _ordered(_joined(made, kept))


def _joined(made: dict[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Ours, and what somebody wrote beside it."""
    ours = {*made, "base_model", "base_model_relation", "model-index"}
    if "license" in made:
        ours |= {"license_name", "license_link"}
    joined = made | {key: value for key, value in kept.items() if key not in ours}
    for key in ("tags", "language"):
        before = kept.get(key)
        if isinstance(before, str):
            before = [before]
        if isinstance(before, list):
            joined[key] = list(dict.fromkeys([*made.get(key, ()), *map(str, before)]))
    return joined


def _ordered(metadata: dict[str, Any]) -> dict[str, Any]:
    first = ("license", "license_name", "license_link", "language", "base_model", "base_model_relation")
    order = {key: index for index, key in enumerate((*first, "library_name", "pipeline_tag", "tags"))}
    last = {"model-index": len(metadata) + len(order)}
    return dict(sorted(metadata.items(), key=lambda item: last.get(item[0], order.get(item[0], len(order)))))


def _results(facts: CardFacts, after: Figures) -> list[Any]:
    """What was measured of the result, in the form of the Hub's `model-index`."""
    from huggingface_hub import EvalResult

    prompts, task = facts.settings["prompts"], {"task_type": facts.task, "task_name": "Text generation"}
    asked = {"dataset_type": _dataset(prompts), "dataset_name": prompts}
    text = {"dataset_type": "text", "dataset_name": facts.settings["text"]}
    found = [
        (asked, "dsr", f"Defense success rate ({after.num_harmful} harmful prompts)", after.dsr),
        (asked, "over-refusal", f"Over-refusal ({after.num_harmless} harmless prompts)", after.over_refusal),
        (text, "perplexity", "Perplexity", after.perplexity),
    ]
    for skill in after.skills:
        about = {"dataset_type": _dataset(skill.name), "dataset_name": skill.name}
        found.append((about, "accuracy", skill_label(skill.name).replace("s", "S", 1), skill.score))
    return [
        EvalResult(**task, **about, metric_type=kind, metric_name=name, metric_value=round(value, 6))
        for about, kind, name, value in found
        if math.isfinite(value)
    ]


def _dataset(name: str) -> str:
    """The Hub's id of a dataset, or a word for a set that is not there."""
    known = re.fullmatch(r"([\w.-]+/[\w.-]+)(@.*)?(\?.*)?", name)
    return known.group(1) if known else re.sub(r"[^\w.-]+", "-", name).strip("-") or "prompts"
