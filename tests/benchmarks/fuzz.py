"""The readers against files that an enemy made: how many were tried, what became of them, and that nothing gave way.

`python tests/benchmarks/fuzz.py [--headers 200000] [--indices 50000] [--pairs 4000] [--seed 0]`: mutates sound files,
reads each, and compares with the safetensors library. Every pair of models is taken the whole way: to a refusal that
leaves nothing, or to a result that is proved and equal to what the library's bytes say. An input for which something
does not hold is printed, and the exit code is 1.

`python tests/benchmarks/fuzz.py --atheris [--headers 200000] [--corpus FOLDER]`: guided by the coverage of the readers,
which atheris instruments; each input is read both as a weight file and as a shard index. It does not need the project's
other dependencies, so that it can have an environment of its own:

    python -m venv fuzz && fuzz/bin/pip install atheris==3.0.0 safetensors
    PYTHONPATH=. fuzz/bin/python tests/benchmarks/fuzz.py --atheris
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random

from tiny import parse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
CHUNK = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Print what became of the inputs, and the first few that gave trouble."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("headers", 200_000), ("indices", 50_000), ("pairs", 4_000), ("seed", 0), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    parser.add_argument("--corpus", type=Path, help="where atheris keeps what it found (default: nowhere)")
    arguments = parse(parser, argv, headers=40, indices=20, pairs=1, processes=0)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        if arguments.atheris:
            return guided(arguments, Path(folder))
        fine = [blind(kind, getattr(arguments, kind), arguments, folder) for kind in KINDS]
    return int(not all(fine))


def blind(kind: str, number: int, arguments: argparse.Namespace, folder: str) -> bool:
    """Try so many seeded inputs of one kind; whether all was well."""
    started = time.perf_counter()
    chunks = [
        (kind, arguments.seed * 10**9 + start, min(CHUNK, number - start), folder) for start in range(0, number, CHUNK)
    ]
    outcomes: Counter[str] = Counter()
    with multiprocessing.Pool(arguments.processes) if arguments.processes else nullcontext() as pool:
        # Without processes of its own, the work is done here.
        for counted in (pool.imap_unordered if pool else map)(try_chunk, chunks):
            outcomes += counted
    seconds = time.perf_counter() - started
    wrong = {outcome: times for outcome, times in outcomes.items() if outcome.startswith("WRONG")}
    print(f"\n{kind}: {outcomes.total()} inputs in {seconds:.0f} s, {len(wrong)} wrong")
    for outcome, times in outcomes.most_common():
        print(f"{times:8} {outcome}")
    return not wrong


def try_chunk(job: tuple[str, int, int, str]) -> Counter[str]:
    """Count what became of the inputs of some seeds."""
    kind, first, number, folder = job
    own = Path(folder, f"{kind}-{os.getpid()}")
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + number):
        try:
            outcomes[KINDS[kind](own, Random(seed))] += 1
        except Exception as error:
            outcomes[f"WRONG: seed {seed}: {type(error).__name__}: {str(error)[:500]}"] += 1
    return outcomes


def try_header(own: Path, random: Random) -> str:
    """One weight file."""
    from hostile_checks import check_header
    from hostile_files import hostile_file

    own.mkdir(exist_ok=True)
    return check_header(own / "t.safetensors", hostile_file(random))


def try_index(own: Path, random: Random) -> str:
    """One shard index, in a folder of traps."""
    from hostile_checks import SOUND_INDEX, check_index, trap_folder
    from hostile_files import hostile_index

    if not own.exists():
        own.mkdir()
        trap_folder(own / "model")
    return check_index(own / "model", hostile_index(random, SOUND_INDEX))


def try_pair(own: Path, random: Random) -> str:
    """One target and source, the whole way."""
    from hostile_models import check_pair, empty

    return check_pair(empty(own), random)


KINDS: dict[str, Callable[[Path, Random], str]] = {"headers": try_header, "indices": try_index, "pairs": try_pair}


def guided(arguments: argparse.Namespace, folder: Path) -> int:
    """Run atheris in a process of its own, and print how the coverage grew."""
    corpus = arguments.corpus or folder / "corpus"
    corpus.mkdir(exist_ok=True, parents=True)
    command = [sys.executable, __file__, str(folder), str(corpus), f"-runs={arguments.headers}", "-max_len=4096"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, f"-seed={arguments.seed + 1}", f"-artifact_prefix={corpus}/"],
        env={**os.environ, "DAPA_FUZZ": "atheris"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    growth = [line for line in done.stdout.splitlines() if re.search(r"cov: \d+", line)]
    for line in growth[:1] + growth[1 : -1 : max(1, len(growth) // 8)] + growth[-1:]:
        print(line[:100])
    print(f"{arguments.headers} inputs asked for, {seconds:.0f} s, exit code {done.returncode}")
    if done.returncode:
        print(done.stdout[-5000:])
    return int(done.returncode != 0)


def atheris_child() -> None:
    """What runs under atheris: `fuzz.py FOLDER CORPUS [libFuzzer options]`."""
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed; the head of this script says how to install it")
    with atheris.instrument_imports(include=["dapa_merge"], enable_loader_override=False):
        import dapa_merge.checkpoint.folder  # noqa: F401
    from hostile_checks import SOUND_INDEX, check_header, check_index, trap_folder
    from hostile_files import TREE_MUTATIONS, dump, hostile_file, hostile_index, load, weight_file

    own, corpus = Path(sys.argv[1], "own"), Path(sys.argv[2])
    own.mkdir()
    trap_folder(own / "model")
    for seed in range(20):
        (corpus / f"header-{seed}").write_bytes(hostile_file(Random(seed)))
        (corpus / f"index-{seed}").write_bytes(hostile_index(Random(seed), SOUND_INDEX))

    def read(raw: bytes) -> None:
        check_header(own / "t.safetensors", raw)
        check_index(own / "model", raw)

    def mutate(raw: bytes, max_size: int, seed: int) -> bytes:
        """A change of the JSON's tree, where there is one, or one of libFuzzer's own of its bytes."""
        random = Random(seed)
        is_index = raw.startswith(b"{")
        parts = load(weight_file(raw, b"") if is_index else raw)
        if parts is None or random.randrange(2):
            return bytes(atheris.Mutate(raw, max_size))
        tree, data = parts
        try:
            random.choice(TREE_MUTATIONS)(random, tree)
            text = dump(tree).encode("utf-8", "surrogatepass")
        except RecursionError:
            return raw
        return (text if is_index else weight_file(text, data))[:max_size]

    atheris.Setup([sys.argv[0], *sys.argv[3:], str(corpus)], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    if os.environ.get("DAPA_FUZZ") == "atheris":
        atheris_child()
    else:
        sys.exit(main())
