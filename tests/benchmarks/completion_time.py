"""How long a shell waits for completions, beside the help of the same commands and the limit: `completion_time.py`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

LIMIT_SECONDS = 0.3
NUM_RUNS = 7
PROGRAM = "from dapa_merge.cli import main; main(prog_name='dapa-merge')"
ASKED = {"a command": "dapa-merge ver", "run": "dapa-merge run --jou", "trace": "dapa-merge trace --model s"}


def seconds(*arguments: str, **environment: str) -> float:
    """The median time of a process."""
    taken = []
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            check=True,
            capture_output=True,
            env={**os.environ, **environment},
        )
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    """Print a row for each kind of completion."""
    print(f"{'':<12}completion  help  limit (seconds, median of {NUM_RUNS})")
    for name, words in ASKED.items():
        asked = {"_DAPA_MERGE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [] if name == "a command" else [name]
        print(f"{name:<12}{seconds(**asked):10.2f}{seconds(*command, '--help'):6.2f}{LIMIT_SECONDS:7.2f}")


if __name__ == "__main__":
    main()
