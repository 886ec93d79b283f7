"""What is compared, beside what the recipes say. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

# In the order of a table. The target untouched and the source itself are always there.
METHODS = {
    "dapa": "DAPA: what the search finds of the recipe's modules",
    "auto": "DAPA among gate, up and down projections (`modules: auto`)",
    "fixed": "the DAPA repository's fixed middle layers, whole MLP",
    "gates": "all gates; where a model has none, every unit of the recipe's modules",
    "mlp": "the whole MLP of the layers that a search selects, for each of the two",
    "random": "random selections of the modules and size of each",
    "random-search": "the best of as many random selections as each search tested, by the prompts of the search",
    "linear": "mergekit's linear blend of target and source",
    "task-arithmetic": "mergekit's task arithmetic; needs `pretrained` in the recipe",
    "ties": "mergekit's TIES",
}
BLENDS = ("linear", "task-arithmetic", "ties")
# Of the entries that TIES keeps of each difference; Yadav et al. 2023, section 5.
TIES_DENSITY = 0.2


@dataclass(frozen=True)
class CompareOptions:
    """What to compare.

    Attributes:
        methods: Some of `METHODS`.
        num_seeds: Random selections of each size.
        seed: The first of the seeds.
        weights: Of the source, in mergekit's methods.
        draws_curve: Whether edits of every size are measured.
        num_points: Sizes of edits on the curve, roughly.
        rows_per_block: Rows (neurons) of the smallest edit; None for a sixteenth of a projection.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    num_seeds: int = 5
    seed: int = 0
    weights: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    draws_curve: bool = True
    num_points: int = 12
    rows_per_block: int | None = None
