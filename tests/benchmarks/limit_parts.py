"""Compares ways to find the part of a transplant that refuses most within the limits, where all of it violates one.

    python tests/benchmarks/limit_parts.py RECIPE... [--modules gate,auto] [--share 0.9]

Of each recipe, with `min_skill` set: DSR / skill of all units, and of the best part within the limits by the search's
own way (units in the order of their effects), by the same way in the order of the layers, and of as many parts drawn at
random. All are measured on the same prompts. A dash means that no part within the limits refuses more than the target.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny import few_prompts, parse

from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CannotRepair
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.plan.selection import make_plan, without_equal_units
from dapa_merge.progress import LOG
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.bench import make_bench
from dapa_merge.search.journal import Journal
from dapa_merge.search.parts import Part, Parts, best_part
from dapa_merge.search.requirement import requirement, settings_of
from dapa_merge.search.search import effects_of
from dapa_merge.search.session import Session, baselines


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all ways for all recipes and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--modules", default="gate,auto", help="with commas, each for itself")
    parser.add_argument("--share", type=float, default=0.9, help="of the target's own skill that must be kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse(parser, argv, recipes=[Path("recipes/miniature.yml")], modules="gate", share=1.0)
    LOG.setLevel(logging.WARNING)
    print(f"{'pair':<24}{'modules':<9}{'all units':<24}{'by effects':<14}{'by layers':<14}{'at random':<14}measured")
    for path in arguments.recipes:
        for modules in arguments.modules.split(","):
            recipe = replace(
                load_recipe(path), layers=None, modules=(modules,), keep="skills", min_skill=arguments.share
            )
            with TemporaryDirectory() as folder:
                if arguments.tiny:
                    recipe = replace(recipe, prompts=str(few_prompts(Path(folder), 12)), max_new_tokens=4)
                print(f"{path.stem:<24}{modules:<9}{compared(recipe, arguments.seed)}", flush=True)


def compared(recipe: Recipe, seed: int) -> str:
    """The rest of a recipe's line."""
    try:
        plan = without_equal_units(recipe, make_plan(recipe))
    except CannotRepair as error:
        return str(error)
    prompts, options = split_prompts(recipe), Options("cpu")
    with closing(make_bench(recipe, plan, prompts.search, options)) as bench:
        session = Session(recipe, plan, bench, Journal(), options)
        target, full = baselines(session)
        limits = requirement(bench.constraints, target.figures, full.figures, settings_of(recipe))
        whole = f"{full.score:.3f} / {full.figures['skill']:.3f}"
        if full.score <= target.score:
            return f"{whole:<24}refuses no more than the target"
        if limits.complaint(full.figures) is None:
            return f"{whole:<24}within the limits"
        effects = effects_of(session, plan.units, "prior", target, full)

        def found(parts: Iterable[Part]) -> str:
            best = best_part(list(parts), limits, target.score)
            return "-" if best is None else f"{best.baseline.score:.3f} / {best.baseline.figures['skill']:.3f}"

        def tried(weights: Mapping[Unit, float] | None) -> list[Part]:
            return Parts(bench, Journal(), limits).within_limits(plan.units, weights)

        ours, by_layer = tried(effects), tried(None)
        draw = random.Random(seed)
        measure = Parts(bench, Journal(), limits)
        drawn = [
            measure.measured(draw.sample(plan.units, draw.randint(1, len(plan.units) - 1)), number)
            for number in range(len(ours))
        ]
        columns = "".join(f"{found(parts):<14}" for parts in (ours, by_layer, drawn))
        return f"{whole:<24}{columns}{len(ours)}, {len(by_layer)}, {len(drawn)}"


if __name__ == "__main__":
    main()
