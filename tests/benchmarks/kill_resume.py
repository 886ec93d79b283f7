"""A search that is killed again and again: does it end with the same selection, and is anything asked twice?

`python tests/benchmarks/kill_resume.py [--kills 20] [--search ddmin]`: searches the miniature in processes of their own
and kills each with SIGKILL at a random moment: after so many new lines in its journal, from none to two, and a random
part of a second. When all kills are done, the search may end. A journal that shrinks, a test or a note that is there
twice, or another selection is a fault, and the exit code 1. A search that is over before its kill comes does not count;
its journal is removed, and it starts again.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tiny import few_prompts, parse

from dapa_merge import miniature

COMMAND = (sys.executable, "-c", "from dapa_merge.cli import main; main()", "search")
RECIPE = """\
merge_method: dapa
base_model: {target}
models: [{{model: {source}}}]
parameters: {{prompts: {prompts}, max_new_tokens: {num_tokens}, batch_size: 128, search: {search}}}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--search", default="ddmin", help="guided asks so little that there is hardly time to kill it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse(parser, argv, kills=1)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = folder / "recipe.yml"
        target, source = miniature.path("target"), miniature.path("source")
        prompts = few_prompts(folder) if arguments.tiny else "miniature"
        num_tokens = 8 if arguments.tiny else 24
        how = {"prompts": prompts, "num_tokens": num_tokens, "search": arguments.search}
        recipe.write_text(RECIPE.format(target=target, source=source, **how))
        began = time.monotonic()
        expected = finish(recipe, folder / "whole")
        whole_seconds = time.monotonic() - began
        tests = len(tests_of(folder / "whole"))
        print(f"uninterrupted: {tests} tests, {len(expected['units'])} units, {whole_seconds:.1f} s")
        journal = folder / "journal"
        kills = 0
        sizes: list[int] = []
        while kills < arguments.kills:
            began = time.monotonic()
            process = subprocess.Popen(
                [*COMMAND, str(recipe), "--json", "--journal", str(journal)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wanted = lines(journal) + generator.randrange(3)
            while lines(journal) < max(wanted, 1) and process.poll() is None:
                time.sleep(0.005)
            time.sleep(generator.uniform(0, 0.5))
            if process.poll() is not None:
                journal.unlink()
                print("  it was over; starting again from nothing")
                sizes.append(0)
                continue
            before = journal.stat().st_size
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            recorded = check(journal)
            if sizes and before < sizes[-1]:
                sys.exit(f"FAULT: the journal shrank from {sizes[-1]} to {before} bytes")
            sizes.append(before)
            print(f"  kill {kills:2d} after {time.monotonic() - began:5.2f} s: {recorded} tests on disk")
        found = finish(recipe, journal)
        check(journal)
    same = all(found[key] == expected[key] for key in ("units", "certificate", "tests"))
    print(
        f"{kills} kills: {'the same' if same else 'ANOTHER'} selection and certificate, no test twice, "
        f"{found['tests_recorded']} of {found['tests']} tests were there when the last process began"
    )
    sys.exit(not same)


def finish(recipe: Path, journal: Path) -> dict:
    """Let a search end."""
    command = [*COMMAND, str(recipe), "--json", "--journal", str(journal)]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def lines(journal: Path) -> int:
    """Complete lines so far."""
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def tests_of(journal: Path) -> list[dict]:
    """The complete lines that are tests."""
    entries = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
    return [entry for entry in entries if "holds" in entry]


def check(journal: Path) -> int:
    """End with a fault if anything stands in a journal twice; else the number of its tests."""
    entries = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
    names = [str(entry.get("note") or entry.get("piece") or sorted(entry["selection"])) for entry in entries[1:]]
    if len(set(names)) != len(names):
        sys.exit("FAULT: something was asked twice")
    return len(tests_of(journal))


if __name__ == "__main__":
    main()
