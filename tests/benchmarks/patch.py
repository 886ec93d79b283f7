"""A repair as a patch: its size, the time and memory of each command, and what is written to the model in place.

`python tests/benchmarks/patch.py [--gigabytes 2] [--repeat 3]`: writes a checkpoint of Llama-2-7B's layer shapes in
three shards under a temporary folder (`--folder` to choose the disk) and a copy with other gates in half of its layers
and in 64 rows of one more, and runs each patch command as its own process. Prints median seconds, peak memory, and
bytes read and written as Linux counts them in /proc/self/io. Then strace (where it is installed) adds up what a patch
in place and its revert write to the model's files, beside the limit: the changed bytes and one block for each range.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tiny import parse
from transplant import OURS, TINY_SHAPE, in_child, layers_for, write_checkpoint

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.patch.file import read_patch

BLOCK_BYTES = 4096
CALLS = "write,pwrite64,writev,pwritev,pwritev2,copy_file_range,sendfile,ftruncate,truncate,fallocate"
# What strace -y prints of a call that was answered with a number: 1234 write(5</path>, ""..., 4096) = 4096
WRITE = re.compile(r"(\w+)\(\d+<([^>]*)>.*\) = (\d+)$")


def written_to_model(folder: Path, trace: Path) -> tuple[int, int, list[str]]:
    """From a trace: bytes written to the weight files of a model, in how many calls, and calls that change a size."""
    total = num_calls = 0
    others = []
    for line in trace.read_text(errors="replace").splitlines():
        if found := WRITE.search(line):
            call, name, answer = found.groups()
            path = Path(name)
            if path.parent == folder and path.name.startswith("model"):
                if "write" in call:
                    total += int(answer)
                    num_calls += 1
                else:
                    others.append(line)
    return total, num_calls, others


def traced(folder: Path, *arguments: str) -> tuple[int, int, list[str]]:
    """Run a command of dapa-merge under strace; what it wrote to the model in `folder`."""
    with tempfile.NamedTemporaryFile(suffix=".trace") as trace:
        command = [sys.executable, "-c", "from dapa_merge.cli import main; main()", "--quiet", "patch", *arguments]
        subprocess.run(
            ["strace", "-f", "-y", "-s", "0", "-e", f"trace={CALLS}", "-o", trace.name, *command],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return written_to_model(folder, Path(trace.name))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the checkpoints, run everything, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parse(parser, argv, repeat=1)
    num_layers = 2 if arguments.tiny else layers_for(arguments.gigabytes * 1e9)
    shape = TINY_SHAPE if arguments.tiny else {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary).resolve()
        for seed, name in enumerate(("base", "source")):
            write_checkpoint(folder / name, num_layers, seed, **shape)
        write_result(folder, num_layers // 2)
        measure(folder, arguments.repeat)


def write_result(folder: Path, num_layers: int) -> None:
    """A copy of `base` with the source's gates of the first so many layers, and rows 64 to 127 of the next one's."""
    shutil.copytree(folder / "base", folder / "result")
    result, source = (open_checkpoint(str(folder / name)) for name in ("result", "source"))
    for layer in range(num_layers + 1):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        ours, theirs = result.tensors[name], source.tensors[name]
        row_bytes = 2 * ours.shape[1]
        first, stop = (0, ours.num_bytes) if layer < num_layers else (64 * row_bytes, 128 * row_bytes)
        with (result.folder / ours.file).open("r+b") as file, source.open(theirs.file) as reader:
            file.seek(ours.start + first)
            reader.seek(theirs.start + first)
            file.write(reader.read(stop - first))


def measure(folder: Path, repeat: int) -> None:
    """Run every command on the models in `folder`: `base`, and `result` that was made of it."""
    base, patch, out = folder / "base", folder / "repair.safetensors", folder / "out"
    commands = {
        "extract": ("extract", str(folder / "result"), str(patch), "--base", str(base)),
        "apply to a copy": ("apply", str(patch), str(base), str(out)),
        "apply --in-place": ("apply", str(patch), str(base), "--in-place"),
        "revert": ("revert", str(base)),
    }
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    size = open_checkpoint(str(base)).num_bytes
    for _ in range(repeat):
        for name, command in commands.items():
            costs[name].append(in_child(OURS, "--quiet", "patch", *command))
            os.sync()
            if name == "apply to a copy":
                shutil.rmtree(out)
        content = read_patch(patch)
        num_ranges, num_bytes, num_file_bytes = len(content.entries), content.num_bytes, patch.stat().st_size
        patch.unlink()
    print(f"model {size / 1e9:.3f} GB, patch {num_file_bytes / 1e6:.1f} MB ({100 * num_file_bytes / size:.2f} %): "
          f"{num_ranges} ranges, {num_file_bytes - num_bytes} bytes beside the values")  # fmt: skip
    for name, runs in costs.items():
        cost = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"{name:<18}{cost['seconds']:7.2f} s  peak {cost['peak']:6.0f} MB  read {cost['read']:6.3f} GB  "
            f"written {cost['written']:6.3f} GB"
        )
    if shutil.which("strace"):
        in_child(OURS, "--quiet", "patch", *commands["extract"])
        limit = num_bytes + BLOCK_BYTES * num_ranges
        for name in ("apply --in-place", "revert"):
            total, num_calls, others = traced(base, *commands[name])
            print(
                f"{name}: {total:,} bytes in {num_calls} writes to the model's files; changed {num_bytes:,}, "
                f"limit {limit:,}; truncations and the like: {len(others)}"
            )
            assert total <= limit, total
            assert not others, others


if __name__ == "__main__":
    main()
