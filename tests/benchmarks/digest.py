"""What it costs to know whose journal it is: every byte of the target and the source's units, beside `sha256sum`.

`python tests/benchmarks/digest.py [--gigabytes 4]`: a checkpoint of random bytes in four shards, in a temporary folder.
The files are in the page cache; from a disk, its speed is the limit of both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
from tiny import parse

from dapa_merge.checkpoint.digest import tensors_digest
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
    """Print seconds and GB/s of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    arguments = parse(parser, argv, gigabytes=0.002)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder, int(arguments.gigabytes * 1e9))
        checkpoint = open_checkpoint(str(folder))
        gigabytes = checkpoint.num_bytes / 1e9
        shards = [str(folder / shard) for shard in checkpoint.shards]
        for _ in range(2):  # The first round warms the page cache.
            began = time.monotonic()
            tensors_digest(checkpoint)
            ours = time.monotonic() - began
            began = time.monotonic()
            subprocess.run(["sha256sum", *shards], stdout=subprocess.DEVNULL, check=True)
            theirs = time.monotonic() - began
    print(f"{gigabytes:.1f} GB on {os.cpu_count()} cores")
    for name, seconds in (("tensors_digest", ours), ("sha256sum", theirs)):
        print(f"{name:16}{seconds:6.2f} s {gigabytes / seconds:6.2f} GB/s")


if __name__ == "__main__":
    main()
