"""Directions that tests choose themselves: an SVD of source - target, matrix by matrix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, UNGATED, call, save_random

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


def made(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    modules: str = "gate,v",
    *,
    dtype: torch.dtype = torch.bfloat16,
    strength: float = 1.0,
    weights: tuple[float, ...] = WEIGHTS,
) -> tuple[Path, Path]:
    """A random target, and its repair by directions of some matrices: fewer in the later layer."""
    class_name, changes = {**ARCHITECTURES, **UNGATED}[architecture]
    config = getattr(transformers, class_name)(**{**SHAPE, **changes})
    target = save_random(folder / "target", config, seed=1, dtype=dtype)
    source = save_random(folder / "source", config, seed=2, dtype=torch.float32)
    tables = [
        chosen(target, source, "1", weights, modules=modules),
        chosen(target, source, "3", weights[:1], modules=modules),
    ]
    file = saved(folder / "file", FactorTable({**tables[0].of, **tables[1].of}))
    parameters = {
        "layers": "1,3", "modules": modules, "edit": "directions", "directions": str(file), "strength": strength,
    }  # fmt: skip
    (folder / "recipe.yml").write_text(
        f"merge_method: dapa\nbase_model: {target}\nmodels: [{{model: {source}}}]\n"
        f"parameters: {json.dumps(parameters)}\n"
    )
    result = call("run", folder / "recipe.yml", folder / "out", "--no-evaluate")
    assert result.exit_code == 0, result.output
    return target, folder / "out"
