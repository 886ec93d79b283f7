"""A transplant that is killed again and again: does it go on, and does it end with the same bytes?

`python tests/benchmarks/kill_transplant.py [--kills 20] [--megabytes 400] [--folder F]`: writes a checkpoint of twelve
shards, transplants it once undisturbed and takes the time, then kills runs into one and the same folder with SIGKILL at
random moments of that time. After each kill the result must not be there, the files that the next run will take for
finished must have the undisturbed run's bytes, and none may be lost by it. When all kills are done, the run may end;
its files must be the undisturbed run's, and nothing hidden may be left. A run that is over before its kill comes does
not count; its result is removed, and it starts again. A fault ends in exit code 1, and in words that tell this
project's faults from the machine's: whether the file is what its record says, and whether the models are still what
they were.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tiny import parse
from transplant import TINY_SHAPE, write_checkpoint

from dapa_merge.checkpoint.digest import ALGORITHM, hash_file
from dapa_merge.transplant.staging import finished_files, staging_folder

COMMAND = (sys.executable, "-c", "from dapa_merge.cli import main; main()", "--quiet", "run")
# What a report says of its own time differs from run to run, and the manifest has the report's digest.
OF_THE_MOMENT = ("dapa_report.json", "dapa.json", "README.md")


def main(argv: Sequence[str] | None = None) -> None:
    """Kill, go on, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--megabytes", type=float, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; the default is the temporary folder")
    arguments = parse(parser, argv, kills=1, megabytes=1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        shape = {"hidden": 1024, "intermediate": 2816, "vocabulary": 8000, "num_shards": 12}
        if arguments.tiny:
            shape |= TINY_SHAPE
        num_layers = max(4, round(arguments.megabytes / 26))
        for seed, name in enumerate(("target", "source")):
            write_checkpoint(folder / name, num_layers, seed, **shape)
        # Whatever the disk cannot take shall show now, and not as a file that changes under a run.
        os.sync()
        recipe = folder / "recipe.yml"
        recipe.write_text(
            f"merge_method: dapa\nbase_model: {folder / 'target'}\nmodels:\n  - model: {folder / 'source'}\n"
            f"parameters:\n  layers: 1-{num_layers // 2}\n"
        )
        models = [folder / "target", folder / "source"]
        before = [digests(model) for model in models]
        try:
            kill_and_compare(recipe, folder / "whole", folder / "out", arguments.kills, random.Random(arguments.seed))
        except SystemExit:
            changed = [model.name for model, found in zip(models, before, strict=True) if digests(model) != found]
            print(f"models that are not what they were: {', '.join(changed) or 'none'}", file=sys.stderr)
            raise


def kill_and_compare(recipe: Path, whole: Path, out: Path, kills: int, generator: random.Random) -> None:
    """Have one run undisturbed, and another killed so often; raise SystemExit if they differ."""
    began = time.monotonic()
    subprocess.run([*COMMAND, str(recipe), str(whole), "--no-evaluate"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    expected = digests(whole)
    print(f"undisturbed: {len(expected)} files, {seconds:.2f} s")
    done = 0
    kept: set[str] = set()
    again = 0
    while done < kills:
        process = subprocess.Popen(
            [*COMMAND, str(recipe), str(out), "--no-evaluate"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(generator.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            # It was over: its last step was the rename.
            compare(digests(out), expected)
            shutil.rmtree(out)
            kept, again = set(), again + 1
            print("  it was over; starting again from nothing")
            continue
        done += 1
        place = staging_folder(out)
        found = finished_files(place)
        for name, recorded in found.items():
            digest = hash_file(place / "result" / name, ALGORITHM).digest
            if digest != expected[name]:
                as_recorded = "as recorded" if digest == recorded.digest else f"not {recorded.digest}, as recorded"
                again_read = digests(whole)[name]
                sys.exit(
                    f"FAULT: {name} is on record as finished, but has {digest} ({as_recorded}), not {expected[name]} "
                    f"(in the undisturbed run, {again_read} now)"
                )
        if not kept <= found.keys():
            sys.exit(f"FAULT: {', '.join(sorted(kept - found.keys()))} was finished once, and is no more")
        kept = set(found)
        print(f"  kill {done:2d}: {len(kept)} files are finished")
    subprocess.run([*COMMAND, str(recipe), str(out), "--no-evaluate"], check=True, stdout=subprocess.DEVNULL)
    compare(digests(out), expected)
    left = [path.name for path in out.parent.iterdir() if path.name.startswith(".")]
    if left:
        sys.exit(f"FAULT: {', '.join(left)} is left")
    print(json.dumps({"kills": done, "started_anew": again, "files": len(expected), "same": True}))


def digests(folder: Path) -> dict[str, str]:
    """The digest of each file of a result, by the manifest's algorithm."""
    return {
        path.relative_to(folder).as_posix(): hash_file(path, ALGORITHM).digest
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in OF_THE_MOMENT
    }


def compare(found: dict[str, str], expected: dict[str, str]) -> None:
    """Raise SystemExit unless two results are the same."""
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        sys.exit(f"FAULT: {', '.join(differing)} differs from the undisturbed run")


if __name__ == "__main__":
    main()
