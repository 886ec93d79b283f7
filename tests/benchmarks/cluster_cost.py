"""What a comparison costs on a cluster: one process beside two workers, and 1,000 pairs of 7 B on 64 GPUs.

    python tests/benchmarks/cluster_cost.py [--parts FILE] [--pairs 1000] [--gpus 64] [--compare]

FILE is what `cost.py` wrote, such as recorded/cost.json: the seconds and the work of every part of a repair. Without
it, the parts of the packaged pair are measured. Their rates are those of the device that they were measured on, be it a
GPU; beside them stand rates that are only *assumed* of one. How often a row needs each part follows from the declared
methods and their settings.

`--compare` measures the packaged pair's comparison by one process and by `--workers ray:2`: wall time, and processor
time of all processes, Ray's own among them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cost
import torch
from grid import grid
from tiny import few_prompts, parse

from dapa_merge import miniature
from dapa_merge.compare.methods import METHODS, TRAINING, TUNED
from dapa_merge.recipe.parse import recipe_from
from dapa_merge.search.slopes import Settings

# Tokens of a prompt in its template, and of an answer.
PROMPT, ANSWER = 40, 40
# Prompts of a report, of a try of a setting, and of a test of a search, most of which ends early.
REPORT, TRIAL, TEST = 60 + 60 + 120, 60 + 60, 30
NUM_TESTS, NUM_SEEDS = 12, 5
ROWS_OF_TRAINING, TOKENS_OF_TRAINING = 8, 20


@dataclass(frozen=True)
class RowWork:
    """How often a row needs each part.

    Attributes:
        verdicts: Prompts that are answered.
        models: Models that are read whole, for a digest or to be loaded.
        jobs: Pieces that are handed to workers.
    """

    name: str
    verdicts: int
    models: int
    jobs: int
    steps: int = 0
    decompositions: int = 0
    training_steps: int = 0

    def work(self, shape: cost.Shape) -> dict[str, float]:
        """What there is to do of each part: bytes or operations."""
        settings = Settings()
        kept = settings.num_keep * (2 * PROMPT + settings.num_tokens + settings.num_keep_tokens)
        tokens = settings.num_contrasts * (PROMPT + settings.num_tokens) + kept
        predicted = tokens - (settings.num_contrasts + 2 * settings.num_keep) * PROMPT
        trained = ROWS_OF_TRAINING * (PROMPT + TOKENS_OF_TRAINING)
        return {
            "reading": self.models * shape.num_bytes,
            "generating": self.verdicts * shape.passes(PROMPT + ANSWER, ANSWER),
            "a step along directions": self.steps * shape.passes(tokens, predicted, backward=True),
            "decomposing": self.decompositions * cost.work_of("decomposing", shape, (0, 0)),
            "a step of training": self.training_steps
            * shape.passes(trained, ROWS_OF_TRAINING * TOKENS_OF_TRAINING, backward=True),
        }

    def seconds(self, shape: cost.Shape, rates: Mapping[str, float]) -> float:
        """On one device with these rates."""
        return sum(amount / rates[part] for part, amount in self.work(shape).items())


def rows_of() -> list[RowWork]:
    """A row with three sets of methods, each of which has those before; curves are left out."""
    settings = Settings()
    # Target, source, DAPA, all gates, the MLPs, the random selections, and the best of those of the search's size.
    arms = 5 + NUM_SEEDS + 1
    verdicts = arms * REPORT + NUM_TESTS * TEST + NUM_TESTS * TRIAL
    # Two for the digests, one for the search, the source, the target.
    dapa = RowWork("DAPA and its controls", verdicts, 5, 1 + arms + NUM_TESTS + 1)
    steps = settings.num_rounds * settings.num_steps
    points = settings.num_rounds + 1
    # The target, the answers of target and source, the points, the tests, and the report.
    more = 2 * TEST + 3 * TRIAL + points * TEST + NUM_TESTS * TEST + REPORT
    directions = RowWork("and directions", verdicts + more, 6, dapa.jobs + 1, steps, 1)
    tuned = [one for one in METHODS.values() if one.kind in TUNED]
    num_tries = sum(len(one.grid) for one in tuned)
    trained = sum(
        len({rate for rate, _ in one.grid}) * int(max(steps for _, steps in one.grid))
        for one in tuned
        if one.kind == TRAINING
    )
    everything = RowWork(
        "and all others, with all settings",
        directions.verdicts + num_tries * TRIAL + len(tuned) * REPORT + 2 * TRIAL,
        directions.models + 2,
        directions.jobs + num_tries + len(tuned),
        steps,
        1,
        trained,
    )
    return [dapa, directions, everything]


def measured_rates(path: Path | None, is_tiny: bool) -> tuple[str, dict[str, float]]:
    """The name of a pair, and the rates at which its parts were measured."""
    if path is not None:
        return rates_of(cost.read(path)[-1])
    models = [str(miniature.path(name)) for name in ("shadow-target", "shadow-source")]
    content = {"merge_method": "dapa", "base_model": models[0], "models": [{"model": models[1]}]}
    parameters = {"layers": "auto", "prompts": "miniature", "edit": "directions", "modules": "auto"}
    torch.set_num_threads(1)
    return rates_of(cost.measure(recipe_from({**content, "parameters": parameters}), torch.device("cpu"), is_tiny))


def rates_of(one: cost.Measured) -> tuple[str, dict[str, float]]:
    """A pair's name, and what each part did a second."""
    return one.shape.name, {part: found.work / found.seconds for part, found in one.parts.items()}


def rates_table(name: str, rates: Mapping[str, float]) -> str:
    """The rates of a pair's parts, and those that are assumed."""
    heads = ["part", f"measured on {name}, a second", "assumed of a GPU, a second"]
    rows = ([part, f"{rates[part] / 1e9:.3g} G", f"{rate / 1e9:,.0f} G"] for part, rate in cost.ASSUMED.items())
    return grid(heads, rows)


def rows_table(name: str, rates: Mapping[str, float], num_pairs: int = 1000, num_gpus: int = 64) -> str:
    """The table of the time that a row takes, and all pairs."""
    shape = cost.SHAPES[0]
    heads = (
        "methods", f"a row of {shape.name}: answers, models read, jobs", f"on one device at the rates of {name}",
        "on one GPU as assumed", f"{num_pairs:,} pairs on {num_gpus} such GPUs", "read in all",
    )  # fmt: skip
    lines = []
    for row in rows_of():
        on_gpu = row.seconds(shape, cost.ASSUMED)
        # Rows are independent; at the end, workers share what is left of the last ones.
        hours = num_pairs * on_gpu / num_gpus / 3600
        read = num_pairs * row.models * shape.num_bytes / 1e12
        lines.append(
            [
                row.name, f"{row.verdicts:,}, {row.models}, {row.jobs}", cost.told(row.seconds(shape, rates)),
                cost.told(on_gpu), f"{hours:.1f} h, {num_gpus * hours:,.0f} GPU hours", f"{read:.0f} TB",
            ]
        )  # fmt: skip
    return grid(heads, lines)


class Watch(threading.Thread):
    """Adds up the processor time of this process's descendants, which outlives none of them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: dict[tuple[int, float], float] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        import psutil

        while not self.ended.wait(0.2):
            for one in psutil.Process().children(recursive=True):
                try:
                    times = one.cpu_times()
                    self.seconds[one.pid, one.create_time()] = times.user + times.system
                except psutil.Error:
                    continue


def compared(folder: Path, prompts: Path, is_tiny: bool) -> list[str]:
    """The comparison of the packaged pair by one process and by two workers."""
    lines = ["", "| the packaged comparison | wall | processor time | same table |", "|---|---|---|---|"]
    models = [str(miniature.path(name)) for name in ("target", "source")]
    settings = {"layers": "auto", "prompts": str(prompts), "max_new_tokens": 12, "batch_size": 64}
    recipe = folder / "packaged.yml"
    content = {"merge_method": "dapa", "base_model": models[0], "models": [{"model": models[1]}]}
    recipe.write_text(json.dumps({**content, "parameters": settings}), encoding="utf-8")
    methods = "gates" if is_tiny else "dapa,gates,mlp,random,random-search,linear"
    first = None
    for name, workers in (("one process", ()), ("`--workers ray:2`", ("--workers", "ray:2"))):
        out = folder / f"out-{len(workers)}"
        command = [sys.executable, "-c", "from dapa_merge.cli import main; main()", "--quiet", "compare", str(recipe)]
        command += ["--out", str(out), "--methods", methods, "--no-curve", "--device", "cpu", "--tries", "2", *workers]
        watch, start = Watch(), time.perf_counter()
        watch.start()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        wall = time.perf_counter() - start
        watch.ended.set()
        watch.join()
        rows = json.loads((out / "summary.json").read_text())["rows"]
        shown = [[arm["key"], arm["figures"], arm["share"]] for row in rows for arm in row["arms"]]
        first = first or shown
        total = sum(watch.seconds.values())
        lines.append(f"| {name} | {wall:.0f} s | {total:.0f} s | {'yes' if shown == first else 'NO'} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, metavar="FILE", help="what cost.py wrote")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--compare", action="store_true", help="also compare the packaged pair with two workers")
    arguments = parse(parser, argv)
    name, rates = measured_rates(arguments.parts, arguments.tiny)
    print(f"{rates_table(name, rates)}\n{rows_table(name, rates, arguments.pairs, arguments.gpus)}")
    if arguments.compare:
        with tempfile.TemporaryDirectory() as folder:
            prompts = few_prompts(Path(folder), 8 if arguments.tiny else 32)
            print("\n".join(compared(Path(folder), prompts, arguments.tiny)))


if __name__ == "__main__":
    main()
