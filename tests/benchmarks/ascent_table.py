"""Measures settings of an ascent on a real pair: `python tests/benchmarks/ascent_table.py RECIPE OUT [SETTING ...]`.

RECIPE is one with `edit: directions`, as `real_families.py` and `real_base_families.py` write. SETTING is one or more
of `search.slopes.Settings`, such as `max_rank=64` or `max_harmless=0.35,num_rounds=6`; without one, those of a run are
measured. The directions are chosen anew with each, and the points are printed with their figures on the search's
prompts, and the seconds of the process. OUT gets a journal for each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from ascent_settings import with_settings
from tiny import parse

from dapa_merge import progress
from dapa_merge.errors import CannotRepair
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parse import load_recipe
from dapa_merge.search.search import search_plan

AS_A_RUN = "as a run"


def main(argv: Sequence[str] | None = None) -> None:
    """Choose directions with each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path, help="folder of the journals")
    parser.add_argument("settings", nargs="*", metavar="SETTING", default=[AS_A_RUN])
    arguments = parse(parser, argv)
    torch.set_num_threads(1)
    recipe = load_recipe(arguments.recipe)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for said in arguments.settings or [AS_A_RUN]:
        changed = {} if said == AS_A_RUN else dict(one.split("=") for one in said.split(","))
        values = {key: json.loads(value) for key, value in changed.items()}
        if arguments.tiny:
            values |= {"num_rounds": 1, "num_steps": 1}
        start = time.process_time()
        with progress.shown(), with_settings(**values):
            journal = arguments.out / f"{said.replace(' ', '-')}.jsonl"
            try:
                found = search_plan(recipe, make_plan(recipe), Options(device="cpu", journal=journal))
                told = "\n".join(point.text(found.limits) for point in found.points) + f"\ntaken: point {found.picked}"
            except CannotRepair as error:
                told = str(error).replace("; point", ";\npoint")
        print(f"{said}, {time.process_time() - start:.0f} s:\n{told}\n", flush=True)


if __name__ == "__main__":
    main()
