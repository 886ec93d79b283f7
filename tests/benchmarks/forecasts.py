"""What `plan` says that a run takes, beside what it takes: seconds, tests and prompts, for recipes of any models.

    python tests/benchmarks/forecasts.py OUT [RECIPE ...]

Without recipes, the two packaged pairs. Results are written into new folders below OUT. A forecast is good enough if it
tells minutes from hours: within a factor of 2.5 of the seconds that the run took on the same, otherwise idle machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tiny import few_prompts, parse

from dapa_merge.errors import CannotRepair
from dapa_merge.flow import repair
from dapa_merge.miniature import recipe_text
from dapa_merge.plan.ladder import make_ladder
from dapa_merge.progress import shown
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe, parse_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.forecast import forecast

LIMIT = 2.5


def measured(name: str, recipe: Recipe, out: Path) -> str:
    """A row: the forecast beside the run."""
    start = time.perf_counter()
    expected = forecast(make_ladder(recipe), Options("cpu"))
    calibration = time.perf_counter() - start
    start = time.perf_counter()
    try:
        tests = str(repair(recipe, out, options=Options("cpu")).tests)
    except CannotRepair:
        tests = "no repair"
    seconds = time.perf_counter() - start
    ratio = expected.total_seconds / seconds
    verdict = "within" if 1 / LIMIT <= ratio <= LIMIT else "beyond"
    return (
        f"| {name} | {expected.total_seconds:.0f} | {seconds:.0f} | {ratio:.2f} ({verdict} {LIMIT:g}) | "
        f"{expected.tests} | {tests} | {calibration:.1f} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("recipes", nargs="*", type=Path)
    arguments = parse(parser, argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipes = {path.stem: load_recipe(path) for path in arguments.recipes} or {
        name: parse_recipe(recipe_text(pair), name) for name, pair in (("planted", ""), ("shadow", "shadow-"))
    }
    if arguments.tiny:
        few = str(few_prompts(arguments.out))
        recipes = {"planted": replace(recipes["planted"], prompts=few, max_new_tokens=2, max_tests=1)}
    rows = []
    with shown():
        for name, recipe in recipes.items():
            rows.append(measured(name, recipe, arguments.out / name))
    print("| recipe | seconds forecast | seconds taken | ratio | tests forecast | tests | seconds to forecast |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
