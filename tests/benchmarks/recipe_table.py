"""The tables of published pairs in recipes/README.md: what `dapa-merge plan` says of each recipe, without the Hub.

`python tests/benchmarks/recipe_table.py`: prints the tables, to be pasted. Configs and shapes are those of
tests/published_models.py; no weight is read, and none is there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from published_models import MODELS, Published, write_published
from tiny import parse

from dapa_merge.checkpoint.location import Location
from dapa_merge.plan.selection import given_selection, make_plan
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.report.tables import plan_json

RECIPES = Path(__file__).parents[2] / "recipes"
FAMILIES = {"llama-2": "Llama 2", "mistral": "Mistral 7B", "gemma": "Gemma", "today": "Today's families"}
HEAD = (
    "| recipe | target | source | vocabulary | licence | layers (units) | per layer | share |\n"
    "|---|---|---|---|---|---|---|---|"
)


def published_recipes(family: str) -> list[Path]:
    """The recipes of a family, in the order of the table."""
    return sorted((RECIPES / family).glob("*.yml"))


def plan_offline(path: Path, folder: Path) -> dict[str, Any]:
    """What `dapa-merge plan --json` says of a recipe, with folders under `folder` in the place of the Hub's models.

    Their values, gigabytes of zeros, are not compared.
    """
    recipe = load_recipe(path)
    target, source = (Location(str(write_published(folder, place.path))) for place in (recipe.target, recipe.source))
    plan = make_plan(replace(recipe, target=target, source=source))
    return plan_json(plan, given_selection(recipe, plan), compares=False)


def num_layers(plan: dict[str, Any]) -> int:
    """How many layers the units of a plan are in."""
    return len({unit["unit"].partition(".")[0] for unit in plan["units"]})


def table(family: str, folder: Path) -> str:
    """The table of one family."""
    return "\n".join([HEAD, *(_row(path, folder) for path in published_recipes(family))])


def _row(path: Path, folder: Path) -> str:
    recipe, plan = load_recipe(path), plan_offline(path, folder)
    target, source = (MODELS[place.path] for place in (recipe.target, recipe.source))
    layers, units = num_layers(plan), len(plan["units"])
    num_bytes = sum(unit["bytes"] for unit in plan["units"]) // layers
    share = sum(unit["parameters"] for unit in plan["units"]) / layers / plan["target"]["parameters"]
    cells = (
        f"`{path.relative_to(RECIPES)}`",
        recipe.target.path + ("" if "id" not in target.unsure else " (id not confirmed)"),
        recipe.source.path,
        f"{_said(target, 'vocab_size', target.num_tokens)} / {_said(source, 'vocab_size', source.num_tokens)}",
        f"{_said(target, 'licence', target.licence)} / {_said(source, 'licence', source.licence)}",
        str(layers) if units == layers else f"{layers} ({units})",
        f"{num_bytes / 1e6:.2f} MB" + ("*" if "dtype" in target.unsure else ""),
        f"{100 * share:.2f} %",
    )
    return f"| {' | '.join(cells)} |"


def _said(model: Published, fact: str, value: object) -> str:
    return "?" if fact in model.unsure else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = [*FAMILIES.items()][: 1 if parse(parser, argv).tiny else None]
    with tempfile.TemporaryDirectory() as folder:
        for family, title in families:
            print(f"### {title}\n\n{table(family, Path(folder))}\n")


if __name__ == "__main__":
    main()
