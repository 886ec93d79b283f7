"""Does `dapa-merge inspect` name what was done? `python tests/benchmarks/inspected.py RECIPE...`.

Prints a row of Markdown for each recipe of `real_families.py` or `real_base_families.py`: the history of its models, as
its first line tells it; the kind that is read from the weights, without and with the pretrained model that it names; of
how many matrices the difference is of low rank, and the rank that most of these have; the median share of a difference
that rounding explains; and the seconds of the first of the two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tiny import parse

from dapa_merge import load_recipe
from dapa_merge.inspect.damage import Seen
from dapa_merge.inspect.inspection import inspect_pair


def main(argv: Sequence[str] | None = None) -> None:
    """Inspect the models of recipes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    arguments = parse(parser, argv, recipes=[Path("recipes/miniature.yml")])
    print("| models | history | named | with the pretrained model | low rank | rank | rounding | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for path in arguments.recipes:
        recipe = load_recipe(path)
        began = time.perf_counter()
        found = inspect_pair(recipe.target, recipe.source)
        seconds = time.perf_counter() - began
        with_base = inspect_pair(recipe.target, recipe.source, recipe.pretrained) if recipe.pretrained else None
        seen = Seen(found.differences)
        cells = [
            path.stem,
            path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "),
            found.damage.kind,
            with_base.damage.kind if with_base else "-",
            f"{len(seen.low)} of {len(seen.matrices)}",
            str(seen.rank),
            f"{seen.noise:.2f}",
            f"{seconds:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
