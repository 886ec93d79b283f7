"""The methods of a comparison, each declared once: its name, what it needs, and the settings that are tried.

A new method is one entry of `METHODS`; `--methods`, `--help`, the page of a comparison and docs/compare.md read the
table. How a method is applied is in the module of its kind. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

TARGET, SOURCE, DAPA, AUTO, DIRECTIONS = "target", "source", "dapa", "auto", "directions"
# Kinds of methods, by how they are applied: to units that a search or its controls select, or to fixed units
# (`row.py`), by mergekit (`blend.py`), by arithmetic on deltas (`peers.py`), by training (`training.py`).
SEARCH, CONTROL, FIXED, BLEND, DELTA, TRAINING = "search", "control", "fixed", "blend", "delta", "training"
# Of these, settings are tried (`tuning.py`).
TUNED = (BLEND, DELTA, TRAINING)
# What a user may lack, as text.
PRETRAINED, REFUSALS, OWN_ANSWERS, BACKWARD = "pretrained", "refusals", "own answers", "backward"
NEEDS = {
    PRETRAINED: "what target and source were fine-tuned from (`pretrained`)",
    REFUSALS: "the source's own refusals of harmful prompts",
    OWN_ANSWERS: "the target's own answers to harmless and keep prompts",
    BACKWARD: "backward passes",
}
# Of several settings, the one that is taken.
RULE = (
    "of the settings that keep to the recipe's limits the one with the highest score, of equals the first; if none "
    "does, the highest score less what the limits are violated by"
)
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
        without: Its key and its label if the recipe names no pretrained model and it is another method then; `{}`
            stands for a weight. Empty if it is the same, or cannot be applied.
        of_auto: Its label where it follows the selection of `auto` instead of DAPA's.
        reference: Whom it is from.
    """

    key: str
    kind: str
    label: str
    what: str
    needs: tuple[str, ...] = ()
    settings: tuple[tuple[str, tuple[float, ...]], ...] = ()
    without: tuple[str, str] = ("", "")
    of_auto: str = ""
    reference: str = ""

    def text(self, setting: tuple[float, ...]) -> str:
        """A setting for people, such as `weight 0.5`."""
        return ", ".join(f"{name} {value:g}" for (name, _), value in zip(self.settings, setting, strict=True))

    @property
    def grid(self) -> tuple[tuple[float, ...], ...]:
        """All combinations of its settings, in the order in which they are tried."""
        return tuple(product(*(values for _, values in self.settings)))


WEIGHTS = ("weight", (0.25, 0.5, 0.75, 1.0))
# Of weight 1 these are the source.
PARTIAL_WEIGHTS = ("weight", (0.25, 0.5, 0.75))
# The share of the matrices that are changed, those first whose delta keeps least to the safety vector.
LEAST_SAFE = "share of matrices"
TRAINED = (("rate", (2e-4, 1e-3)), ("steps", (10.0, 40.0)))

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
            DIRECTIONS,
            SEARCH,
            "directions",
            "what `edit: directions` finds in all projections: how much to add of each direction of source - target",
            needs=(REFUSALS, OWN_ANSWERS, BACKWARD),
            reference="directions.md",
        ),
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
            settings=(PARTIAL_WEIGHTS,),
            reference="arXiv 2203.05482",
        ),
        Method(
            "slerp",
            BLEND,
            "slerp",
            "mergekit's spherical blend of target and source",
            settings=(PARTIAL_WEIGHTS,),
            reference="Shoemake 1985, section 3.3",
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
            without=("ties of target{}", "ties{} on the target"),
            reference="arXiv 2306.01708, section 3",
        ),
        Method(
            "safe-lora",
            DELTA,
            "Safe LoRA",
            "projects the delta, target - source, of the matrices that keep least to the safety vector, source - "
            "pretrained, on that vector",
            needs=(PRETRAINED,),
            settings=((LEAST_SAFE, (0.25, 0.5, 0.75, 1.0)),),
            reference="arXiv 2405.16833, sections 3.1 and 3.2",
        ),
        Method(
            "safemerge",
            DELTA,
            "SafeMERGE",
            "blends those matrices with the safe model's, which is here the source itself instead of one trained on "
            "safety data",
            needs=(PRETRAINED,),
            settings=((LEAST_SAFE, (0.5, 1.0)), ("weight", (0.5, 0.8))),
            reference="arXiv 2503.17239",
        ),
        Method(
            "resta",
            DELTA,
            "RESTA",
            "adds the safety vector, gamma times; drops a share of the delta, and rescales the rest (DARE); without "
            "`pretrained`, the unaligned model is the source with its refusal direction removed",
            settings=(("dropped", (0.3, 0.7)), ("gamma", (0.5, 1.0))),
            without=("resta abliterated{}", "RESTA, abliterated"),
            reference="arXiv 2402.11746",
        ),
        Method(
            "safe-delta",
            DELTA,
            "Safe Delta",
            "keeps the elements of the delta that cost least safety, by the inputs of the source's refusals, up to a "
            "share of the whole delta's cost, and compensates for them",
            needs=(REFUSALS,),
            settings=(("share of cost", (0.95, 0.8, 0.5, 0.1)),),
            reference="arXiv 2505.12038, section 4",
        ),
        Method(
            "training",
            TRAINING,
            "training on refusals",
            "trains a LoRA on the source's refusals alone",
            needs=(REFUSALS, BACKWARD),
            settings=TRAINED,
            reference="arXiv 2106.09685, section 4.1",
        ),
        Method(
            "training-keep",
            TRAINING,
            "training, self-distilled",
            "trains a LoRA on these and, as many, the target's own answers to harmless and keep prompts",
            needs=(REFUSALS, OWN_ANSWERS, BACKWARD),
            settings=TRAINED,
            reference="arXiv 2106.09685, section 4.1",
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


def method_of(group: str) -> Method | None:
    """The method of a group of arms, as `linear 0.5` or `mlp of auto` name it; None for target and source."""
    return next((one for key, one in METHODS.items() if f"{group} ".startswith(f"{key} ")), None)


def declared(keys: Iterable[str]) -> list[str]:
    """The lines of a Markdown table of methods: what they apply, need and are tuned over, and whom they are from."""
    lines = ["| method | what it applies | needs | settings tried | from |", "|---|---|---|---|---|"]
    for one in map(METHODS.__getitem__, keys):
        needs = "; ".join(NEEDS[need] for need in one.needs) or "-"
        settings = "; ".join(f"{name} {', '.join(f'{value:g}' for value in values)}" for name, values in one.settings)
        lines.append(f"| `{one.key}` | {one.what} | {needs} | {settings or '-'} | {one.reference or '-'} |")
    return lines
