"""What a model card says, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dapa_merge.hub.licence import Licence
from dapa_merge.hub.parent import Parent
from dapa_merge.report import Report


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
