"""What a start costs: `import dapa_merge` and `dapa-merge --help`, beside their limit of 0.3 s.

`python tests/benchmarks/startup.py`: medians of whole processes, and of a bare interpreter as the floor.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass (the floor)": "pass",
    "import dapa_merge": "import dapa_merge",
    "dapa-merge --help": "import sys; sys.argv = ['dapa-merge', '--help']; from dapa_merge.cli import main; main()",
}
REPEAT = 11
LIMIT_SECONDS = 0.3


def main() -> None:
    """Print the medians."""
    for name, code in COMMANDS.items():
        seconds = []
        for _ in range(REPEAT):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        print(f"{name}: {statistics.median(seconds):.3f} s of {REPEAT} runs; limit {LIMIT_SECONDS} s")


if __name__ == "__main__":
    main()
