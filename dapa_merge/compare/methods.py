"""The methods of a comparison, each declared once: its name, what it needs, and the settings that are tried.

A new method is one entry of `METHODS`; `--methods`, `--help`, the page of a comparison and docs/compare.md read the
table. How a method is applied is in the module of its kind. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

TARGET, SOURCE, DAPA, AUTO = "target", "source", "dapa", "auto"
# Kinds of methods, by how they are applied: to units that a search or its controls select, or to fixed units
# (`row.py`), by mergekit (`blend.py`).
SEARCH, CONTROL, FIXED, BLEND = "search", "control", "fixed", "blend"
# What a user may lack, as text.
PRETRAINED = "pretrained"
NEEDS = {PRETRAINED: "what target and source were fine-tuned from (`pretrained`)"}
# The share of entries that TIES keeps of each difference; Yadav et al. 2023, section 5.
TIES_DENSITY = 0.2


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        key: Its name in `--methods`, and the beginning of its keys in a row.
        kind: One of the kinds above.
        label: Its name in tables.
        what: What it applies, in a phrase.
        needs: Keys of `NEEDS`: what it takes besides target, source and prompts.
        settings: The values that each of its settings may have, by name, from the one that changes the target least;
            all combinations are tried, the last setting varying fastest. Empty for a method without settings.
        of_auto: Its label where it follows the selection of `auto` instead of DAPA's.
        reference: Whom it is from.
    """

    key: str
    kind: str
    label: str
    what: str
    needs: tuple[str, ...] = ()
    settings: tuple[tuple[str, tuple[float, ...]], ...] = ()
    of_auto: str = ""
    reference: str = ""

    @property
    def grid(self) -> tuple[tuple[float, ...], ...]:
        """All combinations of its settings, in the order in which they are tried."""
        return tuple(product(*(values for _, values in self.settings)))


WEIGHTS = ("weight", (0.25, 0.5, 0.75, 1.0))

# In the order of a table. The target untouched and the source itself are always there.
METHODS = {
    one.key: one
    for one in (
        Method(
            DAPA,
            SEARCH,
            "DAPA",
            "what the search finds with the modules of the recipe",
            reference="arXiv 2406.01514",
        ),
        Method(AUTO, SEARCH, "DAPA, modules: auto", "what it finds among all projections of a layer (`modules: auto`)"),
        Method(
            "fixed",
            FIXED,
            "fixed middle layers, MLP",
            "the fixed middle layers of the DAPA repository: the whole MLP, scaled by depth",
        ),
        Method("gates", FIXED, "all gates", "all gates; where a model has none, every unit of the recipe's modules"),
        Method(
            "mlp",
            CONTROL,
            "MLP of DAPA's layers",
            "the whole MLP of the layers that each of the two searches found",
            of_auto="MLP of auto's layers",
        ),
        Method(
            "random",
            CONTROL,
            "random like DAPA's",
            "random selections of the same modules and size, for each search",
            of_auto="random like auto's",
        ),
        Method(
            "random-search",
            CONTROL,
            "best random like DAPA's",
            "the best of as many random selections as the search made tests, by the prompts of the search",
            of_auto="best random like auto's",
        ),
        Method(
            "linear",
            BLEND,
            "linear",
            "mergekit's linear blend of target and source; scaling the fine-tune's delta (as an average over its "
            "training would) is the same",
            settings=(WEIGHTS,),
            reference="arXiv 2203.05482",
        ),
        Method(
            "task-arithmetic",
            BLEND,
            "task arithmetic",
            "mergekit's task arithmetic: adds the weighted difference of source and pretrained model",
            needs=(PRETRAINED,),
            settings=(WEIGHTS,),
            reference="arXiv 2212.04089, section 2",
        ),
        Method(
            "ties",
            BLEND,
            "ties",
            "mergekit's TIES of both differences from the pretrained model or, if absent, of the source's from the "
            "target",
            settings=(WEIGHTS,),
            reference="arXiv 2306.01708, section 3",
        ),
    )
}
BLENDS = tuple(key for key, one in METHODS.items() if one.kind == BLEND)
CONTROLS = tuple(key for key, one in METHODS.items() if one.kind == CONTROL)
# For these, a row in which a search found nothing counts as its untouched target.
MAY_FIND_NOTHING = tuple(key for key, one in METHODS.items() if one.kind in (SEARCH, CONTROL))
LABELS = {
    TARGET: "target, untouched",
    SOURCE: "source itself",
    "all": "all of the recipe's modules",
    **{key: one.label for key, one in METHODS.items()},
    **{f"{key} of {AUTO}": one.of_auto for key, one in METHODS.items() if one.of_auto},
}


def declared(keys: Iterable[str]) -> list[str]:
    """The lines of a Markdown table of methods: what they apply, need and are tuned over, and whom they are from."""
    lines = ["| method | what it applies | needs | settings tried | from |", "|---|---|---|---|---|"]
    for one in map(METHODS.__getitem__, keys):
        needs = "; ".join(NEEDS[need] for need in one.needs) or "-"
        settings = "; ".join(f"{name} {', '.join(f'{value:g}' for value in values)}" for name, values in one.settings)
        lines.append(f"| `{one.key}` | {one.what} | {needs} | {settings or '-'} | {one.reference or '-'} |")
    return lines
