"""The project's own evaluation, from nothing: trains families of small models, and compares methods on all of them.

`python tests/benchmarks/compare_table.py OUT [--quick] [--processes N]`: about half an hour on two cores, `--quick`
under five minutes. OUT/families gets the models and recipes (`dapa_merge.miniature.families`), OUT/table what
`dapa-merge compare` writes. What was stopped goes on with the same command. Every row has its own journal, so that
several processes fill the rows of one folder at once; the last step only reads them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

# Models of this size gain nothing from more threads.
os.environ["OMP_NUM_THREADS"] = "1"

from dapa_merge.miniature.families import train_families

COMPARE = [sys.executable, "-c", "from dapa_merge.cli import main; main()"]
# The least that still has every method and a curve.
QUICK = ["--seeds", "2", "--points", "6"]
# Of the scheduled run.
LIMIT_SECONDS = 300


def say(line: str) -> None:
    """A line that is seen at once."""
    print(line, flush=True)


def main() -> None:
    """Train, compare, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for families/ and table/")
    parser.add_argument("--quick", action="store_true", help="a few Llama models, fewer seeds and sizes")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="rows at once")
    arguments = parser.parse_args()
    began = time.perf_counter()
    recipes = train_families(arguments.out / "families", quick=arguments.quick, say=say)
    trained = time.perf_counter()
    options = ["--out", str(arguments.out / "table"), "--device", "cpu", *(QUICK if arguments.quick else [])]
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


if __name__ == "__main__":
    main()
