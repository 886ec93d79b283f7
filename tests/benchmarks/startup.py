"""What a start costs: `import dapa_merge` and `dapa-merge --help`, beside their limit of 0.3 s.

`python tests/benchmarks/startup.py`: medians of whole processes, and of a bare interpreter as the floor. With
`--demos N` the demo too, beside its limit of 20 s; each has an empty cache, matplotlib's too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
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
DEMO_LIMIT_SECONDS = 20


def main(argv: Sequence[str] | None = None) -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", type=int, default=0, metavar="N", help="also run `dapa-merge demo` N times")
    arguments = parse(parser, argv)
    repeat = 1 if arguments.tiny else REPEAT
    for name, code in COMMANDS.items():
        seconds = []
        for _ in range(repeat):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        print(f"{name}: {statistics.median(seconds):.3f} s of {repeat} runs; limit {LIMIT_SECONDS} s")
    for _ in range(arguments.demos):
        with tempfile.TemporaryDirectory() as folder:
            environment = {key: value for key, value in os.environ.items() if key != "MPLCONFIGDIR"}
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "dapa_merge", "--quiet", "demo", f"{folder}/out"],
                check=True,
                stdout=subprocess.DEVNULL,
                env={**environment, "XDG_CACHE_HOME": f"{folder}/cache"},
            )
            print(f"dapa-merge demo: {time.perf_counter() - start:.1f} s; limit {DEMO_LIMIT_SECONDS} s")


if __name__ == "__main__":
    main()
