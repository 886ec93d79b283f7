"""A card as a file: the part that is made anew each time, what somebody wrote around it, and what was said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from dapa_merge.hub.card_facts import CardFacts
from dapa_merge.hub.card_metadata import card_metadata
from dapa_merge.hub.card_text import card_text
from dapa_merge.hub.parent import metadata_of, split_card

BEGIN = "<!-- made by dapa-merge; `dapa-merge card` makes it anew up to the line that says so, and keeps the rest -->"
END = "<!-- made by dapa-merge up to here -->"
# By this sentence mergekit's own cards are known.
MERGEKIT = "created using [mergekit]"
_SAID = "<!-- said: "


@dataclass(frozen=True)
class CardFile:
    """A card that is there.

    Attributes:
        text: All of it.
        metadata: The YAML at its head.
        above: What stands above our part; if there is none, all of the body but mergekit's.
        below: What stands below it.
        said: What a user said of the card before, by option.
        is_ours: Whether our part is in it, whole.
    """

    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    above: str = ""
    below: str = ""
    said: Mapping[str, str] = field(default_factory=dict)
    is_ours: bool = False

    @property
    def is_anothers(self) -> bool:
        """Whether it is neither ours nor mergekit's, and says something."""
        return bool(self.text.strip()) and not self.is_ours and (MERGEKIT not in self.text or BEGIN in self.text)

    @property
    def is_broken(self) -> bool:
        """Whether its head is no YAML, so that what somebody wrote there would be lost."""
        head, _ = split_card(self.text)
        return bool(head.strip()) and not self.metadata


def read_card(text: str) -> CardFile:
    """A card by its text."""
    body, metadata = split_card(text)[1], metadata_of(text)
    above, begin, rest = body.partition(BEGIN)
    # What a stranger's card brought into our part may look like its end.
    ours, end, below = rest.rpartition(END)
    if begin and end:
        return CardFile(text, metadata, above, below, _said(ours), True)
    return CardFile(text, metadata, "" if MERGEKIT in text else body)


def render_card(facts: CardFacts, before: CardFile, said: Mapping[str, str]) -> str:
    """The whole card.

    Args:
        facts: What it says.
        before: The card whose other text and metadata stay.
        said: What a user said of it, by option.
    """
    kept = dict(before.metadata)
    if kept.get("license") == before.said.get("inherited"):
        # It was not somebody's word, and their cards may say something else now.
        kept = {key: value for key, value in kept.items() if not key.startswith("license")}
    if facts.licence is not None and "license" not in said:
        said = {**said, "inherited": facts.licence.key}
    head = yaml.safe_dump(card_metadata(facts, kept), sort_keys=False, allow_unicode=True, width=1000)
    # Two hyphens end a comment.
    note = json.dumps(dict(said)).replace("--", "\\u002d\\u002d")
    above, below = before.above.rstrip("\n"), before.below.strip("\n")
    parts = [above.lstrip("\n"), f"{BEGIN}\n{_SAID}{note} -->\n\n{card_text(facts)}\n{END}", below]
    return f"---\n{head}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _said(ours: str) -> dict[str, str]:
    note = ours.partition(_SAID)[2].partition(" -->\n")[0]
    try:
        found = json.loads(note)
    except ValueError:
        return {}
    return {str(key): value for key, value in found.items() if isinstance(value, str)} if type(found) is dict else {}
