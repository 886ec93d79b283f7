"""What digests cost: those of tensors, by which a journal is known, and those of files; beside `sha256sum`.

`python tests/benchmarks/digest.py [--gigabytes 4] [--repeat 3]`: a checkpoint of random bytes in four shards, in a
temporary folder; medians of the rounds, each of which runs all in turn. The files are in the page cache; from a disk,
its speed is the limit of all. Of one file alone, each algorithm has one processor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from tiny import parse

from dapa_merge.checkpoint.digest import DIGEST_THREADS, HASHES, hash_file, tensors_digest
from dapa_merge.checkpoint.open import open_checkpoint

NUM_SHARDS = 4
TENSORS_PER_SHARD = 16


def write_checkpoint(folder: Path, num_bytes: int) -> None:
    """A folder that `open_checkpoint` reads: bfloat16 matrices of random bytes."""
    rows = num_bytes // (NUM_SHARDS * TENSORS_PER_SHARD * 2 * 4096)
    size = rows * 4096 * 2
    noise = numpy.random.default_rng(0).bytes(size)
    owners = {}
    for shard in range(NUM_SHARDS):
        name = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        header = {
            f"tensor.{shard}.{index}": {
                "dtype": "BF16", "shape": [rows, 4096], "data_offsets": [index * size, (index + 1) * size],
            }
            for index in range(TENSORS_PER_SHARD)
        }  # fmt: skip
        owners |= dict.fromkeys(header, name)
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _ in range(TENSORS_PER_SHARD):
                file.write(noise)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds and GB/s of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parse(parser, argv, gigabytes=0.002, repeat=1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder, int(arguments.gigabytes * 1e9))
        checkpoint = open_checkpoint(str(folder))
        gigabytes = checkpoint.num_bytes / 1e9
        shards = [folder / shard for shard in checkpoint.shards]

        def hash_all(algorithm: str) -> None:
            with ThreadPoolExecutor(DIGEST_THREADS) as pool:
                list(pool.map(lambda shard: hash_file(shard, algorithm), shards))

        programs: dict[str, tuple[float, Callable[[], object]]] = {
            "tensors_digest": (gigabytes, lambda: tensors_digest(checkpoint)),
            "sha256sum": (
                gigabytes,
                lambda: subprocess.run(["sha256sum", *shards], stdout=subprocess.DEVNULL, check=True),
            ),
        }
        for algorithm in HASHES:
            programs[f"{algorithm}, files at once"] = gigabytes, lambda name=algorithm: hash_all(name)
            programs[f"{algorithm}, one file"] = (
                gigabytes / NUM_SHARDS,
                lambda name=algorithm: hash_file(shards[0], name),
            )
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(arguments.repeat + 1):
            for name, (_, run) in programs.items():
                began = time.monotonic()
                run()
                if number:  # The first round warms the page cache.
                    seconds[name].append(time.monotonic() - began)
    print(f"{gigabytes:.1f} GB on {os.cpu_count()} cores")
    for name, (size, _) in programs.items():
        median = statistics.median(seconds[name])
        print(f"{name:24}{median:6.2f} s {size / median:6.2f} GB/s")


if __name__ == "__main__":
    main()
