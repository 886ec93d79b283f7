"""Directions that tests choose themselves: an SVD of source - target, matrix by matrix."""

from __future__ import annotations

from pathlib import Path

import numpy

from dapa_merge.measure.live import mapped_values
from dapa_merge.plan.directions import FILE_NAME, Factors, FactorTable, Place, quantize
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import given_selection, make_plan
from dapa_merge.recipe.parse import recipe_from

WEIGHTS = (1.0, 0.5, 0.0, 0.25)


def chosen(target: Path, source: Path, layers: str, weights=WEIGHTS, **parameters: object) -> FactorTable:
    """The leading directions of every matrix of some layers, with these weights."""
    content = {"merge_method": "dapa", "base_model": str(target), "models": [{"model": str(source)}]}
    recipe = recipe_from({**content, "parameters": {"layers": layers, **parameters}})
    plan = make_plan(recipe)
    return table_of(plan, given_selection(recipe, plan), weights)


def table_of(plan: Plan, units, weights=WEIGHTS) -> FactorTable:
    found: dict[Place, Factors] = {}
    for regions in plan.regions(units):
        ours = regions["target"]
        if len(ours.extents) != 2:
            continue
        source, old = (
            mapped_values(plan.models[name], regions[name]).float().reshape(ours.extents).numpy()
            for name in ("source", "target")
        )
        left, values, right = numpy.linalg.svd((source - old).astype(float), full_matrices=False)
        kept = len(weights)
        whole = ours.is_whole and len(ours.shape) == 2
        found[Place(ours.tensor.name, None if whole else ours.box)] = quantize(
            left[:, :kept] * values[:kept] * numpy.array(weights), right[:kept]
        )
    return FactorTable(found)


def saved(folder: Path, table: FactorTable) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_bytes(table.content())
    return path
