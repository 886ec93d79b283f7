"""What a start costs: `import dapa_merge` and `dapa-merge --help`, beside their limit of 0.3 s.

`python tests/benchmarks/startup.py`: medians of whole processes, and of a bare interpreter as the floor.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from tiny import parse

COMMANDS = {
    "python -c pass (the floor)": "pass",
    "import dapa_merge": "import dapa_merge",
    "dapa-merge --help": "import sys; sys.argv = ['dapa-merge', '--help']; from dapa_merge.cli import main; main()",
}
REPEAT = 11
LIMIT_SECONDS = 0.3


def main(argv: Sequence[str] | None = None) -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    repeat = 1 if parse(parser, argv).tiny else REPEAT
    for name, code in COMMANDS.items():
        seconds = []
        for _ in range(repeat):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        print(f"{name}: {statistics.median(seconds):.3f} s of {repeat} runs; limit {LIMIT_SECONDS} s")


if __name__ == "__main__":
    main()
