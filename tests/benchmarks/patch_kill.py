"""Patching in place and reverting, killed again and again: is every model in the end the old one or the new one?

`python tests/benchmarks/patch_kill.py [--kills 20] [--megabytes 600]`: writes a model, of which half is changed, and
runs `dapa-merge patch apply --in-place` and `patch revert` in processes of their own. Each is killed with SIGKILL: one
half of them at a random moment of the whole time, the others at a random moment after the first write to the model.
Then a random one of the two is run to its end, and the model must be, byte for byte, what that one makes of it. A run
that is over before its kill comes does not count. Prints what the kills left, and how it was recovered; the exit code
is 1 if any was not.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy
from safetensors.numpy import save_file
from tiny import parse

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.patch.apply import State, states
from dapa_merge.patch.file import read_patch

UNDO = ".dapa-undo.safetensors"
COMMAND = (sys.executable, "-c", "from dapa_merge.cli import main; main()", "--quiet", "patch")


def write_models(folder: Path, megabytes: int) -> None:
    """A base and its result: 40 matrices in two shards, of which every second one is changed, wholly or in rows."""
    generator = numpy.random.default_rng(0)
    for name in ("base", "result"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    num_rows = megabytes * 1_000_000 // 40 // 4096
    before = {f"t{n}": generator.integers(0, 255, (num_rows, 4096), numpy.uint8) for n in range(40)}
    after = {name: array.copy() for name, array in before.items()}
    for number in range(0, 40, 2):
        after[f"t{number}"][: num_rows - number] += 1
    save_file(before, folder / "base" / "model.safetensors")
    save_file(after, folder / "result" / "model.safetensors")


def digest(model: Path) -> str:
    """The SHA-256 of the model's weights."""
    with (model / "model.safetensors").open("rb") as file:
        state = hashlib.sha256()
        while piece := file.read(1 << 24):
            state.update(piece)
    return state.hexdigest()


def torn(model: Path, patch: Path) -> str:
    """Whether a half-written model has a range that is neither the old one nor the new one."""
    found = Counter(states(read_patch(patch), open_checkpoint(str(model))))
    return " with a torn range" if found[State.OTHER] else " between two ranges"


def run(*arguments: object) -> float:
    """Run a patch command to its end; the seconds it took."""
    began = time.monotonic()
    subprocess.run([*COMMAND, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def killed(seconds: float, written: Path | None, *arguments: object) -> bool:
    """Run a patch command and kill it after so many seconds, or so long after it has written to a file.

    Returns:
        Whether it was still running.
    """
    before = written.stat().st_mtime_ns if written else 0
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL)
    while written and written.stat().st_mtime_ns == before and process.poll() is None:
        time.sleep(0.0005)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def main(argv: Sequence[str] | None = None) -> None:
    """Kill, recover, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each of the two commands")
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse(parser, argv, kills=1, megabytes=7)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        write_models(folder, arguments.megabytes)
        base, patch = folder / "base", folder / "p.safetensors"
        run("extract", folder / "result", patch, "--base", base)
        old, new = digest(base), digest(folder / "result")
        commands = {"apply": ("apply", patch, base, "--in-place"), "revert": ("revert", base)}
        seconds = {name: run(*command) for name, command in commands.items()}
        print(f"patch of {patch.stat().st_size / 1e6:.0f} MB; uninterrupted: {seconds}")
        found: Counter[str] = Counter()
        faults = 0
        for name, command in commands.items():
            kills = 0
            while kills < arguments.kills:
                # From the old model, or from the patched one with its undo file.
                if (digest(base) == new) is not (name == "revert"):
                    run(*commands["revert" if name == "apply" else "apply"])
                written = base / "model.safetensors" if kills % 2 else None
                latest = 0.15 if written else seconds[name]
                if not killed(generator.uniform(0, latest), written, *command):
                    continue
                kills += 1
                state = {old: "old", new: "new"}.get(digest(base)) or f"half-written{torn(base, patch)}"
                has_undo = (base / UNDO).exists()
                found[f"{name}: {state}, {'with' if has_undo else 'without'} an undo file"] += 1
                # Without an undo file nothing was written, or everything was reverted: there is only one way.
                way = generator.choice(("apply", "revert")) if has_undo else "apply"
                run(*commands[way])
                wrong = digest(base) != (new if way == "apply" else old) or list(base.glob(".dapa-merge*"))
                faults += bool(wrong)
                found[f"recovered by {way}"] += not wrong
        for what, number in sorted(found.items()):
            print(f"{number:4} {what}")
        print(f"faults: {faults}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
