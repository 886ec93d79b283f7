"""Every long job, stopped at random moments: is each stop one sentence, is nothing half-written, does it end alike?

    python tests/benchmarks/stopped.py [--stops 10] [--job run ...]

Jobs on the miniature, in processes of their own, get SIGINT, SIGTERM or SIGKILL after a random part of the time that
they take undisturbed. The first two must end with exit code 130 or 143 and a last line that begins with "Error:
stopped"; a result's folder must not exist yet. When all stops are done, the job may end, and must say what it says
undisturbed. A fault is printed, and the exit code is then 1. A job that is over before its stop comes begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import few_prompts, parse

from dapa_merge import miniature

# A shell that runs scripts in the background has them ignore Ctrl-C.
CODE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from dapa_merge.cli import main; main()"
)
RECIPE = """\
merge_method: dapa
base_model: {target}
models: [{{model: {source}}}]
parameters:
  {{layers: auto, edit: {edit}, prompts: {prompts}, keep: skills, max_tests: 4, max_new_tokens: 16, batch_size: 64}}
"""
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
# What a clock, a machine or the way there decides.
VOLATILE = ("resumed", "tests_recorded", "tests_unneeded", "share_of_prompts_saved", "peak_bytes")
TIME = re.compile(r"[\d.]+ s of search")


@dataclass(frozen=True)
class Job:
    """A command that takes long.

    Attributes:
        edit: Of its recipe.
        arguments: Of a recipe and a folder.
        out: What must not exist before the end, of a folder; None if it is filled step by step.
    """

    edit: str
    arguments: Callable[[Path, Path], list[str]]
    out: Callable[[Path], Path] | None = None


def _run(recipe: Path, folder: Path) -> list[str]:
    return ["run", str(recipe), str(folder / "out"), "--no-lock"]


JOBS = {
    "run": Job("copy", _run, lambda folder: folder / "out"),
    "run-directions": Job("directions", _run, lambda folder: folder / "out"),
    "run-auto": Job("auto", _run, lambda folder: folder / "out"),
    "search": Job("copy", lambda recipe, folder: ["search", str(recipe), "--out", str(folder / "replay.yml")]),
    "compare": Job(
        "copy",
        lambda recipe, folder: [
            "compare",
            str(recipe),
            "--out",
            str(folder / "table"),
            "--methods",
            "dapa",
            "--no-curve",
        ],
    ),
    "trace": Job("copy", lambda recipe, folder: ["trace", str(recipe), str(folder / "study")]),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Stop, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--job", nargs="*", choices=JOBS, default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse(parser, argv, stops=1, job=["run"])
    faults = 0
    print("| job | undisturbed | stops by INT, TERM, KILL | faults | ends alike |")
    print("|---|---|---|---|---|")
    for name in arguments.job:
        with tempfile.TemporaryDirectory() as temporary:
            row, found = stopped(name, Path(temporary), arguments)
        print(row, flush=True)
        print("".join(f"  FAULT: {fault}\n" for fault in found), end="", flush=True)
        faults += len(found)
    sys.exit(bool(faults))


def stopped(name: str, folder: Path, arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """A row about a job, and the faults that were seen."""
    job, generator, faults = JOBS[name], random.Random(f"{arguments.seed} {name}"), []
    prefix = "shadow-" if job.edit != "copy" else ""
    recipe = folder / "recipe.yml"
    models = {role: miniature.path(f"{prefix}{role}") for role in ("target", "source")}
    recipe.write_text(RECIPE.format(**models, edit=job.edit, prompts=few_prompts(folder, 4 if arguments.tiny else 48)))
    began = time.monotonic()
    wanted = ended(job, recipe, folder / "whole", folder / "cache of the whole")
    seconds = time.monotonic() - began
    cache, here = folder / "cache", folder / "stopped"
    counts = dict.fromkeys(SIGNALS, 0)
    while sum(counts.values()) < arguments.stops:
        process = start(job, recipe, here, cache)
        time.sleep(generator.uniform(0, seconds))
        number = generator.choice(list(SIGNALS))
        if process.poll() is not None:
            process.communicate()
            shutil.rmtree(cache, ignore_errors=True)
            shutil.rmtree(here, ignore_errors=True)
            continue
        process.send_signal(number)
        _, said = process.communicate()
        if process.returncode == 0:
            shutil.rmtree(cache, ignore_errors=True)
            shutil.rmtree(here, ignore_errors=True)
            continue
        counts[number] += 1
        last = (said.splitlines() or [""])[-1]
        # Before Python has begun, or while it ends, nobody can say anything.
        is_early = not said
        if process.returncode != SIGNALS[number] and not is_early:
            faults.append(f"{name}: exit code {process.returncode} after {number.name}: {last}")
        if number != signal.SIGKILL and not last.startswith("Stopped by ") and not is_early:
            faults.append(f"{name}: after {number.name} the last line is {last!r}")
        if job.out is not None and job.out(here).exists():
            faults.append(f"{name}: {job.out(here)} exists after {number.name}")
    found = ended(job, recipe, here, cache)
    is_alike = found == wanted
    if not is_alike:
        faults += [f"{name}: it ends with another {what}" for what in differing(found, wanted)]
    stops = ", ".join(str(number) for number in counts.values())
    return f"| {name} | {seconds:.0f} s | {stops} | {len(faults)} | {'yes' if is_alike else 'NO'} |", faults


def start(job: Job, recipe: Path, folder: Path, cache: Path) -> subprocess.Popen[str]:
    """Start a job in a folder, with a cache of its own."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *job.arguments(recipe, folder), "--json"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(job: Job, recipe: Path, folder: Path, cache: Path) -> dict[str, Any]:
    """Let a job end, and return what it says, without what changes from run to run."""
    process = start(job, recipe, folder, cache)
    answer, said = process.communicate()
    if process.returncode:
        sys.exit(f"FAULT: exit code {process.returncode}: {said[-2000:]}")
    return stable(json.loads(answer.replace(str(folder), "FOLDER")))


def stable(content: Any) -> Any:
    """Plain data without what a clock or the way there decides."""
    if isinstance(content, dict):
        return {key: stable(value) for key, value in content.items() if key not in VOLATILE and "seconds" not in key}
    if isinstance(content, list):
        return [stable(value) for value in content]
    return TIME.sub("", content) if isinstance(content, str) else content


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys in which two answers differ, with what they say."""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [f"{key}: {one.get(key)!r:.2000} instead of {other.get(key)!r:.2000}" for key in keys]


if __name__ == "__main__":
    main()
