"""Does speculative decoding change what a search selects, and what does it save?

`python tests/benchmarks/speculative.py [RECIPE ...]`: each recipe's search and that among all projections, with drafts
and without, by the deterministic attention and by the fused one. Two searches that differ in a test or a unit are not
the same. Seconds are the process's, on one thread. In float32, or on an accelerator, both columns are one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tiny import parse

from dapa_merge.compare.selections import auto_of
from dapa_merge.compare.selections import find_selections as find
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.journal import Journal

RECIPES = ("recipes/miniature.yml", "recipes/shadow.yml")
# What a search came to: its units, and how many tests it made.
Outcome = tuple[tuple[str, ...] | None, int]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each search, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    arguments = parse(parser, argv)
    torch.set_num_threads(1)
    print(f"{'search':32} {'attention':13} {'same':>5} {'tests':>9} {'s, drafts':>9} {'s, none':>9}")
    same = {"deterministic": 0, "fused": 0}
    seconds = {"deterministic": [0.0, 0.0], "fused": [0.0, 0.0]}
    number = 0
    for path in map(Path, arguments.recipes):
        recipe = load_recipe(path)
        plan = make_plan(recipe, partial=False, allow_pickle=False)
        auto = None if arguments.tiny else auto_of(recipe, plan)
        for name, (own, chosen) in {"": (recipe, plan), " auto": auto or (None, None)}.items():
            if own is None or chosen is None:
                continue
            number += 1
            for attention in same:
                (one, first), (other, second) = (search(own, chosen, attention, drafts) for drafts in (True, False))
                same[attention] += one == other
                seconds[attention][0] += first
                seconds[attention][1] += second
                print(
                    f"{path.stem + name:32} {attention:13} {'yes' if one == other else 'NO':>5} "
                    f"{f'{one[1]}, {other[1]}':>9} {first:9.1f} {second:9.1f}",
                    flush=True,
                )
    for attention, (first, second) in seconds.items():
        print(
            f"\n{attention}: {same[attention]} of {number} searches are the same with drafts and without (limit: all); "
            f"{first:.0f} s with, {second:.0f} s without"
        )


def search(recipe: Recipe, plan: Plan, attention: str, drafts: bool) -> tuple[Outcome, float]:
    """One search, from nothing, and its seconds."""
    with ExitStack() as stack:
        if not drafts:
            stack.enter_context(mock.patch("dapa_merge.measure.meter.LookupCache", return_value=None))
        if attention == "fused":
            stack.enter_context(mock.patch("dapa_merge.measure.determinism.MAX_TOKENS", 0))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        began = time.process_time()
        found = find("search", recipe, plan, folder, Journal(), Options(device="cpu"))
        seconds = time.process_time() - began
    tests = found.cost.tests if found.cost else 0
    return (None if found.units is None else tuple(map(str, found.units)), tests), seconds


if __name__ == "__main__":
    main()
