"""A card as a file: its metadata, the generated part, and the text that users wrote around it.

The Hub lists and links a model by the metadata, the YAML at the head (huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import huggingface_hub
import yaml

from dapa_merge.errors import printable
from dapa_merge.measure.figures import Figures
from dapa_merge.publish.card import CardFacts, card_text
from dapa_merge.publish.options import license_in
from dapa_merge.publish.parents import metadata_of, split_card
from dapa_merge.report.tables import skill_label

BEGIN = "<!-- made by dapa-merge; `dapa-merge card` makes it anew up to the line that says so, and keeps the rest -->"
END = "<!-- made by dapa-merge up to here -->"
# Every card that mergekit writes has this text.
MERGEKIT = "created using [mergekit]"
_SAID = "<!-- said: "


@dataclass(frozen=True)
class CardFile:
    """An existing card.

    Attributes:
        text: All of it.
        metadata: The YAML at its head.
        above: Text above the generated part; without that part, the whole body unless mergekit wrote it.
        below: Text below the generated part.
        said: The options that a user gave for the card before.
        is_ours: Whether it has the complete generated part.
    """

    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    above: str = ""
    below: str = ""
    said: Mapping[str, str] = field(default_factory=dict)
    is_ours: bool = False

    @property
    def is_anothers(self) -> bool:
        """Whether it is not empty and was written by neither dapa-merge nor mergekit."""
        return bool(self.text.strip()) and not self.is_ours and (MERGEKIT not in self.text or BEGIN in self.text)

    @property
    def is_broken(self) -> bool:
        """Whether its head is not valid YAML; a rewrite would lose it."""
        head, _ = split_card(self.text)
        return bool(head.strip()) and not self.metadata


def read_card(text: str) -> CardFile:
    """Parse a card."""
    body, metadata = split_card(text)[1], metadata_of(text)
    above, begin, rest = body.partition(BEGIN)
    # Untrusted text in the generated part may look like its end.
    ours, end, below = rest.rpartition(END)
    if begin and end:
        return CardFile(text, metadata, above, below, _said(ours), True)
    return CardFile(text, metadata, "" if MERGEKIT in text else body)


def render_card(facts: CardFacts, before: CardFile, said: Mapping[str, str]) -> str:
    """Write the whole card.

    Args:
        facts: The facts that it states.
        before: The existing card, whose other text and metadata are kept.
        said: The options that a user gave for the card.
    """
    kept = dict(before.metadata)
    if kept.get("license") == before.said.get("inherited"):
        # No user stated it, and the models' cards may have changed.
        kept = {key: value for key, value in kept.items() if not key.startswith("license")}
    if before.is_ours and "license" not in said and (stated := license_in(kept, "")) is not None:
        # A user wrote it into the metadata by hand.
        facts = replace(facts, license=stated)
    elif facts.license is not None and "license" not in said:
        said = {**said, "inherited": facts.license.key}
    head = yaml.safe_dump(card_metadata(facts, kept), sort_keys=False, allow_unicode=True, width=1000)
    # Two hyphens end a comment.
    note = json.dumps(dict(said)).replace("--", "\\u002d\\u002d").replace("<", "\\u003c")
    above, below = before.above.rstrip("\n"), before.below.strip("\n")
    parts = [above.lstrip("\n"), f"{BEGIN}\n{_SAID}{note} -->\n\n{card_text(facts)}\n{END}", below]
    return f"---\n{head}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _said(ours: str) -> dict[str, str]:
    note = ours.partition(_SAID)[2].partition(" -->\n")[0]
    try:
        found = json.loads(note)
    except (ValueError, RecursionError):
        return {}
    return {str(key): value for key, value in found.items() if isinstance(value, str)} if type(found) is dict else {}


TAGS = ("mergekit", "merge", "dapa")
LIBRARY = "transformers"
# The Hub accepts as a language: ISO 639 codes, and a few words.
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")


def card_metadata(facts: CardFacts, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Make the metadata of a card.

    Args:
        facts: The facts that it states.
        kept: The existing metadata, whose other keys, tags and languages are kept.
    """
    # In the target's own repository, a model must not be listed as its own base.
    named = [parent.repository for parent in facts.parents if parent.repository and parent.repository != facts.title]
    repositories = list(dict.fromkeys(named))
    languages = [one for parent in facts.of_role("target") for one in parent.languages if _LANGUAGE.fullmatch(one)]
    measured = facts.report.after if facts.report else None
    data = huggingface_hub.ModelCardData(
        base_model=repositories or None,
        library_name=LIBRARY,
        pipeline_tag=facts.task,
        tags=list(TAGS),
        language=list(dict.fromkeys(languages)) or None,
        model_name=printable(facts.title.rpartition("/")[2]) if measured else None,
        eval_results=_results(facts, measured) if measured else None,
    ).to_dict()
    made = dict(data) | (facts.license.to_metadata() if facts.license else {})
    if repositories:
        made["base_model_relation"] = "merge"
    return _ordered(_joined(made, kept))


def _joined(made: dict[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Join the generated metadata with the keys that users added."""
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
    """The figures of the result, in the form of the Hub's `model-index`."""
    prompts, task = printable(facts.settings["prompts"]), {"task_type": facts.task, "task_name": "Text generation"}
    asked = {"dataset_type": _dataset(prompts), "dataset_name": prompts}
    text = {"dataset_type": "text", "dataset_name": printable(facts.settings["text"])}
    found = [
        (asked, "dsr", f"Defense success rate ({after.num_harmful} harmful prompts)", after.dsr),
        (asked, "over-refusal", f"Over-refusal ({after.num_harmless} harmless prompts)", after.over_refusal),
        (text, "perplexity", "Perplexity", after.perplexity),
    ]
    for skill in after.skills:
        about = {"dataset_type": _dataset(skill.name), "dataset_name": printable(skill.name)}
        found.append((about, "accuracy", printable(skill_label(skill.name)).replace("s", "S", 1), skill.score))
    return [
        huggingface_hub.EvalResult(**task, **about, metric_type=kind, metric_name=name, metric_value=round(value, 6))
        for about, kind, name, value in found
        if math.isfinite(value)
    ]


def _dataset(name: str) -> str:
    """The Hub's id of a dataset, or a word for a set that is not on the Hub."""
    known = re.fullmatch(r"([\w.-]+/[\w.-]+)(@.*)?(\?.*)?", name)
    return known.group(1) if known else re.sub(r"[^\w.-]+", "-", name).strip("-") or "prompts"
