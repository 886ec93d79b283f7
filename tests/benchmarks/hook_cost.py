"""What the pydantic hook costs: `mergekit-yaml` at its start, and a program that has nothing to do with mergekit.

`python tests/benchmarks/hook_cost.py [--repeat N]`: runs each program N times with the hook and with
`PYDANTIC_DISABLE_PLUGINS=__all__`, in turns, and prints medians beside their limits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

from tiny import parse

# The program's own clocks, so that the start of the interpreter does not blur them.
UNRELATED = """
import time; start = time.perf_counter()
from typing import Optional
from pydantic import BaseModel, create_model
class Inner(BaseModel):
    a: int
    b: Optional[str] = None
models = [create_model(f"Model{i}", x=(int, ...), inner=(list[Inner], ...)) for i in range(200)]
define = time.perf_counter() - start
data = {"x": 1, "inner": [{"a": 1, "b": "c"}] * 3}
start = time.perf_counter()
for _ in range(200):
    for model in models:
        model.model_validate(data)
import json; print(json.dumps({"define": define, "validate": time.perf_counter() - start}))
"""
MERGEKIT = """
import time; start = time.perf_counter()
from mergekit.config import MergeConfiguration
import mergekit.merge
loaded = time.perf_counter()
MergeConfiguration.model_validate(
    {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]})
import json; print(json.dumps({"import": loaded - start, "validate": time.perf_counter() - loaded}))
"""
DAPA = MERGEKIT.replace(
    '{"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}',
    '{"merge_method": "dapa", "base_model": "a", "models": [{"model": "b"}]}',
)


def measure(program: str, plugins: bool) -> dict[str, float]:
    """Seconds of one run, by the program's own clocks."""
    environment = dict(os.environ)
    environment.pop("PYDANTIC_DISABLE_PLUGINS", None)
    if not plugins:
        environment["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parse(parser, argv, repeat=2)
    repeat = arguments.repeat
    programs = {
        "unrelated program, 201 models, 40,000 validations": (UNRELATED, "nothing measurable"),
        "mergekit, another method": (MERGEKIT, "under 50 ms"),
        "mergekit, dapa": (DAPA, "under 50 ms"),
    }
    if arguments.tiny:
        unrelated, *_ = programs
        programs = {unrelated: (UNRELATED.replace("200", "2"), "none")}
    for name, (program, limit) in programs.items():
        runs = [(measure(program, True), measure(program, False)) for _ in range(repeat)]
        for clock in runs[0][0]:
            hooked, plain = (statistics.median(run[side][clock] for run in runs) for side in (0, 1))
            spread = statistics.stdev(run[1][clock] for run in runs)
            print(
                f"{name}, {clock}: {1000 * hooked:.1f} ms with the hook, {1000 * plain:.1f} ms without "
                f"(+{1000 * (hooked - plain):.1f} ms; spread without {1000 * spread:.1f} ms; aim: {limit})",
                flush=True,
            )


if __name__ == "__main__":
    main()
