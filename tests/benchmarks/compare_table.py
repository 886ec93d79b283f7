"""The project's own evaluation, from nothing: trains families of small models, and compares methods on all of them.

`python tests/benchmarks/compare_table.py OUT [--quick] [--processes N]`: about half an hour on two cores, `--quick`
under five minutes. OUT/families gets the models and recipes (`families`), OUT/table what
`dapa-merge compare` writes. What was stopped goes on with the same command. Every row has its own journal, so that
several processes fill the rows of one folder at once; the last step only reads them. `OUT/table --show` prints
what RESULTS.md shows of a folder that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

# Models of this size gain nothing from more threads.
os.environ["OMP_NUM_THREADS"] = "1"

from families import train_families
from tiny import few_prompts, parse

COMPARE = [sys.executable, "-c", "from dapa_merge.cli import main; main()"]
# The least that still has a curve and every method that takes seconds.
QUICK = [
    "--seeds", "2", "--points", "6",
    "--methods", "dapa,auto,fixed,gates,mlp,random,random-search,linear,task-arithmetic,ties",
]  # fmt: skip
# Of the blends, each a row.
WEIGHTS = "0.25,0.5,0.75,1"
# Of the table of pairs: what an arm is called there, by its key.
SHOWN = {
    "target": "target",
    "dapa": "DAPA, gates",
    "auto": "auto",
    "random of auto": "random",
    "random-search of auto": "best random",
    "fixed": "fixed layers",
    "linear 0.5": "linear 0.5",
    "task-arithmetic 0.75": "task arithmetic 0.75",
    "task-arithmetic 1": "1",
}
# Of the scheduled run.
LIMIT_SECONDS = 300


def say(line: str) -> None:
    """A line that is seen at once."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for families/ and table/; with --show the table")
    parser.add_argument("--show", action="store_true", help="print what is there, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="a few Llama models, fewer seeds and sizes")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="rows at once")
    arguments = parse(parser, argv, quick=True, processes=1)
    if arguments.show:
        print("\n".join(shown(json.loads((arguments.out / "summary.json").read_text(encoding="utf-8")))))
        return
    began = time.perf_counter()
    recipes = train_families(arguments.out / "families", quick=arguments.quick, say=say, _tiny=arguments.tiny)
    trained = time.perf_counter()
    options = ["--out", str(arguments.out / "table"), "--device", "cpu", "--weights", WEIGHTS]
    options += QUICK if arguments.quick else []
    if arguments.tiny:
        recipes, options = recipes[:1], [*options, "--methods", "fixed", "--no-curve"]
        text = recipes[0].read_text(encoding="utf-8")
        text = text.replace("prompts: miniature", f"prompts: {few_prompts(arguments.out)}")
        recipes[0].write_text(text.replace("max_new_tokens: 24", "max_new_tokens: 4"))
    shares = [recipes[start :: arguments.processes] for start in range(arguments.processes)]
    running = [
        subprocess.Popen([*COMPARE, "--quiet", "compare", *map(str, share), *options], stdout=subprocess.DEVNULL)
        for share in shares
        if share
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(max(codes))
    subprocess.run([*COMPARE, "--quiet", "compare", *map(str, recipes), *options], check=True)
    ended = time.perf_counter()
    total = ended - began
    print(f"\ntraining {trained - began:.0f} s, comparing {ended - trained:.0f} s, together {total:.0f} s", end="")
    print(f" (limit of --quick {LIMIT_SECONDS} s)" if arguments.quick else "")


def shown(summary: dict[str, Any]) -> Iterator[str]:
    """The averages and the pairs of a comparison, in Markdown."""
    yield "| method | repairs | DSR | skill | perplexity | parameters | tests | s |\n|---|---|---|---|---|---|---|---|"
    for one in summary["averages"]:
        effort = "- | -" if one["tests"] is None else f"{one['tests']['value']:.1f} | {one['seconds']['value']:.1f}"
        yield (
            f"| {one['label']} | {one['num_repaired']} of {one['num_rows']} | {points(one['gain'])} | "
            f"{points(one['skill'])} | x {one['perplexity']['value']:.3f} | {100 * one['share']['value']:.1f} % | "
            f"{effort} |"
        )
    yield f"\n| pair | {' | '.join(SHOWN.values())} |\n|---|{'---|' * len(SHOWN)}"
    for row in summary["rows"]:
        yield f"| {row['name']} | {' | '.join(cell(row, key) for key in SHOWN)} |"


def points(change: dict[str, Any]) -> str:
    """A change and its interval, in percentage points."""
    if change["interval"] is None:
        return f"{100 * change['value']:+.1f}"
    low, high = change["interval"]
    return f"{100 * change['value']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def cell(row: dict[str, Any], key: str) -> str:
    """DSR and skill of an arm, or the mean of its seeds; of auto also the share of the parameters and the tests."""
    arms = [arm for arm in row["arms"] if arm["key"].partition(" seed ")[0] == key]
    found = [arm for arm in arms if arm["figures"] is not None]
    if not found:
        return "none" if arms else ""
    text = f"{mean(arm['figures']['dsr'] for arm in found):.2f} / {mean(arm['skill'] for arm in found):.2f}"
    return f"{text}; {100 * found[0]['share']:.0f} %, {found[0]['cost']['tests']}" if key == "auto" else text


if __name__ == "__main__":
    main()
