"""The recipe that replays a result without a search."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import yaml

from dapa_merge.checkpoint.units import Unit
from dapa_merge.measure.prompts.parts import SKILLS
from dapa_merge.measure.prompts.sets import pinned_prompts
from dapa_merge.plan.plan import Plan, join
from dapa_merge.plan.selection import with_pinned_models
from dapa_merge.recipe.attacks import parse_attacks
from dapa_merge.recipe.parameters import layer_spans
from dapa_merge.recipe.recipe import DEFAULTS, METHOD, Recipe
from dapa_merge.transplant.manifest import TEMPLATE_NAME

# Parameters that a recipe with named layers does not use, or sets itself.
SEARCH_ONLY = ("layers", "modules", "granularity", "search", "prefer", "max_tests", "pretrained")


def replay_text(recipe: Recipe, plan: Plan, selection: Sequence[Unit]) -> str:
    """A recipe that transplants exactly this selection without a search, with `dapa-merge` or `mergekit-yaml`.

    Models and prompts of the Hub are pinned to their commits; folders and files have absolute paths.
    """
    parameters: dict[str, Any] = layer_parameters(join(plan, selection), plan.modules)
    parameters |= {
        name: getattr(recipe, name)
        for name, default in DEFAULTS.items()
        if name not in SEARCH_ONLY and getattr(recipe, name) != default
    }
    parameters |= plan.edit.parameters()
    if recipe.template_file is not None:
        # Copied into the result.
        parameters["chat_template"] = TEMPLATE_NAME
    if "prompts" in parameters:
        parameters["prompts"] = pinned_prompts(recipe.prompts)
    if recipe.keep not in (None, SKILLS):
        parameters["keep"] = pinned_prompts(recipe.keep)
    if recipe.text is not None and os.path.exists(recipe.text):
        parameters["text"] = os.path.abspath(recipe.text)
    if "attacks" in parameters:
        known, files = parse_attacks(recipe.attacks)
        names = (*dict.fromkeys(attack.kind for attack in known), *map(os.path.abspath, files))
        parameters["attacks"] = ", ".join(names)
    if recipe.skills is not None:
        # It loads scipy, which is not needed without skills.
        from dapa_merge.measure.skills import absolute

        parameters["skills"] = absolute(recipe.skills)
    pinned = with_pinned_models(recipe, plan)
    parameters |= {name: str(getattr(pinned, name)) for name in plan.others if name != "source"}
    content: dict[str, Any] = {"merge_method": METHOD, "base_model": str(pinned.target)}
    content["models"] = [{"model": str(pinned.source)}]
    if recipe.dtype:
        content["dtype"] = recipe.dtype
    if recipe.keeps_tokenizer:
        content["tokenizer"] = {"source": "base"}
    content["parameters"] = parameters
    return str(yaml.safe_dump(content, sort_keys=False))


def layer_parameters(units: Sequence[Unit], modules: Sequence[str]) -> dict[str, str]:
    """The parameters of a recipe that name these units, which are of these modules."""
    if len(modules) == 1 and all(unit.rows is None for unit in units):
        return {"layers": layer_spans([unit.layer for unit in units]), "modules": modules[0]}
    return {"layers": ",".join(map(str, units))}
