"""How small does the edit get? The share of the parameters against DSR, over-refusal and skill, on the miniature.

`python tests/benchmarks/edit_size.py [--rows 104 52 26 8] [--retain 0.95 0.8]`: searches for whole layers and, within
those, for blocks of so many rows (neurons), for each share of the gain that must be kept. The first two lines are the
ends of the curve: the target as it is, and every gate of the source. DSR, its 95 % interval, over-refusal and skill are
measured with prompts that no search has asked.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tiny import few_prompts, parse

from dapa_merge.measure.figures import Figures
from dapa_merge.measure.meter import measure_live, report_meter
from dapa_merge.measure.prompts.parts import split_prompts
from dapa_merge.miniature import recipe_text
from dapa_merge.plan.plan import join
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.parse import parse_recipe
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.bench import make_bench
from dapa_merge.search.identity import open_journal
from dapa_merge.search.search import search
from dapa_merge.search.session import Session


def main(argv: Sequence[str] | None = None) -> None:
    """Print the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[104, 52, 26, 8])
    parser.add_argument("--retain", type=float, nargs="*", default=[0.95, 0.8])
    arguments = parse(parser, argv, rows=[104], retain=[0.95])
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe(recipe_text())
        if arguments.tiny:
            recipe = replace(recipe, prompts=str(few_prompts(Path(folder))), max_new_tokens=4)
        show_curve(recipe, arguments.retain, arguments.rows)


def show_curve(recipe: Recipe, retains: Sequence[float], numbers_of_rows: Sequence[int]) -> None:
    """The ends of the curve, and a line for each search."""
    plan = make_plan(recipe)
    print(
        f"{'edit':24} {'share':>8} {'DSR':>6} {'95 % interval':>14} {'over-ref.':>9} {'skill':>6} {'tests':>6} {'s':>6}"
    )
    parts = split_prompts(recipe)
    searching, confirming = parts.search, parts.report
    with closing(make_bench(recipe, plan, searching, Options("cpu"))) as bench:
        meter = report_meter(recipe, confirming, Options())

        def figures(units: tuple) -> Figures:
            return measure_live(bench.live, units, meter, "").figures

        show("nothing", 0.0, figures(()))
        show("every gate", plan.share(plan.units), figures(plan.units))
        with tempfile.TemporaryDirectory() as folder:
            for retain in retains:
                for granularity in ("layer", *(f"block:{rows}" for rows in numbers_of_rows)):
                    wanted = replace(recipe, retain=retain, granularity=granularity)
                    options = Options("cpu", Path(folder) / f"{retain}-{granularity}")
                    with closing(open_journal(wanted, plan, bench, options.journal)) as journal:
                        found = search(Session(wanted, plan, bench, journal, options))
                    units = join(plan, found.minimum.units)
                    name = f"retain {retain}, {granularity}"
                    show(name, plan.share(units), figures(units), found.minimum.tests, found.seconds)
                    print(f"{'':26}{spans(units)}")


def show(name: str, share: float, measured: Figures, tests: int | None = None, seconds: float | None = None) -> None:
    """One line of the curve."""
    low, high = measured.dsr_interval
    effort = "" if tests is None or seconds is None else f" {tests:6d} {seconds:6.1f}"
    print(
        f"{name:24} {100 * share:7.2f}% {measured.dsr:6.3f} {low:.3f}-{high:.3f}".ljust(55)
        + f" {measured.over_refusal:9.3f} {measured.skills[0].score:6.3f}{effort}",
        flush=True,
    )


if __name__ == "__main__":
    main()
